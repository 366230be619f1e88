"""The line of pending jobs: who comes before whom, pure. It knows no GPU and starts nothing.

``fair``: aging says which priority is served next, by its longest-waiting job; within a priority
the notebook that has the fewest GPUs goes first, then the one that has gone longest without; within
a notebook the order of submission. With one notebook that is effective priority, then id.

``shortest``: within a priority the smallest expected area (GPU seconds) first; a job that has
waited past its bound goes before all, the longest waiting first.

A :class:`Line` is kept sorted between decisions, so that one event costs one insertion.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter

from gpusched_ipy.job import Allocation, Job

_SINCE = attrgetter("queued_mono", "id")

Eligible = Callable[[Job], bool]


def effective_priority(job: Job, aging_s: float, mono: float) -> float:
    """The priority of a job after aging: one step more per ``aging_s`` of waiting."""
    return job.priority + max(0.0, mono - job.queued_mono) / aging_s


class Line:
    """Pending jobs by priority and notebook, each row in the order of submission."""

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        by_id = sorted(jobs, key=attrgetter("id"))
        self._jobs = {job.id: job for job in by_id}
        self._ranks: dict[int, dict[str, list[Job]]] = {}
        # Two sorts by one number each are faster than one by pairs.
        for job in sorted(by_id, key=attrgetter("queued_mono")):
            self._row(job).append(job)

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def put(self, job: Job) -> None:
        """Add a job, or replace what is known of it."""
        self.drop(job.id)
        self._jobs[job.id] = job
        insort(self._row(job), job, key=_SINCE)

    def drop(self, job_id: int) -> None:
        """Take a job out; one that is not in the line is no error."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        row = self._row(job)
        del row[bisect_left(row, _SINCE(job), key=_SINCE)]
        if not row:
            rank = self._ranks[job.priority]
            del rank[job.spec.owner]
            if not rank:
                del self._ranks[job.priority]

    def fair(
        self, eligible: Eligible, aging_s: float, allocations: Sequence[Allocation]
    ) -> Iterator[Job]:
        """The eligible jobs in ``fair`` order."""
        using = Counter[str]()
        served: dict[str, float] = {}
        for holder in allocations:
            if holder.ended_mono is None:
                using[holder.owner] += len(holder.gpus)
            else:
                served[holder.owner] = max(served.get(holder.owner, 0.0), holder.ended_mono)
        ranks = {
            priority: _Rank(rows, eligible, using, served) for priority, rows in self._ranks.items()
        }
        heap = [key for key in (rank.urgency(p, aging_s) for p, rank in ranks.items()) if key]
        heapify(heap)
        while heap:
            priority = -heap[0][1]
            rank = ranks[priority]
            yield rank.take()
            key = rank.urgency(priority, aging_s)
            if key is None:
                heappop(heap)
            else:
                heapreplace(heap, key)

    def shortest(
        self,
        eligible: Eligible,
        area: Callable[[Job], float],
        overdue: Callable[[Job], bool],
    ) -> Iterator[Job]:
        """The eligible jobs in ``shortest`` order."""
        heap = [
            (0, job.queued_mono, job.id) if overdue(job) else (1, -job.priority, area(job), job.id)
            for job in filter(eligible, self._jobs.values())
        ]
        heapify(heap)
        while heap:
            yield self._jobs[int(heappop(heap)[-1])]

    def _row(self, job: Job) -> list[Job]:
        try:
            return self._ranks[job.priority][job.spec.owner]
        except KeyError:
            return self._ranks.setdefault(job.priority, {}).setdefault(job.spec.owner, [])


class _Rank:
    """The jobs of one priority: each notebook offers its next one.

    ``using`` (GPUs by notebook) is shared by all ranks and counts the jobs already taken.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Job]],
        eligible: Eligible,
        using: Counter[str],
        served: Mapping[str, float],
    ) -> None:
        self._using = using
        self._served = served
        self._rows = {owner: filter(eligible, row) for owner, row in rows.items()}
        self._next: dict[str, Job] = {}
        self._oldest: list[tuple[float, int, str]] = []
        self._turns: list[tuple[int, float, int, str]] = []
        for owner in rows:
            self._offer(owner)

    def urgency(self, priority: int, aging_s: float) -> tuple[float, int] | None:
        """The key of its longest-waiting job, smallest first; None when no job is left."""
        while self._oldest:
            since, job_id, owner = self._oldest[0]
            offered = self._next.get(owner)
            if offered is not None and offered.id == job_id:
                return since / aging_s - priority, -priority
            heappop(self._oldest)
        return None

    def take(self) -> Job:
        """The next job by turns between the notebooks."""
        while self._turns[0][0] != self._using[self._turns[0][3]]:
            _, since, job_id, owner = self._turns[0]
            heapreplace(self._turns, (self._using[owner], since, job_id, owner))
        owner = heappop(self._turns)[3]
        job = self._next.pop(owner)
        self._using[owner] += job.request.gpus
        self._offer(owner)
        return job

    def _offer(self, owner: str) -> None:
        job = next(self._rows[owner], None)
        if job is None:
            return
        self._next[owner] = job
        since = max(job.queued_mono, self._served.get(owner, job.queued_mono))
        heappush(self._oldest, (job.queued_mono, job.id, owner))
        heappush(self._turns, (self._using[owner], since, job.id, owner))
