"""This kernel (or terminal IPython) as a member of the queue: its cells, and what they need.

Made when a magic first needs it. It wires the loop, the runner of cells, the badges and the courier
together; what any of them does stands in its own module.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpusched_ipy.aftercells import AfterCells
from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.board import Board
from gpusched_ipy.cellqueue import CellQueue
from gpusched_ipy.cellsweep import CellSweep
from gpusched_ipy.cellwatch import CellWatch
from gpusched_ipy.config import Settings
from gpusched_ipy.courier import Courier
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import FrontEnd
from gpusched_ipy.here import Home
from gpusched_ipy.isolated import Isolated
from gpusched_ipy.job import JobKind, JobState
from gpusched_ipy.kernel_log import close_log, log_to
from gpusched_ipy.lending import Lending
from gpusched_ipy.locks import Membership
from gpusched_ipy.lostcells import LostCells
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.notify import Notifier, notifier
from gpusched_ipy.onward import Onward
from gpusched_ipy.paced import PacedStarts
from gpusched_ipy.pin import Pin
from gpusched_ipy.place import Place
from gpusched_ipy.release import SETTLED_S, Release
from gpusched_ipy.runners.allocation import AllocationRunner
from gpusched_ipy.runners.cell import Cell, CellRunner, Phase
from gpusched_ipy.scheduler import Claim, Runner, Scheduler
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.vigil import stand

_READING_S = 1.0  # how long a reading may take that only names GPUs
_FORECAST_S = 30.0  # each new forecast of a badge changes the notebook
_HEARING_S = 1.0  # a cell that holds its place waits no longer for its transcript
_BUSY_S = 0.1  # shorter cells are not worth a line in the record


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
        self.several = CellSweep(front, self.runner, self.membership.key)
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
        self.onward = Onward(
            front, lambda: self.queue, self.labels, self.isolated.bring, lambda: self.main_is_free
        )
        self._telling: Notifier | None = None
        self._leave_vigil: Callable[[], None] | None = None
        self._release = Release(front, self.store, self.membership.key, self._at_rest)
        self.lending = Lending(front, self.runner, self.board.record)
        self.place = Place(
            front, self.store, self.runner, self.board, self.labels, self._record_in_place
        )
        self.lost = LostCells(front, self.store, self.runner, self.membership.key)
        self.cells = CellQueue(self)
        self._start(settings)
        self.lost.offer(time.time())
        self.go_on()

    # -- life

    def go_on(self) -> None:
        """Show on what an earlier kernel of this notebook has sent off, where a cell runs now."""
        if self.onward.adopt(time.time()):
            self._resume_showing()

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
        # What this kernel has sent off is an agent's to bring home.
        self._leave_vigil = stand(self.store)
        self.watch.watcher = self

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings; jobs and claims stay.

        Raises:
            UserError: the state directory cannot change while the kernel is a member.
        """
        if settings.state_dir != self.settings.state_dir:
            raise UserError("state_dir takes effect after %unload_ext and %load_ext gpusched_ipy")
        enrolled = self.enrolled
        self.park()
        self._start(settings)
        if enrolled:
            self.enrol()
        self._resume_showing()

    def park(self) -> None:
        """Stop all threads; cells that wait go on waiting until :meth:`unpark`."""
        self.watch.watcher = None
        self._release.stop()
        leave_vigil, self._leave_vigil = self._leave_vigil, None
        if leave_vigil is not None:
            leave_vigil()
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
            self.enrol()
        self._resume_showing()

    def close(self) -> None:
        """Leave the queue; what still waits here is lost, and says so."""
        self.park()
        self.onward.close()
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
        self.enrol()
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

    @property
    def enrolled(self) -> bool:
        """Whether the loop runs: a cell of this kernel has been queued."""
        return self._scheduler is not None

    def enrol(self) -> Scheduler:
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

    def hear(self) -> None:
        """Hear what the kernel puts out, from now on or soon."""
        if (courier := self.sending()) is not None:
            courier.listen(True)
            courier.look()

    def sending(self) -> Courier | None:
        """The courier, begun where there is a kernel that it can serve."""
        path = self.front.connection_file
        if self._courier is None and path is not None:
            self._courier = Courier(path, self.board)
        return self._courier

    def _resume_showing(self) -> None:
        if self.open_cells:
            self.hear()
        if self.isolated.open_jobs:
            self.sending()
            self.isolated.resume()
        if self.onward.open and (courier := self.sending()) is not None:
            courier.look()

    def begin_marked(self, mark: Mapping[str, Any], text: str) -> bool | None:
        """Whether the body of a request of ours may run now; None: ``text`` is not that body."""
        cell = self.runner.cells.get(str(mark.get("uid")))
        if cell is not None and text.rstrip("\n") != cell.code.rstrip("\n"):
            return None
        return cell is not None and self.runner.begin(
            cell.uid, int(mark["epoch"]), self.watch.depth + 1
        )

    def _record_in_place(self, cell: Cell) -> None:
        """As for a deferred cell, where there is a kernel whose output can be heard."""
        if self._courier is not None and self._courier.hearing.wait(_HEARING_S):
            self.board.record(cell)

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
        return self.lending.can_run(cell)

    def send(self, cell: Cell) -> None:
        """Have the kernel run the cell now."""
        assert self._courier is not None
        self.board.record(cell)
        self._courier.send(cell.parent, cell.code, cell.mark)

    def granted(self, claim: Claim) -> None:
        """Show the body its GPUs."""
        self._labels |= {gpu.uuid: _label(gpu.number, gpu.uuid) for gpu in claim.gpus}
        self.several.begins(claim.job)
        self._after.granted |= set(claim.job.gpus)
        self.pin.grant(claim)

    def changed(self) -> None:
        """Bring the badges up to date."""
        courier = self._courier  # this may be any thread
        if courier is not None:
            courier.look()

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
                self.place.leave(active)
        elif not ours:
            waiting = [cell.job_id for cell in self.open_cells if not cell.in_place]
            waiting += self.isolated.open_jobs
            self._after.ordinary_cell(result, waiting)
        if self.runner.cells:
            self.changed()
        self.isolated.take_in()
        self.onward.take_in()

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
            self._labels |= {gpu.uuid: _label(gpu.number, gpu.uuid) for gpu in latest.gpus}
        return [self._labels.get(gpu, gpu) for gpu in gpus]

    def _look_after_all(self, waiting: bool) -> float | None:
        dues = (self.isolated.pulse(), self.onward.pulse(), self._look_after(waiting))
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
        executing = self.watch.depth > 0 and not self.lending.active
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


def _label(number: str | None, gpu: str) -> str:
    return gpu if number is None else f"GPU {number}"
