"""Whether the main thread runs a cell, and which: two hooks that cost an ordinary cell next to
nothing. Standard library only: it is there from ``%load_ext`` on.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Protocol

    class Watcher(Protocol):
        """Who wants to hear of cells; called on the main thread."""

        def cell_begins(self, depth: int) -> None:
            """A cell is about to run; ``depth`` counts it."""
            ...

        def cell_ended(self, result: Any, depth: int) -> None:
            """A cell has run; ``result`` is None where it was cancelled, ``depth`` without it."""
            ...


class CellWatch:
    """The cells that run now, a nested one inside the one that started it."""

    def __init__(self) -> None:
        # Made inside a running cell, as a rule: that of %load_ext, whose begin nobody told us.
        self._running: list[Any] = [None]
        self._main = threading.main_thread().ident
        self.watcher: Watcher | None = None
        self.changed_at = time.monotonic()  # when main last began or ended something

    @property
    def depth(self) -> int:
        """How many cells run, one inside the other; 0 between cells."""
        return len(self._running)

    def register(self, events: Any) -> None:
        """Begin to watch."""
        events.register("pre_run_cell", self._begins)
        events.register("post_run_cell", self._ended)

    def unregister(self, events: Any) -> None:
        """End to watch."""
        events.unregister("pre_run_cell", self._begins)
        events.unregister("post_run_cell", self._ended)

    def _begins(self, info: Any) -> None:
        if threading.get_ident() != self._main:
            return  # a subshell: no cell of the main thread
        if self._running == [None]:
            self._running.clear()  # that cell is over: cells follow one another
        self._running.append(info)
        self.changed_at = time.monotonic()
        if self.watcher is not None:
            self.watcher.cell_begins(self.depth)

    def _ended(self, result: Any) -> None:
        if threading.get_ident() != self._main:
            return
        info = getattr(result, "info", None)
        places = [at for at, running in enumerate(self._running) if running is info]
        if places and info is not None:
            del self._running[places[-1] :]
        elif result is None or self._running == [None]:
            # Cancelled, or the cell that loaded us; an empty cell ends without having begun.
            del self._running[-1:]
        self.changed_at = time.monotonic()
        if self.watcher is not None:
            self.watcher.cell_ended(result, self.depth)
