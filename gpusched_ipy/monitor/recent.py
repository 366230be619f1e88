"""What the monitor remembers of its readings: the last hour, and how long each GPU has been quiet.

Plain bookkeeping of readings that are handed in. It reads no GPU, no file and no clock.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

from gpusched_ipy.backends.fake import add_job_load
from gpusched_ipy.monitor.wire import JobLoad
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot

WHOLE_S = 300.0  # readings of the last minutes are kept as they came
HISTORY_S = 3600.0  # older ones as bare numbers
_PLOTTED = ("utilization", "mem_used_bytes", "temperature_c", "power_w")
# What an old reading forgets: it comes and goes with the detail, or belongs to its moment.
_BARED = (
    *_PLOTTED,
    *("utilization_window_s", "mem_reserved_bytes", "power_limit_w", "sm_clock_mhz", "throttled"),
    *("processes", "quiet_s"),
)
_NAMES = tuple(item.name for item in fields(Gpu))
_fixed = attrgetter(*(name for name in _NAMES if name not in {*_BARED, "quiet_samples"}))
_plotted = attrgetter(*_PLOTTED)
_of_all = attrgetter("backend", "source", "driver", "problem")
_values = attrgetter(*_NAMES)
_PUT = tuple(getattr(Gpu, name).__set__ for name in _NAMES)

# For each GPU the running jobs of ours on it: (job id, pid where there is one).
Allocated = Mapping[str, Sequence[tuple[int, int | None]]]


@dataclass(frozen=True, slots=True)
class _Past:
    """An older reading: the GPUs without their numbers (shared between readings), and those."""

    frame: Snapshot
    taken_at: float
    taken_mono: float
    values: array[float]

    def snapshot(self) -> Snapshot:
        """The reading again; its process lists are not known any more."""
        width = len(_PLOTTED)
        gpus = tuple(
            _with_values(gpu, self.values[width * place : width * (place + 1)])
            for place, gpu in enumerate(self.frame.gpus)
        )
        return replace(self.frame, taken_at=self.taken_at, taken_mono=self.taken_mono, gpus=gpus)


class Recent:
    """The readings of the last hour, oldest first."""

    def __init__(self) -> None:
        self._past: deque[_Past] = deque()
        self._whole: deque[Snapshot] = deque()
        self._frame: tuple[object, Snapshot] | None = None  # what it was made of, and the frame

    def add(self, snapshot: Snapshot) -> None:
        """Append a reading; one as old as the last takes its place, an older one is left out."""
        last = self._whole[-1].taken_mono if self._whole else -math.inf
        if snapshot.taken_mono < last:
            return
        if snapshot.taken_mono == last:
            self._whole.pop()
        self._whole.append(snapshot)
        while self._whole[0].taken_mono < snapshot.taken_mono - WHOLE_S:
            self._past.append(self._pack(self._whole.popleft()))
        while self._past and self._past[0].taken_mono < snapshot.taken_mono - HISTORY_S:
            self._past.popleft()

    def since(self, mono: float) -> tuple[Snapshot, ...]:
        """The readings taken at ``mono`` or later."""
        old = (past.snapshot() for past in self._past if past.taken_mono >= mono)
        return (*old, *(item for item in self._whole if item.taken_mono >= mono))

    def _pack(self, snapshot: Snapshot) -> _Past:
        fixed = (_of_all(snapshot), [_fixed(gpu) for gpu in snapshot.gpus])
        if self._frame is None or fixed != self._frame[0]:
            bare = tuple(_without_values(gpu) for gpu in snapshot.gpus)
            frame = replace(snapshot, taken_at=0.0, taken_mono=0.0, read_s=None, gpus=bare)
            self._frame = (fixed, frame)
        numbers = [value for gpu in snapshot.gpus for value in _plotted(gpu)]
        values = array("d", [math.nan if value is None else value for value in numbers])
        return _Past(self._frame[1], snapshot.taken_at, snapshot.taken_mono, values)


def _without_values(gpu: Gpu) -> Gpu:
    forgotten: dict[str, Any] = dict.fromkeys(_BARED)
    return altered(gpu, **forgotten, quiet_samples=0)


def _with_values(gpu: Gpu, values: Sequence[float]) -> Gpu:
    utilization, memory, temperature, power = (None if math.isnan(v) else v for v in values)
    return replace(
        gpu,
        utilization=utilization,
        mem_used_bytes=None if memory is None else int(memory),
        temperature_c=temperature,
        power_w=power,
    )


def altered(gpu: Gpu, **changes: Any) -> Gpu:
    """As ``dataclasses.replace``, at a third of its price: once a second for every GPU."""
    made = object.__new__(Gpu)
    for put, value in zip(_PUT, _values(gpu), strict=True):
        put(made, value)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


@dataclass(frozen=True, slots=True)
class _Quiet:
    since: float  # the first reading of the window
    last: float  # the newest reading
    counted: float  # the newest one that counted as a sample
    samples: int


class QuietWindows:
    """For how long, and in how many readings in a row, each GPU has been at or below the limit.

    Args:
        limit: the utilization (0-1) that still counts as quiet.
        interval_s: the sampling interval. A gap of more than three of them starts a window anew,
            and readings closer together than half of one count as one sample: the driver's own
            averaging window would make them the same reading.
    """

    def __init__(self, limit: float, interval_s: float) -> None:
        self._limit = limit
        self._interval_s = interval_s
        self._windows: dict[str, _Quiet] = {}

    def mark(self, snapshot: Snapshot, period_s: float | None = None) -> Snapshot:
        """``snapshot`` with ``quiet_s`` and ``quiet_samples`` set.

        Args:
            snapshot: newer than those before it.
            period_s: the rate at which readings are taken now, where slower than the interval.
        """
        gap_s = 3 * max(self._interval_s, period_s or 0.0)
        before, self._windows = self._windows, {}
        gpus = []
        for gpu in snapshot.gpus:
            window = self._next(before.get(gpu.uuid), gpu.utilization, snapshot.taken_mono, gap_s)
            if window is not None:
                self._windows[gpu.uuid] = window
                gpu = altered(gpu, quiet_s=window.last - window.since, quiet_samples=window.samples)
            elif gpu.quiet_samples or gpu.quiet_s is not None:
                gpu = altered(gpu, quiet_s=None, quiet_samples=0)
            gpus.append(gpu)
        return snapshot.with_gpus(tuple(gpus))

    def _next(
        self, before: _Quiet | None, utilization: float | None, mono: float, gap_s: float
    ) -> _Quiet | None:
        if utilization is None or utilization > self._limit:
            return None
        if before is None or mono - before.last > gap_s:
            return _Quiet(mono, mono, mono, 1)
        if mono - before.counted < self._interval_s / 2:
            return replace(before, last=mono)
        return _Quiet(before.since, mono, mono, before.samples + 1)


def with_jobs(snapshot: Snapshot, loads: Mapping[str, JobLoad], allocated: Allocated) -> Snapshot:
    """A scripted reading with what our running jobs add to it, once for each job and GPU."""
    if not any(allocated.get(uuid) for uuid in loads):
        return snapshot
    return snapshot.with_gpus(
        tuple(
            _with_jobs(gpu, loads.get(gpu.uuid, (None, None)), allocated.get(gpu.uuid, ()))
            for gpu in snapshot.gpus
        )
    )


def _with_jobs(gpu: Gpu, load: JobLoad, jobs: Sequence[tuple[int, int | None]]) -> Gpu:
    utilization, memory = load
    for job_id, pid in jobs:
        gpu = add_job_load(gpu, utilization, memory)
        if gpu.processes is not None:
            shown = GpuProcess(
                pid=pid or 0,
                name=f"job {job_id}",
                mem_bytes=memory,
                kind="compute",
                visible=pid is not None,
                job=job_id,
            )
            gpu = replace(gpu, processes=(*gpu.processes, shown))
    return gpu
