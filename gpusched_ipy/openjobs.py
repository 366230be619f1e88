"""The jobs that have not ended, as one member knows them: kept up to date by revision.

A round of the scheduler costs what has changed, not what is queued.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gpusched_ipy.config import LOCAL, Clock
from gpusched_ipy.job import ACTIVE, BOUND_KINDS, Allocation, Job, JobState
from gpusched_ipy.policy.order import Line
from gpusched_ipy.process import ProcessId
from gpusched_ipy.store import Store


class OpenJobs:
    """Pending and active jobs, and the allocations that ended a moment ago.

    Args:
        keep_s: how long an ended allocation is remembered: a reading may still show it. The last
            one of each notebook is kept beyond that, for turns between them.
        ended: called with every job that has ended, and again when more is known of it.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        keep_s: float,
        ended: Callable[[Job], None] = lambda _job: None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._keep_s = keep_s
        self._ended_seen = ended
        self.forget()

    def forget(self) -> None:
        """Know nothing any more, as at first: what was read may come from a write that failed."""
        self._rev: int | None = None
        self._purge: str | None = None
        self._ended: dict[int, Allocation] = {}
        self._just_ended: list[Job] = []
        self._outcomes: dict[int, JobState] = {}
        self._leaders: dict[str, ProcessId] = {}
        self._since: dict[tuple[int, int], float] = {}
        self.jobs: dict[int, Job] = {}
        self.line = Line()  # the pending ones that run here, sorted
        # Parts of ``jobs``, kept so that a round need not go through all that wait.
        self._active: dict[int, Job] = {}
        self._bound: dict[int, Job] = {}  # pending, and only one member can run them
        self._away: dict[int, Job] = {}  # with an engine, or waiting for one
        self._unheld: set[int] = set()  # pending, not held, and for GPUs of this machine
        self._needed: Counter[int] = Counter()  # what pending ones come after

    def refresh(self) -> None:
        """Read what has changed since the last time."""
        first = self._rev is None and not self.jobs
        purge = self._store.last_purge
        self._rev, changed = self._store.changed_since(self._rev)
        if first:
            self._begin_with(changed)
        else:
            for job in changed:
                self.put(job)
        for number in self._store.damaged:
            self._drop(number)
        if purge != self._purge:
            for number in self.jobs.keys() - self._store.states(self.jobs).keys():
                self._drop(number)
            self._purge = purge

    def _begin_with(self, jobs: Sequence[Job]) -> None:
        """Take over all open jobs at once: a long line is sorted once, not job by job."""
        mono = self._clock.now().mono
        for job in jobs:
            self._sort_in(None, job)
            if job.state in ACTIVE:
                self._since[job.id, job.epoch] = mono
        self.jobs = {job.id: job for job in jobs}
        self.line = Line(job for job in jobs if _waits_here(job))

    def put(self, job: Job) -> None:
        """Take over how a job stands now."""
        before = self.jobs.pop(job.id, None)
        self._sort_in(before, job)
        if _waits_here(job):
            self.line.put(job)
        else:
            self.line.drop(job.id)
        if before is not None and before.state in ACTIVE and job.state not in ACTIVE:
            self._remember_end(before)
        if job.ended:
            self._outcomes[job.id] = job.state
            self._ended_seen(job)
            if before is not None:
                self._just_ended.append(job)
        else:
            self.jobs[job.id] = job
        if job.state in ACTIVE:
            self._since.setdefault((job.id, job.epoch), self._clock.now().mono)

    def _drop(self, job_id: int) -> None:
        """Know a job no more: it cannot be read. The locks that its processes hold still count."""
        before = self.jobs.pop(job_id, None)
        if before is not None:
            self._sort_out(before)
            self.line.drop(job_id)

    def _sort_out(self, before: Job) -> None:
        for part in (self._active, self._bound, self._away):
            part.pop(before.id, None)
        self._unheld.discard(before.id)
        if before.state is JobState.PENDING:
            self._needed.subtract(_after(before))

    def _sort_in(self, before: Job | None, job: Job) -> None:
        if before is not None:
            self._sort_out(before)
        if job.spec.engine != LOCAL and not job.ended:
            self._away[job.id] = job
        if job.state in ACTIVE:
            self._active[job.id] = job
        elif job.state is JobState.PENDING:
            if after := _after(job):
                self._needed.update(after)
            if not job.held and job.spec.engine == LOCAL:
                self._unheld.add(job.id)
            if job.kind in BOUND_KINDS:
                self._bound[job.id] = job

    def take_ended(self) -> list[Job]:
        """The jobs that have ended since this was last asked."""
        ended, self._just_ended = self._just_ended, []
        return ended

    @property
    def any_waits(self) -> bool:
        """Whether a job waits that is not held."""
        return bool(self._unheld)

    @property
    def pending(self) -> list[Job]:
        """The jobs that wait."""
        return [job for job in self.jobs.values() if job.state is JobState.PENDING]

    @property
    def away(self) -> list[Job]:
        """The jobs that an engine has, or is to have."""
        return list(self._away.values())

    @property
    def depend_on_members(self) -> list[Job]:
        """The jobs whose fate hangs on a member's life: active ones, and pending cells."""
        return [*self._active.values(), *self._bound.values()]

    @property
    def active(self) -> list[Job]:
        """The jobs that have been claimed or run."""
        return [self._active[job_id] for job_id in sorted(self._active)]

    def allocations(self) -> list[Allocation]:
        """Who has which GPU, who just had one, and when each notebook last had one."""
        limit = self._clock.now().mono - self._keep_s
        last = {gone.owner: key for key, gone in self._ended.items()}
        self._ended = {
            key: gone
            for key, gone in self._ended.items()
            if (gone.ended_mono or 0.0) >= limit or last[gone.owner] == key
        }
        return [*(self._allocation(job) for job in self.active), *self._ended.values()]

    def states_of_dependencies(self) -> Mapping[int, JobState]:
        """The states of all jobs that pending ones come after."""
        wanted = {other for other, count in self._needed.items() if count > 0}
        self._needed = Counter({other: self._needed[other] for other in wanted})
        unknown = wanted - self._outcomes.keys() - self.jobs.keys()
        if unknown:
            self._outcomes |= self._store.states(unknown)
        return {
            other: self.jobs[other].state if other in self.jobs else self._outcomes[other]
            for other in wanted
            if other in self.jobs or other in self._outcomes
        }

    def leaders(self) -> dict[int, int]:
        """The pid of the process that leads each active job, where it has one."""
        found: dict[int, int] = {}
        for job in self.active:
            process = self._leader(job)
            if process is not None:
                found[process.pid] = job.id
        return found

    def pids_by_gpu(self) -> dict[str, tuple[tuple[int, int | None], ...]]:
        """For each allocated GPU its jobs and their leading processes."""
        by_gpu: dict[str, list[tuple[int, int | None]]] = {}
        for job in self.active:
            process = self._leader(job)
            for gpu in job.gpus:
                by_gpu.setdefault(gpu, []).append((job.id, process.pid if process else None))
        return {gpu: tuple(entries) for gpu, entries in by_gpu.items()}

    def _leader(self, job: Job) -> ProcessId | None:
        if job.attempt is None or job.state is not JobState.RUNNING or job.kind in BOUND_KINDS:
            return None
        if job.spec.engine != LOCAL:
            return None
        if job.attempt not in self._leaders:
            process = self._store.process_of(job)
            if process is None:
                return None
            self._leaders[job.attempt] = process
        return self._leaders[job.attempt]

    def _allocation(self, job: Job) -> Allocation:
        since = self._since.get((job.id, job.epoch), job.started_mono or 0.0)
        started = since if job.started_mono is None else job.started_mono
        return Allocation(
            job_id=job.id,
            gpus=job.gpus,
            shared=job.request.shared,
            mem_bytes=job.request.mem_bytes,
            started_mono=started,
            expected_end_mono=None if job.request.time_s is None else started + job.request.time_s,
            label=f"job {job.id} ({job.name})",
            owner=job.spec.owner,
            array=None if job.spec.array is None else job.spec.array.id,
        )

    def _remember_end(self, job: Job) -> None:
        ended = replace(self._allocation(job), ended_mono=self._clock.now().mono)
        self._ended.pop(job.id, None)  # the latest stands last
        self._ended[job.id] = ended
        self._since.pop((job.id, job.epoch), None)
        if job.attempt is not None:
            self._leaders.pop(job.attempt, None)


def _waits_here(job: Job) -> bool:
    return job.state is JobState.PENDING and job.spec.engine == LOCAL


def _after(job: Job) -> tuple[int, ...]:
    request = job.spec.request
    return request.after + request.after_any
