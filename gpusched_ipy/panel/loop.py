"""The panel's own thread: it beats, sends what is new, and does what the buttons ask.

It knows pages only as names that beat, and a function that sends; it runs without Jupyter. While
no page can be seen there is no thread, no wanted reading and no subscription: that costs nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gpusched_ipy.backends import Detail
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import ExpectedStart
from gpusched_ipy.panel.feed import (
    PAGE,
    REPEATED,
    WINDOW_S,
    JobPage,
    pack,
    problem_of,
    state_message,
    thin,
)
from gpusched_ipy.panel.needs import AlwaysFree, Host, PanelQueue, Readings
from gpusched_ipy.records import expected_text
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.steer import number, obey

_log = logging.getLogger(__name__)

BEAT_S = 2.0  # how often a page beats
SILENCE_S = 3 * BEAT_S + 1.0  # a page that was not heard for so long is gone
ANSWERS_S = 5.0  # for how long an answer to a click is repeated
FIRST_S = 10.0  # when it has shown itself for so long there is something worth saving …
KEPT_S = 60.0  # … the picture that is saved with the notebook is renewed at most so often
REASONS_S = 2.0  # wait reasons change without a move of the job: they are read this often

Send = Callable[[dict[str, Any], bytes | None], None]


def read_page(
    queue: PanelQueue, wall: float, offset: int = 0, unfolded: Collection[str] = ()
) -> JobPage:
    """A part of the queue as it stands at ``wall`` (s since the epoch).

    Raises:
        GpuSchedError: the queue cannot be read.
    """
    counts = queue.counts()
    rows, total = queue.folded_page(offset, PAGE, unfolded)
    return JobPage(
        rows=tuple(rows),
        offset=offset,
        total=total,
        running=counts["running"],
        waiting=counts["waiting"],
        held=counts["held"],
        spans=tuple(queue.ran_since(wall - WINDOW_S)),
        drained=bool(queue.drained),
    )


@dataclass(slots=True)
class _View:
    heard: float  # monotonic, s
    visible: bool = True


@dataclass(slots=True)
class _Shown:
    """What has been sent and what it was made of."""

    state: dict[str, Any] | None = None
    rev: int = 0
    layout: int = 0
    keys: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()  # those of the last good reading
    members: Mapping[str, str] = field(default_factory=dict)
    page: JobPage = field(default_factory=JobPage)
    page_at: float = float("-inf")
    page_cost: float = 0.0  # what reading it took, s
    last: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=REPEATED))


class PanelLoop:
    """Feeds the pages of one panel.

    Args:
        queue: what is shown and steered.
        monitor: gives the readings.
        settings: ``panel_hz``.
        send: sends one message to every page; called from the panel's thread.
        host: tells when the silence of a page means nothing.
        name: names the want at the monitor.
        moved: called from the panel's thread when jobs have started or ended, at most every
            ``KEPT_S`` seconds.
        starts: when waiting jobs are expected to start, where that is known.
    """

    def __init__(
        self,
        queue: PanelQueue,
        monitor: Readings,
        settings: Settings,
        send: Send,
        *,
        host: Host | None = None,
        clock: Clock | None = None,
        name: str = "panel",
        moved: Callable[[], None] | None = None,
        starts: Callable[[], Mapping[int, ExpectedStart]] | None = None,
    ) -> None:
        self._queue = queue
        self._monitor = monitor
        self._send = send
        self._host = host or AlwaysFree()
        self._clock = clock or SystemClock()
        self._name = name
        self._moved = moved
        self._starts = starts
        self._kept: tuple[object, float] = (None, self._mono())  # told as moved, and when
        self.every_s = 1.0 / min(4.0, settings.panel_hz)
        self._cond = threading.Condition()
        self._inbox: deque[Mapping[str, Any]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        # The rest belongs to the thread.
        self._views: dict[str, _View] = {}
        self._shown = _Shown()
        self._changed = True
        self._offset = 0
        self._unfolded: set[str] = set()  # sweeps whose members are shown
        self._due = 0.0  # when the next tick is to be sent, monotonic, s
        self._seq = 0
        self._heard_while_busy = False  # the front end's messages pass a running cell
        self._done: deque[str] = deque(maxlen=256)  # clicks: each is obeyed once
        self._answers: deque[tuple[float, list[Any]]] = deque(maxlen=64)

    @property
    def working(self) -> bool:
        """Whether the panel's thread runs: only while a page can be seen."""
        with self._cond:
            return self._thread is not None

    def expect(self) -> None:
        """A page is about to open: send although none has been heard yet."""
        self.receive({"t": "expect", "v": ""})

    def receive(self, message: Mapping[str, Any]) -> None:
        """Take a message of a page. Only puts it down; may be called from any thread."""
        with self._cond:
            if self._closed:
                return
            if self._thread is None:
                if message.get("t") in ("bye", "hide"):
                    return
                self._thread = threading.Thread(
                    target=self._run, name="gpusched-panel", daemon=True
                )
                self._thread.start()
            self._inbox.append(message)
            self._cond.notify()

    def close(self) -> None:
        """End the thread; nothing is sent afterwards."""
        with self._cond:
            self._closed = True
            thread = self._thread
            self._cond.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(2.0)

    # The thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        # The thread before this one may still be leaving: it must not end this one's want.
        who = f"{self._name} {threading.get_ident()}"
        leave: Callable[[], None] | None = None
        try:
            self._monitor.want(who, self.every_s, Detail.FULL)
            leave = self._queue.subscribe(self._on_change)
            self._views.clear()
            self._changed = True  # nobody has listened until now
            while self._take_messages():
                if self._alive() and self._mono() >= self._due:
                    self._beat()
        except (GpuSchedError, OSError):
            _log.exception("the panel cannot be served now; its next message begins anew")
        finally:
            if leave is not None:
                leave()
            self._monitor.unwant(who)
            with self._cond:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _take_messages(self) -> bool:
        """Wait for messages or the next beat; False when nobody can see the panel any more."""
        with self._cond:
            while not self._closed and not self._inbox and (wait := self._due - self._mono()) > 0:
                self._cond.wait(wait)
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            self._handle(message)
        with self._cond:
            if self._closed:
                return False
            if self._alive() or self._inbox:
                return True
            # Decided under the lock: a page that comes now finds no thread, and starts one.
            self._thread = None
            return False

    def _on_change(self, *_: object) -> None:
        self._changed = True

    def _handle(self, message: Mapping[str, Any]) -> None:
        kind, name = message.get("t"), str(message.get("v", ""))
        if kind == "bye":
            self._views.pop(name, None)
        elif kind == "hide" and name in self._views:
            self._views[name].visible = False
        elif kind in ("hello", "beat", "expect"):
            known = self._views.get(name)
            self._views[name] = _View(self._mono())
            if name:
                self._views.pop("", None)
                self._heard_while_busy |= self._host.busy
            if kind == "hello" or known is None or not known.visible:
                self._greet()
        elif kind == "do":
            self._click(message)

    def _alive(self) -> bool:
        """Whether somebody looks. A page that is silent although it could speak is forgotten."""
        now = self._mono()
        muted = self._host.busy and not self._heard_while_busy
        since = now - SILENCE_S
        if not muted and self._host.free_since < since:
            for name in [name for name, view in self._views.items() if view.heard < since]:
                del self._views[name]
        return any(view.visible for view in self._views.values())

    # Sending -------------------------------------------------------------------------------------

    def _greet(self) -> None:
        """Everything, for a page that has nothing yet."""
        self._shown.state = None
        self._due = self._mono()
        self._refresh()
        base = self._clock.now().wall
        snapshots = thin(self._monitor.history(WINDOW_S))
        counts, points = pack(snapshots, self._shown.keys, base)
        past = {"t": "past", "lay": self._shown.layout, "base": base, "counts": counts}
        self._send(past, points)

    def _beat(self) -> None:
        if "" in self._views:
            self._greet()  # nobody has been heard yet: a page that opens now must not miss it
        else:
            self._refresh()
        now = self._clock.now()
        snapshot = self._monitor.latest()
        last = self._shown.last
        if snapshot and not snapshot.problem and (not last or last[-1] is not snapshot):
            last.append(snapshot)
        while self._answers and self._answers[0][0] < now.mono - ANSWERS_S:
            self._answers.popleft()
        counts, points = pack(list(last), self._shown.keys, now.wall)
        self._seq += 1
        tick = {
            "t": "tick",
            "seq": self._seq,
            "rev": self._shown.rev,
            "lay": self._shown.layout,
            "now": now.wall,
            "every": self.every_s,
            "age": snapshot.age_s(now.mono) if snapshot else None,
            "limit": max(5.0, 3 * self.every_s),
            "problem": problem_of(snapshot),
            "base": now.wall,
            "counts": counts,
            "answers": [answer for _, answer in self._answers],
        }
        self._send(tick, points)
        self._keep()
        self._due = self._mono() + self.every_s

    def _keep(self) -> None:
        """Say that jobs have started or ended since that was last said; and once at first."""
        page = self._shown.page
        stands = [(job.id, job.state) for job in page.spans]
        before, at = self._kept
        rest = FIRST_S if before is None else KEPT_S
        early = self._mono() < at + rest or self._monitor.latest() is None
        if self._moved is None or stands == before or early:
            return
        self._kept = (stands, self._mono())
        self._moved()

    def _refresh(self) -> None:
        """Send the state if it is not the one that was sent last."""
        shown = self._shown
        self._read_queue()
        snapshot = self._monitor.latest(Detail.FULL)
        newest = self._monitor.latest()
        if newest is not None and newest.problem:
            snapshot = newest
        if snapshot is not None and not snapshot.problem:
            shown.gpus = self._marked(snapshot).gpus
        keys = tuple(gpu.uuid for gpu in shown.gpus)
        if keys != shown.keys:
            shown.keys = keys
            shown.layout += 1
            shown.last.clear()
        state = state_message(
            snapshot,
            shown.gpus,
            shown.page,
            source=self._source(snapshot),
            members=shown.members,
            now=self._clock.now().wall,
            absent=self._absent(snapshot),
        )
        if state == shown.state:
            return
        if shown.state is not None or shown.rev == 0:
            shown.rev += 1
        shown.state = state
        self._send(state | {"rev": shown.rev, "lay": shown.layout}, None)

    def _marked(self, snapshot: Snapshot) -> Snapshot:
        """With our jobs and notebooks known by name, where the queue can be read."""
        shown = self._shown
        try:
            shown.members = self._queue.members()
            return self._queue.mark(snapshot, [job for job in shown.page.spans if not job.ended])
        except GpuSchedError as exc:
            shown.page = JobPage(trouble=str(exc))
            return snapshot

    def _absent(self, snapshot: Snapshot | None) -> bool:
        """Whether there is no backend: then the problem is the explanation why."""
        problem = snapshot.problem if snapshot else None
        return problem is not None and problem == self._monitor.explanation

    def _source(self, snapshot: Snapshot | None) -> str:
        if snapshot is not None and not snapshot.problem:
            return f"{snapshot.backend} · {snapshot.source}"
        return self._monitor.explanation or "the first reading is on its way"

    def _read_queue(self) -> None:
        """Read the shown part of the queue when it may differ, but never for much of the time."""
        now = self._clock.now()
        shown = self._shown
        age = now.mono - shown.page_at
        changed = self._changed and (shown.state is None or age >= 25 * shown.page_cost)
        waits = shown.page.waiting > 0 and age >= max(REASONS_S, 100 * shown.page_cost)
        if not changed and not waits:
            return
        self._changed = False
        try:
            shown.page = self._load_page(now.wall)
        except GpuSchedError as exc:
            self._changed = True
            shown.page = JobPage(trouble=str(exc))
        shown.page_at = self._mono()
        shown.page_cost = shown.page_at - now.mono

    def _load_page(self, wall: float) -> JobPage:
        page = read_page(self._queue, wall, self._offset, self._unfolded)
        if self._offset >= max(1, page.total):
            self._offset = max(0, (page.total - 1) // PAGE * PAGE)
            page = read_page(self._queue, wall, self._offset, self._unfolded)
        return replace(page, starts=self._expected(page.waiting))

    def _expected(self, waiting: int) -> Mapping[int, str]:
        if self._starts is None or not waiting:
            return {}
        now = self._clock.now()
        return {job: expected_text(start, now) for job, start in self._starts().items()}

    # Clicks --------------------------------------------------------------------------------------

    def _click(self, message: Mapping[str, Any]) -> None:
        """Do what a button asks, once, and answer."""
        click = str(message.get("c", ""))
        if click in self._done:
            return
        self._done.append(click)
        try:
            good, text = True, self._obey(message)
        except GpuSchedError as exc:
            good, text = False, str(exc)
        except Exception as exc:  # noqa: BLE001 - shown to who clicked, and logged
            _log.exception("a click on the panel failed")
            good, text = False, f"that failed: {type(exc).__name__}: {exc}"
        self._changed = True
        self._shown.page_cost = 0.0  # whoever clicks sees at once what it did
        self._answers.append((self._mono(), [click, good, text]))
        self._beat()

    def _obey(self, message: Mapping[str, Any]) -> str:
        verb = message.get("verb")
        if verb == "page":
            self._offset = max(0, number(message.get("value"), message))
        elif verb == "fold":
            self._fold(number(message.get("id"), message))
        else:
            return obey(self._queue, message)
        return ""

    def _fold(self, first: int) -> None:
        """Show the members of the sweep in the row of that job, or no longer."""
        for row in self._shown.page.rows:
            if row.sweep is not None and row.job.id == first:
                self._unfolded ^= {row.sweep.id}

    def _mono(self) -> float:
        return self._clock.now().mono
