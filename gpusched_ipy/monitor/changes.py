"""Whether a reading shows anything that a start could hang on, compared with those before it.

Plain bookkeeping of readings that are handed in. A stranger's utilization that goes up and down
above the limit, a temperature or a few megabytes change no decision: nobody need be woken for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot

# So long after a change every reading counts: quiet windows run meanwhile.
STEADY_S = 10.0
# Of a GPU's memory, or of a process's: less is no change.
_MEM_BYTES = 64 << 20


class Changes:
    """What has been shown last, as far as it counts.

    Args:
        limit: the utilization (0-1) up to which a GPU counts as quiet.
        steady_s: for how long after a change every reading counts.
    """

    def __init__(self, limit: float, steady_s: float = STEADY_S) -> None:
        self._limit = limit
        self._steady_s = steady_s
        self._shown: tuple[Gpu, ...] = ()
        self._listed: dict[str, tuple[GpuProcess, ...]] = {}
        self._problem: str | None = None
        self._last_mono = self._changed_mono = -math.inf

    def count(self, snapshot: Snapshot) -> bool:
        """Whether this reading, newer than those before it, counts."""
        mono = snapshot.taken_mono
        if mono - self._last_mono > self._steady_s or not self._like_before(snapshot):
            self._changed_mono = mono
            self._shown, self._problem = snapshot.gpus, snapshot.problem
        for gpu in snapshot.gpus:
            if gpu.processes is not None and self._changed_mono == mono:
                self._listed[gpu.uuid] = gpu.processes
        self._last_mono = mono
        return mono - self._changed_mono <= self._steady_s

    def _like_before(self, snapshot: Snapshot) -> bool:
        return (
            snapshot.problem == self._problem
            and len(snapshot.gpus) == len(self._shown)
            and all(map(self._like, snapshot.gpus, self._shown))
        )

    def _like(self, gpu: Gpu, shown: Gpu) -> bool:
        return (
            gpu.uuid == shown.uuid
            and gpu.health is shown.health
            and gpu.compute_mode == shown.compute_mode
            and gpu.mem_pressure == shown.mem_pressure
            and self._busy(gpu) == self._busy(shown)
            and _near(gpu.mem_used_bytes, shown.mem_used_bytes)
            and (gpu.processes is None or _same(gpu.processes, self._listed.get(gpu.uuid)))
        )

    def _busy(self, gpu: Gpu) -> bool | None:
        return None if gpu.utilization is None else gpu.utilization > self._limit


def _same(listed: Sequence[GpuProcess], shown: Sequence[GpuProcess] | None) -> bool:
    if listed is shown:
        return True
    return (
        shown is not None
        and len(listed) == len(shown)
        and all(
            now.pid == then.pid
            and now.started_at == then.started_at
            and now.job == then.job
            and _near(now.mem_bytes, then.mem_bytes)
            for now, then in zip(listed, shown, strict=True)
        )
    )


def _near(now: int | None, then: int | None) -> bool:
    if now is None or then is None:
        return now is then
    return abs(now - then) <= _MEM_BYTES
