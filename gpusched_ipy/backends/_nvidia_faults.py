"""What nvidia-smi says in place of data, and what it means. Pure: it runs nothing, never raises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from gpusched_ipy.snapshot import Health

# "GPU 0000:02:00.0", "gpu 0000:02:00.0", "GPU0000:07:00.0", "GPU1: 0000:C2:00.0"
_BUS = re.compile(
    r"gpu\s*(?:\d{1,3}:\s*)?([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])", re.IGNORECASE
)
_BAD_FIELD = re.compile(r"Field \"([^\"]+)\" is not a valid field")


class FaultKind(StrEnum):
    """What kind of text stands in place of data."""

    DRIVER_MISMATCH = "driver_mismatch"
    NVML_UNKNOWN = "nvml_unknown"
    NO_DRIVER = "no_driver"
    NO_LIBRARY = "no_library"
    NO_DEVICES = "no_devices"
    NO_PERMISSION = "no_permission"
    GPU_LOST = "gpu_lost"
    GPU_RESET = "gpu_reset"
    GPU_UNKNOWN = "gpu_unknown"
    BAD_FIELD = "bad_field"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Fault:
    """A text in place of data."""

    kind: FaultKind
    text: str  # one line, with what to do where that is known
    bus_id: str | None = None  # the card it speaks of, as nvidia-smi writes it
    field: str | None = None  # the field that this nvidia-smi does not know

    @property
    def health(self) -> Health:
        """What it says of the card that it names."""
        return _HEALTH.get(self.kind, Health.UNKNOWN)


def classify(text: str) -> Fault | None:
    """What a message of nvidia-smi means; None: it is none that is known."""
    flat = " ".join(text.split())
    low = flat.lower()
    for needed, kind, advice in _MESSAGES:
        if all(part in low for part in needed):
            bus = _BUS.search(flat)
            bad = _BAD_FIELD.search(flat)
            return Fault(kind, _say(flat, advice), bus and bus[1], bad and bad[1])
    return None


def unknown_text(text: str, status: int | None = None) -> Fault:
    """A fault for an answer without data: known words, else the first line or the exit status."""
    fault = classify(text)
    if fault is not None:
        return fault
    kind, meaning = _STATUSES.get(status or 0, (FaultKind.OTHER, ""))
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    said = printable(first)[:300] or "it printed nothing"
    return Fault(kind, f"nvidia-smi: {meaning or said}")


def printable(text: str) -> str:
    """``text`` without control characters."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


def _say(flat: str, advice: str) -> str:
    said = printable(flat)[:300]
    return f"nvidia-smi: {said}" + (f" ({advice})" if advice else "")


_MESSAGES: tuple[tuple[tuple[str, ...], FaultKind, str], ...] = (
    (
        ("driver/library version mismatch",),
        FaultKind.DRIVER_MISMATCH,
        "the driver was upgraded under the running system; restart the machine",
    ),
    (
        ("unable to determine the device handle", "lost"),
        FaultKind.GPU_LOST,
        "restart the machine to get it back",
    ),
    (
        ("unable to determine the device handle", "requires reset"),
        FaultKind.GPU_RESET,
        "`nvidia-smi --gpu-reset` as root, or a restart, brings it back",
    ),
    (
        ("unable to determine the device handle",),
        FaultKind.GPU_UNKNOWN,
        "`dmesg` on that machine says more",
    ),
    (
        ("failed to initialize nvml", "driver not loaded"),
        FaultKind.NO_DRIVER,
        "load or install the NVIDIA driver",
    ),
    (
        ("failed to initialize nvml", "not found"),
        FaultKind.NO_LIBRARY,
        "the driver's library is missing",
    ),
    (
        ("failed to initialize nvml", "insufficient permissions"),
        FaultKind.NO_PERMISSION,
        "ask for access to /dev/nvidia*",
    ),
    (
        ("gpu access blocked by the operating system",),
        FaultKind.NO_PERMISSION,
        "under WSL update the Windows driver; in a container give it the GPU",
    ),
    (
        ("failed to initialize nvml",),
        FaultKind.NVML_UNKNOWN,
        "in a container its access to the GPU was cut; restart the container",
    ),
    (
        ("couldn't communicate with the nvidia driver",),
        FaultKind.NO_DRIVER,
        "load or install the NVIDIA driver",
    ),
    (("couldn't find libnvidia-ml",), FaultKind.NO_LIBRARY, "the driver's library is missing"),
    (
        ("no devices were found",),
        FaultKind.NO_DEVICES,
        "a container without its GPUs, or a card that fell off the bus",
    ),
    (("no devices found",), FaultKind.NO_DEVICES, ""),
    (("is not a valid field to query",), FaultKind.BAD_FIELD, ""),
    (("gpu is lost. reboot",), FaultKind.GPU_LOST, ""),
)
_HEALTH = {
    FaultKind.GPU_LOST: Health.LOST,
    FaultKind.GPU_RESET: Health.RESET_REQUIRED,
}
_STATUSES = {
    4: (FaultKind.NO_PERMISSION, "this user may not ask the driver"),
    9: (FaultKind.NO_DRIVER, "the NVIDIA driver is not loaded"),
    12: (FaultKind.NO_LIBRARY, "the driver's library libnvidia-ml is missing"),
    15: (FaultKind.GPU_LOST, "a GPU is lost; restart the machine to get it back"),
}
