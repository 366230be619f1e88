"""The errands that are open at one engine, the jobs that they belong to, and what the engine says.

Handing over and bringing home both work on them. Nothing here moves a job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gpusched_ipy import errand
from gpusched_ipy.config import Clock
from gpusched_ipy.engines import Engine, Health, UnreachableError
from gpusched_ipy.errand import Errand
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import Job
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.text import clean

_log = logging.getLogger(__name__)

_PING_S = 5.0  # the limit of one
_UP_S, _DOWN_S = 15.0, 3.0  # between two pings
_YOUNG_S, _OLD_S = 60.0, 600.0
# Seconds between two looks at the engine, by the age of the youngest job.
_LOOKS_S = (2.0, 10.0, 30.0)
# An engine that has been told to end a job is told again after so long.
TELL_S = 10.0
_QUOTED = 300


class OpenErrands:
    """What is open at one engine. One thread calls it.

    Args:
        root: the folder of this queue's jobs at the engine; every node sees it.
    """

    def __init__(self, engine: Engine, root: Path, state: StateDir, clock: Clock) -> None:
        self.engine = engine
        self.name = engine.name
        self.root = root
        self.all = errand.open_errands(root, clock.now().mono)
        self.jobs: dict[int, Job] = {}
        self.health: Health | None = None
        self._state = state
        self._clock = clock
        self._fresh = True
        self._pinged_mono = self._asked_mono = float("-inf")
        self._troubles: dict[str, str] = {}  # what each folder was last in trouble with

    @property
    def mono(self) -> float:
        """Now."""
        return self._clock.now().mono

    @property
    def up(self) -> bool:
        """Whether the engine answers, as far as we know."""
        return self.health is not None and self.health.up

    # -- which job each belongs to

    def match(self, jobs: Iterable[Job]) -> None:
        """These are the engine's open jobs now."""
        self.jobs = {job.id: job for job in jobs}
        by_uid = {job.spec.uid: job for job in self.jobs.values()}
        for one in self.all:
            job = by_uid.get(one.uid)
            belongs = job is not None and one.of(job) and not one.folder.revoked
            one.job_id = job.id if belongs and job is not None else None
            if self._fresh and one.job_id is not None and job is not None:
                errand.go_on(one, job, self._state)
                if one.folder.intended and one.folder.submitted is None:
                    one.tried_mono = self.mono
        self._fresh = False

    def live(self) -> list[Errand]:
        """Those that a job asks for."""
        return [one for one in self.all if one.job_id is not None]

    def drop(self, one: Errand) -> None:
        """It is over: its folder goes."""
        one.folder.remove()
        self._troubles.pop(one.folder.key, None)
        one.job_id = None
        self.all.remove(one)

    def guarded(self, one: Errand, act: Callable[[], None]) -> None:
        """One job that cannot be read or written holds up no other."""
        try:
            act()
        except (GpuSchedError, OSError) as exc:
            key = one.folder.key
            if self._troubles.get(key) != str(exc):
                self._troubles[key] = str(exc)
                _log.error("%s: the job of %s waits: %s", self.name, key, exc)

    # -- what the engine says, and is told

    def look(self) -> None:
        """Ask the engine how it is, and how our jobs stand there, where either is due."""
        mono = self.mono
        if mono - self._pinged_mono >= (_UP_S if self.up else _DOWN_S):
            self.health = self.engine.ping(_PING_S)
            self._pinged_mono = self.mono
        asked = [one for one in self.all if one.folder.submitted is not None]
        if asked and self.up and mono - self._asked_mono >= self._pace_s(mono, asked):
            self.ask(asked)
            self._asked_mono = self.mono

    def _pace_s(self, mono: float, asked: list[Errand]) -> float:
        if any(not one.asked for one in asked):
            return 0.0
        age_s = min(mono - one.since_mono for one in asked)
        return _LOOKS_S[(age_s > _YOUNG_S) + (age_s > _OLD_S)]

    def ask(self, errands: list[Errand]) -> None:
        """How these stand, in one call."""
        try:
            found = self.engine.status([one.key for one in errands])
        except UnreachableError as exc:
            self.lost_touch(exc)
            return
        for one in errands:
            one.seen(found[one.key], self.mono)

    def tell_to_end(self, one: Errand) -> bool:
        """Whether the engine has been told, now or a moment ago."""
        if one.told_mono is not None and self.mono - one.told_mono < TELL_S:
            return True
        if not self.up:
            return False
        try:
            self.engine.cancel([one.key])
        except UnreachableError as exc:
            self.lost_touch(exc)
            return False
        one.told_mono = self.mono
        return True

    def rank(self, ranks: Mapping[str, int]) -> None:
        """Have the engine order those that wait there."""
        try:
            self.engine.rank(ranks)
        except UnreachableError as exc:
            self.lost_touch(exc)

    def lost_touch(self, why: Exception) -> None:
        """It is left alone until a ping says that it is back."""
        self.health = Health(up=False, text=clean(str(why), _QUOTED))
        self._pinged_mono = self.mono
