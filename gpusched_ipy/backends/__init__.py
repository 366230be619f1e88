"""The contract of a backend, and the choice of one. Backends know readings; they decide nothing.

A backend is called from one thread at a time. Whatever the driver does (garbage, a vanished card,
a missing field), ``read`` returns a :class:`Snapshot`, with ``problem`` set where the reading
failed as a whole; it never raises out of its own faults and never invents a number. It may hang
when the driver hangs: the monitor is built to abandon it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from importlib import import_module
from typing import Protocol, runtime_checkable

from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Snapshot


class Detail(IntEnum):
    """How much of a reading is wanted: dearer values are asked for less often."""

    LOAD = 0  # utilization and memory
    PROCESSES = 1  # and the process lists: always in a reading that decides a start
    FULL = 2  # and temperature, power, clocks, throttling


DETAILS = tuple(Detail)  # an enumeration makes its members anew whenever it is gone through


@runtime_checkable
class Backend(Protocol):
    """One way of reading the GPUs of this machine."""

    name: str  # as in GPUSCHED_BACKEND
    source: str  # what is read exactly, for people
    authoritative_pids: bool  # True: its process list is complete although the pids need not exist

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        """The GPUs now; fields that ``detail`` does not ask for may be None."""
        ...

    def close(self) -> None:
        """Let go of handles and helper processes; a later ``read`` opens them again."""
        ...


# Each opens its backend or raises BackendUnavailableError with the reason. In order of preference.
Opener = Callable[[Settings, Clock], Backend]
_OPENERS: tuple[tuple[str, str, str], ...] = (
    ("nvml", "gpusched_ipy.backends.nvml", "open_nvml"),
    ("nvidia-smi", "gpusched_ipy.backends.nvidia_smi", "open_nvidia_smi"),
    ("powermetrics", "gpusched_ipy.backends.powermetrics", "open_powermetrics"),
    ("ioreg", "gpusched_ipy.backends.powermetrics", "open_ioreg"),
    ("amd", "gpusched_ipy.backends.amd", "open_amd"),
    ("intel", "gpusched_ipy.backends.intel", "open_intel"),
    ("fake", "gpusched_ipy.backends.fake", "open_fake"),
)


@dataclass(frozen=True, slots=True)
class Detected:
    """The backend in use (None: there is none), and why each better one is not."""

    backend: Backend | None
    refused: tuple[tuple[str, str], ...]  # (name, reason), in the order in which they were tried

    @property
    def explanation(self) -> str:
        """One line for people."""
        refused = "; ".join(f"{name}: {reason}" for name, reason in self.refused)
        if self.backend is None:
            return f"no GPU can be read ({refused})"
        used = f"{self.backend.name} ({self.backend.source})"
        return f"{used}; not used: {refused}" if refused else used


def detect(settings: Settings, clock: Clock | None = None) -> Detected:
    """Open the backend that the settings name or, with ``auto``, the first that works.

    A named backend that cannot be used is never replaced by another one.
    """
    clock = clock or SystemClock()
    refused: list[tuple[str, str]] = []
    for name, module, opener in _OPENERS:
        if not _wanted(name, settings):
            continue
        try:
            backend: Backend = getattr(import_module(module), opener)(settings, clock)
        except BackendUnavailableError as exc:
            refused.append((name, str(exc)))
            continue
        return Detected(backend, tuple(refused))
    return Detected(None, tuple(refused))


def _wanted(name: str, settings: Settings) -> bool:
    if settings.backend == "auto":
        # The fake is for who asks for it: by name, or by giving its script.
        return name != "fake" if settings.fake is None else name == "fake"
    return name == settings.backend
