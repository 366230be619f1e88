"""What people see of this kernel's queued cells: their badges, and a transcript of what they show.

Works in the courier's thread; the main thread only puts up the first badge of a cell. It decides
nothing and starts nothing.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gpusched_ipy import badge
from gpusched_ipy.badge import Around
from gpusched_ipy.errors import JobNotFoundError
from gpusched_ipy.frontend import FrontEnd, Message
from gpusched_ipy.job import FINAL, Job, JobState
from gpusched_ipy.paced import PacedStarts
from gpusched_ipy.runners.cell import Cell, CellRunner, Phase
from gpusched_ipy.store import Store
from gpusched_ipy.transcript import Recorder

_REFRESH_S = 1.0  # a badge that waits changes at most this often
_LATE_S = 10.0  # so long after its end a cell's threads may still show something


class Badged(Protocol):
    """A cell that has a badge."""

    uid: str
    parent: Message  # the request under which its badge stands
    job_id: int

    @property
    def bound(self) -> bool:
        """Whether only this kernel can run it."""
        ...


@dataclass(slots=True)
class _Shown:
    display_id: str
    around: Around
    data: dict[str, str]
    state: JobState
    at_mono: float
    erased: bool = False  # the cell has cleared its outputs, the badge with them


@dataclass(slots=True)
class _Sweep:
    display_id: str
    around: Around
    data: dict[str, str]
    parent: Message


class Board:
    """The badges and transcripts of one kernel.

    Args:
        labels: what people call the GPUs of these UUIDs.
        pinned: the GPUs that this kernel is bound to.
        look_after: called at each look, with whether any cell waits; seconds until it must be
            called again, None: when something happens.
    """

    def __init__(
        self,
        front: FrontEnd,
        store: Store,
        runner: CellRunner,
        *,
        log_cap: int,
        labels: Callable[[Sequence[str]], Sequence[str]],
        pinned: Callable[[], Sequence[str]],
        look_after: Callable[[bool], float | None],
    ) -> None:
        self._front = front
        self._store = store
        self._runner = runner
        self.log_cap = log_cap
        self._labels = labels
        self._pinned = pinned
        self._look_after = look_after
        self.starts: PacedStarts | None = None  # when jobs are expected to start
        self._mutex = threading.Lock()
        self._shown: dict[str, _Shown] = {}
        self._sweeps: dict[str, _Sweep] = {}
        self._recording: dict[str, Cell] = {}

    def put_up(self, cell: Badged, job: Job, around: Around) -> None:
        """Show the badge of a cell for the first time, under the cell that queued it."""
        data = badge.bundle(job, replace(around, pinned=self._pinned() if cell.bound else ()))
        shown = _Shown(f"gpusched-{cell.uid}", around, data, job.state, time.monotonic())
        with self._mutex:
            self._shown[cell.uid] = shown
        self._front.display(data, shown.display_id, cell.parent)

    def put_up_sweep(self, array: str, parent: Message, around: Around) -> None:
        """Show the one badge of a sweep, under the cell that queued it."""
        found = self._store.array_states([array])
        if array not in found:
            return
        data = badge.sweep_bundle(found[array], around)
        shown = _Sweep(f"gpusched-{array}-{uuid.uuid4().hex[:8]}", around, data, parent)
        with self._mutex:
            self._sweeps[array] = shown
        self._front.display(data, shown.display_id, parent)

    def _refresh_sweeps(self) -> None:
        with self._mutex:
            sweeps = dict(self._sweeps)
        found = self._store.array_states(sweeps)
        for array in sweeps.keys() - found.keys():  # somebody has purged them
            with self._mutex:
                self._sweeps.pop(array, None)
        for array, state in found.items():
            shown = sweeps[array]
            data = badge.sweep_bundle(state, shown.around)
            if data != shown.data:
                shown.data = data
                self._front.display(data, shown.display_id, shown.parent, update=True)
            if state.ended:
                with self._mutex:
                    self._sweeps.pop(array, None)

    def record(self, cell: Cell) -> None:
        """Keep what the cell shows from now on."""
        path = self._store.state.transcript(cell.uid)
        before = self._recording.get(_mark(cell))
        if before is not None and before.recorder is not None:
            before.recorder.close()  # of an earlier attempt
        cell.recorder = Recorder(path, self.log_cap)
        self._recording[_mark(cell)] = cell

    def refresh(self, cell: Badged, *, note: str | None = None, last: bool = True) -> None:
        """Bring the badge of a cell up to date, if it has one.

        Args:
            note: one more thing to say, now.
            last: whether that of a job which has ended is final.
        """
        with self._mutex:
            shown = self._shown.get(cell.uid)
            if shown is None:
                return
            job = self._store.job(cell.job_id)
            now = time.monotonic()
            brief = job.state in (shown.state, JobState.STARTING) and note is None
            if brief and now - shown.at_mono < _REFRESH_S:
                return
            pinned = self._pinned() if cell.bound else ()
            around = replace(
                shown.around,
                gpus=self._labels(job.gpus),
                pinned=pinned,
                expected=self._expected(job),
            )
            data = badge.bundle(job, around if note is None else replace(around, note=note))
            if data == shown.data and not (shown.erased and job.ended):
                return
            shown.data, shown.state, shown.at_mono = data, job.state, now
            update = not (shown.erased and job.ended)
            self._front.display(data, shown.display_id, cell.parent, update=update)
            shown.erased = shown.erased and update
            if job.ended and last:
                del self._shown[cell.uid]

    def erased(self, cell: Badged) -> None:
        """The outputs of a cell have been cleared, and its badge with them."""
        if (shown := self._shown.get(cell.uid)) is not None:
            shown.erased = True

    # -- what the courier tells

    def heard(self, mark: str, kind: str, content: Mapping[str, Any]) -> None:
        """Record what a cell of ours shows."""
        cell = self._recording.get(mark)
        if cell is None or cell.recorder is None:
            return
        if kind == "status":
            if content.get("execution_state") == "idle" and cell.phase is Phase.ENDED:
                cell.recorded.set()
            return
        display_id = str((content.get("transient") or {}).get("display_id", ""))
        if display_id == f"gpusched-{cell.uid}":
            return
        if kind == "clear_output":
            self.erased(cell)
        cell.recorder.record(kind, content)

    def replied(self, uid: str, content: Mapping[str, Any]) -> None:
        """Take what a reply alone carries; send again what the kernel has dropped."""
        for item in content.get("payload") or []:
            if item.get("source") == "page" and uid in self._recording:
                # `x?`: a front end shows this from the reply, which goes to us alone.
                shown = {"data": item.get("data", {}), "metadata": {}, "transient": {}}
                self._front.publish("display_data", shown, self._recording[uid].parent)
        cell = self._runner.active
        if content.get("status") == "aborted" and cell is not None and cell.uid == uid:
            self._runner.give_back(cell, "its kernel dropped it after an error in another cell")

    def _expected(self, job: Job) -> str | None:
        if self.starts is None or job.state is not JobState.PENDING:
            return None
        return self.starts.text(job.id)

    def pulse(self) -> float | None:
        """Refresh the badges, forget what is over."""
        if self.starts is not None and self._shown:
            self.starts.renew()
        # A cell without a number is being submitted at this moment.
        cells = [cell for cell in list(self._runner.cells.values()) if cell.job_id]
        self._refresh_sweeps()
        states = self._store.states(cell.job_id for cell in cells)
        for cell in cells:
            if cell.job_id not in states or not self._refreshed(cell):
                with self._mutex:  # somebody has purged it
                    self._shown.pop(cell.uid, None)
                self.forget(cell)
                continue
            if cell.phase is Phase.WAITING and states.get(cell.job_id) in FINAL:
                cell.phase, cell.ended_mono = Phase.ENDED, time.monotonic()
            if cell.phase is Phase.ENDED and time.monotonic() - cell.ended_mono > _LATE_S:
                self.forget(cell)
        waiting = any(cell.phase is Phase.WAITING and not cell.in_place for cell in cells)
        again = self._look_after(waiting)
        if self._runner.cells:
            return _REFRESH_S if again is None else min(again, _REFRESH_S)
        return again

    def _refreshed(self, cell: Cell) -> bool:
        """Whether its job is still recorded; then its badge is up to date."""
        try:
            self.refresh(cell)
        except JobNotFoundError:
            return False
        return True

    def forget(self, cell: Cell) -> None:
        """The cell is over, its late output too."""
        self._runner.cells.pop(cell.uid, None)
        if self._recording.get(_mark(cell)) is cell:
            del self._recording[_mark(cell)]
        if cell.recorder is not None:
            cell.recorder.close()


def _mark(cell: Cell) -> str:
    """What its output is known by: one that holds its place is not sent, it is there already."""
    return cell.msg_id if cell.in_place else cell.uid
