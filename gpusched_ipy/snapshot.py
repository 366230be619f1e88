"""The GPUs at one moment, as plain data. It reads nothing and decides nothing.

``None`` always means *unknown*, never 0: a wrong 0 in ``utilization`` would start a job on a busy
GPU. ``processes`` is ``None`` when the list cannot be known and ``()`` when it is known to be
empty. Units stand in the names; ratios are 0-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from operator import attrgetter
from typing import Any

from gpusched_ipy.pretty import Shown


class Health(StrEnum):
    """What the driver says of a GPU beyond its numbers."""

    OK = "ok"
    LOST = "lost"
    RESET_REQUIRED = "reset_required"
    DRIVER_MISMATCH = "driver_mismatch"
    ASLEEP = "asleep"
    UNKNOWN = "unknown"


class MemoryKind(StrEnum):
    """Whether the GPU has memory of its own or shares the machine's."""

    DEDICATED = "dedicated"
    UNIFIED = "unified"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """One process that the driver lists on a GPU."""

    pid: int
    user: str | None = None
    name: str | None = None
    mem_bytes: int | None = None
    kind: str | None = None  # "compute", "graphics" or "both"
    utilization: float | None = None
    started_at: float | None = None  # wall clock, s; with pid the identity of the process
    visible: bool = (
        True  # False: the pid belongs to another pid namespace and must not be looked up
    )
    job: int | None = None  # the job of ours that it belongs to, filled in by the scheduler
    member: str | None = None  # the key of the member (a notebook's kernel) that it is, likewise
    idle_s: float | None = None  # how long it has held memory and done nothing, where known


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one MIG instance (then ``parent`` is the UUID of its card)."""

    uuid: str
    index: int | None = None  # PCI order, for people only
    name: str = "unknown GPU"
    vendor: str = "unknown"  # "nvidia", "apple", "amd", "intel", "fake"
    bus_id: str | None = None
    parent: str | None = None
    instance: int | None = None  # of a MIG instance: which one of its card's
    health: Health = Health.OK
    health_text: str | None = None
    utilization: float | None = None
    utilization_window_s: float | None = None
    mem_used_bytes: int | None = None
    mem_total_bytes: int | None = None
    mem_reserved_bytes: int | None = None
    mem_kind: MemoryKind = MemoryKind.DEDICATED
    mem_pressure: str | None = None  # unified memory: "normal", "warn", "critical"
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_clock_mhz: float | None = None
    throttled: bool | None = None
    compute_mode: str | None = None  # "default", "exclusive_process", "prohibited"
    processes: tuple[GpuProcess, ...] | None = None
    # Kept by the monitor: for how long, and in how many readings in a row, utilization has been at
    # or below the limit of the settings (None and 0: the last reading was above it or unknown).
    quiet_s: float | None = None
    quiet_samples: int = 0

    @property
    def number(self) -> str | None:
        """What people call it: ``0``, a MIG instance on it ``0:1`` (as containers do); or None."""
        if self.index is None or self.instance is None:
            return None if self.index is None else str(self.index)
        return f"{self.index}:{self.instance}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Shown):
    """All GPUs of this machine at one moment.

    A reading that failed has a ``problem`` and no GPUs: old data is never shown as new.
    """

    backend: str  # the name it is selected by: "nvml", "nvidia-smi", "fake", …
    source: str  # what exactly was read, for people
    taken_at: float  # wall clock, s since the epoch: for display
    taken_mono: float  # monotonic clock of this boot, s: for every decision
    driver: str | None = None
    read_s: float | None = None  # what the reading cost
    problem: str | None = None
    gpus: tuple[Gpu, ...] = field(default=())
    # Kept by the monitor: until then (monotonic) whoever reads tells this process of any change
    # that a start could hang on. It is not handed on to other processes.
    vouched_mono: float = 0.0

    _repr_pretty_ = Shown._repr_pretty_  # IPython would take the dataclass's own repr

    def age_s(self, mono: float) -> float:
        """Seconds between this reading and ``mono`` on the same monotonic clock."""
        return max(0.0, mono - self.taken_mono)

    def unsure_s(self, mono: float) -> float:
        """For how many seconds at ``mono`` nobody has stood by this reading."""
        return max(0.0, mono - max(self.taken_mono, self.vouched_mono))

    def gpu(self, uuid: str) -> Gpu | None:
        """The GPU of that UUID, or None."""
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)

    def with_gpus(self, gpus: tuple[Gpu, ...]) -> Snapshot:
        """The same reading with its GPUs replaced."""
        return replace(self, gpus=gpus)


# Readings are written and read once a second by every notebook: names are looked up only once.
_NAMES: dict[type, tuple[str, ...]] = {
    kind: tuple(item.name for item in fields(kind) if item.name != "vouched_mono")
    for kind in (GpuProcess, Gpu, Snapshot)
}
_VALUES = {kind: attrgetter(*names) for kind, names in _NAMES.items()}


def to_record(snapshot: Snapshot) -> dict[str, Any]:
    """``snapshot`` as JSON-ready data that :func:`from_record` reads back without loss."""
    record = _plain(snapshot)
    record["gpus"] = [_plain(gpu) for gpu in snapshot.gpus]
    for entry, gpu in zip(record["gpus"], snapshot.gpus, strict=True):
        if gpu.processes is not None:
            entry["processes"] = [_plain(process) for process in gpu.processes]
    return record


def _plain(item: Snapshot | Gpu | GpuProcess) -> dict[str, Any]:
    kind = type(item)
    return dict(zip(_NAMES[kind], _VALUES[kind](item), strict=True))


def from_record(record: dict[str, Any]) -> Snapshot:
    """The snapshot that :func:`to_record` wrote.

    Raises:
        KeyError, TypeError, ValueError: ``record`` is not such data.
    """
    gpus = tuple(_gpu(entry) for entry in record["gpus"])
    return Snapshot(**{**_known(Snapshot, record), "gpus": gpus})


def _gpu(entry: dict[str, Any]) -> Gpu:
    listed = entry.get("processes")
    processes = (
        None if listed is None else tuple(GpuProcess(**_known(GpuProcess, item)) for item in listed)
    )
    values = _known(Gpu, entry)
    values["health"] = Health(values.get("health", Health.OK))
    values["mem_kind"] = MemoryKind(values.get("mem_kind", MemoryKind.DEDICATED))
    return Gpu(**{**values, "processes": processes})


def _known(kind: type, record: dict[str, Any]) -> dict[str, Any]:
    """Only the keys this version knows: a newer member may have written more."""
    return {name: record[name] for name in _NAMES[kind] if name in record}
