"""Brings the jobs of one engine home: their begin, what they write and their end; takes back those
that are to end, or are wanted no more.

A job stays pending here until a node has claimed its folder; how it ended its folder alone says.
"""

from __future__ import annotations

import logging

from gpusched_ipy import environment, errand
from gpusched_ipy.engines import EngineState
from gpusched_ipy.errand import Errand
from gpusched_ipy.job import ACTIVE, Job, JobState
from gpusched_ipy.openerrands import TELL_S, OpenErrands
from gpusched_ipy.outcome import Outcome, record
from gpusched_ipy.retry import may_be_tried_again, may_requeue
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean

_log = logging.getLogger(__name__)

# What has ended a job the engine says a moment after its node does.
_VERDICT_S = 10.0
_LONGEST = 600  # characters of what the record keeps about an end


class Homecoming:
    """The way home from one engine.

    Args:
        key: the member that works here.
    """

    def __init__(self, errands: OpenErrands, store: Store, key: str) -> None:
        self._errands = errands
        self._store = store
        self._key = key

    # -- what the folders bring

    def collect(self, one: Errand) -> None:
        """Begin the job that a node has claimed; bring what it writes, and its end."""
        assert one.job_id is not None
        job = self._errands.jobs[one.job_id]
        claim = one.folder.claimed
        if claim is None:
            return
        if not claim and not one.claim_seen:
            one.claim_seen = True  # by whom is being written just now
            return
        if job.state is JobState.PENDING:
            begun = self._begin(one, job)
            if begun is None:
                return
            job = self._errands.jobs[job.id] = begun
        errand.carry_home(one, job, self._store.state)
        result = one.folder.result()
        if result is None:
            return
        if result.ended == "engine" and not job.cancel_requested and not self._why_known(one):
            return
        errand.carry_home(one, job, self._store.state)
        errand.bring_outcome(one, job, self._store.state)
        name = self._errands.name
        self._end(one, job, errand.ending(result, job, one.status, name, self._store.state))

    def _why_known(self, one: Errand) -> bool:
        """Whether the engine has said why it has ended a job, or does not say it in time."""
        mono = self._errands.mono
        if one.result_mono is None:
            one.result_mono = mono
        if not self._errands.up or mono - one.result_mono >= _VERDICT_S:
            return True
        self._errands.ask([one])
        return one.ended_mono is not None

    def _begin(self, one: Errand, job: Job) -> Job | None:
        """pending → running, in one write; None where the record has moved on meanwhile."""
        errand.begin_anew(one, job, self._store.state)
        with self._store.writing():
            current = self._store.job(job.id)
            if current.state is not JobState.PENDING or not one.of(current):
                return None
            place = errand.place_of(one, current)
            claimed = self._store.claim(current, (), member=self._key, place=place)
            begun = self._store.take_over(
                claimed.id, epoch=claimed.epoch, claimed_by=self._key, member=self._key
            )
        if not may_be_tried_again(job):
            environment.drop(self._store.state, job.spec.uid)
        return begun

    def _end(self, one: Errand, job: Job, outcome: Outcome) -> None:
        record(self._store, job, outcome)
        self._errands.jobs.pop(job.id, None)
        self._errands.drop(one)

    # -- what follows from what the engine says, and from what is wanted

    def settle(self, one: Errand, wanted: set[int]) -> None:
        """Take back what is not wanted, end what is to end, and see what the engine has given up.

        Args:
            wanted: the pending jobs that the engine may have.
        """
        job = None if one.job_id is None else self._errands.jobs.get(one.job_id)
        if job is None or (job.state is JobState.PENDING and job.id not in wanted):
            self.withdraw(one)
        elif job.cancel_requested:
            self._cancel(one)
        over = one.asked and one.status.state not in (EngineState.QUEUED, EngineState.RUNNING)
        if job is None or not over or one not in self._errands.all:
            return
        if one.folder.claimed is None:
            self._never_began(one, job)
        elif job.state in ACTIVE and one.silent(self._errands.mono):
            self._lose(one, job)

    def withdraw(self, one: Errand) -> None:
        """Nobody wants it any more, or not yet: take it back, or end it where it runs."""
        if not one.folder.intended:
            self._errands.drop(one)
            return
        if not one.folder.revoke():
            if one.job_id is None:
                one.folder.ask_to_cancel()
                if one.folder.result() is not None or one.silent(self._errands.mono):
                    self._errands.drop(one)
                    return
                self._errands.tell_to_end(one)
            return  # it has just begun: the next round sees it run
        one.job_id = None
        if self._errands.tell_to_end(one):
            self._errands.drop(one)

    def _cancel(self, one: Errand) -> None:
        one.folder.ask_to_cancel()
        if one.told_mono is None:
            one.told_mono = self._errands.mono  # its node has some time first
        elif self._errands.mono - one.told_mono >= TELL_S:
            one.told_mono = None
            self._errands.tell_to_end(one)

    def _never_began(self, one: Errand, job: Job) -> None:
        """The engine is done with it, and no node has claimed it: from now on none will."""
        status, mono, name = one.status, self._errands.mono, self._errands.name
        if one.folder.submitted is None:
            return
        settle_s = self._errands.engine.capabilities().settle_s
        forgotten = status.state is EngineState.UNKNOWN
        if forgotten and mono - (one.ended_mono or mono) < settle_s:
            return  # a controller that comes back may know it again
        if not one.folder.revoke():
            return
        self._errands.tell_to_end(one)
        said = _engine_log(one) or status.text
        self._errands.drop(one)
        if forgotten:
            _log.warning("%s has forgotten job %d; it is handed over again", name, job.id)
            return
        by_hand = status.state is EngineState.CANCELLED
        error = f"{status.text} before it began"
        if not by_hand:
            root, node = self._errands.root, status.where or "its node"
            error = (
                f"{name} ended it before it began: {said}; "
                f"is {root} seen by {node}? (setting engine_dir)"
            )
        state = JobState.CANCELLED if by_hand else JobState.FAILED
        self._store.end_pending(job, state, clean(error, _LONGEST))
        environment.drop(self._store.state, job.spec.uid)

    def _lose(self, one: Errand, job: Job) -> None:
        """Its node is silent, and the engine has it no more: nobody can know how it ended."""
        said = one.status.text or f"{self._errands.name} does not have it any more"
        why = f"outcome unknown: {said}, and its node has written no result"
        self._errands.tell_to_end(one)
        if job.cancel_requested:
            self._end(one, job, Outcome(state=JobState.CANCELLED))
        elif may_requeue(job):
            self._store.unclaim(job, f"{why}; queued again as asked", lost=True)
            self._errands.drop(one)
        else:
            self._end(one, job, Outcome(state=JobState.LOST, error=why))


def _engine_log(one: Errand) -> str | None:
    """The last line that the engine itself has written into the folder."""
    try:
        lines = (one.folder.path / "engine.log").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
