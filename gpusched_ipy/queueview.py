"""The queue as those see it who only look: lists, pages, single jobs. It changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpusched_ipy.attribution import attribute
from gpusched_ipy.bell import Bell
from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.entries import Entry
from gpusched_ipy.job import BOUND_KINDS, ArrayState, Job, JobKind
from gpusched_ipy.naming import resolve
from gpusched_ipy.pretty import Drawn
from gpusched_ipy.showing import JobList, jobs_drawn
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Event, Store

# Inside the class below the name ``list`` is its method.
_Jobs = list[Job]
_Events = list[Event]


class QueueView:
    """What can be seen of the queue of this user on this machine.

    Args:
        store: the record.
        settings: ``aging_s`` orders the pages.
    """

    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self.store = store
        self.settings = settings
        self.clock = clock

    @property
    def state(self) -> StateDir:
        """The private folder of the queue."""
        return self.store.state

    def list(self, *, all: bool = False, limit: int | None = None) -> _Jobs:  # noqa: A002
        """The jobs not yet ended, or all of them, oldest first; ``limit`` keeps the newest."""
        return JobList(self.store.jobs(ended=all, limit=limit))

    def history(self, *, since: float | None = None, limit: int | None = None) -> _Jobs:
        """The jobs that have ended, by their ids.

        Args:
            since: those that ended within so many seconds; all that are kept when None.
            limit: only the newest ones.
        """
        wall = 0.0 if since is None else self.clock.now().wall - since
        return JobList(self.store.ended_since(wall, limit))

    def arrays(self, jobs: Iterable[Job]) -> Mapping[str, ArrayState]:
        """How each sweep stands that one of these jobs is a member of, by its id."""
        return self.store.array_states(job.spec.array.id for job in jobs if job.spec.array)

    def _repr_html_(self) -> str:
        return self._drawn().html

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self._drawn().text)

    def _drawn(self) -> Drawn:
        counts = self.counts()
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        drained = f"; drained: {self.drained}" if self.drained else ""
        jobs = self.page(0, 50)
        return jobs_drawn(jobs, f"the queue: {told}{drained}; higher priority runs first")

    def page(self, offset: int, limit: int) -> Sequence[Job]:
        """A part of the jobs not yet ended: who runs, who waits by priority, then who is held."""
        return self.store.page(offset, limit, self.settings.aging_s)

    def folded_page(
        self, offset: int, limit: int, unfolded: Collection[str] = ()
    ) -> tuple[Sequence[Entry], int]:
        """The same with one row for each sweep, and how many rows there are.

        Args:
            unfolded: the ids of sweeps whose open members have a row each, below that of the sweep.
        """
        return self.store.folded_page(offset, limit, self.settings.aging_s, unfolded)

    def counts(self) -> Mapping[str, int]:
        """How many jobs are ``running`` (or starting), ``waiting`` and ``held``."""
        return self.store.counts()

    def ran_since(self, wall: float) -> Sequence[Job]:
        """Jobs that had a GPU at ``wall`` (s since the epoch) or later."""
        return self.store.ran_since(wall)

    def members(self) -> Mapping[str, str]:
        """What each process that uses the queue is called, by its key."""
        return {key: member.label for key, member in self.store.members().items()}

    def mark(self, snapshot: Snapshot, jobs: Iterable[Job]) -> Snapshot:
        """``snapshot`` with the job and the member of each process filled in.

        Args:
            jobs: those that run.
        """
        running = list(jobs)
        leaders = {
            process.pid: job.id for job in running if (process := self.store.process_of(job))
        }
        members = self.store.member_pids()
        return attribute(snapshot, running, leaders=leaders, members=members)

    def show(self, reference: str | int) -> Job:
        """The one job of an id or, for a name, its newest job.

        Raises:
            JobNotFoundError: there is none.
        """
        return self.store.job(self.resolve([reference])[0])

    def resolve(self, references: Iterable[str | int]) -> tuple[int, ...]:
        """The ids that ``12``, ``14-16``, ``12,prep``, ``prep*`` or ``array:3f9a`` stand for, in
        the order given. A name stands for its newest job; of a sweep for all its members.

        Raises:
            JobNotFoundError: a reference stands for no job.
        """
        return resolve(self.store, references)

    def events(self, reference: str | int) -> _Events:
        """What happened to a job, in order."""
        return self.store.events(self.show(reference).id)

    def log_path(self, reference: str | int) -> Path | None:
        """The file that holds the output of the job's last attempt; None before it has begun."""
        job = self.show(reference)
        paths = []
        if job.kind in BOUND_KINDS or job.kind is JobKind.ISOLATED:
            paths.append(self.state.transcript(job.spec.uid))
        if job.attempt is not None and job.kind not in BOUND_KINDS:
            paths.append(self.state.log(job.attempt))
        return next((path for path in paths if path.exists()), None)

    @property
    def drained(self) -> str | None:
        """Why nothing is started at present, or None."""
        return self.store.drained

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call ``changed`` from a thread after every change of the record, until unsubscribed.

        Meanwhile an agent is there whenever one is needed: whoever listens waits for something.
        """
        from gpusched_ipy.vigil import stand

        bell = Bell(self.state.bell, changed)
        try:
            leave = stand(self.store)
        except BaseException:
            bell.close()
            raise

        def unsubscribe() -> None:
            bell.close()
            leave()

        return unsubscribe
