"""Sees to it that an agent lives while somebody cares: an open kernel, a panel, a followed log.

It waits for the end of the agent's process and for the bell, and polls nothing. Where the agent has
died, and somebody has work for it, it starts the next one; one after the other ever more slowly
where they die at once. One that was told to stop stays stopped until the next submit or wish.
"""

from __future__ import annotations

import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from gpusched_ipy.bell import Bell
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import BOUND_KINDS, JobKind
from gpusched_ipy.store import Store
from gpusched_ipy.summon import STOPPED, AgentLock, ensure_agent

_log = logging.getLogger(__name__)

_AGENT_KINDS = frozenset(JobKind) - BOUND_KINDS
# Whoever submits starts an agent himself, and one that has just died is told of twice: so long
# nothing is done about a lock that nobody holds.
SETTLE_S = 1.0
# Between two starts of agents that die at once; one that has lived for so long died of itself.
FIRST_S, LONGEST_S, LIVED_S = 2.0, 60.0, 10.0

_standing: dict[int, tuple[Vigil, int]] = {}  # by the store: the watcher, and how many want it
_mutex = threading.Lock()


def stand(store: Store) -> Callable[[], None]:
    """See to it that an agent lives, until the function that is returned is called.

    Whoever does so in the same process with the same store shares one watcher.
    """
    with _mutex:
        vigil, count = _standing.get(id(store), (None, 0))
        _standing[id(store)] = (vigil or Vigil(store), count + 1)
    left = threading.Event()

    def leave() -> None:
        with _mutex:
            if left.is_set():
                return
            left.set()
            vigil, count = _standing.pop(id(store))
            if count > 1:
                _standing[id(store)] = (vigil, count - 1)
                return
        vigil.close()

    return leave


class Vigil:
    """One watcher; it has a thread, from its making until :meth:`close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = AgentLock(store.state)
        self._stop = threading.Event()
        self._watching = False  # an agent's process: the bell says nothing new
        self._pause_s = FIRST_S
        self._not_before = 0.0
        self._pipe = threading.Lock()  # held while it is written to, or closed
        self._closed = False
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._bell = Bell(store.state.bell, self._heard)
        self._thread = threading.Thread(target=self._run, name="gpusched-vigil", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more; closing twice changes nothing."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake()
        self._bell.close()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        with self._pipe:
            if not self._thread.is_alive():
                self._closed = True  # from here on these numbers may be somebody else's files
                os.close(self._wake_r)
                os.close(self._wake_w)

    def _heard(self) -> None:
        if not self._watching:
            self._wake()

    def _wake(self) -> None:
        with self._pipe, suppress(BlockingIOError):  # full: it wakes anyway
            if not self._closed:
                os.write(self._wake_w, b"x")

    # -- the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._round()
            except (GpuSchedError, OSError) as exc:
                _log.error("whether an agent lives cannot be seen: %s", exc)
                self._wait(None, LONGEST_S)

    def _round(self) -> None:
        """Watch the agent to its end; where there is none, wait for news, or start one."""
        # Before the look: what rings from here on may be a new agent.
        self._watching = False
        pid = self._lock.holder
        if pid is not None:
            self._watch(pid)
        elif not self._wanted():
            self._wait(None, None)
            self._stop.wait(SETTLE_S)
        elif (left := self._not_before - time.monotonic()) > 0:
            self._wait(None, left)
        else:
            self._start()

    def _wanted(self) -> bool:
        return self._lock.word != STOPPED and self._store.any_unheld(_AGENT_KINDS)

    def _start(self) -> None:
        """Start one, if that is still called for in a moment: others watch as well."""
        if self._stop.wait(SETTLE_S * random.uniform(0.2, 1.0)):
            return
        if self._lock.holder is None and self._wanted():
            _log.warning("the agent has died; the next one is started")
            ensure_agent(self._store.state)
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_S)

    def _watch(self, pid: int) -> None:
        """Until that agent has ended; where its process cannot be watched, until the bell rings."""
        since = time.monotonic()
        try:
            fd = os.pidfd_open(pid)
        except (OSError, AttributeError):  # it is gone, another namespace's, or no Linux
            self._wait(None, LIVED_S)
            self._stop.wait(SETTLE_S)
            return
        try:
            if self._lock.holder == pid:
                self._watching = True
                self._wait(fd, None)
        finally:
            os.close(fd)
        if time.monotonic() - since >= LIVED_S:
            self._pause_s = FIRST_S

    def _wait(self, fd: int | None, longest_s: float | None) -> None:
        """Until the process of ``fd`` ends, somebody wakes us, or the time is over."""
        waiting = select.poll()
        waiting.register(self._wake_r, select.POLLIN)
        if fd is not None:
            waiting.register(fd, select.POLLIN)
        waiting.poll(None if longest_s is None else 1000 * longest_s)
        with suppress(BlockingIOError):
            os.read(self._wake_r, 65536)
