"""Takes cells of one kernel into the queue, and waits for jobs in one: what the magics ask for.

Each is queued whole or not at all. When a cell begins, the runner says; how it looks meanwhile, the
board.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gpusched_ipy import cellsyntax
from gpusched_ipy.badge import Around, heading
from gpusched_ipy.errors import JobFailedError, UserError
from gpusched_ipy.interrupts import shielded
from gpusched_ipy.isolated import Away
from gpusched_ipy.job import Job, JobKind, JobState
from gpusched_ipy.options import Isolation
from gpusched_ipy.records import how_it_stands
from gpusched_ipy.replay import Stage
from gpusched_ipy.runners.cell import Cell, Phase
from gpusched_ipy.submission import Submission

if TYPE_CHECKING:
    from gpusched_ipy.frontend import Message
    from gpusched_ipy.kernel import KernelSession

_TRIES = ("retries", "requeue", "retry_oom")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a queued cell asks for: the options by their long names, and its body."""

    fields: Mapping[str, Any]
    body: str
    isolation: Isolation | None = None  # it runs in a Python of its own


class CellQueue:
    """The cells of ``session`` on their way into the queue."""

    def __init__(self, session: KernelSession) -> None:
        self._session = session
        self._front = session.front
        self._store = session.store
        self._runner = session.runner
        self._board = session.board
        self._isolated = session.isolated
        self._pin = session.pin

    def defer(self, asked: Asked, line: str) -> Job:
        """Queue the running cell to run later, and put its badge up.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        sent = str(self._front.parent.get("content", {}).get("code", ""))
        cell = Cell(
            uid=uuid.uuid4().hex,
            parent=self._front.parent,
            code=cellsyntax.source(sent, line, asked.body),
            cell_id=self._front.cell_id,
        )
        job = self._submit(cell, asked)
        self._session.hear()
        replaced = self._replace(cell)
        self._board.put_up(cell, job, Around(replaced=replaced))
        self._session.changed()
        return job

    def defer_several(self, asked: Asked, line: str) -> Job:
        """Queue the running cell once for each value of its sweep, or not at all where its key
        stands already.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        done = self._submit_several(asked, line)
        self._session.hear()
        queued = {job.spec.uid for job in done.jobs}
        older = [
            other
            for other in self._older(self._front.cell_id, self._front.parent)
            if other.uid not in queued
        ]
        around = Around(replaced=self._cancel(older), note=done.note)
        if done.array is not None:
            self._board.put_up_sweep(done.array, self._front.parent, around)
        elif (cell := self._runner.cells.get(done.jobs[0].spec.uid)) is not None:
            self._board.put_up(cell, done.jobs[0], around)
        elif done.note is not None:
            self._front.tell(f"gpuqueue: {done.note}")
        self._session.changed()
        return done.jobs[0]

    def run_several(self, asked: Asked, line: str) -> None:
        """The same for a cell that holds its place: returns when all of it is over.

        Raises:
            UserError: it cannot be queued, or some of it has not completed.
        """
        if self._front.kernel is None:
            raise UserError(
                "a sweep or a key of cells needs a notebook; use --isolate or %gpurun here"
            )
        if self._session.running_claim is not None:
            raise UserError("this cell has its turn already; it cannot wait for another one")
        done = self._submit_several(self._tried_once(asked), line)
        if done.note is not None:
            self._front.tell(f"gpuqueue: {done.note}")
        self._session.hear()
        if self._front.attended and done.array is not None:
            self._board.put_up_sweep(done.array, self._front.parent, Around())
        try:
            with self._session.lending.waiting():
                self._session.changed()
                self._session.several.follow(self._session.queue, done, self._session.lending.lend)
        finally:
            self._session.changed()

    def preview(self, asked: Asked) -> None:
        """Say what would become of the running cell, and when; nothing is queued.

        Raises:
            UserError: a submit would be refused.
        """
        if asked.isolation is not None:
            self._isolated.check(asked.isolation, asked.fields)
        found = self._session.queue.preview(
            kind=JobKind.CELL if asked.isolation is None else JobKind.ISOLATED,
            code=asked.body,
            home=self._session.membership.key if asked.isolation is None else None,
            **asked.fields,
        )
        print(found)

    def _submit_several(self, asked: Asked, line: str) -> Submission:
        scheduler = self._session.enrol()
        self._pin.look(self._session.monitor, asked.fields.get("gpus", 1))
        sent = str(self._front.parent.get("content", {}).get("code", ""))
        code = cellsyntax.source(sent, line, asked.body)
        done = self._session.several.submit(self._session.queue, code, asked.body, asked.fields)
        scheduler.wake()
        return done

    def isolate(self, asked: Asked, line: str, *, wait: bool) -> Job:
        """Queue the running cell to run in a Python of its own; ``wait`` holds its place.

        Raises:
            UserError: it cannot be, and nothing is queued; or it has not ended well.
            RemoteError: what its body has raised, under its own name.
        """
        assert asked.isolation is not None
        code = str(self._front.parent.get("content", {}).get("code", ""))
        source = cellsyntax.source(code, line, asked.body)
        if asked.fields.get("sweep"):
            sent = self._isolated.send_sweep(source, asked.body, asked.isolation, asked.fields)
            return self._follow_isolated(sent, wait=wait)
        away = self._isolated.send(source, asked.body, asked.isolation, asked.fields)
        if wait:
            return self._await_isolated(away)
        self._session.sending()
        self._isolated.show(away, self._session.onward.run_again(away.cell_id))
        return self._session.queue.show(away.job_id)

    def _follow_isolated(self, sent: Sequence[Away], *, wait: bool) -> Job:
        """The members of a sweep: each below a heading where this cell waits, else by its badge."""
        if wait:
            try:
                for away in sent:
                    self._front.show_here(heading(self._session.queue.show(away.job_id)))
                    self._await_isolated(away)
            except BaseException:
                shielded(partial(self._session.queue.cancel, *(away.job_id for away in sent)))
                raise
        else:
            self._session.sending()
            replaced = self._session.onward.run_again(sent[0].cell_id)
            for away in sent:
                self._isolated.show(away, replaced)
                replaced = ()
        return self._session.queue.show(sent[0].job_id)

    def _await_isolated(self, away: Away) -> Job:
        stage = Stage()
        job = self._isolated.await_here(away, stage.show)
        self._session.place.say_wait(job.id)
        if job.state is JobState.COMPLETED:
            return job
        if stage.error is not None and job.state is JobState.FAILED:
            raise stage.error
        raise JobFailedError(job.id, job.state, f"job {job.id}: {how_it_stands(job)}")

    def requeue(self, job: Job) -> Job:
        """Queue an ended cell, of this kernel or of one that is gone, once more: here.

        Raises:
            UserError: it has not ended, or cannot run here later.
        """
        scheduler = self._session.enrol()
        self._pin.look(self._session.monitor, job.request.gpus)
        cell, again = self._session.lost.requeue(job)
        scheduler.wake()
        self._session.hear()
        self._board.put_up(cell, again, Around())
        self._session.changed()
        return again

    def _submit(self, cell: Cell, asked: Asked) -> Job:
        scheduler = self._session.enrol()
        self._pin.look(self._session.monitor, asked.fields.get("gpus", 1))
        self._runner.cells[cell.uid] = cell
        try:
            submit = partial(
                self._session.queue.submit,
                kind=JobKind.CELL,
                code=asked.body,
                uid=cell.uid,
                home=self._session.membership.key,
                cell_id=cell.cell_id,
                in_place=cell.in_place,
                **asked.fields,
            )
            job = shielded(submit)
        except BaseException:
            del self._runner.cells[cell.uid]
            raise
        cell.job_id = job.id
        scheduler.wake()
        return job

    def _replace(self, cell: Cell) -> tuple[int, ...]:
        """The cell has been run again: what it had queued before must not run as well."""
        return self._cancel(self._older(cell.cell_id, cell.parent))

    def _older(self, cell_id: str | None, parent: Message) -> list[Cell]:
        """What the same cell of the notebook had queued when it was run before."""
        msg_id = parent.get("header", {}).get("msg_id", "")
        return [
            other
            for other in self._session.open_cells
            if other.cell_id is not None and other.cell_id == cell_id and other.msg_id != msg_id
        ]

    def _cancel(self, cells: Sequence[Cell]) -> tuple[int, ...]:
        with self._store.writing():
            for cell in cells:
                self._store.request_cancel(cell.job_id)
        return tuple(cell.job_id for cell in cells)

    def _tried_once(self, asked: Asked) -> Asked:
        """A cell that holds its place fails where it stands: the notebook sees its error."""
        fields = {name: value for name, value in asked.fields.items() if name not in _TRIES}
        if len(fields) < len(asked.fields):
            self._front.tell(
                "gpuqueue: a cell that holds its place is not tried again; its error ends it here"
            )
        return replace(asked, fields=fields)

    def hold_place(self, asked: Asked) -> None:
        """Wait until the running cell may go on; its GPU is given back when it has ended.

        Raises:
            UserError: it cannot be queued, or it was cancelled while it waited.
        """
        if self._runner.active is not None and self._runner.active.phase is Phase.RUNNING:
            raise UserError("this cell has its turn already; it cannot wait for another one")
        asked = self._tried_once(asked)
        cell = Cell(
            uid=uuid.uuid4().hex,
            parent=self._front.parent,
            code=asked.body,
            cell_id=self._front.cell_id,
            in_place=True,
        )
        job = self._submit(cell, asked)
        self._session.hear()
        self._session.place.hold(cell, job, self._session.watch.depth, partial(self._replace, cell))

    def wait(self, references: Sequence[str], timeout: float | None = None) -> list[Job]:
        """Wait for jobs; cells of this kernel run meanwhile, each under its own badge.

        Raises:
            UserError: one of them can only run after the cell that waits.
            TimeoutError: they have not ended in time.
        """
        active = self._runner.active
        if active is not None and active.phase is Phase.RUNNING:
            return self._wait_inside(active, references, timeout)
        try:
            return self._wait_lending(references, timeout)
        finally:
            self._isolated.take_in_after_wait()

    def _wait_lending(self, references: Sequence[str], timeout: float | None) -> list[Job]:
        if not self._session.enrolled:  # no cell of this kernel waits
            return self._session.queue.wait(*references, timeout=timeout)
        try:
            with self._session.lending.waiting():
                self._session.changed()
                return self._session.queue.wait(
                    *references, timeout=timeout, tick=self._session.lending.lend
                )
        finally:
            self._session.changed()

    def _wait_inside(
        self, active: Cell, references: Sequence[str], timeout: float | None
    ) -> list[Job]:
        ids = (
            self._session.queue.resolve(references)
            if references
            else [j.id for j in self._session.queue.list()]
        )
        bound = {cell.job_id for cell in self._session.open_cells}
        if references and bound & set(ids):
            raise UserError(
                f"job {min(bound & set(ids))} is a cell of this kernel: it cannot run before "
                "the cell that waits for it has ended"
            )
        others = [number for number in ids if number not in bound]
        return self._session.queue.wait(*others, timeout=timeout) if others else []
