"""Hands the jobs that are next to one engine, a small window of them, in our own order.

Every mark is on the disk before what it stands for is done, so whoever takes over after a kill
finds each job again and hands none over twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from gpusched_ipy import environment, errand
from gpusched_ipy.config import Settings
from gpusched_ipy.engines import (
    AmbiguousError,
    EngineJob,
    EngineState,
    RejectedError,
    UnreachableError,
)
from gpusched_ipy.errand import Errand
from gpusched_ipy.errors import StateDirError, UserError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.openerrands import OpenErrands
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean

_log = logging.getLogger(__name__)

# Jobs that an engine has beyond one for each of its GPUs.
WINDOW = 2
_LONGEST = 600  # characters of a refusal


class Handover:
    """The way to one engine.

    Args:
        withdraw: takes a job back that waits there.
    """

    def __init__(
        self,
        errands: OpenErrands,
        store: Store,
        settings: Settings,
        withdraw: Callable[[Errand], None],
    ) -> None:
        self._errands = errands
        self._engine = errands.engine
        self._store = store
        self._settings = settings
        self._withdraw = withdraw

    def fill(self, wanted: list[Job]) -> None:
        """Fill the window with the jobs that are next, and try again what was not taken.

        Args:
            wanted: the pending jobs that the engine may have, the next one first.
        """
        live, jobs = {one.job_id: one for one in self._errands.live()}, self._errands.jobs
        free = self._room() - sum(self._share(jobs[at]) for at in live if at in jobs)
        crowded = False
        for job in wanted:
            one = live.get(job.id)
            if one is None and free >= self._share(job) and not crowded:
                one = errand.new_errand(self._errands.root, job, self._errands.mono)
                self._errands.all.append(one)
                free -= self._share(job)
            elif one is None and not crowded:
                crowded = True
                self._make_room(job, live)
            # One that has just been taken back has no job any more.
            if one is not None and one.job_id is not None and one.folder.submitted is None:
                self._rank()
                self._errands.guarded(one, partial(self._submit, one, job))
            if not self._errands.up:
                return
        self._rank()

    @property
    def _gpus(self) -> int:
        health = self._errands.health
        return (None if health is None else health.gpus) or 1

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
            for other in self._errands.jobs.values()
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
            self._errands.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            errand.pack(one, job, self._store.state, self._settings.log_cap)
        except (UserError, StateDirError, OSError) as exc:
            self._refuse(one, job, str(exc))
            return
        name = self._errands.name
        try:
            if not self._may_try(one):
                return
            one.folder.intend()
            native = self._engine.submit(self._order(one, job))
        except RejectedError as exc:
            self._refuse(one, job, f"{name} refuses it: {exc}")
        except AmbiguousError as exc:
            _log.warning("job %d: whether %s has it is not known: %s", job.id, name, exc)
            one.tried_mono = self._errands.mono
            self._errands.lost_touch(exc)
        except UnreachableError as exc:
            if one.tried_mono is None:
                one.folder.not_taken()
            self._errands.lost_touch(exc)
        else:
            one.folder.set_submitted(native)
            one.since_mono, one.asked = self._errands.mono, False

    def _may_try(self, one: Errand) -> bool:
        """Whether it may be handed over: not where an earlier try may have gone through."""
        if not one.folder.intended:
            return True
        found, mono = self._engine.status([one.key])[one.key], self._errands.mono
        if found.state is not EngineState.UNKNOWN:
            one.folder.set_submitted(found.native or "")
            one.seen(found, mono)
            return False
        tried = one.tried_mono = mono if one.tried_mono is None else one.tried_mono
        return mono - tried >= self._engine.capabilities().settle_s

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
        self._store.end_pending(job, JobState.FAILED, clean(why, _LONGEST))
        environment.drop(self._store.state, job.spec.uid)
        self._errands.jobs.pop(job.id, None)
        self._errands.drop(one)

    def _rank(self) -> None:
        """Our own order among those that wait there, where it has changed."""
        jobs = self._errands.jobs
        waiting = {
            one: jobs[one.job_id].priority
            for one in self._errands.live()
            if one.job_id in jobs and jobs[one.job_id].state is JobState.PENDING
        }
        steps = sorted(set(waiting.values()), reverse=True)
        changed = {}
        for one, priority in waiting.items():
            rank = steps.index(priority)
            if rank != one.rank and one.folder.submitted is not None:
                changed[one.key] = rank
            one.rank = rank
        if changed:
            self._errands.rank(changed)
