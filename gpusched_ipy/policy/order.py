"""The line of pending jobs: who comes before whom, pure. It knows no GPU and starts nothing.

``fair``: effective priority, then id; but jobs of one priority swap places so that notebooks take
turns: the one with the fewest GPUs first, then the one that has gone longest without, each offering
its jobs in the order of submission. Turns never change which priority has which place.

``shortest``: within a priority the smallest expected area (GPU seconds) first, shrunk by the
patience that the job has used up; one that has none left goes before its priority, the longest wait
first, and it alone may hold a reservation.

A :class:`Line` is kept sorted between decisions, so that one event costs one insertion.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from operator import attrgetter

from gpusched_ipy.job import Job
from gpusched_ipy.policy.standing import Facts, always_stands

_QUEUED = attrgetter("queued_mono")
_SINCE = attrgetter("queued_mono", "id")

PATIENCE = 0.9  # found on the Philly traces; see docs/decisions/0003-policy.md

Eligible = Callable[[Job], bool]


class Line:
    """Pending jobs by priority and notebook, each row in the order of submission."""

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        by_id = sorted(jobs, key=attrgetter("id"))
        self._jobs = {job.id: job for job in by_id}
        self._always = {job.id for job in by_id if always_stands(job)}
        self._ranks: defaultdict[int, list[Job]] = defaultdict(list)
        self._rows: defaultdict[int, defaultdict[str, list[Job]]]  # of each rank, by notebook
        self._rows = defaultdict(lambda: defaultdict(list))
        ranks, rows = self._ranks, self._rows
        for job in by_id:
            priority = job.priority
            ranks[priority].append(job)
            rows[priority][job.spec.owner].append(job)
        # Sorted as they lie in memory, by one number; that keeps the order of ids among equals.
        for row in (*ranks.values(), *(one for rank in rows.values() for one in rank.values())):
            row.sort(key=_QUEUED)

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
        if always_stands(job):
            self._always.add(job.id)
        for row in (self._ranks[job.priority], self._rows[job.priority][job.spec.owner]):
            insort(row, job, key=_SINCE)

    def drop(self, job_id: int) -> None:
        """Take a job out; one that is not in the line is no error."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        self._always.discard(job_id)
        rank, rows = self._ranks[job.priority], self._rows[job.priority]
        row = rows[job.spec.owner]
        for jobs in (rank, row):
            del jobs[bisect_left(jobs, _SINCE(job), key=_SINCE)]
        if not row:
            del rows[job.spec.owner]
        if not rank:
            del self._ranks[job.priority], self._rows[job.priority]

    def fair(self, facts: Facts, eligible: Eligible) -> Iterator[Job]:
        """The eligible jobs in ``fair`` order."""
        aging_s = facts.step_s
        using: defaultdict[str, int] = defaultdict(int)
        served: dict[str, float] = {}
        for holder in facts.allocations:
            if holder.ended_mono is None:
                using[holder.owner] += len(holder.gpus)
            else:
                served[holder.owner] = max(served.get(holder.owner, 0.0), holder.ended_mono)
        stands = _once(eligible, self._always)
        ranks = [
            _Rank(priority, rank, self._rows[priority], stands, using, served)
            for priority, rank in self._ranks.items()
        ]
        heap = [(key, rank) for rank in ranks if (key := rank.place(aging_s)) is not None]
        heapify(heap)
        while heap:
            rank = heap[0][1]
            yield rank.take()
            key = rank.place(aging_s)
            if key is None:
                heappop(heap)
            else:
                heapreplace(heap, (key, rank))


def _once(eligible: Eligible, always: Collection[int]) -> Eligible:
    """``eligible``, asked once of each job: for its place in the line, and for its turn.

    Args:
        always: the jobs of which it need not be asked.
    """
    known: dict[int, bool] = {}

    def stands(job: Job) -> bool:
        number = job.id
        if number in always:
            return True
        found = known.get(number)
        if found is None:
            found = known[number] = eligible(job)
        return found

    return stands


class _Rank:
    """The jobs of one priority: their places in the line, and the notebooks' turns to take them.

    ``using`` (GPUs by notebook) is shared by all ranks and counts the jobs already taken.
    """

    def __init__(
        self,
        priority: int,
        jobs: Sequence[Job],
        rows: Mapping[str, Sequence[Job]],
        eligible: Eligible,
        using: defaultdict[str, int],
        served: Mapping[str, float],
    ) -> None:
        self._priority = priority
        self._using = using
        self._served = served
        self._places = filter(eligible, jobs)
        self._rows = {owner: filter(eligible, row) for owner, row in rows.items()}
        offers = (self._offer(owner) for owner in rows)
        self._turns = [offer for offer in offers if offer is not None]
        heapify(self._turns)

    def place(self, aging_s: float) -> tuple[float, int] | None:
        """The key of its next place in the line, smallest first; None when all are taken."""
        job = next(self._places, None)
        if job is None:
            return None
        return job.queued_mono / aging_s - self._priority, -self._priority

    def take(self) -> Job:
        """The job whose notebook has the turn."""
        turns, using = self._turns, self._using
        count, since, number, job = turns[0]
        owner = job.spec.owner
        while count != using[owner]:
            heapreplace(turns, (using[owner], since, number, job))
            count, since, number, job = turns[0]
            owner = job.spec.owner
        using[owner] = count + job.spec.request.gpus
        offer = self._offer(owner)
        if offer is None:
            heappop(turns)
        else:
            heapreplace(turns, offer)
        return job

    def _offer(self, owner: str) -> tuple[int, float, int, Job] | None:
        """The next job of a notebook as it stands among the turns; None where it has no more."""
        job = next(self._rows[owner], None)
        if job is None:
            return None
        since = job.queued_mono
        if owner in self._served:
            since = max(since, self._served[owner])
        return self._using[owner], since, job.id, job


class Patience:
    """The order ``shortest``: how large each job is taken to be, and how long it may be passed.

    A job may be passed for :data:`PATIENCE` of the time that the machine would need for all that
    waits and runs, now or at the worst moment that the caller remembers: about as long as the
    last in line would wait if all were served in order.
    """

    def __init__(self, jobs: Sequence[Job], facts: Facts) -> None:
        self._jobs = jobs
        self._facts = facts
        known = {job.id: area for job in jobs if (area := facts.area_s(job)) is not None}
        # A job of which nothing is known is taken for an average one.
        mean = sum(known.values()) / len(known) if known else 1.0
        self._areas = {job.id: known.get(job.id, mean) for job in jobs}
        mono = facts.now.mono
        running = sum(
            len(holder.gpus) * max(0.0, (holder.expected_end_mono or mono) - mono)
            for holder in facts.allocations
            if holder.ended_mono is None
        )
        self.backlog_s = (sum(self._areas.values()) + running) / max(1, len(facts.gpus))
        self.limit_s = PATIENCE * max(self.backlog_s, facts.worst_backlog_s)

    def ordered(self) -> Iterator[Job]:
        """The jobs in order."""
        heap = [(*self._key(job), job.queued_mono, job.id) for job in self._jobs]
        heapify(heap)
        jobs = {job.id: job for job in self._jobs}
        while heap:
            yield jobs[heappop(heap)[-1]]

    def _key(self, job: Job) -> tuple[float, float]:
        waited_s = max(0.0, self._facts.now.mono - job.queued_mono)
        over_s = waited_s - self.limit_s
        if over_s >= 0:
            return -job.priority - over_s / self._facts.step_s, -1.0
        return -job.priority, -self._areas[job.id] * over_s / self.limit_s
