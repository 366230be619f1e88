"""Hands the jobs that are next to one engine, a small window of them, in our own order.

Members of one sweep go in one call where the engine takes arrays; each stays a job of its own.
Every mark is on the disk before what it stands for is done, so whoever takes over after a kill
finds each job again and hands none over twice.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from gpusched_ipy import environment, errand
from gpusched_ipy.config import Settings
from gpusched_ipy.engines import (
    AmbiguousError,
    EngineJob,
    EngineState,
    RejectedError,
    Status,
    TakesArrays,
    UnreachableError,
    member_key,
)
from gpusched_ipy.engines.kept import GoneError, Keeper, Need
from gpusched_ipy.errand import Errand
from gpusched_ipy.errors import StateDirError, UserError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.openerrands import OpenErrands
from gpusched_ipy.statedir import private_folder
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean

_log = logging.getLogger(__name__)

# Jobs that an engine has beyond one for each of its GPUs.
WINDOW = 2
# For so long everything goes one by one after an array was refused: a site may allow a user few
# jobs at a time, and then some of them go where not all do.
_SINGLY_S = 60.0
_LONGEST = 600  # characters of a refusal


class Handover:
    """The way to one engine.

    Args:
        withdraw: takes a job back that waits there.
        keeper: what keeps what jobs have had there; None: nothing does.
    """

    def __init__(
        self,
        errands: OpenErrands,
        store: Store,
        settings: Settings,
        withdraw: Callable[[Errand], None],
        keeper: Keeper | None = None,
    ) -> None:
        self._keeper = keeper
        self._errands = errands
        self._engine = errands.engine
        self._store = store
        self._settings = settings
        self._withdraw = withdraw
        self._singly_until = float("-inf")

    def start_kept(self, wanted: list[Job], *, keep: bool) -> bool:
        """Start in what is kept the jobs that are next, as far as they fit; whether any was.

        Args:
            keep: False: what is idle there is given back.
        """
        if self._keeper is None or not (self._keeper.busy or wanted):
            return False
        live = {one.job_id: one for one in self._errands.live()}
        waiting = [job for job in wanted if _waits(live.get(job.id))]
        self._keeper.tend([Need.of(job) for job in waiting], keep=keep)
        begun = False
        for job in waiting:
            # Nobody passes one that is next and fits nothing.
            if not self._keeper.offers(Need.of(job)):
                break
            if job.id in live:
                self._withdraw(live[job.id])
                if live[job.id] in self._errands.all:
                    break
            one = errand.new_errand(self._errands.root, job, self._errands.mono)
            self._errands.all.append(one)
            if self._packed(one):
                self._errands.guarded(one, partial(self._hand_over, [one]))
            begun = True
        return begun

    def fill(self, wanted: list[Job]) -> None:
        """Fill the window with the jobs that are next, and try again what was not taken.

        Args:
            wanted: the pending jobs that the engine may have, the next one first.
        """
        due = self._due(wanted)
        self._rank()
        packed = [one for one in due if self._packed(one)]
        for some in self._parts(self._not_there(packed)):
            if not self._errands.up:
                return
            self._errands.guarded(some[0], partial(self._hand_over, some))
        self._rank()

    def _due(self, wanted: list[Job]) -> list[Errand]:
        """The errands of those that fit into the window and that the engine has not taken."""
        live, jobs = {one.job_id: one for one in self._errands.live()}, self._errands.jobs
        free = self._room() - sum(self._share(jobs[at]) for at in live if at in jobs)
        crowded, due = False, []
        for job in wanted:
            one = live.get(job.id)
            if one is None and free >= self._share(job) and not crowded:
                one = errand.new_errand(self._errands.root, job, self._errands.mono)
                self._errands.all.append(one)
                free -= self._share(job)
            elif one is None and not crowded:
                crowded = True
                self._make_room(wanted, job, live)
            if one is not None and one.folder.submitted is None:
                due.append(one)
        # One that has just been taken back has no job any more.
        return [one for one in due if one.job_id is not None]

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

    def _make_room(self, wanted: list[Job], job: Job, live: Mapping[int | None, Errand]) -> None:
        """Take back the last one that waits there, where ``job`` has a higher priority.

        One that comes before it, because it has waited for long, would only be handed over again.
        """
        waiting = [
            other
            for other in wanted[wanted.index(job) + 1 :]
            if other.priority < job.priority
            and other.id in live
            and live[other.id].status.state is EngineState.QUEUED
        ]
        if waiting:
            last = min(waiting, key=lambda other: (other.priority, -other.id))
            self._withdraw(live[last.id])

    # -- one by one, or several in one call

    def _packed(self, one: Errand) -> bool:
        """Whether its folder holds what the node needs."""
        try:
            for folder in (self._errands.root.parent, self._errands.root):
                private_folder(folder)
            errand.pack(one, self._job(one), self._store.state, self._settings.log_cap)
        except (UserError, StateDirError, OSError) as exc:
            self._errands.guarded(one, partial(self._refuse, one, str(exc)))
            return False
        return True

    def _not_there(self, due: list[Errand]) -> list[Errand]:
        """Those that may be handed over: none of which an earlier try may have gone through."""
        doubtful = [one for one in due if one.folder.intended]
        if not doubtful:
            return due
        try:
            found = self._engine.status([one.key for one in doubtful])
        except UnreachableError as exc:
            self._errands.lost_touch(exc)
            return []
        settle_s = self._engine.capabilities().settle_s
        waits = {one for one in doubtful if not self._settled(one, found[one.key], settle_s)}
        return [one for one in due if one not in waits]

    def _settled(self, one: Errand, found: Status, settle_s: float) -> bool:
        """Whether an earlier try of it has surely failed."""
        mono = self._errands.mono
        if found.state is not EngineState.UNKNOWN:
            one.folder.set_submitted(found.native or "")
            one.seen(found, mono)
            return False
        tried = one.tried_mono = mono if one.tried_mono is None else one.tried_mono
        return mono - tried >= settle_s

    def _parts(self, due: list[Errand]) -> Iterator[list[Errand]]:
        """What goes in one call each: members of one sweep that follow each other and ask for the
        same, every other job alone."""
        most = self._engine.capabilities().array_max
        if not isinstance(self._engine, TakesArrays) or self._errands.mono < self._singly_until:
            most = 1
        for kind, same in groupby(due, self._kind):
            those = list(same)
            step = most if kind is not None else 1
            for start in range(0, len(those), step):
                yield those[start : start + step]

    def _kind(self, one: Errand) -> object:
        """What is alike in those that may go together; None: it goes alone."""
        job = self._job(one)
        if job.spec.array is None or one.folder.intended:
            return None
        wish = job.request
        return job.spec.array.id, wish.gpus, wish.on_gpu, wish.time_s, one.rank

    def _hand_over(self, some: list[Errand]) -> None:
        """Hand these over in one call; the key of each stands on the disk before."""
        self._name(some)
        for one in some:
            one.folder.intend(one.key)
        try:
            natives = self._submit([self._order(one) for one in some])
        except RejectedError as exc:
            self._rejected(some, str(exc))
        except GoneError as exc:
            _log.warning("%s is handed over anew: %s", _ids(some), exc)
            self._withdraw(some[0])
        except AmbiguousError as exc:
            _log.warning("whether %s has %s is not known: %s", self._errands.name, _ids(some), exc)
            for one in some:
                one.tried_mono = self._errands.mono
            self._errands.lost_touch(exc)
        except UnreachableError as exc:
            self._not_taken(some)
            self._errands.lost_touch(exc)
        else:
            for one, native in zip(some, natives, strict=True):
                one.folder.set_submitted(native)
                one.since_mono, one.asked = self._errands.mono, False

    def _name(self, some: list[Errand]) -> None:
        """Members of an array share a name there."""
        if len(some) > 1:
            place = self._job(some[0]).spec.array
            assert place is not None
            name = f"{place.id}-{secrets.token_hex(4)}"
            for at, one in enumerate(some):
                one.key = member_key(name, at)

    def _submit(self, orders: list[EngineJob]) -> Sequence[str]:
        if len(orders) == 1:
            return [self._engine.submit(orders[0])]
        assert isinstance(self._engine, TakesArrays)
        return self._engine.submit_array(orders)

    def _rejected(self, some: list[Errand], why: str) -> None:
        """The engine will not take it; what was in an array it may take as a job of its own."""
        if some[0].key == some[0].folder.key:
            self._refuse(some[0], f"{self._errands.name} refuses it: {why}")
            return
        _log.info("%s refuses an array: %s", self._errands.name, why)
        for one in some:
            one.tried_mono = None
        self._not_taken(some)

    def _not_taken(self, some: list[Errand]) -> None:
        """The engine has surely none of them: the next round tries again."""
        for one in some:
            if one.tried_mono is None:
                one.folder.not_taken()
                one.key = one.folder.key
        if len(some) > 1:
            self._singly_until = self._errands.mono + _SINGLY_S

    def _job(self, one: Errand) -> Job:
        assert one.job_id is not None
        return self._errands.jobs[one.job_id]

    def _order(self, one: Errand) -> EngineJob:
        job = self._job(one)
        return EngineJob(
            key=one.key,
            folder=one.folder,
            name=job.name,
            gpus=job.request.gpus,
            gpu_type=job.request.on_gpu,
            time_s=job.request.time_s,
            rank=one.rank,
        )

    def _refuse(self, one: Errand, why: str) -> None:
        job = self._job(one)
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


def _ids(some: list[Errand]) -> str:
    """The jobs of these, for a log."""
    return ", ".join(f"job {one.job_id}" for one in some)


def _waits(one: Errand | None) -> bool:
    """Whether a job that is next waits for the engine's GPUs: here, or there in line."""
    return one is None or one.status.state is EngineState.QUEUED
