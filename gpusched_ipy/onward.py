"""Isolated cells that an earlier kernel of this notebook has sent off: shown on under their cells.

A front end lets no kernel write under a cell that another kernel has run. So a small script in the
page makes all that the job has shown the outputs of its cell, in the notebook itself. Where the
page does not tell of its notebook, or the cell is gone, they stand under the cell that runs now.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from gpusched_ipy import awaynotes, badge
from gpusched_ipy.api import Queue
from gpusched_ipy.badge import Around
from gpusched_ipy.errors import JobNotFoundError
from gpusched_ipy.folding import ranges
from gpusched_ipy.frontend import FrontEnd, Message
from gpusched_ipy.job import ACTIVE, FINAL, Job, JobState
from gpusched_ipy.store import Store
from gpusched_ipy.sweep import label
from gpusched_ipy.transcript import Follower, Output, Standing, rewritten

# So long after its end (s) what a cell has shown is still brought to its place.
_KEPT_S = 86400.0
_MOST = 200  # cells; what is older has to be asked for
_FOLLOW_S = 0.3  # all that it has shown is sent each time
_BYTES_PER_S = 4_000_000  # characters: the more that is, the less often
_REFRESH_S = 1.0
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_SCRIPT = Path(__file__).parent / "static" / "onward.js"


@dataclass(slots=True, eq=False)
class _Place:
    """One cell, and what it shows."""

    job: Job
    follower: Follower
    area: Any  # an ipywidgets.Output, which holds its outputs
    standing: Standing = field(default_factory=Standing)
    note: str | None = None
    over: bool = False  # all that it has shown is shown
    settled: bool = False  # and what it brings is here
    due_mono: float = 0.0
    badge_mono: float = 0.0

    def told(self, labels: Callable[[Sequence[str]], Sequence[str]]) -> dict[str, Any]:
        """What the page has to know of it."""
        note = self.note or label(self.job.spec.sweep) or None
        around = Around(gpus=labels(self.job.gpus), note=note)
        shown = badge.bundle(self.job, around)
        return {
            "uid": self.job.spec.uid,
            "badge": shown["text/html"],
            "text": shown["text/plain"],
            "area": self.area.model_id,
            "over": self.settled,
        }


class Onward:
    """The cells of earlier kernels of one notebook.

    Args:
        queue: gives the queue with the settings in force.
        labels: what people call the GPUs of these UUIDs.
        bring: binds, on the main thread, what a job brings back; says so in a few words.
        main_is_free: whether the main thread runs no cell.
    """

    def __init__(
        self,
        front: FrontEnd,
        queue: Callable[[], Queue],
        labels: Callable[[Sequence[str]], Sequence[str]],
        bring: Callable[[Job], str | None],
        main_is_free: Callable[[], bool],
    ) -> None:
        self._front = front
        self._queue = queue
        self._labels = labels
        self._bring = bring
        self._main_is_free = main_is_free
        self._mutex = threading.Lock()
        self._places: list[_Place] = []
        self._widget: Any = None
        self._to_bring: list[_Place] = []
        self._parent: Message = {}  # the cell that loaded us
        self._display_id = ""

    @property
    def open(self) -> bool:
        """Whether one of them may still show something."""
        return any(not place.over for place in self._places)

    def adopt(self, wall: float) -> bool:
        """Take over what is away from this notebook, once; whether there is anything to show."""
        if self._widget is not None or self._front.notebook is None or not self._front.attended:
            return False
        jobs = self._away(self._front.notebook, wall)
        if not jobs:
            return False
        from ipywidgets import Output as Area

        state = self._queue().state
        self._places = [
            _Place(job, Follower(state.transcript(job.spec.uid)), Area()) for job in jobs
        ]
        self._widget = _widget_class()(cells=self._told())
        self._widget.observe(self._found, "found")
        self._widget.observe(self._written, "written")
        which = f"{'job' if len(jobs) == 1 else 'jobs'} {ranges(job.id for job in jobs)}"
        text = f"gpuqueue: {which} of this notebook: %gpuq show has the output"
        view = {"version_major": 2, "version_minor": 0, "model_id": self._widget.model_id}
        self._parent, self._display_id = self._front.parent, f"gpuqueue-{uuid4().hex}"
        data = {"text/plain": text, _WIDGET_VIEW: view}
        self._front.display(data, self._display_id, self._parent)
        return True

    def _away(self, notebook: str, wall: float) -> list[Job]:
        """What is away, with all members of a sweep of which one is."""
        store, found = self._queue().store, set[int]()
        for uid in awaynotes.found(store.state.root, notebook):
            job = _recorded(store, uid)
            if job is None or (job.ended_at is not None and job.ended_at < wall - _KEPT_S):
                awaynotes.remove(store.state, notebook, uid)
            elif job.spec.array is None:
                found.add(job.id)
            else:
                found.update(store.array_ids(job.spec.array.id))
        return store.those(sorted(found)[-_MOST:])

    def run_again(self, cell_id: str | None) -> tuple[int, ...]:
        """That cell has been run again: what it shows now takes the place of what it showed.

        Returns:
            its jobs that had not begun: they are cancelled.
        """
        with self._mutex:
            gone = [
                place
                for place in self._places
                if cell_id is not None and place.job.spec.cell_id == cell_id
            ]
            self._places = [place for place in self._places if place not in gone]
            for place in gone:
                place.follower.close()
                self._forget(place)
            if gone:
                self._tell()
        store = self._queue().store
        states = store.states(place.job.id for place in gone)
        late = tuple(job_id for job_id, state in states.items() if state is JobState.PENDING)
        for job_id in late:
            store.request_cancel(job_id)
        return late

    def _found(self, change: Mapping[str, Any]) -> None:
        """These have their cells: where all have, no view is left that a saved notebook lacks."""
        jobs = [place.job for place in list(self._places)]
        if jobs and all(job.spec.uid in change["new"] for job in jobs):
            several = "jobs" if len(jobs) > 1 else "job"
            text = f"gpuqueue: the output of {several} {ranges(job.id for job in jobs)} goes on "
            text += "under its cell"
            self._front.display({"text/plain": text}, self._display_id, self._parent, update=True)

    def _written(self, change: Mapping[str, Any]) -> None:
        """These stand whole in the notebook: its next kernel has nothing to add."""
        for place in list(self._places):
            if place.settled and place.job.spec.uid in change["new"]:
                self._forget(place)

    def _forget(self, place: _Place) -> None:
        if self._front.notebook is not None:
            awaynotes.remove(self._queue().state, self._front.notebook, place.job.spec.uid)

    # -- following, in the courier's thread

    def pulse(self) -> float | None:
        """Show what has come; seconds until the next look, None: nothing more will come."""
        with self._mutex:
            open_places = [place for place in self._places if not place.over]
            if not open_places:
                return None
            changed = [self._follow(place, time.monotonic()) for place in open_places]
            if any(changed):
                self._tell()
            running = any(place.job.state in ACTIVE for place in open_places)
        return _FOLLOW_S if running else _REFRESH_S

    def _follow(self, place: _Place, now: float) -> bool:
        """Send what is new of one; whether its badge has changed."""
        if now < place.due_mono:
            return False
        before, job = place.job, _recorded(self._queue().store, place.job.spec.uid)
        if job is None:  # somebody has purged it
            place.over = True
            return False
        place.job = job
        if place.job.attempt is not None:
            place.follower.follow_log(self._queue().state.log(place.job.attempt))
        news = list(place.follower.news())
        for kind, content in news:
            place.standing.take(kind, content)
        if news:
            outputs = [_as_saved(output) for output in place.standing.outputs()]
            place.area.outputs = tuple(outputs)
            place.due_mono = now + max(_FOLLOW_S, len(str(outputs)) / _BYTES_PER_S)
        if place.job.state in FINAL:
            place.over = True
            place.follower.close()
            self._to_bring.append(place)
            self._front.on_main(self.take_in)
        if place.job.state is before.state and now - place.badge_mono < _REFRESH_S:
            return place.over
        place.badge_mono = now
        return True

    def take_in(self) -> None:
        """On the main thread, between two cells: bind what those bring that have ended."""
        if not self._to_bring or not self._main_is_free():
            return
        with self._mutex:
            ended, self._to_bring = self._to_bring, []
        for place in ended:
            if place.job.state is JobState.COMPLETED:
                place.note = self._bring(place.job)
            place.settled = True
        with self._mutex:
            self._tell()

    def _told(self) -> list[dict[str, Any]]:
        return [place.told(self._labels) for place in self._places]

    def _tell(self) -> None:
        told = self._told()
        if told != self._widget.cells:
            self._widget.cells = told

    def close(self) -> None:
        """Follow nothing any more; what is shown stays."""
        with self._mutex:
            for place in self._places:
                place.over = True
                place.follower.close()


def _recorded(store: Store, uid: str) -> Job | None:
    try:
        return store.by_uid(uid)
    except JobNotFoundError:
        return None


def _as_saved(output: Output) -> dict[str, Any]:
    """An output as notebooks save it."""
    names = {
        "stream": ("name", "text"),
        "error": ("ename", "evalue", "traceback"),
        "execute_result": ("data", "metadata"),
    }.get(output.kind, ("data", "metadata"))
    kept = {name: output.content[name] for name in names if name in output.content}
    if output.kind == "stream":
        # As it is seen now: what is set, not written, a page does not take for a terminal's.
        kept["text"] = rewritten(f"{kept['text']}\n")[:-1]
    if output.kind == "execute_result":
        kept["execution_count"] = None
    return {"output_type": output.kind, **kept}


@cache
def _widget_class() -> type:
    """The widget's class; made on first use, because anywidget is a heavy import."""
    import anywidget
    from traitlets import Dict, List, Unicode

    class OnwardWidget(anywidget.AnyWidget):
        """Carries the page's script, and which outputs belong under which cell."""

        _esm = _SCRIPT.read_text(encoding="utf-8")
        cells = List(Dict()).tag(sync=True)
        found = List(Unicode()).tag(sync=True)  # the jobs whose cells the page has
        written = List(Unicode()).tag(sync=True)  # the jobs that the page has seen to their end

    return OnwardWidget
