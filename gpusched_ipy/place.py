"""A cell that holds its place: the main thread waits in short steps until the cell may go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from gpusched_ipy.badge import Around
from gpusched_ipy.board import Board
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import FrontEnd
from gpusched_ipy.interrupts import shielded
from gpusched_ipy.job import Job, WaitCode
from gpusched_ipy.runners.cell import Cell, CellRunner, Phase
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean, format_duration

_STEP_S = 0.1  # the longest that an interrupt of a waiting cell takes
_SOON = frozenset({WaitCode.NO_READING, WaitCode.STARTING_SOON})  # over in a moment
_SAY_S = 1.0  # shorter waits are not worth a line in the notebook


class Place:
    """Waits for the turn of cells that stay where they are.

    Args:
        labels: what people call the GPUs of these UUIDs.
        record: keeps what a cell shows from now on, where that can be heard.
    """

    def __init__(
        self,
        front: FrontEnd,
        store: Store,
        runner: CellRunner,
        board: Board,
        labels: Callable[[Sequence[str]], Sequence[str]],
        record: Callable[[Cell], None],
    ) -> None:
        self._front = front
        self._store = store
        self._runner = runner
        self._board = board
        self._labels = labels
        self._record = record

    def hold(self, cell: Cell, job: Job, depth: int, first: Callable[[], object]) -> None:
        """Wait for the cell's turn; an interrupt gives its place up.

        Args:
            depth: of the body among the cells that run.
            first: is done before the wait; an interrupt of it gives the place up as well.

        Raises:
            UserError: the job was cancelled while it waited.
        """
        try:
            first()
            self._await_turn(cell, job)
            self._record(cell)
            if not self._runner.begin(cell.uid, None, depth):
                raise UserError(f"job {job.id} was cancelled before it began")
            self.say_wait(job.id)
        except BaseException:
            if self._runner.give_up(cell):
                shielded(partial(self._store.request_cancel, job.id))
            self.leave(cell)
            raise

    def leave(self, cell: Cell) -> None:
        """If the cell is over: its last word. What it has shown may still be on its way."""
        if cell.phase is Phase.ENDED:
            self._board.refresh(cell)
            if cell.recorder is None:
                self._board.forget(cell)

    def _await_turn(self, cell: Cell, job: Job) -> None:
        shown = not self._front.attended
        told = self._front.kernel is not None
        while not cell.granted.wait(_STEP_S):
            now = self._store.job(job.id)
            if now.ended:
                why = f": {now.error}" if now.error else " while it waited"
                raise UserError(f"job {job.id} was {now.state}{why}")
            if not told and now.reason is not None and now.reason.code not in _SOON:
                why = clean(now.reason.text)
                self._front.tell(f"gpuqueue: job {job.id} waits: {why}; Ctrl-C gives its place up")
                told = True
            if not shown:
                self._board.put_up(cell, now, Around())
                shown = True
            self._board.refresh(cell)

    def say_wait(self, job_id: int) -> None:
        """In a headless run, where no badge tells it: how long the cell has waited."""
        job = self._store.job(job_id)
        waited = (job.started_at or job.submitted_at) - job.submitted_at
        if waited >= _SAY_S and not self._front.attended:
            gpus = ", ".join(self._labels(job.gpus))
            self._front.tell(f"gpuqueue: job {job.id} waited {format_duration(waited)} for {gpus}")
