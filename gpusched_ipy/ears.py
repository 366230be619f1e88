"""What wakes a loop: a call, the bell, the end of a process, a shim that tells of its job's end.

It waits and passes on; what has happened, the loop finds in the record.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from gpusched_ipy.bell import Bell
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import Job
from gpusched_ipy.process import ExitWatch
from gpusched_ipy.store import Store

_CALL, _RING = b"x", b"b"


class Ears:
    """The ears of one loop; only :meth:`wait` and :meth:`wait_for_ends` belong to its thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._exits = ExitWatch()
        self._shims: dict[int, tuple[Job, Callable[[], None]]] = {}
        self._mutex = threading.Lock()
        self._bell: Bell | None = None
        self._thread: threading.Thread | None = None  # that waits
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        os.set_blocking(self._wake_r, False)

    def open(self) -> None:
        """Hear the bell from now on."""
        self._bell = Bell(self._store.state.bell, lambda: self._write(_RING))

    def close(self) -> None:
        """Hear neither the bell nor an end any more."""
        if self._bell is not None:
            self._bell.close()
            self._bell = None
        with self._mutex:
            self._exits.close()

    def call(self) -> None:
        """Wake the loop; callable from any thread, at any time."""
        self._write(_CALL)

    def watch(self, pids: Iterable[int | None], leaders: Mapping[int, int]) -> None:
        """Be woken by the end of these processes, but not by that of a job whose shim tells it.

        Args:
            leaders: the process that leads a job, and that job.
        """
        told = {job.id for job, _ in tuple(self._shims.values())}
        wanted = {pid for pid in pids if pid and pid != os.getpid()}
        with self._mutex:
            self._exits.watch(pid for pid in wanted if leaders.get(pid) not in told)

    def tells(self, job: Job) -> bool:
        """Whether the shim of that claim is heard."""
        heard = [known for known, _ in tuple(self._shims.values())]
        return any((known.id, known.epoch) == (job.id, job.epoch) for known in heard)

    def hear(self, fd: int, job: Job, heard: Callable[[], None]) -> None:
        """Call ``heard`` in the loop whenever that descriptor can be read: there the shim of
        ``job`` tells of its end."""
        self._shims[fd] = (job, heard)
        if threading.current_thread() is not self._thread:
            self.call()

    def hear_no_more(self, fd: int) -> None:
        """Undo :meth:`hear`."""
        self._shims.pop(fd, None)

    def wait(self, longest_s: float) -> set[int]:
        """Until something may have happened; what this loop has written itself is nothing new.

        Returns:
            the watched processes that have ended.
        """
        self._thread = threading.current_thread()
        waiting = _poll([self._wake_r, *self._exits.fds, *self._shims])
        ready = waiting.poll(1000 * longest_s)
        while [fd for fd, _ in ready] == [self._wake_r] and self._only_ourselves():
            ready = waiting.poll(1000 * longest_s)
        with self._mutex:
            # An end left in the poll would wake us again and again until it is recorded.
            ended = self._exits.told(fd for fd, _ in ready)
        self._pass_on(ready)
        with suppress(BlockingIOError):
            os.read(self._wake_r, 65536)
        return ended

    def wait_for_ends(self, longest_s: float) -> None:
        """Until a shim tells something; nothing else is heard meanwhile, and nothing is missed."""
        self._pass_on(_poll(tuple(self._shims)).poll(1000 * longest_s))

    def _pass_on(self, ready: Iterable[tuple[int, int]]) -> None:
        for fd, _ in ready:
            if fd in self._shims:
                self._shims[fd][1]()

    def _only_ourselves(self) -> bool:
        """Whether nothing but the bell woke us, and what rang it was this loop's own write."""
        try:
            called = _CALL in os.read(self._wake_r, 65536)
            return not called and not self._store.changed_by_others()
        except (BlockingIOError, GpuSchedError):
            return False  # the loop finds out what is wrong

    def _write(self, what: bytes) -> None:
        with suppress(BlockingIOError, OSError):
            os.write(self._wake_w, what)


def _poll(fds: Iterable[int]) -> select.poll:
    waiting = select.poll()
    for fd in fds:
        waiting.register(fd, select.POLLIN)
    return waiting
