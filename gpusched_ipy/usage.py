"""What a job has drawn of its GPUs: mean and peak utilization, peak memory, energy. Pure sums.

Readings come a few seconds apart, so these are estimates: a peak between two readings is not seen.
A value that no reading held stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from gpusched_ipy.job import Allocation
from gpusched_ipy.snapshot import Gpu, Snapshot

# A pause longer than this between two readings is a gap: nothing is assumed of it.
GAP_S = 30.0


@dataclass(slots=True)
class Usage:
    """The sums of one job so far."""

    peak_mem_bytes: int | None = None  # of all its GPUs together
    energy_j: float | None = None
    peak_utilization: float | None = None  # 0-1, of the busiest of its GPUs
    _weighted: float = 0.0  # utilization times seconds
    _seconds: float = 0.0
    # When each value of each GPU was last read: power comes less often than utilization.
    _read_at: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def mean_utilization(self) -> float | None:
        """Mean over time and over its GPUs, 0-1."""
        return self._weighted / self._seconds if self._seconds else None

    def add(self, gpus: Iterable[Gpu], allocation: Allocation, mono: float) -> None:
        """Count one reading of the GPUs; each value stands for the time since the last one."""
        gpus = list(gpus)
        memory = [used for gpu in gpus if (used := _memory(gpu, allocation)) is not None]
        if memory:
            self.peak_mem_bytes = max(self.peak_mem_bytes or 0, sum(memory))
        for gpu in gpus:
            if gpu.utilization is not None:
                seconds = self._since("utilization", gpu, allocation, mono)
                self.peak_utilization = max(self.peak_utilization or 0.0, gpu.utilization)
                self._weighted += gpu.utilization * seconds
                self._seconds += seconds
            # On a shared card nobody can tell whose power it is.
            if gpu.power_w is not None and not allocation.shared:
                seconds = self._since("power", gpu, allocation, mono)
                # Power that was read and time that was not make no energy: unknown, and not 0.
                if seconds:
                    self.energy_j = (self.energy_j or 0.0) + gpu.power_w * seconds

    def _since(self, value: str, gpu: Gpu, allocation: Allocation, mono: float) -> float:
        before = self._read_at.get((value, gpu.uuid), allocation.started_mono)
        self._read_at[value, gpu.uuid] = mono
        return mono - before if mono - before <= GAP_S else 0.0


class UsageTracker:
    """The usage of every job that has GPUs, reading by reading."""

    def __init__(self) -> None:
        self._usage: dict[int, Usage] = {}
        self._last_mono = -math.inf

    def observe(self, snapshot: Snapshot, allocations: Iterable[Allocation]) -> None:
        """Count a reading; one that was counted already, or has a problem, changes nothing."""
        now = snapshot.taken_mono
        if snapshot.problem is not None or now <= self._last_mono:
            return
        self._last_mono = now
        for allocation in allocations:
            if allocation.ended_mono is None and allocation.started_mono <= now:
                gpus = (gpu for gpu in snapshot.gpus if gpu.uuid in allocation.gpus)
                self._usage.setdefault(allocation.job_id, Usage()).add(gpus, allocation, now)

    def peak_mem_bytes(self, job_id: int) -> int | None:
        """The most memory that a job has been seen with so far; None where nobody can tell."""
        found = self._usage.get(job_id)
        return None if found is None else found.peak_mem_bytes

    def take(self, job_id: int) -> Usage | None:
        """The sums of a job that has ended, which are forgotten; None when it was never seen."""
        return self._usage.pop(job_id, None)


def _memory(gpu: Gpu, allocation: Allocation) -> int | None:
    """The job's own memory where its processes are known, else the card's, if it has it alone."""
    own = [found.mem_bytes for found in gpu.processes or () if found.job == allocation.job_id]
    if own and None not in own:
        return sum(size for size in own if size is not None)
    return None if allocation.shared else gpu.mem_used_bytes
