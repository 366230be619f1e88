"""The live panel: the widget that shows the GPUs and the queue, and its still substitutes.

The page (``static/``) draws; :mod:`gpusched_ipy.panel.loop` feeds it from a thread of its own.
Handlers of the page's messages only put them down: no click ever takes a cell's time.
"""

from __future__ import annotations

import atexit
import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import ExpectedStart
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.paced import PacedStarts
from gpusched_ipy.panel.feed import WINDOW_S, JobPage
from gpusched_ipy.panel.loop import PanelLoop, read_page
from gpusched_ipy.panel.needs import PanelQueue, Readings
from gpusched_ipy.panel.picture import Picture
from gpusched_ipy.panel.still import still_html, still_text

_STATIC = Path(__file__).parent / "static"
_SCRIPTS = ("parts.js", "plot.js", "table.js", "panel.js")  # one module, in this order
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

_open: weakref.WeakSet[GpuPanel] = weakref.WeakSet()
_numbers = itertools.count(1)
_PID = os.getpid()


class GpuPanel:
    """The live panel; show it as the result of a cell, as often as you like.

    Args:
        queue: what is shown and steered; usually a :class:`gpusched_ipy.api.Queue`.
        monitor: gives the readings; usually a :class:`gpusched_ipy.monitor.Monitor`.
        settings: ``panel_hz``; those in force when None.
        live: False gives only the still picture (nbconvert, papermill and other headless runs).
    """

    def __init__(
        self,
        queue: PanelQueue,
        monitor: Readings,
        settings: Settings | None = None,
        *,
        live: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self._queue = queue
        self._monitor = monitor
        self._settings = settings or Settings.load()
        self._live = live
        self._clock = clock or SystemClock()
        self._widget: Any = None
        self._kernel: _Kernel | None = None
        self._loop: PanelLoop | None = None
        self._picture: Picture | None = None
        self._closed = False
        _open.add(self)

    @property
    def working(self) -> bool:
        """Whether the panel does anything at present: only while somebody can see it."""
        return self._loop is not None and self._loop.working

    def close(self) -> None:
        """End the panel's work and its widget; its last picture stays."""
        if self._closed:
            return
        self._closed = True
        if self._picture is not None:
            self._picture.renew()
        if self._loop is not None:
            self._loop.close()
        if self._kernel is not None:
            self._kernel.leave()
        if self._widget is not None:
            self._widget.close()

    @property
    def orphaned(self) -> bool:
        """Whether somebody else has closed its widget."""
        return self._widget is not None and self._widget.comm is None and not self._closed

    def shows(self, queue: PanelQueue, monitor: Readings) -> bool:
        """Whether this is a live panel of that queue and those readings."""
        # `Widget.close_all()` takes a widget its comm.
        alive = self._widget is not None and self._widget.comm is not None and not self._closed
        return alive and self._queue is queue and self._monitor is monitor

    def _ipython_display_(self) -> None:
        """The widget where there can be one, and below it the picture that is saved with it.

        They are two outputs: a front end shows nothing but an error in the place of a widget whose
        kernel is gone.

        Raises:
            NotImplementedError: there is only the picture, which is shown as any other result.
        """
        from IPython.display import display

        view = self._view() if self._live and not self._closed else None
        if view is None:
            raise NotImplementedError  # IPython's word for: show it as any other result
        live = "GPU panel: live while its kernel runs; below is its last picture"
        display({"text/plain": live, _WIDGET_VIEW: view}, raw=True)
        if self._picture is None:
            self._picture = Picture(self._repr_mimebundle_, self._widget.model_id)
        self._picture.show()

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None, **_: object
    ) -> dict[str, Any]:
        """The still picture, as HTML and as text."""
        snapshot = self._monitor.latest(Detail.FULL) or self._monitor.latest()
        page = self._page()
        now = self._clock.now()
        return {
            "text/plain": still_text(snapshot, page, now),
            "text/html": still_html(snapshot, self._monitor.history(WINDOW_S), page, now),
        }

    def _page(self) -> JobPage:
        try:
            return read_page(self._queue, self._clock.now().wall)
        except GpuSchedError as exc:
            return JobPage(trouble=str(exc))

    def _view(self) -> dict[str, Any] | None:
        """What a front end needs to show the widget; None where there is no kernel."""
        kernel = _Kernel.here()
        if kernel is None:
            return None
        if self._widget is None:
            self._kernel = kernel
            self._widget = _widget_class()()
            self._widget.picture = self._widget.model_id
            self._loop = PanelLoop(
                self._queue,
                self._monitor,
                self._settings,
                self._send,
                host=kernel,
                clock=self._clock,
                name=f"panel {next(_numbers)}",
                moved=self._on_moved,
                starts=_starts(self._queue, self._monitor),
            )
            self._widget.on_msg(self._on_message)
            _route_past_cells(self._widget.comm)
            kernel.enter()
        assert self._loop is not None
        self._loop.expect()
        return {
            "version_major": 2,
            "version_minor": 0,
            "model_id": self._widget.model_id,
        }

    def _send(self, message: dict[str, Any], points: bytes | None) -> None:
        self._widget.send(message, None if points is None else [points])

    def _on_moved(self) -> None:
        """Jobs have started or ended: what is saved with the notebook is to show it."""
        if self._picture is not None:
            self._picture.renew()

    def _on_message(self, _widget: object, content: object, _buffers: object) -> None:
        if self._loop is not None and isinstance(content, dict):
            self._loop.receive(content)


