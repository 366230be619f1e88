"""The isolated cells of this kernel: sent off, shown while they run, their outputs taken in.

A job of its own runs the cell; this module only follows what that writes. The kernel may end at any
time: the job goes on, and its outputs wait in the state directory.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gpusched_ipy import awaynotes, parcel
from gpusched_ipy.api import Queue
from gpusched_ipy.badge import Around
from gpusched_ipy.board import Board
from gpusched_ipy.calls import drop_call
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import FrontEnd, Message
from gpusched_ipy.interrupts import shielded
from gpusched_ipy.job import ACTIVE, FINAL, Job, JobKind, JobSpec, JobState
from gpusched_ipy.options import Isolation
from gpusched_ipy.parcel import Parcel
from gpusched_ipy.process import python_argv
from gpusched_ipy.sweep import label
from gpusched_ipy.transcript import Follower
from gpusched_ipy.transcript import Message as Shown

_FOLLOW_S = 0.1  # so long output may wait until it is shown
_REFRESH_S = 1.0
_BETWEEN_S = 0.03
_MERGED = 64 * 1024  # characters of one stream in one message
_NOT_SET = 0


@dataclass(slots=True, eq=False)
class Away:
    """One isolated cell that this kernel has sent off."""

    uid: str  # of its badge; as a rule that of its job as well
    parent: Message  # the request that sent it: its output goes there
    outputs: tuple[str, ...]
    cell_id: str | None
    follower: Follower
    bound_to: Mapping[str, int]  # what its outputs' names stood for, by identity, when it was sent
    job_id: int = 0
    state: JobState = JobState.PENDING
    ended: bool = False  # and all that it has shown was shown here
    looked_mono: float = 0.0
    take_back: Callable[[], None] | None = None  # the word to the next kernel

    @property
    def bound(self) -> bool:
        """Whether only this kernel can run it."""
        return False


@dataclass(slots=True)
class Taken:
    """What has become of the outputs of an isolated cell."""

    here: list[str] = field(default_factory=list)
    rebound: list[str] = field(default_factory=list)  # the user has bound the name meanwhile

    def note(self, job_id: int) -> str | None:
        """It in a few words."""
        parts = []
        if self.here:
            parts.append(f"{', '.join(self.here)} {'is' if len(self.here) == 1 else 'are'} here")
        if self.rebound:
            was = "was" if len(self.rebound) == 1 else "were"
            parts.append(
                f"{', '.join(self.rebound)} {was} bound anew meanwhile and kept: "
                f"%gpuq fetch {job_id} replaces"
            )
        return "; ".join(parts) or None


class Isolated:
    """The isolated cells of one kernel.

    Args:
        queue: gives the queue with the settings in force.
        main_is_free: whether the main thread runs no cell.
        look: has :meth:`pulse` called soon, in the courier's thread.
    """

    def __init__(
        self,
        front: FrontEnd,
        board: Board,
        queue: Callable[[], Queue],
        main_is_free: Callable[[], bool],
        look: Callable[[], None],
    ) -> None:
        self._front = front
        self._board = board
        self._queue = queue
        self._main_is_free = main_is_free
        self._look = look
        self._mutex = threading.Lock()
        self._away: dict[str, Away] = {}
        self._published: dict[str, int] = {}  # names that we have bound, and to what
        self._unlisten: Callable[[], None] | None = None
        self._pulse_mono = 0.0

    @property
    def open_jobs(self) -> list[int]:
        """The isolated cells of this kernel that have not ended."""
        return [away.job_id for away in list(self._away.values()) if not away.ended]

    # -- sending

    def send(self, source: str, body: str, isolation: Isolation, fields: Mapping[str, Any]) -> Away:
        """Queue a cell to run in a Python of its own; its inputs are as they are now.

        Args:
            source: the cell as it stands in the notebook; ``body`` is what stands below the magic.
            fields: the options of a submit.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        queue, uid = self._queue(), uuid.uuid4().hex
        away = self._sent_off(uid, isolation)
        sent = self._parcel(source, isolation)
        parcel.send(queue.state, uid, sent)
        options = {"name": "isolated", **fields}
        argv = python_argv("isolatedmain", str(queue.state.root), uid, isolated=False)
        submit = partial(
            queue.submit,
            argv,
            kind=JobKind.ISOLATED,
            code=body,
            uid=uid,
            cell_id=away.cell_id,
            **options,
        )
        try:
            job = shielded(submit)
        except BaseException:
            drop_call(queue.state, uid)
            raise
        away.job_id = job.id
        if job.spec.uid != uid:  # the same --key again: that job is followed
            drop_call(queue.state, uid)
            away.follower = Follower(queue.state.transcript(job.spec.uid))
        return away

    def send_sweep(
        self, source: str, body: str, isolation: Isolation, fields: Mapping[str, Any]
    ) -> list[Away]:
        """The same once for each combination of the sweep's values, which are inputs as well.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        _refuse_outputs(isolation)
        queue, uid = self._queue(), uuid.uuid4().hex
        sent = self._parcel(source, isolation)

        def prepare(spec: JobSpec, values: Mapping[str, Any]) -> None:
            parcel.send(queue.state, spec.uid, replace(sent, values={**sent.values, **values}))

        submit = partial(
            queue.submit_all,
            python_argv("isolatedmain", str(queue.state.root), uid, isolated=False),
            prepare=prepare,
            undo=partial(drop_call, queue.state),
            kind=JobKind.ISOLATED,
            code=body,
            uid=uid,
            cell_id=self._front.cell_id,
            **{"name": "isolated", **fields},
        )
        found, parent, done = [], self._front.parent, shielded(submit)
        if done.note is not None:
            self._front.tell(f"gpuqueue: {done.note}")
        for job in done.jobs:
            away = self._sent_off(job.spec.uid, isolation)
            away.job_id, away.parent = job.id, parent
            found.append(away)
        return found

    def check(self, isolation: Isolation, fields: Mapping[str, Any]) -> None:
        """Refuse what a submit would refuse of the inputs and outputs; nothing is sent.

        Raises:
            UserError: a variable is missing, does not pickle or is too large; or each job of a
                sweep would bring it back.
        """
        if fields.get("sweep"):
            _refuse_outputs(isolation)
        parcel.check(self._parcel("", isolation).values)

    def _sent_off(self, uid: str, isolation: Isolation) -> Away:
        namespace = self._front.shell.user_ns
        return Away(
            uid=uid,
            parent=self._front.parent,
            outputs=isolation.outputs,
            cell_id=self._front.cell_id,
            follower=Follower(self._queue().state.transcript(uid)),
            bound_to={name: _identity(namespace, name) for name in isolation.outputs},
        )

    def _parcel(self, source: str, isolation: Isolation) -> Parcel:
        return Parcel(
            source=source,
            outputs=isolation.outputs,
            log_cap=self._queue().settings.log_cap,
            values=parcel.taken(isolation.inputs, self._front.shell.user_ns),
        )

    def show(self, away: Away, replaced: tuple[int, ...] = ()) -> None:
        """Put up the badge of a cell, and show what it shows from now on.

        Args:
            replaced: jobs of the same cell that have been cancelled for it.
        """
        queue = self._queue()
        replaced += self._replace(away)
        job = queue.show(away.job_id)
        values = label(job.spec.sweep) or None
        self._board.put_up(away, job, Around(replaced=replaced, note=values))
        with self._mutex:
            self._away[away.uid] = away
        self._note_away(away, job)
        self.resume()

    def _note_away(self, away: Away, job: Job) -> None:
        """Leave word to the next kernel of this notebook."""
        notebook = self._front.notebook
        if notebook is not None:
            away.take_back = partial(awaynotes.remove, self._queue().state, notebook, job.spec.uid)
            with suppress(OSError):  # on a full disk only this courtesy is not to be had
                awaynotes.leave(self._queue().state, notebook, job.spec.uid)

    def resume(self) -> None:
        """Hear of changes while a cell is away."""
        with self._mutex:
            if self._away and self._unlisten is None:
                self._unlisten = self._queue().subscribe(self._look)
        self._look()

    def pause(self) -> None:
        """Hear of nothing any more; the cells stay."""
        unlisten, self._unlisten = self._unlisten, None
        if unlisten is not None:
            unlisten()

    def _replace(self, away: Away) -> tuple[int, ...]:
        """The cell has been run again: what it had queued before and has not begun must not run."""
        store = self._queue().store
        older = [
            other.job_id
            for other in list(self._away.values())
            if other.cell_id is not None
            and other.job_id != away.job_id
            and other.parent is not away.parent  # of the same sweep
            and other.cell_id == away.cell_id
            and store.job(other.job_id).state is JobState.PENDING
        ]
        for job_id in older:
            store.request_cancel(job_id)
        return tuple(older)

    # -- following, in the courier's thread

    def pulse(self) -> float | None:
        """Show what has come; seconds until the next look, None: nothing is away."""
        now = time.monotonic()
        if now < self._pulse_mono + _BETWEEN_S:
            return _BETWEEN_S  # a busy queue rings again and again
        self._pulse_mono = now
        return self._pulse()

    def _pulse(self) -> float | None:
        with self._mutex:
            away = [item for item in self._away.values() if not item.ended]
            if not away:
                self.pause()
                return None
            states = self._queue().store.states([item.job_id for item in away])
            for item in away:
                if item.job_id in states:
                    self._follow(item, states[item.job_id])
                else:  # somebody has purged it
                    self._away.pop(item.uid).follower.close()
            running = any(item.state in ACTIVE for item in away)
        return _FOLLOW_S if running else _REFRESH_S

    def _follow(self, away: Away, state: JobState) -> None:
        now = time.monotonic()
        late = now - away.looked_mono >= _REFRESH_S
        changed, away.state = state is not away.state, state
        if state is not JobState.PENDING:
            job = self._queue().show(away.job_id)
            for kind, content in merged(self._news(away, job)):
                if kind == "clear_output":
                    self._board.erased(away)
                self._front.publish(kind, content, away.parent)
        if state in FINAL:
            away.ended = True
            away.follower.close()
            if away.take_back is not None:
                away.take_back()
            brings = state is JobState.COMPLETED and away.outputs
            note = f"{', '.join(away.outputs)} once this kernel is idle" if brings else None
            self._board.refresh(away, note=note, last=not brings)
            self._front.on_main(self.take_in)
        elif changed or late:
            away.looked_mono = now
            self._board.refresh(away)

    def _news(self, away: Away, job: Job) -> Iterator[Shown]:
        if job.attempt is not None:
            away.follower.follow_log(self._queue().state.log(job.attempt))
        return away.follower.news()

    # -- outputs, on the main thread

    def take_in(self, between: bool = True) -> None:
        """Bind the outputs of cells that have ended.

        Args:
            between: only between two cells, so that no running code finds a name changed.
        """
        if between and not self._main_is_free():
            return
        with self._mutex:
            over = [item for item in self._away.values() if item.ended]
            for item in over:
                del self._away[item.uid]
        for item in over:
            if item.state is JobState.COMPLETED and item.outputs:
                self._board.refresh(item, note=self._take(item))

    def take_in_after_wait(self) -> None:
        """A cell has waited for jobs: what they bring is here for its next line."""
        if self._away:
            self._pulse()
            self.take_in(between=False)

    def _take(self, away: Away) -> str | None:
        try:
            values = _outputs(self._queue(), self._queue().show(away.job_id))
            return self._bind(values, away.bound_to).note(away.job_id)
        except UserError as exc:
            return str(exc)

    def bring(self, job: Job) -> str | None:
        """Bind what a cell of an earlier kernel brings; what has become of it, in a few words."""
        try:
            values = parcel.fetch(self._queue().state, job.spec.uid)
        except UserError as exc:
            return str(exc)
        return None if values is None else self._bind(values, {}).note(job.id)

    def _bind(self, values: Mapping[str, Any], bound_to: Mapping[str, int]) -> Taken:
        taken, namespace = Taken(), self._front.shell.user_ns
        for name, value in values.items():
            now = _identity(namespace, name)
            if now in (bound_to.get(name, _NOT_SET), self._published.get(name)):
                self._put(name, value)
                taken.here.append(name)
            else:
                taken.rebound.append(name)
        return taken

    def fetch(self, job: Job) -> list[str]:
        """Bind the outputs of an isolated cell, whoever has sent it; the names that are bound.

        Of one that has failed for a part of its outputs, the others.

        Raises:
            UserError: it has no outputs, or they cannot be read back here.
        """
        if job.kind is not JobKind.ISOLATED:
            raise UserError(f"job {job.id} is a {job.kind}; only isolated cells have outputs")
        if not job.ended:
            raise UserError(f"job {job.id} is {job.state}; `%gpuq wait {job.id}` waits for its end")
        values = parcel.fetch(self._queue().state, job.spec.uid)
        if values is None and job.state is not JobState.COMPLETED:
            why = f": {job.error}" if job.error else ""
            raise UserError(f"job {job.id} has no outputs, it is {job.state}{why}")
        if values is None:
            raise UserError(_gone(job))
        for name, value in values.items():
            self._put(name, value)
        return list(values)

    def _put(self, name: str, value: object) -> None:
        self._front.shell.user_ns[name] = value
        self._published[name] = id(value)

    # -- in its place

    def await_here(self, away: Away, show: Callable[[str, Mapping[str, Any]], None]) -> Job:
        """Wait for the end of a cell that holds its place; its outputs are bound then.

        Args:
            show: shows a message of the cell where it stands.
        """
        queue = self._queue()
        if self._front.attended:
            self._board.put_up(away, queue.show(away.job_id), Around())

        def tick() -> None:
            job = queue.show(away.job_id)
            for kind, content in merged(self._news(away, job)):
                if kind == "clear_output":
                    self._board.erased(away)
                show(kind, content)
            self._board.refresh(away, last=False)

        try:
            queue.wait(away.job_id, tick=tick)
            tick()
        except BaseException:
            shielded(partial(queue.cancel, away.job_id))
            raise
        finally:
            away.follower.close()
        job = queue.show(away.job_id)
        note = None
        if job.state is JobState.COMPLETED and away.outputs:
            note = self._bind(_outputs(queue, job), away.bound_to).note(job.id)
        self._board.refresh(away, note=note)
        return job


def merged(messages: Iterable[Shown]) -> Iterator[Shown]:
    """The messages, neighbouring pieces of one stream joined: a burst must not fill a socket."""
    name, length = "", 0
    pieces: list[str] = []
    for kind, content in messages:
        same = kind == "stream" and content["name"] == name and length < _MERGED
        if pieces and not same:
            yield "stream", {"name": name, "text": "".join(pieces)}
            pieces, length = [], 0
        if kind == "stream":
            name = content["name"]
            pieces.append(content["text"])
            length += len(content["text"])
        else:
            yield kind, content
    if pieces:
        yield "stream", {"name": name, "text": "".join(pieces)}


def _outputs(queue: Queue, job: Job) -> dict[str, Any]:
    values = parcel.fetch(queue.state, job.spec.uid)
    if values is None:
        raise UserError(_gone(job))
    return values


def _gone(job: Job) -> str:
    return f"the outputs of job {job.id} are no longer kept"


def _refuse_outputs(isolation: Isolation) -> None:
    if isolation.outputs:
        raise UserError(
            f"--out {','.join(isolation.outputs)}: each job of the sweep would bring it back; "
            "let them write files, and name these by the values"
        )


def _identity(namespace: Mapping[str, Any], name: str) -> int:
    """What the name stands for now, without keeping that alive (it may hold GPU memory)."""
    return id(namespace[name]) if name in namespace else _NOT_SET
