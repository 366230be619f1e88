"""Hands GPUs to code that waits for them in this process: ``with gpuqueue():``.

It begins nothing: whoever waits takes its turn by itself, and gives the GPUs back itself. A cancel
or the end of the walltime interrupts the main thread if that is who holds the GPUs; code of another
thread cannot be interrupted, it is only told.
"""

from __future__ import annotations

import os
import threading
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from gpusched_ipy.interrupts import interrupt_main, shielded, uninterrupted
from gpusched_ipy.job import Job, JobState

if TYPE_CHECKING:
    from gpusched_ipy.scheduler import Claim, Scheduler


class _Phase(Enum):
    WAITING = auto()
    CLAIMED = auto()
    HELD = auto()
    ENDED = auto()


class Turn:
    """One block of code that waits for its turn, has it, or has had it."""

    def __init__(self, uid: str, runner: AllocationRunner) -> None:
        self.uid = uid
        self.granted = threading.Event()
        self.claim: Claim | None = None
        self.job_id: int | None = None
        self.wish: JobState | None = None  # how it is to end, where somebody wants it to
        self._runner = runner
        self._phase = _Phase.WAITING
        self._lock = threading.RLock()
        self._on_main = threading.current_thread() is threading.main_thread()
        self._pid = os.getpid()
        self._walltime: threading.Timer | None = None

    @property
    def over(self) -> bool:
        """Whether there is nothing to give back; in the child of a fork it is the parent's."""
        return self._phase is _Phase.ENDED or self._pid != os.getpid()

    def granted_to(self, claim: Claim) -> bool:
        """The GPUs are ours; False: nobody waits for them any more."""
        with self._lock:
            if self._phase is not _Phase.WAITING:
                return False
            self.claim, self._phase = claim, _Phase.CLAIMED
        self.granted.set()
        return True

    def begin(self) -> bool:
        """Begin to hold the GPUs; False: the claim no longer stands, or was cancelled."""
        return uninterrupted(self._begin)

    def end(self, state: JobState, error: str | None = None, exit_code: int | None = None) -> None:
        """Give the GPUs or the place back; ending twice changes nothing.

        Raises:
            StoreError: the end cannot be recorded; the GPUs are given back all the same.
        """
        if self._pid == os.getpid():  # in the child of a fork they are the parent's
            shielded(partial(self._end, state, error, exit_code))

    def ask_back(self, state: JobState) -> None:
        """Somebody wants it to end in that state."""
        with self._lock:
            if self._phase is _Phase.ENDED:
                return
            self.wish = self.wish or state
            if self._phase is _Phase.HELD and self._on_main:
                # Under the lock: the signal is there before the block can end.
                interrupt_main()

    def _begin(self) -> bool:
        with self._lock:
            claim = self.claim
            if claim is None or self.wish is not None:
                return False
            if self._runner.scheduler.begin(claim) is None:
                self.claim, self._phase = None, _Phase.ENDED
                return False
            self._phase = _Phase.HELD
        if claim.job.request.time_s is not None:
            over = threading.Timer(claim.job.request.time_s, self.ask_back, (JobState.TIMEOUT,))
            over.daemon = True
            over.start()
            self._walltime = over
        return True

    def _end(self, state: JobState, error: str | None, exit_code: int | None) -> None:
        with self._lock:
            claim, self.claim, self._phase = self.claim, None, _Phase.ENDED
        if self._walltime is not None:
            self._walltime.cancel()
        self._runner.forget(self)
        if claim is not None:
            self._runner.scheduler.finish(claim, state=state, error=error, exit_code=exit_code)


class AllocationRunner:
    """The blocks of this process that wait for GPUs or hold them."""

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._scheduler: Scheduler | None = None

    @property
    def scheduler(self) -> Scheduler:
        """The loop that claims for them."""
        assert self._scheduler is not None
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def open(self) -> int:
        """How many wait or hold GPUs."""
        return len(self._turns)

    def expect(self, uid: str) -> Turn:
        """A block is about to queue a job of that uid."""
        turn = self._turns[uid] = Turn(uid, self)
        return turn

    def forget(self, turn: Turn) -> None:
        """The block is over."""
        self._turns.pop(turn.uid, None)

    def ready(self, job: Job) -> bool:
        """Whether somebody here waits for it."""
        return job.spec.uid in self._turns

    def start(self, claim: Claim) -> None:
        """Tell who waits that its turn has come."""
        turn = self._turns.get(claim.job.spec.uid)
        if turn is None or not turn.granted_to(claim):
            self.scheduler.finish(claim, state=JobState.CANCELLED)

    def cancel(self, job: Job) -> None:
        """Tell who waits or holds that it is no longer wanted."""
        turn = self._turns.get(job.spec.uid)
        if turn is not None:
            turn.ask_back(JobState.CANCELLED)
