"""This process in the queue: its kernel's membership where there is one, else one of its own.

A plain script becomes a member when it first waits for GPUs, and leaves soon after it last held
some. Nothing here imports IPython.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpusched_ipy import framework
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobKind, JobState
from gpusched_ipy.locks import Membership
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.pin import Pin
from gpusched_ipy.runners.allocation import AllocationRunner
from gpusched_ipy.scheduler import Claim, Scheduler

# A loop that takes GPUs again and again finds the process a member still.
LINGER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A member that can hold GPUs for code of its process."""

    queue: Queue
    key: str
    runner: AllocationRunner
    monitor: Monitor
    pin: Pin
    granted: Callable[[Iterable[str]], None]  # called with the GPUs that a block gets
    given_back: Callable[[], None]  # called after a block has given its GPUs back


class _Script:
    """A process without a kernel as a member."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.users = 0
        self.left_at = 0.0
        self.closing: threading.Timer | None = None
        self.closed = False
        queue = Queue(settings)
        self._membership = Membership(queue.state)
        key = self._membership.key
        queue.store.join(key, "script", queue.owner)
        monitor = Monitor(settings, queue.clock, queue.state.root)
        runner = AllocationRunner()
        self.home = Home(
            queue=queue,
            key=key,
            runner=runner,
            monitor=monitor,
            pin=Pin(queue.store, key),
            granted=lambda _gpus: None,
            given_back=self._free_caches,
        )
        runner.scheduler = Scheduler(
            queue.store,
            monitor,
            self._membership,
            {JobKind.ALLOCATION: runner},
            settings,
            queue.clock,
        )
        runner.scheduler.start()

    def _free_caches(self) -> None:
        """Others may need the memory that frameworks keep in stock."""
        wanted = self.settings.release_caches
        if wanted == "never" or not framework.has_stock():
            return
        waiting = (job.state is JobState.PENDING for job in self.home.queue.list())
        if wanted == "always" or any(waiting):
            framework.free_caches()

    def close(self) -> None:
        """Leave the queue; leaving twice changes nothing."""
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        home = self.home
        home.runner.scheduler.stop()
        home.monitor.stop()
        home.queue.store.leave(home.key)
        self._membership.leave()
        home.queue.store.close()


_lock = threading.Lock()
_script: _Script | None = None
_queues: dict[tuple[int, Settings], Queue] = {}


@contextmanager
def home() -> Iterator[Home]:
    """The member that holds GPUs for the code of this process, for the length of a block.

    Raises:
        UserError: a setting, the state directory or the record cannot be used.
    """
    session = kernel_session()
    if session is not None:
        yield session.home
        return
    script = _enter(Settings.load())
    try:
        yield script.home
    finally:
        _leave(script)


def current_queue() -> Queue:
    """The queue with the settings in force now; the same object while they stay the same.

    Raises:
        UserError: a setting, the state directory or the record cannot be used.
    """
    session = kernel_session()
    if session is not None:
        found: Queue = session.queue
        return found
    key = (os.getpid(), Settings.load())
    with _lock:
        if key not in _queues:
            _queues[key] = Queue(key[1])
        return _queues[key]


def current_monitor(queue: Queue) -> Monitor:
    """What has watched the GPUs in this process, else a new one."""
    session = kernel_session()
    if session is not None:
        kernels: Monitor = session.monitor
        return kernels
    with _lock:
        if _script is not None:
            return _script.home.monitor
    return Monitor(queue.settings, queue.clock, queue.state.root)


def running_cell() -> Claim | None:
    """The claim of the queued cell that runs on this thread right now."""
    session = kernel_session()
    if session is None or threading.current_thread() is not threading.main_thread():
        return None
    claim: Claim | None = session.running_claim
    return claim


def has_watcher() -> bool:
    """Whether somebody looks on: a notebook, or a terminal."""
    return kernel_session() is not None or sys.stderr.isatty()


def kernel_session() -> Any:
    """The session of the extension in this process; None where it is not loaded."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    extension = getattr(shell, "_gpusched", None)
    return None if extension is None else extension.session


def _enter(settings: Settings) -> _Script:
    global _script
    with _lock:
        script = _script
        if script is not None and script.settings != settings:
            if script.users == 0:
                script.close()
            script = None
        if script is None:
            script = _script = _Script(settings)
        script.users += 1
        return script


def _leave(script: _Script) -> None:
    with _lock:
        if script.pid != os.getpid():
            return
        script.users -= 1
        script.left_at = time.monotonic()
        if script.users == 0 and script.closing is None:
            _close_later(script, LINGER_S)


def _close_later(script: _Script, seconds: float) -> None:
    script.closing = threading.Timer(seconds, _close_idle, (script,))
    script.closing.daemon = True
    script.closing.start()


def _close_idle(script: _Script) -> None:
    global _script
    with _lock:
        script.closing = None
        idle_s = time.monotonic() - script.left_at
        if script.users == 0 and idle_s < LINGER_S:
            _close_later(script, LINGER_S - idle_s)
        elif script.users == 0:
            script.close()
            _script = None if _script is script else _script


def _after_fork() -> None:
    """In the child of a fork: the parent's threads do not exist, and its lock may never open."""
    global _lock, _script
    _lock = threading.Lock()
    _script = None


os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    with _lock:
        if _script is not None:
            _script.close()
