"""For how long each process on a GPU has held memory and done nothing, as far as readings tell."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpusched_ipy.monitor.recent import altered
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot

IDLE_AFTER_S = 60.0  # a shorter rest is a data loader's, not worth a word
GAP_S = 60.0  # after a longer pause between readings nothing is known of the time between

_Identity = tuple[str, int, float | None]


@dataclass(frozen=True, slots=True)
class _Rest:
    since: float
    last: float


class IdleProcesses:
    """Watches who rests.

    Args:
        limit: the utilization (0-1) of a GPU up to which nobody on it is taken to work, where the
            driver does not tell it for each process.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._rests: dict[_Identity, _Rest] = {}

    def mark(self, snapshot: Snapshot) -> Snapshot:
        """``snapshot`` with ``idle_s`` of the processes that have rested for long enough."""
        before, self._rests = self._rests, {}
        if not any(gpu.processes for gpu in snapshot.gpus):
            # A reading without process lists says nothing about them.
            self._rests = before
            return snapshot
        mono = snapshot.taken_mono
        return snapshot.with_gpus(tuple(self._gpu(gpu, before, mono) for gpu in snapshot.gpus))

    def _gpu(self, gpu: Gpu, before: dict[_Identity, _Rest], mono: float) -> Gpu:
        if not gpu.processes:
            return gpu
        marked = tuple([self._process(gpu, process, before, mono) for process in gpu.processes])
        # Most rest for too short a time to be marked: the same objects, and the same GPU.
        return gpu if marked == gpu.processes else altered(gpu, processes=marked)

    def _process(
        self, gpu: Gpu, process: GpuProcess, before: dict[_Identity, _Rest], mono: float
    ) -> GpuProcess:
        if not self._rests_now(gpu, process):
            return process
        key = (gpu.uuid, process.pid, process.started_at)
        rest = before.get(key)
        since = rest.since if rest is not None and mono - rest.last <= GAP_S else mono
        self._rests[key] = _Rest(since, mono)
        if process.idle_s is not None or mono - since < IDLE_AFTER_S:
            return process
        return replace(process, idle_s=mono - since)

    def _rests_now(self, gpu: Gpu, process: GpuProcess) -> bool:
        if process.utilization is not None:
            return process.utilization == 0
        return gpu.utilization is not None and gpu.utilization <= self._limit
