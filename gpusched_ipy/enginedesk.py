"""The queue's side of one engine: round by round it hands jobs over and brings them home.

Order, holds, dependencies and retries stay with the queue: the engine gets a small window of jobs,
those that are next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from gpusched_ipy import enginewindow, environment
from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.engines import Engine
from gpusched_ipy.engines.kept import Keeping
from gpusched_ipy.errand import Errand
from gpusched_ipy.handover import Handover
from gpusched_ipy.homecoming import Homecoming
from gpusched_ipy.job import Job, JobState, WaitReason
from gpusched_ipy.openerrands import OpenErrands
from gpusched_ipy.policy.standing import Facts
from gpusched_ipy.store import Store

_BUSY_S, _IDLE_S = 0.3, 1.0  # between two rounds
# So short, and for so long, after a job was started in what is kept: it begins at once.
_QUICK_S, _HURRY_S = 0.02, 2.0


class EngineDesk:
    """The jobs of one engine. One thread calls it.

    Args:
        root: the folder of this queue's jobs at the engine; every node sees it.
        key: the member that works here.
    """

    def __init__(
        self, engine: Engine, root: Path, store: Store, settings: Settings, clock: Clock, key: str
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._errands = OpenErrands(engine, root, store.state, clock)
        self._home = Homecoming(self._errands, store, key)
        self._keeper = engine.keeper(root) if isinstance(engine, Keeping) else None
        self._over = Handover(self._errands, store, settings, self._home.withdraw, self._keeper)
        self._hurried_mono = float("-inf")
        self._told: dict[int, WaitReason] = {}

    @property
    def busy(self) -> bool:
        """Whether a folder is open, or anything kept."""
        return bool(self._errands.all) or (self._keeper is not None and self._keeper.busy)

    def leave(self) -> None:
        """Nobody works here any more: what is kept idle is given back."""
        if self._keeper is not None:
            self._keeper.leave()

    def round(self, jobs: Iterable[Job], outcomes: Mapping[int, JobState]) -> float:
        """Look once and do what is due; seconds until the next look.

        Args:
            jobs: the open jobs of this engine.
            outcomes: the states of those that pending ones come after.
        """
        errands = self._errands
        began = errands.mono
        errands.match(jobs)
        for one in errands.live():
            errands.guarded(one, partial(self._home.collect, one))
        facts = self._facts(outcomes)
        self._end_hopeless(facts)
        wanted = enginewindow.wanted(errands.jobs.values(), facts)
        # What is kept needs no look at the engine, which may take its time.
        if self._over.start_kept(wanted, keep=not facts.drained):
            self._hurried_mono = began = errands.mono
        if wanted or errands.all:
            errands.look()
        ids = {job.id for job in wanted}
        for one in list(errands.all):
            errands.guarded(one, partial(self._home.settle, one, ids))
        if wanted and errands.up:
            self._over.fill(wanted)
        self._tell_reasons(facts, wanted)
        rest_s = _BUSY_S if errands.all else _IDLE_S
        if errands.all and errands.mono - self._hurried_mono < _HURRY_S:
            rest_s = _QUICK_S
        # Where very many wait a round takes its time: most of it is left to others.
        return max(rest_s, 4 * (errands.mono - began))

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
        for job in list(self._errands.jobs.values()):
            why = facts.never(job) if job.state is JobState.PENDING else None
            if why is not None:
                self._store.end_pending(job, JobState.CANCELLED, why.text)
                environment.drop(self._store.state, job.spec.uid)
                self._errands.jobs.pop(job.id)

    # -- what people read

    def _said(self, one: Errand | None) -> str | None:
        """What keeps a job waiting that is next, or that the engine has; None: those ahead."""
        name, health = self._errands.name, self._errands.health
        if not self._errands.up:
            why = health.text if health is not None else "it has not been asked yet"
            return f"waits for {name}: {why}"
        if one is None:
            return None
        if one.folder.submitted is not None:
            return f"{name}: {one.status.text or 'handed over'}"
        return f"waits for {name}: whether it has the job is being looked up"

    def _tell_reasons(self, facts: Facts, wanted: list[Job]) -> None:
        places = {job.id: at for at, job in enumerate(wanted)}
        by_job = {one.job_id: one for one in self._errands.live()}
        reasons = {
            job.id: enginewindow.reason(
                job, facts, places.get(job.id), self._said(by_job.get(job.id)), self._errands.name
            )
            for job in self._errands.jobs.values()
            if job.state is JobState.PENDING
        }
        news = {job: why for job, why in reasons.items() if self._told.get(job) != why}
        if news:
            self._store.set_reasons(news)
        self._told = reasons
