"""What the terminal's live screen knows, and what its keys do. It draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.entries import Entry
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import ACTIVE, ExpectedStart
from gpusched_ipy.look import Look
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.paced import PacedStarts
from gpusched_ipy.screendraw import WINDOW_S, Scene, queue_lines
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.steer import obey

_SAID_S = 8.0  # for how long an answer stays
_MOVES = {"up": -1, "k": -1, "down": 1, "j": 1}
_PAGES = {"page up": -1, "page down": 1}
_VERBS = {"c": "cancel", "h": "hold", "r": "release", "t": "top", "d": "drain", "u": "resume"}
_STEPS = {"+": 1, "=": 1, "-": -1}
_WHOLE = frozenset({"drain", "resume"})  # of the queue, not of a job


@dataclass(slots=True)
class _Rows:
    """The part of the queue that is on the screen."""

    entries: list[Entry] = field(default_factory=list)
    offset: int = 0
    total: int = 0  # rows in all
    counts: Mapping[str, int] = field(default_factory=dict)
    starts: Mapping[int, ExpectedStart] = field(default_factory=dict)
    drained: str | None = None
    trouble: str | None = None


class ScreenState:
    """GPUs and queue as they were last read, the chosen job, and the last answer.

    Args:
        queue: what is shown and steered.
        monitor: gives the readings; somebody else wants them.
        size: columns and lines of the terminal now.
        unicode: whether it shows more than ASCII.
    """

    def __init__(
        self,
        queue: Queue,
        monitor: Monitor,
        size: Callable[[], tuple[int, int]],
        *,
        unicode: bool = True,
    ) -> None:
        self._queue = queue
        self._monitor = monitor
        self._size = size
        self._unicode = unicode
        self._look = Look(queue, monitor)
        self._starts = PacedStarts(queue, monitor)
        self._rows = _Rows()
        self._selected: str | None = None  # the key of a row
        self._place = 0  # where it stands on the screen
        self._slipped = False  # the row that was chosen has gone, and nobody has chosen since
        self._unfolded: set[str] = set()  # sweeps whose members are shown
        self._gpus: tuple[Gpu, ...] = ()
        self._snapshot: Snapshot | None = None
        self._names: Mapping[int, str] = {}
        self._members: Mapping[str, str] = {}
        self._message = ""
        self._said_at = float("-inf")
        self._armed: str | None = None  # the row whose cancel must be confirmed
        self.quit = False

    # -- reading

    def read(self) -> None:
        """Read the newest GPUs and the shown part of the queue; what cannot be read is said."""
        try:
            self._read_gpus()
            self._read_queue()
            self._rows.trouble = None
        except GpuSchedError as exc:
            self._rows.trouble = str(exc)

    def _read_gpus(self) -> None:
        snapshot = self._look.latest(Detail.FULL)
        newest = self._monitor.latest()
        if newest is not None and newest.problem:
            snapshot = newest
        self._snapshot = snapshot
        if snapshot is not None and not snapshot.problem:
            self._gpus = snapshot.gpus
            self._names, self._members = self._look.jobs, self._look.members

    def _read_queue(self) -> None:
        rows, queue = self._rows, self._queue
        rows.counts = queue.counts()
        rows.drained = queue.drained
        fits = self.fits
        entries, rows.total = queue.folded_page(rows.offset, fits, self._unfolded)
        last = max(0, rows.total - fits)
        if rows.offset > last:
            rows.offset = last
            entries, rows.total = queue.folded_page(last, fits, self._unfolded)
        rows.entries = list(entries)
        rows.starts = self._starts.renew() if rows.counts.get("waiting") else {}
        keys = [entry.key for entry in rows.entries]
        if self._selected not in keys:
            self._slipped |= self._selected is not None
            self._selected = keys[min(self._place, len(keys) - 1)] if keys else None
        self._place = keys.index(self._selected) if self._selected is not None else 0

    @property
    def fits(self) -> int:
        """How many jobs the screen has room for."""
        return queue_lines(self.scene())

    def scene(self) -> Scene:
        """What is to be drawn now."""
        now = self._queue.clock.now()
        width, height = self._size()
        rows = self._rows
        return Scene(
            now=now,
            width=width,
            height=height,
            snapshot=self._snapshot,
            gpus=self._gpus,
            history=self._monitor.history(WINDOW_S),
            names=self._names,
            members=self._members,
            explanation=self._monitor.explanation,
            entries=rows.entries,
            starts=rows.starts,
            offset=rows.offset,
            total=rows.total,
            counts=rows.counts,
            drained=rows.drained,
            trouble=rows.trouble,
            selected=self._selected,
            message=self._message if now.mono - self._said_at < _SAID_S else "",
            unicode=self._unicode,
        )

    # -- keys

    def press(self, key: str) -> None:
        """Do what a key asks for; the answer is the next screen's message."""
        armed, self._armed = self._armed, None
        slipped, self._slipped = self._slipped, False
        if key in ("q", "Q"):
            self.quit = True
        elif key in _MOVES:
            self._move(_MOVES[key])
        elif key in _PAGES:
            self._turn_to(self._rows.offset + _PAGES[key] * self.fits)
        elif key in ("home", "g"):
            self._turn_to(0)
        elif key in ("end", "G"):
            self._turn_to(self._rows.total, last=True)
        elif key == "f":
            self._fold()
        elif slipped and _VERBS.get(key) not in _WHOLE and (key in _STEPS or key in _VERBS):
            self._say("the chosen job has gone: nothing is done; the key is now for this one")
        elif key in _STEPS or key in _VERBS:
            self._steer(key, armed)

    def _move(self, step: int) -> None:
        keys = [entry.key for entry in self._rows.entries]
        if self._selected not in keys:
            return
        place = keys.index(self._selected) + step
        if 0 <= place < len(keys):
            self._selected, self._place = keys[place], place
        else:
            self._turn_to(self._rows.offset + step, last=step > 0)

    def _turn_to(self, offset: int, *, last: bool = False) -> None:
        """Show the rows from ``offset`` on, and choose the first or last of them."""
        self._rows.offset = max(0, offset)
        self.read()
        if self._rows.entries:
            self._place = len(self._rows.entries) - 1 if last else 0
            self._selected = self._rows.entries[self._place].key
            self._slipped = False

    @property
    def _chosen(self) -> Entry | None:
        return next((one for one in self._rows.entries if one.key == self._selected), None)

    def _fold(self) -> None:
        """Show the members of the chosen sweep, or no longer."""
        chosen = self._chosen
        array = None if chosen is None else chosen.job.spec.array
        if chosen is None or array is None:
            self._say("no sweep is chosen")
            return
        self._unfolded ^= {array.id}
        if chosen.member:
            self._selected = f"sweep {array.id}"
        self.read()
        self._slipped = False

    def _steer(self, key: str, armed: str | None) -> None:
        verb, chosen = _VERBS.get(key, "priority"), self._chosen
        if verb in _WHOLE:
            self._obey({"verb": verb})
        elif chosen is None:
            self._say("no job is chosen")
        elif verb == "cancel" and (heavy := _heavy(chosen)) and armed != chosen.key:
            self._armed = chosen.key
            self._say(f"{heavy}: press c once more to end it.")
        else:
            sweep = chosen.sweep
            priority = chosen.job.priority if sweep is None else sweep.priority
            asked = {"verb": verb, "id": chosen.job.id, "sweep": sweep is not None}
            self._obey(asked | {"value": priority + _STEPS.get(key, 0)})

    def _obey(self, message: Mapping[str, object]) -> None:
        try:
            self._say(obey(self._queue, message))
        except GpuSchedError as exc:
            self._say(str(exc))
        self.read()
        self._slipped = False  # what has gone by this key was looked at

    def _say(self, text: str) -> None:
        self._message = text
        self._said_at = self._queue.clock.now().mono


def _heavy(chosen: Entry) -> str | None:
    """What a cancel would end that one keystroke should not; None where it may."""
    if chosen.sweep is not None:
        return f"All jobs of the sweep {chosen.sweep.name} are meant"
    job = chosen.job
    return f"Job {job.id} is {job.state}" if job.state in ACTIVE else None
