"""Runs queued cells on this kernel's main thread, between the user's own cells or in their place.

A cell is claimed only at a moment when it can begin. Who claims one that waits for the main thread
is the main thread itself, in a callback between cells; so a busy kernel never holds a GPU that it
cannot use. User code never runs in any other thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from gpusched_ipy import oom
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.frontend import Message
from gpusched_ipy.interrupts import interrupt_main, shielded
from gpusched_ipy.job import Job, JobState

if TYPE_CHECKING:
    from gpusched_ipy.scheduler import Claim, Scheduler
    from gpusched_ipy.transcript import Recorder

_log = logging.getLogger(__name__)

# After a cell the next one that the user has sent may be on its way: Run All must not be cut into.
SETTLE_S = 0.005


class Phase(Enum):
    """How far this kernel is with a cell."""

    WAITING = auto()
    CLAIMED = auto()  # its GPU is ours, its body has not begun
    RUNNING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Cell:
    """One queued cell of this kernel."""

    uid: str
    parent: Message  # the request that queued it: its output goes there
    code: str  # the cell as it stands in the notebook
    in_place: bool = False  # it holds the main thread while it waits
    cell_id: str | None = None
    array: str | None = None  # the sweep that it is a member of; those share one badge
    job_id: int = 0
    phase: Phase = Phase.WAITING
    claim: Claim | None = None
    ending: JobState | None = None  # what it becomes when it heeds the interrupt
    depth: int = 0  # of its body among the cells that run, one inside the other
    entered: bool = False  # IPython has announced the body
    granted: threading.Event = field(default_factory=threading.Event)
    recorded: threading.Event = field(default_factory=threading.Event)
    recorder: Recorder | None = None
    ended_mono: float = 0.0

    @property
    def mark(self) -> dict[str, Any]:
        """What tells its request from any other: the cell, and the claim it is sent for."""
        return {"uid": self.uid, "epoch": self.claim.job.epoch if self.claim else 0}

    @property
    def bound(self) -> bool:
        """Whether only this kernel can run it."""
        return True

    @property
    def msg_id(self) -> str:
        """The request that queued it."""
        return str(self.parent.get("header", {}).get("msg_id", ""))


@dataclass(frozen=True, slots=True)
class Ending:
    """How a cell has ended."""

    state: JobState
    error: str | None = None
    oom: bool = False  # it ran out of GPU memory
    interrupted: bool = False  # by its user: it is not tried again


class Host(Protocol):
    """The kernel as this runner needs it."""

    @property
    def main_is_free(self) -> bool:
        """Whether the main thread runs no cell."""
        ...

    @property
    def settled_s(self) -> float:
        """Seconds since the main thread began or ended a cell."""
        ...

    def on_main(self, call: Callable[[], None], delay_s: float = 0.0) -> None:
        """Have the main thread call that between two events of its loop."""
        ...

    def can_send(self, cell: Cell) -> bool:
        """Whether :meth:`send` would work now; if not, the scheduler is woken when it does."""
        ...

    def can_run_here(self, cell: Cell) -> bool:
        """Whether the body can run inside the cell that waits for it."""
        ...

    def send(self, cell: Cell) -> None:
        """Have the kernel run the cell now."""
        ...

    def granted(self, claim: Claim) -> None:
        """The body of a cell is about to begin on these GPUs."""
        ...

    def changed(self) -> None:
        """Something about a cell has changed."""
        ...


class CellRunner:
    """The queued cells of one kernel. At most one of them has a GPU at any time."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.RLock()
        self._turn_asked = False
        self._turn_missed = False
        self._turning = False
        self._in_wait = False  # the main thread lends itself while it waits for jobs
        self.scheduler: Scheduler | None = None
        self.cells: dict[str, Cell] = {}
        self.active: Cell | None = None  # the one that has a claim

    # -- the scheduler's side

    def ready(self, job: Job) -> bool:
        """Whether the main thread stands ready for this cell, and nothing else is asked of it."""
        cell = self.cells.get(job.spec.uid)
        if cell is None or cell.phase is not Phase.WAITING or self.active is not None:
            return False
        if cell.in_place:
            return True
        if self._turning:
            main = threading.current_thread() is threading.main_thread()
            there = self._host.can_run_here if self._in_wait else self._host.can_send
            return main and there(cell)
        if self._host.can_send(cell):
            self._ask_for_turn()
        return False

    def start(self, claim: Claim) -> None:
        """Let the cell begin; one that has given up meanwhile ends here."""
        cell = self.cells.get(claim.job.spec.uid)
        with self._lock:
            if cell is None or cell.phase is not Phase.WAITING:
                self._scheduler.finish(claim, state=JobState.CANCELLED)
                return
            cell.claim, cell.phase, self.active = claim, Phase.CLAIMED, cell
        cell.granted.set()
        if not cell.in_place and not self._in_wait:
            self._host.send(cell)
        self._host.changed()

    def cancel(self, job: Job) -> None:
        """End a claimed cell that has not begun; interrupt one that runs, and nothing else."""
        cell = self.cells.get(job.spec.uid)
        if cell is None:
            return
        cell.ending = JobState.CANCELLED if job.cancel_requested else JobState.TIMEOUT
        with self._lock:
            if cell.phase is Phase.CLAIMED:
                self._close(cell, Ending(cell.ending))
            elif cell.phase is Phase.RUNNING:
                # Under the lock: no other body can begin before the signal is there.
                interrupt_main()
        if cell.phase is Phase.RUNNING:
            self._host.on_main(_nothing)  # a body that idles in an await wakes up and sees it
        self._host.changed()

    # -- the main thread's side

    def begin(self, uid: str, epoch: int | None, depth: int) -> bool:
        """The body of a claimed cell begins; False: the claim no longer stands, do not run it.

        Args:
            uid: the cell.
            epoch: of the claim that the request was sent for; None: whatever claim it has.
            depth: of the body among the cells that run.
        """
        return shielded(partial(self._begin, uid, epoch, depth))

    def cell_begins(self, depth: int) -> None:
        """Some cell begins: one that was sent but has lost the race gives its GPU back."""
        cell = self.active
        if cell is None:
            return
        if cell.phase is Phase.RUNNING:
            if depth > cell.depth or not cell.entered:
                cell.entered = True
                return
            # An interrupt came between the end of the body and our hearing of it.
            self._body_ended(cell, None)
        elif cell.phase is Phase.CLAIMED and not cell.in_place and not self._in_wait:
            self.give_back(cell, "its kernel took another cell first")

    def cell_ended(self, result: Any, depth: int) -> None:
        """Some cell has ended; if it was the queued one, say how and let the next one start."""
        cell = self.active
        if cell is not None and cell.phase is Phase.RUNNING and depth < cell.depth:
            self._body_ended(cell, result)
        if self._turn_missed:
            self._turn_missed = False
            self._ask_for_turn()

    def give_up(self, cell: Cell) -> bool:
        """A cell that waits in its place stops waiting; False: it has been claimed already."""
        with self._lock:
            if cell.phase is Phase.CLAIMED:
                self._close(cell, Ending(JobState.CANCELLED))
            if cell.phase is not Phase.WAITING:
                return False
            cell.phase = Phase.ENDED
            return True

    def give_back(self, cell: Cell, why: str) -> None:
        """A claimed cell that has not begun waits again."""
        shielded(partial(self._give_back, cell, why))
        self._host.changed()

    def lend_main(self) -> Cell | None:
        """For a main thread that waits for jobs: claim a cell of this kernel that can run now."""
        self._in_wait = True
        try:
            self._tick()
        finally:
            self._in_wait = False
        cell = self.active
        return cell if cell is not None and cell.phase is Phase.CLAIMED else None

    # -- inside

    @property
    def _scheduler(self) -> Scheduler:
        assert self.scheduler is not None
        return self.scheduler

    def _begin(self, uid: str, epoch: int | None, depth: int) -> bool:
        with self._lock:
            cell = self.active
            if cell is None or cell.uid != uid or cell.claim is None:
                return False
            if epoch is not None and cell.claim.job.epoch != epoch:
                return False
            if cell.phase is Phase.RUNNING:
                return True  # IPython transforms the text of a cell more than once
            if not self._take_over(cell, cell.claim):
                return False
            cell.phase, cell.depth, cell.entered = Phase.RUNNING, depth, cell.in_place
        self._host.changed()
        return True

    def _body_ended(self, cell: Cell, result: Any) -> None:
        ending = _outcome(result, cell)

        def close() -> None:
            with self._lock:
                self._close(cell, ending)

        shielded(close)
        self._host.changed()

    def _give_back(self, cell: Cell, why: str) -> None:
        with self._lock:
            if cell.phase is not Phase.CLAIMED or cell.claim is None:
                return
            claim, cell.claim, self.active = cell.claim, None, None
            cell.phase = Phase.WAITING
            cell.granted.clear()
            self._scheduler.give_back(claim, why)

    def _take_over(self, cell: Cell, claim: Claim) -> bool:
        try:
            if self._scheduler.begin(claim) is None:
                cell.phase, cell.claim, self.active = Phase.ENDED, None, None
                return False
            self._host.granted(claim)
        except GpuSchedError as exc:
            self._close(cell, Ending(JobState.FAILED, str(exc)))
            raise
        return True

    def _close(self, cell: Cell, ending: Ending) -> None:
        """The end of a cell that has a claim; one that is tried again waits again."""
        claim, cell.claim = cell.claim, None
        cell.phase, cell.ended_mono, self.active = Phase.ENDED, time.monotonic(), None
        if claim is None:
            return
        job = self._scheduler.finish(
            claim,
            state=ending.state,
            error=ending.error,
            oom=ending.oom,
            retry=not ending.interrupted,
        )
        if job is not None and job.state is JobState.PENDING:
            cell.phase, cell.ending, cell.entered = Phase.WAITING, None, False
            cell.granted.clear()
            cell.recorded.clear()
            self._scheduler.wake()

    def _ask_for_turn(self) -> None:
        if not self._turn_asked:
            self._turn_asked = True
            self._host.on_main(self._turn)

    def _turn(self) -> None:
        """Between two cells, on the main thread: claim the next one if it is its turn."""
        self._turn_asked = False
        if not self._host.main_is_free:
            self._turn_missed = True
        elif self._host.settled_s < SETTLE_S:
            self._turn_asked = True
            self._host.on_main(self._turn, SETTLE_S)
        else:
            self._tick()

    def _tick(self) -> None:
        self._turning = True
        try:
            self._scheduler.tick()
        except GpuSchedError as exc:
            _log.error("the queue cannot be worked on: %s", exc)
        finally:
            self._turning = False


def _nothing() -> None:
    """Wakes a loop."""


def _outcome(result: Any, cell: Cell) -> Ending:
    """How a body ended, by what IPython says of it (None: cancelled while it awaited)."""
    error: BaseException | None = KeyboardInterrupt()
    if result is not None:
        error = result.error_before_exec or result.error_in_exec
    if error is None:
        return Ending(JobState.COMPLETED)
    interrupted = isinstance(error, (KeyboardInterrupt, asyncio.CancelledError))
    if interrupted and cell.ending is not None:
        why = "its walltime ran out" if cell.ending is JobState.TIMEOUT else None
        return Ending(cell.ending, why, interrupted=True)
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    short = oom.in_exception(error)
    return Ending(
        JobState.FAILED, f"{oom.LEAD if short else ''}{text}", oom=short, interrupted=interrupted
    )
