"""The queue as programs use it: submit, look, wish, wait. It needs no GPU and no Jupyter.

:class:`Queue` is what the magics, the panel and the terminal are made of. It records wishes and
reads the record; starting jobs is the business of agents and kernels.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from gpusched_ipy import environment
from gpusched_ipy.bell import Bell
from gpusched_ipy.config import LOCAL, Clock, Settings, SystemClock
from gpusched_ipy.errors import UserError
from gpusched_ipy.folding import ranges
from gpusched_ipy.job import (
    ACTIVE,
    BOUND_KINDS,
    FINAL,
    PRIORITY_RANGE,
    Job,
    JobKind,
    JobSpec,
    JobState,
    effective_priority,
)
from gpusched_ipy.locks import is_alive
from gpusched_ipy.naming import named
from gpusched_ipy.optionvalues import parse_priority
from gpusched_ipy.queueview import QueueView
from gpusched_ipy.reap import orphans, reap
from gpusched_ipy.statedir import StateDir, open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.submission import Composer, Draft, Submission, Work
from gpusched_ipy.summon import ensure_agent
from gpusched_ipy.wishes import AT_ONCE
from gpusched_ipy.writelock import GIVE_UP_S

if TYPE_CHECKING:  # loaded where readings and decisions are wanted: a submit is to be quick
    from gpusched_ipy.monitor import Monitor
    from gpusched_ipy.preview import Preview

# How long a reading may take when a submit asks whether the machine could ever run the job.
_READING_S = 3.0
# While waiting, how often it is made sure that somebody is left who goes on with the queue.
_MEND_S = 1.0


_OPEN = frozenset(JobState) - FINAL
_ENDED_BADLY = FINAL - {JobState.COMPLETED}

# Inside the class below the name ``list`` is its method.
_Jobs = list[Job]
_Ids = list[int]


class Queue(QueueView):
    """The queue of this user on this machine.

    Args:
        settings: those in force when None.
        store: the record; opened in the state directory of the settings when None.
        monitor: asked only whether a job could ever fit; made when first needed when None.
        owner: where jobs come from, for people: "notebook train.ipynb", "terminal pts/3".
        own_python: commands find the programs beside this interpreter first: "python" is then the
            notebook's own, also where its environment has not been activated.

    Raises:
        StateDirError, StoreError: the state directory or the record cannot be used.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
        monitor: Monitor | None = None,
        clock: Clock | None = None,
        owner: str | None = None,
        own_python: bool = False,
    ) -> None:
        settings, clock = settings or Settings.load(), clock or SystemClock()
        store = store or Store(_opened(settings), clock, patience_s=GIVE_UP_S)
        super().__init__(store, settings, clock)
        self.owner = owner or default_owner()
        self._monitor = monitor
        self._own_python = own_python

    def submit(self, argv: Sequence[str] | None = None, **asked: Any) -> Job:
        """Queue one job and return it; see :meth:`submit_all` for what can be asked.

        Raises:
            UserError: something that was asked for cannot be, a sweep included; nothing is queued.
        """
        if asked.get("sweep"):
            raise UserError("a sweep is more than one job; it cannot be used here")
        return self.submit_all(argv, **asked).jobs[0]

    def submit_all(
        self,
        argv: Sequence[str] | None = None,
        *,
        prepare: Callable[[JobSpec, Mapping[str, Any]], None] | None = None,
        undo: Callable[[str], None] | None = None,
        **asked: Any,
    ) -> Submission:
        """Queue a job, or one for each member of a sweep: all of them, or none.

        Args:
            argv: the command; with ``shell`` one line for /bin/sh.
            prepare: called for each job before it is queued, with its values (sweep) as Python has
                them; ``undo`` is given the uid of one that was prepared and is not queued.
            asked: what is to run (:class:`~gpusched_ipy.submission.Work`), and the options of a
                submit by their long names.

        Raises:
            UserError: something that was asked for cannot be; nothing is queued.
        """
        draft = self._draft(argv, asked)
        undo = undo or _nothing
        prepared: list[str] = []
        try:
            for spec, values in zip(draft.specs, draft.values, strict=True):
                prepared.append(spec.uid)
                environment.keep(self.state, spec.uid, draft.named)
                if prepare is not None:
                    prepare(spec, values)
            jobs = self.store.submit_all(draft.specs)
        except BaseException:
            for uid in prepared:
                environment.drop(self.state, uid)
                undo(uid)
            raise
        done = Submission(jobs=tuple(jobs), specs=draft.specs)
        for spec, job in zip(done.specs, done.jobs, strict=True):
            if job.spec.uid != spec.uid:
                environment.drop(self.state, spec.uid)
                undo(spec.uid)
        if any(job.kind not in BOUND_KINDS and not job.ended for job in jobs):
            ensure_agent(self.state)
        return done

    def preview(self, argv: Sequence[str] | None = None, **asked: Any) -> Preview:
        """What :meth:`submit_all` would do now, and when the jobs would start; it queues nothing.

        Raises:
            UserError: something that was asked for cannot be.
        """
        from gpusched_ipy.preview import preview

        specs = self._draft(argv, asked).specs
        return preview(specs, self.store, self._watching(), self.settings, self.clock)

    def _draft(self, argv: Sequence[str] | None, asked: Mapping[str, Any]) -> Draft:
        names = {item.name for item in fields(Work)}
        work = Work(argv=argv, **{name: asked[name] for name in names & asked.keys()})
        options = {name: value for name, value in asked.items() if name not in names}
        options.pop("dry_run", None)
        return self._composer.compose(work, options)

    @cached_property
    def _composer(self) -> Composer:
        return Composer(
            self.owner,
            self._own_python,
            self.settings.retry_delay_s,
            self.resolve,
            lambda: self._watching().read_now(_READING_S),
            self.settings.engine,
        )

    def _watching(self) -> Monitor:
        from gpusched_ipy.monitor import Monitor

        self._monitor = self._monitor or Monitor(self.settings, self.clock, self.state.root)
        return self._monitor

    # -- wishes

    def cancel(self, *references: str | int) -> _Jobs:
        """Cancel jobs: pending ones at once, running ones are interrupted, terminated, killed."""
        jobs = self._each(
            references, self.store.request_cancel, self.store.cancel_many, frozenset(JobState)
        )
        for job in jobs:
            if job.ended:
                environment.drop(self.state, job.spec.uid)
            alive = not job.ended and is_alive(self.state, job.member or "none")
            left = job.spec.engine != LOCAL if job.ended else job.kind not in BOUND_KINDS
            if left and not alive:
                # Its shim is dead, or an engine may have it: the agent ends what is left of it.
                ensure_agent(self.state)
        return jobs

    def hold(self, *references: str | int) -> _Jobs:
        """Hold pending jobs: they keep their place in line and do not start until released.

        As with every wish: of a range, a pattern or a sweep those jobs are meant to which it
        applies; a job named by its number must be one of them.
        """
        return self._hold(references, True)

    def release(self, *references: str | int) -> _Jobs:
        """Release held jobs."""
        return self._hold(references, False)

    def set_priority(self, references: Iterable[str | int], priority: int) -> _Jobs:
        """Give jobs another priority; higher runs first."""
        value = parse_priority(priority)
        jobs = self._each(
            references,
            lambda job_id: self.store.set_priority(job_id, value),
            lambda ids: self.store.prioritize_many(ids, value),
            _OPEN,
        )
        self._have_obeyed(jobs)
        return jobs

    def top(self, reference: str | int) -> Job:
        """Move a job (or a sweep) to the front: its priority becomes higher than any that waits,
        what these have gained by waiting included.

        Raises:
            UserError: there is no priority as high as that.
        """
        ids, now = set(self.resolve([reference])), self.show(reference)
        waiting = [job for job in self.list() if job.state is JobState.PENDING]
        # Where a step of aging is worth more seconds than this, the others have gained less.
        gained = partial(effective_priority, aging_s=self.settings.aging_s, mono=now.queued_mono)
        others = [
            math.floor(gained(job)) + 1 for job in waiting if not job.held and job.id not in ids
        ]
        front = max([now.priority, *others])
        if front > PRIORITY_RANGE[1]:
            raise UserError(
                f"a priority of {front} would be needed to pass all that wait, and "
                f"{PRIORITY_RANGE[1]} is the highest; hold those that are to wait, or lower theirs"
            )
        return self.set_priority([reference], front)[0]

    def requeue(self, *references: str | int) -> _Jobs:
        """Run ended jobs again: same id, behind those that wait already. Of a sweep those that have
        not completed.

        Raises:
            UserError: a job has not ended, or it is a cell whose kernel is gone.
        """
        return self._each(references, self._requeue_one, self._requeue_many, _ENDED_BADLY)

    def drain(self, why: str = "drained by its user") -> None:
        """Start nothing more; what runs goes on."""
        self.store.set_drained(why)
        self._have_obeyed(self.list())

    def resume(self) -> None:
        """Start jobs again after :meth:`drain` or a reboot."""
        self.store.set_drained(None)
        self._have_obeyed(self.list())

    # -- wait

    def wait(
        self,
        *references: str | int,
        timeout: float | None = None,
        tick: Callable[[], None] | None = None,
    ) -> _Jobs:
        """Wait until the jobs (all open ones when none is named) have ended, and return them.

        Args:
            timeout: seconds; None waits for ever.
            tick: called a few times a second while waiting (progress; it may raise).

        Raises:
            TimeoutError: they have not ended in time.
        """
        ids = self.resolve(references) if references else tuple(job.id for job in self.list())
        rang = threading.Event()
        bell = Bell(self.state.bell, rang.set)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            mended = time.monotonic()
            while not FINAL.issuperset((states := self.store.states(ids)).values()):
                if time.monotonic() - mended >= _MEND_S:
                    self.mend(states)
                    mended = time.monotonic()
                if deadline is not None and time.monotonic() >= deadline:
                    late = [number for number, state in states.items() if state not in FINAL]
                    which = f"job {late[0]} has" if len(late) == 1 else f"jobs {ranges(late)} have"
                    raise TimeoutError(f"{which} not ended in time")
                if tick is not None:
                    tick()
                # Short steps: an interrupt must reach the main thread of a notebook.
                rang.wait(0.1)
                rang.clear()
        finally:
            bell.close()
        return [self.store.job(job_id) for job_id in ids]

    def mend(self, states: Mapping[int, JobState]) -> None:
        """End what the dead have left of these jobs, and have an agent where one is needed.

        Members do so by themselves; but somebody who waits may be the last one alive.
        """
        active = [self.store.job(job_id) for job_id, state in states.items() if state in ACTIVE]
        if orphans(self.store, active):
            reap(self.store, active)
        waiting = [job_id for job_id, state in states.items() if state is JobState.PENDING]
        away = [job for job in active if job.spec.engine != LOCAL]  # nobody but an agent asks
        if away or any(self.store.job(job_id).kind not in BOUND_KINDS for job_id in waiting):
            ensure_agent(self.state)

    # -- inside

    def _hold(self, references: Iterable[str | int], held: bool) -> _Jobs:
        jobs = self._each(
            references,
            lambda job_id: self.store.set_held(job_id, held),
            lambda ids: self.store.hold_many(ids, held),
            frozenset({JobState.PENDING}),
        )
        self._have_obeyed(jobs)
        return jobs

    def _have_obeyed(self, jobs: _Jobs) -> None:
        """Have an agent for a wish about these: only it starts them, or takes them back from an
        engine."""
        if any(job.kind not in BOUND_KINDS and not job.ended for job in jobs):
            ensure_agent(self.state)

    def _each(
        self,
        references: Iterable[str | int],
        act: Callable[[int], Job],
        act_on_many: Callable[[Sequence[int]], None],
        applies: frozenset[JobState],
    ) -> _Jobs:
        """Do one thing to all that is named: in one write, or many jobs in several.

        Args:
            applies: to jobs in which states; of a group only those are meant.
        """
        asked = list(references)
        with self.store.writing():
            wanted = self._wanted(asked, applies)
            if len(wanted) <= AT_ONCE:
                return [act(job_id) for job_id in wanted]
            for job_id, fits in wanted.items():
                if not fits:
                    act(job_id)  # says why not, before anything is changed
        act_on_many([job_id for job_id, fits in wanted.items() if fits])
        return self.store.those(list(wanted))

    def _wanted(
        self, references: Iterable[str | int], applies: frozenset[JobState]
    ) -> dict[int, bool]:
        """The jobs that are meant, and to which of them it applies."""
        wanted: dict[int, bool] = {}
        for one in named(self.store, references):
            states = self.store.states(one.ids)
            fits = {number: states.get(number) in applies for number in one.ids}
            ids = one.ids if one.exact or not any(fits.values()) else filter(fits.get, one.ids)
            wanted |= {number: fits[number] for number in ids}
        return wanted

    def _requeue_many(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), AT_ONCE):
            with self.store.writing():
                for job_id in ids[start : start + AT_ONCE]:
                    self._requeue_one(job_id)

    def _requeue_one(self, job_id: int) -> Job:
        job = self.store.job(job_id)
        if not job.ended:
            raise UserError(f"job {job_id} is {job.state}; only an ended job can be queued again")
        if job.kind in BOUND_KINDS:
            raise UserError(
                f"job {job_id} is a cell of {job.spec.owner}; run the cell again there, or "
                f"%gpuq requeue {job_id} in a notebook"
                if job.kind is JobKind.CELL
                else f"job {job_id} is a block of code of {job.spec.owner}; run that again"
            )
        names = job.spec.env_names
        if names and not self.state.environment(job.spec.uid).exists():
            raise UserError(f"job {job_id} cannot be queued again: {environment.gone(names)}")
        again = self.store.requeue(job)
        ensure_agent(self.state)
        return again


def _nothing(_uid: str) -> None:
    """There is nothing to undo."""


def _opened(settings: Settings) -> StateDir:
    state = open_state_dir(settings)
    if state.note is not None:
        warnings.warn(state.note, UserWarning, stacklevel=3)
    return state


def default_owner() -> str:
    """Where a submit comes from, for people."""
    try:
        return f"terminal {os.ttyname(0).removeprefix('/dev/')}"
    except OSError:
        return f"script (pid {os.getpid()})"
