"""This kernel (or terminal IPython) as a member of the queue: its cells, and what they need.

Made when a magic first needs it. It wires the loop, the runner of cells, the badges and the courier
together; what any of them does stands in its own module.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gpusched_ipy import cellsyntax
from gpusched_ipy.aftercells import AfterCells
from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.badge import Around, heading
from gpusched_ipy.board import Board
from gpusched_ipy.cellsweep import CellSweep
from gpusched_ipy.cellwatch import CellWatch
from gpusched_ipy.config import Settings
from gpusched_ipy.courier import Courier
from gpusched_ipy.errors import JobFailedError, UserError
from gpusched_ipy.frontend import FrontEnd, Message
from gpusched_ipy.here import Home
from gpusched_ipy.interrupts import shielded
from gpusched_ipy.isolated import Away, Isolated
from gpusched_ipy.job import Job, JobKind, JobState
from gpusched_ipy.kernel_log import close_log, log_to
from gpusched_ipy.lending import Lending
from gpusched_ipy.locks import Membership
from gpusched_ipy.lostcells import LostCells
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.notify import Notifier, notifier
from gpusched_ipy.options import Isolation
from gpusched_ipy.paced import PacedStarts
from gpusched_ipy.pin import Pin
from gpusched_ipy.place import Place
from gpusched_ipy.records import how_it_stands
from gpusched_ipy.release import SETTLED_S, Release
from gpusched_ipy.replay import Stage
from gpusched_ipy.runners.allocation import AllocationRunner
from gpusched_ipy.runners.cell import Cell, CellRunner, Phase
from gpusched_ipy.scheduler import Claim, Runner, Scheduler
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.submission import Submission

_TRIES = ("retries", "requeue", "retry_oom")
_READING_S = 1.0  # how long a reading may take that only names GPUs
_FORECAST_S = 30.0  # each new forecast of a badge changes the notebook
_HEARING_S = 1.0  # a cell that holds its place waits no longer for its transcript
_BUSY_S = 0.1  # shorter cells are not worth a line in the record


@dataclass(frozen=True, slots=True)
class Asked:
    """What a queued cell asks for: the options by their long names, and its body."""

    fields: Mapping[str, Any]
    body: str
    isolation: Isolation | None = None  # it runs in a Python of its own


class KernelSession:
    """One kernel in the queue.

    Raises:
        UserError: the state directory or the record cannot be used.
    """

    def __init__(self, front: FrontEnd, watch: CellWatch, settings: Settings) -> None:
        self.front = front
        self.watch = watch
        self.settings = settings
        state = open_state_dir(settings)
        if state.note is not None:  # once for each kernel: it decides what the user finds again
            front.tell(f"gpuqueue: {state.note}")
        self.store = Store(state)
        self._log = log_to(self.store.state.root / "kernel.log")
        self.membership = Membership(self.store.state)
        self.store.join(self.membership.key, "kernel", front.owner)
        self.pin = Pin(self.store, self.membership.key)
        self.runner = CellRunner(self)
        self._several = CellSweep(front, self.runner, self.membership.key)
        self.allocations = AllocationRunner()
        self._scheduler: Scheduler | None = None
        self._courier: Courier | None = None
        self._busy_told = False
        self._heard = False
        self._labels: dict[str, str] = {}
        self._after = AfterCells(front, self.store, self.membership.key, self.labels)
        self.board = Board(
            self.front,
            self.store,
            self.runner,
            log_cap=settings.log_cap,
            labels=self.labels,
            pinned=lambda: self.labels(self.pin.gpus or ()),
            look_after=self._look_after_all,
        )
        self.isolated = Isolated(
            front, self.board, lambda: self.queue, lambda: self.watch.depth == 0, self.changed
        )
        self._telling: Notifier | None = None
        self._release = Release(front, self.store, self.membership.key, self._at_rest)
        self._lending = Lending(front, self.runner, self.board.record)
        self._place = Place(
            front, self.store, self.runner, self.board, self.labels, self._record_in_place
        )
        self._lost = LostCells(front, self.store, self.runner, self.membership.key)
        self._start(settings)
        self._lost.offer(time.time())

    # -- life

    def _start(self, settings: Settings) -> None:
        self.settings = settings
        self.monitor = Monitor(settings, state_dir=self.store.state.root)
        self.queue = Queue(
            settings,
            store=self.store,
            monitor=self.monitor,
            owner=self.front.owner,
            own_python=True,
        )
        self.board.log_cap = settings.log_cap
        self.board.starts = PacedStarts(self.queue, self.monitor, _FORECAST_S)
        self._after.configure(settings, self.monitor, self._outside)
        terminal = None if self.front.kernel is not None else sys.__stderr__
        self._telling = notifier(self.store, settings.notify, terminal=terminal)
        if settings.release_caches != "never":
            self._release.start()
        self.watch.watcher = self

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings; jobs and claims stay.

        Raises:
            UserError: the state directory cannot change while the kernel is a member.
        """
        if settings.state_dir != self.settings.state_dir:
            raise UserError("state_dir takes effect after %unload_ext and %load_ext gpusched_ipy")
        enrolled = self._scheduler is not None
        self.park()
        self._start(settings)
        if enrolled:
            self._enrol()
        self._resume_showing()

    def park(self) -> None:
        """Stop all threads; cells that wait go on waiting until :meth:`unpark`."""
        self.watch.watcher = None
        self._release.stop()
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.stop()
        self.isolated.pause()
        courier, self._courier = self._courier, None
        if courier is not None:
            courier.stop()
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.stop()
        self.monitor.stop()

    def unpark(self, watch: CellWatch, settings: Settings) -> None:
        """Go on after :meth:`park`."""
        self.watch = watch
        self._start(settings)
        if self.open_cells or self.allocations.open:
            self._enrol()
        self._resume_showing()

    def close(self) -> None:
        """Leave the queue; what still waits here is lost, and says so."""
        self.park()
        active = self.runner.active
        if active is not None and active.claim is not None:
            self.store.finish_if_active(
                active.job_id,
                epoch=active.claim.job.epoch,
                state=JobState.LOST,
                error="its kernel was shut down",
            )
        for cell in self.open_cells:
            job = self.store.job(cell.job_id)
            if job.state is JobState.PENDING:
                self.store.end_pending(job, JobState.LOST, "its kernel was shut down")
        self.store.leave(self.membership.key)
        self.membership.leave()
        self.store.close()
        close_log(self._log)

    @property
    def open_cells(self) -> list[Cell]:
        """The queued cells of this kernel that have not ended."""
        cells = list(self.runner.cells.values())
        return [cell for cell in cells if cell.job_id and cell.phase is not Phase.ENDED]

    @property
    def home(self) -> Home:
        """This kernel for code of its cells and threads that takes GPUs by itself."""
        self._enrol()
        return Home(
            queue=self.queue,
            key=self.membership.key,
            runner=self.allocations,
            monitor=self.monitor,
            pin=self.pin,
            granted=self._after.granted.update,
            given_back=self._after.queued_cell,
        )

    @property
    def running_claim(self) -> Claim | None:
        """The claim of the queued cell whose body runs now."""
        active = self.runner.active
        return active.claim if active is not None and active.phase is Phase.RUNNING else None

    def _enrol(self) -> Scheduler:
        """Start the loop: this kernel has cells of its own."""
        if self._scheduler is None:
            runners: dict[JobKind, Runner] = {
                JobKind.CELL: self.runner,
                JobKind.ALLOCATION: self.allocations,
            }
            self._scheduler = Scheduler(
                self.store, self.monitor, self.membership, runners, self.settings
            )
            self.runner.scheduler = self._scheduler
            self.allocations.scheduler = self._scheduler
            self._scheduler.start()
        return self._scheduler

    def _hear(self) -> None:
        if (courier := self._sending()) is not None:
            courier.listen(True)
            courier.look()

    def _sending(self) -> Courier | None:
        """The courier, begun where there is a kernel that it can serve."""
        path = self.front.connection_file
        if self._courier is None and path is not None:
            self._courier = Courier(path, self.board)
        return self._courier

    def _resume_showing(self) -> None:
        if self.open_cells:
            self._hear()
        if self.isolated.open_jobs:
            self._sending()
            self.isolated.resume()

    # -- cells that run later

    def defer(self, asked: Asked, line: str) -> Job:
        """Queue the running cell to run later, and put its badge up.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        sent = str(self.front.parent.get("content", {}).get("code", ""))
        cell = Cell(
            uid=uuid.uuid4().hex,
            parent=self.front.parent,
            code=cellsyntax.source(sent, line, asked.body),
            cell_id=self.front.cell_id,
        )
        job = self._submit(cell, asked)
        self._hear()
        replaced = self._replace(cell)
        self.board.put_up(cell, job, Around(replaced=replaced))
        self.changed()
        return job

    def defer_several(self, asked: Asked, line: str) -> Job:
        """Queue the running cell once for each value of its sweep, or not at all where its key
        stands already.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        done = self._submit_several(asked, line)
        self._hear()
        queued = {job.spec.uid for job in done.jobs}
        older = [
            other
            for other in self._older(self.front.cell_id, self.front.parent)
            if other.uid not in queued
        ]
        around = Around(replaced=self._cancel(older), note=done.note)
        if done.array is not None:
            self.board.put_up_sweep(done.array, self.front.parent, around)
        elif (cell := self.runner.cells.get(done.jobs[0].spec.uid)) is not None:
            self.board.put_up(cell, done.jobs[0], around)
        elif done.note is not None:
            self.front.tell(f"gpuqueue: {done.note}")
        self.changed()
        return done.jobs[0]

    def run_several(self, asked: Asked, line: str) -> None:
        """The same for a cell that holds its place: returns when all of it is over.

        Raises:
            UserError: it cannot be queued, or some of it has not completed.
        """
        if self.front.kernel is None:
            raise UserError("a sweep or a key of cells needs a notebook; use %gpurun here")
        if self.running_claim is not None:
            raise UserError("this cell has its turn already; it cannot wait for another one")
        done = self._submit_several(self._tried_once(asked), line)
        if done.note is not None:
            self.front.tell(f"gpuqueue: {done.note}")
        self._hear()
        if self.front.attended and done.array is not None:
            self.board.put_up_sweep(done.array, self.front.parent, Around())
        try:
            with self._lending.waiting():
                self.changed()
                self._several.follow(self.queue, done, self._lending.lend)
        finally:
            self.changed()

    def preview(self, asked: Asked) -> None:
        """Say what would become of the running cell, and when; nothing is queued."""
        found = self.queue.preview(
            kind=JobKind.CELL if asked.isolation is None else JobKind.ISOLATED,
            code=asked.body,
            home=self.membership.key if asked.isolation is None else None,
            **asked.fields,
        )
        print(found)

    def _submit_several(self, asked: Asked, line: str) -> Submission:
        scheduler = self._enrol()
        self.pin.look(self.monitor, asked.fields.get("gpus", 1))
        sent = str(self.front.parent.get("content", {}).get("code", ""))
        code = cellsyntax.source(sent, line, asked.body)
        done = self._several.submit(self.queue, code, asked.body, asked.fields)
        scheduler.wake()
        return done

    def isolate(self, asked: Asked, line: str, *, wait: bool) -> Job:
        """Queue the running cell to run in a Python of its own; ``wait`` holds its place.

        Raises:
            UserError: it cannot be, and nothing is queued; or it has not ended well.
            RemoteError: what its body has raised, under its own name.
        """
        assert asked.isolation is not None
        code = str(self.front.parent.get("content", {}).get("code", ""))
        source = cellsyntax.source(code, line, asked.body)
        if asked.fields.get("sweep"):
            sent = self.isolated.send_sweep(source, asked.body, asked.isolation, asked.fields)
            return self._follow_isolated(sent, wait=wait)
        away = self.isolated.send(source, asked.body, asked.isolation, asked.fields)
        if wait:
            return self._await_isolated(away)
        self._sending()
        self.isolated.show(away)
        return self.queue.show(away.job_id)

    def _follow_isolated(self, sent: Sequence[Away], *, wait: bool) -> Job:
        """The members of a sweep: each below a heading where this cell waits, else by its badge."""
        if wait:
            try:
                for away in sent:
                    self.front.show_here(heading(self.queue.show(away.job_id)))
                    self._await_isolated(away)
            except BaseException:
                shielded(partial(self.queue.cancel, *(away.job_id for away in sent)))
                raise
        else:
            self._sending()
            for away in sent:
                self.isolated.show(away)
        return self.queue.show(sent[0].job_id)

    def _await_isolated(self, away: Away) -> Job:
        stage = Stage()
        job = self.isolated.await_here(away, stage.show)
        self._place.say_wait(job.id)
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
        scheduler = self._enrol()
        self.pin.look(self.monitor, job.request.gpus)
        cell, again = self._lost.requeue(job)
        scheduler.wake()
        self._hear()
        self.board.put_up(cell, again, Around())
        self.changed()
        return again

    def begin_marked(self, mark: Mapping[str, Any], text: str) -> bool | None:
        """Whether the body of a request of ours may run now; None: ``text`` is not that body."""
        cell = self.runner.cells.get(str(mark.get("uid")))
        if cell is not None and text.rstrip("\n") != cell.code.rstrip("\n"):
            return None
        return cell is not None and self.runner.begin(
            cell.uid, int(mark["epoch"]), self.watch.depth + 1
        )

    def _submit(self, cell: Cell, asked: Asked) -> Job:
        scheduler = self._enrol()
        self.pin.look(self.monitor, asked.fields.get("gpus", 1))
        self.runner.cells[cell.uid] = cell
        try:
            submit = partial(
                self.queue.submit,
                kind=JobKind.CELL,
                code=asked.body,
                uid=cell.uid,
                home=self.membership.key,
                cell_id=cell.cell_id,
                in_place=cell.in_place,
                **asked.fields,
            )
            job = shielded(submit)
        except BaseException:
            del self.runner.cells[cell.uid]
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
            for other in self.open_cells
            if other.cell_id is not None and other.cell_id == cell_id and other.msg_id != msg_id
        ]

    def _cancel(self, cells: Sequence[Cell]) -> tuple[int, ...]:
        with self.store.writing():
            for cell in cells:
                self.store.request_cancel(cell.job_id)
        return tuple(cell.job_id for cell in cells)

    # -- cells that wait in their place

    def _tried_once(self, asked: Asked) -> Asked:
        """A cell that holds its place fails where it stands: the notebook sees its error."""
        fields = {name: value for name, value in asked.fields.items() if name not in _TRIES}
        if len(fields) < len(asked.fields):
            self.front.tell(
                "gpuqueue: a cell that holds its place is not tried again; its error ends it here"
            )
        return replace(asked, fields=fields)

    def hold_place(self, asked: Asked) -> None:
        """Wait until the running cell may go on; its GPU is given back when it has ended.

        Raises:
            UserError: it cannot be queued, or it was cancelled while it waited.
        """
        if self.runner.active is not None and self.runner.active.phase is Phase.RUNNING:
            raise UserError("this cell has its turn already; it cannot wait for another one")
        asked = self._tried_once(asked)
        cell = Cell(
            uid=uuid.uuid4().hex,
            parent=self.front.parent,
            code=asked.body,
            cell_id=self.front.cell_id,
            in_place=True,
        )
        job = self._submit(cell, asked)
        self._hear()
        self._place.hold(cell, job, self.watch.depth, partial(self._replace, cell))

    def _record_in_place(self, cell: Cell) -> None:
        """As for a deferred cell, where there is a kernel whose output can be heard."""
        if self._courier is not None and self._courier.hearing.wait(_HEARING_S):
            self.board.record(cell)

    # -- waiting for jobs in a cell

    def wait(self, references: Sequence[str], timeout: float | None = None) -> list[Job]:
        """Wait for jobs; cells of this kernel run meanwhile, each under its own badge.

        Raises:
            UserError: one of them can only run after the cell that waits.
            TimeoutError: they have not ended in time.
        """
        active = self.runner.active
        if active is not None and active.phase is Phase.RUNNING:
            return self._wait_inside(active, references, timeout)
        try:
            return self._wait_lending(references, timeout)
        finally:
            self.isolated.take_in_after_wait()

    def _wait_lending(self, references: Sequence[str], timeout: float | None) -> list[Job]:
        if self._scheduler is None:  # no cell of this kernel waits
            return self.queue.wait(*references, timeout=timeout)
        try:
            with self._lending.waiting():
                self.changed()
                return self.queue.wait(*references, timeout=timeout, tick=self._lending.lend)
        finally:
            self.changed()

    def _wait_inside(
        self, active: Cell, references: Sequence[str], timeout: float | None
    ) -> list[Job]:
        ids = self.queue.resolve(references) if references else [j.id for j in self.queue.list()]
        bound = {cell.job_id for cell in self.open_cells}
        if references and bound & set(ids):
            raise UserError(
                f"job {min(bound & set(ids))} is a cell of this kernel: it cannot run before "
                "the cell that waits for it has ended"
            )
        others = [number for number in ids if number not in bound]
        return self.queue.wait(*others, timeout=timeout) if others else []

    # -- what the runner asks for (Host)

    @property
    def main_is_free(self) -> bool:
        """Whether the main thread runs no cell."""
        return self.watch.depth == 0

    @property
    def settled_s(self) -> float:
        """Seconds since the main thread began or ended a cell."""
        return time.monotonic() - self.watch.changed_at

    def on_main(self, call: Callable[[], None], delay_s: float = 0.0) -> None:
        """Have the main thread call that between two events of its loop."""
        if self.front.kernel is not None:
            self.front.on_main(call, delay_s)

    def can_send(self, cell: Cell) -> bool:
        """Whether the courier hears the kernel; it wakes the scheduler when it does."""
        return self._courier is not None and self._courier.hearing.is_set()

    def can_run_here(self, cell: Cell) -> bool:
        """Whether the body can run inside the cell that waits for it."""
        return self._lending.can_run(cell)

    def send(self, cell: Cell) -> None:
        """Have the kernel run the cell now."""
        assert self._courier is not None
        self.board.record(cell)
        self._courier.send(cell.parent, cell.code, cell.mark)

    def granted(self, claim: Claim) -> None:
        """Show the body its GPUs."""
        self._labels |= {gpu.uuid: _label(gpu.index, gpu.uuid) for gpu in claim.gpus}
        self._several.begins(claim.job)
        self._after.granted |= set(claim.job.gpus)
        self.pin.grant(claim)

    def changed(self) -> None:
        """Bring the badges up to date."""
        if self._courier is not None:
            self._courier.look()

    # -- what the cells of the user bring (Watcher)

    def cell_begins(self, depth: int) -> None:
        """A cell begins."""
        self.runner.cell_begins(depth)
        if self.runner.cells:
            self.changed()

    def cell_ended(self, result: Any, depth: int) -> None:
        """A cell has ended."""
        active = self.runner.active
        ours = active is not None and active.phase is Phase.RUNNING
        self.runner.cell_ended(result, depth)
        if ours and active is not None and active.phase is not Phase.RUNNING:
            self._after.queued_cell()
            if active.in_place:
                self._place.leave(active)
        elif not ours:
            waiting = [cell.job_id for cell in self.open_cells if not cell.in_place]
            waiting += self.isolated.open_jobs
            self._after.ordinary_cell(result, waiting)
        if self.runner.cells:
            self.changed()
        self.isolated.take_in()

    # -- small things

    @property
    def gives_back(self) -> bool:
        """Whether it empties its framework caches when a waiting job asks for that."""
        return self._release.listening

    def _at_rest(self) -> bool:
        """Whether the main thread has run no cell for a while."""
        return self.main_is_free and self.settled_s >= SETTLED_S

    def _outside(self) -> bool:
        """Whether the main thread runs a cell that has no turn."""
        return self.watch.depth > 0 and self.runner.active is None

    def labels(self, gpus: Sequence[str]) -> list[str]:
        """What people call these GPUs."""
        latest = self.monitor.latest()
        if latest is None and not self._labels.keys() >= set(gpus):
            # Nothing of this kernel watches the GPUs: it has none, only jobs that have.
            latest = self.monitor.read_now(_READING_S, Detail.LOAD)
            self._labels |= {gpu: gpu for gpu in gpus}
        if latest is not None:
            self._labels |= {gpu.uuid: _label(gpu.index, gpu.uuid) for gpu in latest.gpus}
        return [self._labels.get(gpu, gpu) for gpu in gpus]

    def _look_after_all(self, waiting: bool) -> float | None:
        dues = (self.isolated.pulse(), self._look_after(waiting))
        return min((due for due in dues if due is not None), default=None)

    def _look_after(self, waiting: bool) -> float | None:
        """In the courier's thread: tell the others whether this kernel is busy, wake the loop."""
        courier, scheduler = self._courier, self._scheduler
        if courier is None or scheduler is None:
            return None  # parked at this moment
        hears = courier.hearing.is_set()
        if hears and not self._heard:
            scheduler.wake()  # what waits can be sent from now on
        self._heard = hears
        if not self.runner.cells:
            courier.listen(False)
        executing = self.watch.depth > 0 and not self._lending.active
        for_s = self.settled_s
        if executing and (waiting or self.runner.active is not None):
            if not self._busy_told and for_s < _BUSY_S:
                return _BUSY_S - for_s
            busy = True
        else:
            busy = False
        if busy != self._busy_told:
            self._busy_told = busy
            self.store.set_busy(self.membership.key, busy)
        return None


def _label(index: int | None, gpu: str) -> str:
    return f"GPU {index}" if index is not None else gpu
