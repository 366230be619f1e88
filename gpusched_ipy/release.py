"""This kernel, while idle, gives its cached GPU memory back when a waiting job has asked for that.

It runs on the main thread, between two events of its loop, and never while a cell runs: no other
thread ever calls into a framework. A live array is never touched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from gpusched_ipy import framework
from gpusched_ipy.bell import Bell
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.frontend import FrontEnd
from gpusched_ipy.store import Store
from gpusched_ipy.text import format_bytes

_log = logging.getLogger(__name__)

# The bell rings with every change of any job; it is looked at so often at most.
LOOK_S = 0.5
# Between two cells of a Run All nobody is idle.
SETTLED_S = 1.0


class Release:
    """Obeys the questions that the record holds for this kernel.

    Args:
        key: of the kernel as a member.
        idle: whether the main thread has run no cell for :data:`SETTLED_S`.
    """

    def __init__(self, front: FrontEnd, store: Store, key: str, idle: Callable[[], bool]) -> None:
        self._front = front
        self._store = store
        self._key = key
        self._idle = idle
        self._mutex = threading.Lock()
        self._due = False
        self._obeyed: float | None = None
        self._bell: Bell | None = None

    def start(self) -> None:
        """Listen from now on; a shell without a kernel has no loop to do it in."""
        if self._bell is None and self._front.kernel is not None:
            self._bell = Bell(self._store.state.bell, self._heard)

    @property
    def listening(self) -> bool:
        """Whether it would hear of a question."""
        return self._bell is not None

    def stop(self) -> None:
        """Listen no more."""
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()

    def _heard(self) -> None:
        with self._mutex:
            if self._due:
                return
            self._due = True
        self._front.on_main(self._look, LOOK_S)

    def _look(self) -> None:
        """On the main thread."""
        self._due = False
        if self._bell is None or not framework.has_stock():
            return
        try:
            asked = self._store.asked_to_release(self._key)
        except GpuSchedError as exc:
            _log.warning("whether GPU memory is asked back cannot be read: %s", exc)
            return
        if asked is None or asked == self._obeyed:
            return
        if not self._idle():
            self._due = True
            self._front.on_main(self._look, SETTLED_S)
            return
        self._obeyed = asked
        freed = framework.free_caches()
        _log.info("a waiting job asked: %s given back", format_bytes(freed.total_bytes))
