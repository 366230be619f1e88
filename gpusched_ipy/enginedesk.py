"""Hands the jobs of one engine over and brings them home: the queue's side of an engine.

Order, holds, dependencies and retries stay with the queue: the engine gets a small window of jobs,
those that are next. A job stays pending here until a node has claimed its folder, and how it ended
its folder alone says. Every mark is on the disk before what it stands for is done, so whoever takes
over after a kill finds each job again and runs none twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from gpusched_ipy import enginewindow, environment, errand
from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.engines import (
    AmbiguousError,
    Engine,
    EngineJob,
    EngineState,
    Health,
    RejectedError,
    UnreachableError,
)
from gpusched_ipy.errand import Errand
from gpusched_ipy.errors import GpuSchedError, StateDirError, UserError
from gpusched_ipy.job import ACTIVE, Job, JobState, WaitReason
from gpusched_ipy.outcome import Outcome, record
from gpusched_ipy.policy.standing import Facts
from gpusched_ipy.retry import may_be_tried_again, may_requeue
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean

_log = logging.getLogger(__name__)

# Jobs that an engine has beyond one for each of its GPUs.
WINDOW = 2
_PING_S = 5.0  # the limit of one
_UP_S, _DOWN_S = 15.0, 3.0  # between two pings
_YOUNG_S, _OLD_S = 60.0, 600.0
# Seconds between two looks at the engine, by the age of the youngest job.
_LOOKS_S = (2.0, 10.0, 30.0)
# A job that is to end is ended by its node; after so long the engine is told as well.
_TELL_S = 10.0
# What has ended a job the engine says a moment after its node does.
_VERDICT_S = 10.0
_QUOTED = 300
_BUSY_S, _IDLE_S = 0.3, 1.0  # between two rounds


class EngineDesk:
    """The jobs of one engine. One thread calls it.

    Args:
        root: the folder of this queue's jobs at the engine; every node sees it.
        key: the member that works here.
    """

    def __init__(
        self, engine: Engine, root: Path, store: Store, settings: Settings, clock: Clock, key: str
    ) -> None:
        self._engine = engine
        self._name = engine.name
        self._root = root
        self._store = store
        self._settings = settings
        self._clock = clock
        self._key = key
        self._errands = errand.open_errands(root, self._mono)
        self._fresh = True
        self._health: Health | None = None
        self._pinged_mono = self._asked_mono = float("-inf")
        self._told: dict[int, WaitReason] = {}
        self._jobs: dict[int, Job] = {}
        self._troubles: dict[str, str] = {}  # what each folder was last in trouble with

    @property
    def busy(self) -> bool:
        """Whether a folder is open."""
        return bool(self._errands)

    def round(self, jobs: Iterable[Job], outcomes: Mapping[int, JobState]) -> float:
        """Look once and do what is due; seconds until the next look.

        Args:
            jobs: the open jobs of this engine.
            outcomes: the states of those that pending ones come after.
        """
        began = self._mono
        self._jobs = {job.id: job for job in jobs}
        self._match()
        for one in self._live():
            self._guarded(one, partial(self._collect, one))
        facts = self._facts(outcomes)
        self._end_hopeless(facts)
        wanted = enginewindow.wanted(self._jobs.values(), facts)
        waits = bool(wanted or self._errands)
        if waits:
            self._look_at_the_engine()
        ids = {job.id for job in wanted}
        for one in list(self._errands):
            self._guarded(one, partial(self._settle, one, ids))
        if wanted and self._up:
            self._hand_over(wanted)
        self._tell_reasons(facts, wanted)
        # Where very many wait a round takes its time: most of it is left to others.
        return max(_BUSY_S if self._errands else _IDLE_S, 4 * (self._mono - began))

    # -- what stands where

    @property
    def _mono(self) -> float:
        return self._clock.now().mono

    @property
    def _up(self) -> bool:
        return self._health is not None and self._health.up

    def _match(self) -> None:
        """Which job each folder belongs to now."""
        by_uid = {job.spec.uid: job for job in self._jobs.values()}
        for one in self._errands:
            job = by_uid.get(one.uid)
            belongs = job is not None and one.of(job) and not one.folder.revoked
            one.job_id = job.id if belongs and job is not None else None
            if self._fresh and one.job_id is not None and job is not None:
                errand.go_on(one, job, self._store.state)
                if one.folder.intended and one.folder.submitted is None:
                    one.tried_mono = self._mono
        self._fresh = False

    def _live(self) -> list[Errand]:
        return [one for one in self._errands if one.job_id is not None]

    def _facts(self, outcomes: Mapping[int, JobState]) -> Facts:
        return Facts(
            snapshot=None,
            allocations=(),
            settings=self._settings,
            now=self._clock.now(),
            ended=outcomes,
            drained=self._store.drained is not None,
        )

    def _end_hopeless(self, facts: Facts) -> None:
        for job in list(self._jobs.values()):
            why = facts.never(job) if job.state is JobState.PENDING else None
            if why is not None:
                self._store.end_pending(job, JobState.CANCELLED, why.text)
                self._jobs.pop(job.id)

    def _guarded(self, one: Errand, act: Callable[[], None]) -> None:
        """One job that cannot be read or written holds up no other."""
        try:
            act()
        except (GpuSchedError, OSError) as exc:
            if self._troubles.get(one.key) != str(exc):
                self._troubles[one.key] = str(exc)
                _log.error("%s: the job of %s waits: %s", self._name, one.key, exc)

    # -- what the folders bring

    def _collect(self, one: Errand) -> None:
        """Begin the job that a node has claimed; bring what it writes, and its end."""
        assert one.job_id is not None
        job = self._jobs[one.job_id]
        if one.folder.claimed is None:
            return
        if job.state is JobState.PENDING:
            begun = self._begin(one, job)
            if begun is None:
                return
            job = self._jobs[job.id] = begun
        errand.carry_home(one, job, self._store.state)
        result = one.folder.result()
        if result is None:
            return
        if result.ended == "engine" and not job.cancel_requested and not self._why_known(one):
            return
        errand.carry_home(one, job, self._store.state)
        errand.bring_outcome(one, job, self._store.state)
        self._end(one, job, errand.ending(result, job, one.status, self._name, self._store.state))

    def _why_known(self, one: Errand) -> bool:
        """Whether the engine has said why it has ended a job, or does not say it in time."""
        if one.result_mono is None:
            one.result_mono = self._mono
        if not self._up or self._mono - one.result_mono >= _VERDICT_S:
            return True
        self._ask([one])
        return one.ended_mono is not None

    def _begin(self, one: Errand, job: Job) -> Job | None:
        """pending → running, in one write; None where the record has moved on meanwhile."""
        errand.begin_anew(one, job, self._store.state)
        with self._store.writing():
            current = self._store.job(job.id)
            if current.state is not JobState.PENDING or not one.of(current):
                return None
            claimed = self._store.claim(current, (), member=self._key)
            begun = self._store.take_over(
                claimed.id, epoch=claimed.epoch, claimed_by=self._key, member=self._key
            )
        if not may_be_tried_again(job):
            environment.drop(self._store.state, job.spec.uid)
        return begun

    def _end(self, one: Errand, job: Job, outcome: Outcome) -> None:
        record(self._store, job, outcome)
        self._jobs.pop(job.id, None)
        self._drop(one)

    def _drop(self, one: Errand) -> None:
        one.folder.remove()
        self._troubles.pop(one.key, None)
        one.job_id = None
        self._errands.remove(one)

    # -- what the engine says

    def _look_at_the_engine(self) -> None:
        mono = self._mono
        if mono - self._pinged_mono >= (_UP_S if self._up else _DOWN_S):
            self._health = self._engine.ping(_PING_S)
            self._pinged_mono = self._mono
        asked = [one for one in self._errands if one.folder.submitted is not None]
        if asked and self._up and mono - self._asked_mono >= self._pace_s(mono, asked):
            self._ask(asked)
            self._asked_mono = self._mono

    def _pace_s(self, mono: float, asked: list[Errand]) -> float:
        if any(not one.asked for one in asked):
            return 0.0
        age_s = min(mono - one.since_mono for one in asked)
        return _LOOKS_S[(age_s > _YOUNG_S) + (age_s > _OLD_S)]

    def _ask(self, errands: list[Errand]) -> None:
        """How these stand, in one call."""
        try:
            found = self._engine.status([one.key for one in errands])
        except UnreachableError as exc:
            self._lost_touch(exc)
            return
        for one in errands:
            one.seen(found[one.key], self._mono)

    def _lost_touch(self, why: Exception) -> None:
        self._health = Health(up=False, text=clean(str(why), _QUOTED))
        self._pinged_mono = self._mono

    # -- what follows from it

    def _settle(self, one: Errand, wanted: set[int]) -> None:
        job = None if one.job_id is None else self._jobs.get(one.job_id)
        if job is None or (job.state is JobState.PENDING and job.id not in wanted):
            self._withdraw(one)
        elif job.cancel_requested:
            self._cancel(one)
        over = one.asked and one.status.state not in (EngineState.QUEUED, EngineState.RUNNING)
        if job is None or not over or one not in self._errands:
            return
        if one.folder.claimed is None:
            self._never_began(one, job)
        elif job.state in ACTIVE and one.silent(self._mono):
            self._lose(one, job)

    def _withdraw(self, one: Errand) -> None:
        """Nobody wants it any more, or not yet: take it back, or end it where it runs."""
        if not one.folder.intended:
            self._drop(one)
            return
        if not one.folder.revoke():
            if one.job_id is None:
                one.folder.ask_to_cancel()
                if one.folder.result() is not None or one.silent(self._mono):
                    self._drop(one)
                    return
                self._tell_to_end(one)
            return  # it has just begun: the next round sees it run
        one.job_id = None
        if self._tell_to_end(one):
            self._drop(one)

    def _cancel(self, one: Errand) -> None:
        one.folder.ask_to_cancel()
        if one.told_mono is None:
            one.told_mono = self._mono  # its node has some time first
        elif self._mono - one.told_mono >= _TELL_S:
            one.told_mono = None
            self._tell_to_end(one)

    def _tell_to_end(self, one: Errand) -> bool:
        """Whether the engine has been told, now or a moment ago."""
        if one.told_mono is not None and self._mono - one.told_mono < _TELL_S:
            return True
        if not self._up:
            return False
        try:
            self._engine.cancel([one.key])
        except UnreachableError as exc:
            self._lost_touch(exc)
            return False
        one.told_mono = self._mono
        return True

    def _never_began(self, one: Errand, job: Job) -> None:
        """The engine is done with it, and no node has claimed it: from now on none will."""
        status = one.status
        if one.folder.submitted is None:
            return
        settle_s = self._engine.capabilities().settle_s
        forgotten = status.state is EngineState.UNKNOWN
        if forgotten and self._mono - (one.ended_mono or self._mono) < settle_s:
            return  # a controller that comes back may know it again
        if not one.folder.revoke():
            return
        self._tell_to_end(one)
        said = _engine_log(one) or status.text
        self._drop(one)
        if forgotten:
            _log.warning("%s has forgotten job %d; it is handed over again", self._name, job.id)
            return
        by_hand = status.state is EngineState.CANCELLED
        error = f"{status.text} before it began"
        if not by_hand:
            error = (
                f"{self._name} ended it before it began: {said}; "
                f"is {self._root} seen by {status.where or 'its node'}? (setting engine_dir)"
            )
        state = JobState.CANCELLED if by_hand else JobState.FAILED
        self._store.end_pending(job, state, clean(error, 2 * _QUOTED))

    def _lose(self, one: Errand, job: Job) -> None:
        """Its node is silent, and the engine has it no more: nobody can know how it ended."""
        said = one.status.text or f"{self._name} does not have it any more"
        why = f"outcome unknown: {said}, and its node has written no result"
        self._tell_to_end(one)
        if job.cancel_requested:
            self._end(one, job, Outcome(state=JobState.CANCELLED))
        elif may_requeue(job):
            self._store.unclaim(job, f"{why}; queued again as asked", lost=True)
            self._drop(one)
        else:
            self._end(one, job, Outcome(state=JobState.LOST, error=why))

    # -- handing over

    def _hand_over(self, wanted: list[Job]) -> None:
        """Fill the window with the jobs that are next, and try again what was not taken."""
        live = {one.job_id: one for one in self._live()}
        free = self._room() - sum(self._share(self._jobs[at]) for at in live if at in self._jobs)
        crowded = False
        for job in wanted:
            one = live.get(job.id)
            if one is None and free >= self._share(job) and not crowded:
                one = errand.new_errand(self._root, job, self._mono)
                self._errands.append(one)
                free -= self._share(job)
            elif one is None and not crowded:
                crowded = True
                self._make_room(job, live)
            # One that has just been taken back has no job any more.
            if one is not None and one.job_id is not None and one.folder.submitted is None:
                self._rank()
                self._guarded(one, partial(self._submit, one, job))
            if not self._up:
                return
        self._rank()

    @property
    def _gpus(self) -> int:
        return (None if self._health is None else self._health.gpus) or 1

    def _room(self) -> int:
        """The window: jobs, or GPUs of an engine that knows no order."""
        return self._gpus + (WINDOW if self._engine.capabilities().orders else 0)

    def _share(self, job: Job) -> int:
        """What the job takes of the window."""
        if self._engine.capabilities().orders:
            return 1
        return min(max(1, job.request.gpus), self._gpus)

    def _make_room(self, job: Job, live: Mapping[int | None, Errand]) -> None:
        """Take back the last one that waits there, where ``job`` has a higher priority."""
        waiting = [
            other
            for other in self._jobs.values()
            if other.state is JobState.PENDING
            and other.priority < job.priority
            and other.id in live
            and live[other.id].status.state is EngineState.QUEUED
        ]
        if waiting:
            last = min(waiting, key=lambda other: (other.priority, -other.id))
            self._withdraw(live[last.id])

    def _submit(self, one: Errand, job: Job) -> None:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            errand.pack(one, job, self._store.state, self._settings.log_cap)
        except (UserError, StateDirError, OSError) as exc:
            self._refuse(one, job, str(exc))
            return
        try:
            if not self._may_try(one):
                return
            one.folder.intend()
            native = self._engine.submit(self._order(one, job))
        except RejectedError as exc:
            self._refuse(one, job, f"{self._name} refuses it: {exc}")
        except AmbiguousError as exc:
            _log.warning("job %d: whether %s has it is not known: %s", job.id, self._name, exc)
            one.tried_mono = self._mono
            self._lost_touch(exc)
        except UnreachableError as exc:
            if one.tried_mono is None:
                one.folder.not_taken()
            self._lost_touch(exc)
        else:
            one.folder.set_submitted(native)
            one.since_mono, one.asked = self._mono, False

    def _may_try(self, one: Errand) -> bool:
        """Whether it may be handed over: not where an earlier try may have gone through."""
        if not one.folder.intended:
            return True
        found = self._engine.status([one.key])[one.key]
        if found.state is not EngineState.UNKNOWN:
            one.folder.set_submitted(found.native or "")
            one.seen(found, self._mono)
            return False
        tried = one.tried_mono = self._mono if one.tried_mono is None else one.tried_mono
        return self._mono - tried >= self._engine.capabilities().settle_s

    def _order(self, one: Errand, job: Job) -> EngineJob:
        return EngineJob(
            key=one.key,
            folder=one.folder,
            name=job.name,
            gpus=job.request.gpus,
            gpu_type=job.request.on_gpu,
            time_s=job.request.time_s,
            rank=one.rank,
        )

    def _refuse(self, one: Errand, job: Job, why: str) -> None:
        self._store.end_pending(job, JobState.FAILED, clean(why, 2 * _QUOTED))
        environment.drop(self._store.state, job.spec.uid)
        self._jobs.pop(job.id, None)
        self._drop(one)

    def _rank(self) -> None:
        """Our own order among those that wait there, where it has changed."""
        waiting = {
            one: self._jobs[one.job_id].priority
            for one in self._live()
            if one.job_id in self._jobs and self._jobs[one.job_id].state is JobState.PENDING
        }
        steps = sorted(set(waiting.values()), reverse=True)
        changed = {}
        for one, priority in waiting.items():
            rank = steps.index(priority)
            if rank != one.rank and one.folder.submitted is not None:
                changed[one.key] = rank
            one.rank = rank
        if not changed:
            return
        try:
            self._engine.rank(changed)
        except UnreachableError as exc:
            self._lost_touch(exc)

    # -- what people read

    def _said(self, one: Errand | None) -> str | None:
        """What keeps a job waiting that is next, or that the engine has; None: those ahead."""
        if not self._up:
            why = self._health.text if self._health is not None else "it has not been asked yet"
            return f"waits for {self._name}: {why}"
        if one is None:
            return None
        if one.folder.submitted is not None:
            return f"{self._name}: {one.status.text or 'handed over'}"
        return f"waits for {self._name}: whether it has the job is being looked up"

    def _tell_reasons(self, facts: Facts, wanted: list[Job]) -> None:
        places = {job.id: at for at, job in enumerate(wanted)}
        by_job = {one.job_id: one for one in self._live()}
        reasons = {
            job.id: enginewindow.reason(
                job, facts, places.get(job.id), self._said(by_job.get(job.id)), self._name
            )
            for job in self._jobs.values()
            if job.state is JobState.PENDING
        }
        news = {job: why for job, why in reasons.items() if self._told.get(job) != why}
        if news:
            self._store.set_reasons(news)
        self._told = reasons


def _engine_log(one: Errand) -> str | None:
    """The last line that the engine itself has written into the folder."""
    try:
        lines = (one.folder.path / "engine.log").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
