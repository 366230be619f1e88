"""What a fork waits for: no other thread may be inside SQLite then.

SQLite has locks of its own within a process. A child that is forked while another thread holds one
could never take it back, and would wait for ever where nothing can interrupt it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol

from gpusched_ipy.errors import StoreError

# A fork waits so long for a write of another thread; one that hangs must not hang the fork.
_WAIT_S = 5.0


class Forkable(Protocol):
    """What uses SQLite."""

    @property
    def mutex(self) -> Any:
        """Held by whichever thread is inside SQLite."""

    def after_fork(self) -> None:
        """In the child: the mutex was that of the parent's threads."""


class _Fork:
    """The fork that is under way in this process."""

    def __init__(self) -> None:
        self.under_way = threading.Lock()
        self.held: list[Any] = []  # the mutexes that it holds
        self.missed = False  # it had to go on without one of them
        self.torn = False  # this process has come from such a fork


_FORK = _Fork()
_MET: weakref.WeakSet[Forkable] = weakref.WeakSet()


def meet_forks(one: Forkable, *, instead_of: Forkable | None = None) -> None:
    """From now on forks wait for that one (and no more for the other)."""
    if instead_of is not None:
        _MET.discard(instead_of)
    _MET.add(one)


def let_forks_pass() -> None:
    """Take no mutex before a fork that waits for one: who has just given it back would win.

    Not to be called by who holds one.
    """
    if _FORK.under_way.locked():
        with _FORK.under_way:
            pass


def refuse_torn() -> None:
    """Go no further in a child that was forked while another thread was inside SQLite.

    Raises:
        StoreError: this is one.
    """
    if _FORK.torn:
        raise StoreError(
            f"this process was forked during a write to the queue that took over {_WAIT_S:g} s: it "
            "cannot use the queue; start a new one instead (multiprocessing: `spawn`)"
        )


def _before() -> None:
    _FORK.under_way.acquire()
    mutexes = [one.mutex for one in tuple(_MET)]
    _FORK.held = [mutex for mutex in mutexes if mutex.acquire(timeout=_WAIT_S)]
    _FORK.missed = len(_FORK.held) < len(mutexes)


def _after_in_parent() -> None:
    while _FORK.held:
        _FORK.held.pop().release()
    _FORK.under_way.release()


def _after_in_child() -> None:
    _FORK.held.clear()
    _FORK.under_way = threading.Lock()
    _FORK.torn = _FORK.torn or _FORK.missed
    for one in tuple(_MET):
        one.after_fork()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