def _starts(
    queue: PanelQueue, monitor: Readings
) -> Callable[[], Mapping[int, ExpectedStart]] | None:
    """When jobs are expected to start; None where queue or readings are no real ones."""
    if not isinstance(queue, Queue) or not isinstance(monitor, Monitor):
        return None
    return PacedStarts(queue, monitor).renew


def panel_of(queue: PanelQueue, monitor: Readings, settings: Settings, *, live: bool) -> GpuPanel:
    """The live panel of that queue where there is one, shown once more; else a new one.

    However often it is shown, it reads and sends once.
    """
    if live:
        for panel in list(_open):
            if panel.shows(queue, monitor):
                return panel
            if panel.orphaned:
                panel.close()
    return GpuPanel(queue, monitor, settings, live=live)


def close_all() -> None:
    """Close every panel of this process: for unloading the extension."""
    for panel in list(_open):
        panel.close()


class _Kernel:
    """Whether this kernel's main thread runs a cell: then messages of pages may have to wait."""

    def __init__(self, shell: Any, clock: Clock) -> None:
        self._shell = shell
        self._clock = clock
        self.busy = True  # a panel is made by a running cell
        self.free_since = clock.now().mono

    @classmethod
    def here(cls) -> _Kernel | None:
        """The kernel of this process, or None in a terminal or a plain script."""
        from IPython import get_ipython

        shell = get_ipython()
        return None if getattr(shell, "kernel", None) is None else cls(shell, SystemClock())

    def enter(self) -> None:
        self._shell.events.register("pre_run_cell", self._on_start)
        self._shell.events.register("post_run_cell", self._on_end)

    def leave(self) -> None:
        for event, callback in (("pre_run_cell", self._on_start), ("post_run_cell", self._on_end)):
            if callback in self._shell.events.callbacks[event]:
                self._shell.events.unregister(event, callback)

    def _on_start(self, _info: object) -> None:
        self.busy = True

    def _on_end(self, _result: object) -> None:
        self.busy = False
        self.free_since = self._clock.now().mono


@atexit.register
def _at_exit() -> None:
    # A forked child that ends in the ordinary way has no panel of its own.
    if os.getpid() == _PID:
        close_all()


def _route_past_cells(comm: Any) -> None:
    """Let a page's messages come through the front end's subshell, where there is one.

    ipykernel 7.4 sends them to the thread that sent last, so a click would wait for a running cell
    although our handler is made for any thread. Where this private hook is missing they wait, and
    the page says so.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default


@cache
def _widget_class() -> type:
    """The widget's class; made on first use, because anywidget is a heavy import."""
    import anywidget
    from traitlets import Unicode

    class GpuPanelWidget(anywidget.AnyWidget):
        """Carries the page's script and style; everything else goes through messages."""

        _esm = "\n".join((_STATIC / name).read_text(encoding="utf-8") for name in _SCRIPTS)
        _css = (_STATIC / "panel.css").read_text(encoding="utf-8")
        picture = Unicode("").tag(sync=True)  # which saved picture the page hides while it lives

    return GpuPanelWidget
