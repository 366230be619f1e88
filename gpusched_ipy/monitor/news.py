"""How one process tells others that a reading counts, and how they sleep until it does.

Whoever reads the GPUs touches a file; whoever lives on its readings sleeps in one poll until that
file is touched, the reader has ended, or this process itself is called. Where the system has no
inotify or no pidfd nobody can sleep so, and says so by :attr:`News.able`.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gpusched_ipy.errors import StateDirError
from gpusched_ipy.statedir import open_private

_IN_ATTRIB = 0x4
_IN_IGNORED = 0x8000  # the file is gone: whoever makes it anew is not heard
_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_EVENT = struct.Struct("iIII")


class News:
    """The file, as one process uses it; only :meth:`call` and :meth:`tell` may come from
    another thread.

    Args:
        path: the file, in a private folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watch: int | None = None
        self._reader: tuple[int, int] | None = None  # its pid, and what tells of its end
        self._ended: int | None = None  # a reader that has; the kernel may know it a while longer
        self._call_r, self._call_w = -1, -1
        self._mutex = threading.Lock()  # nobody calls a pipe that is being closed

    @property
    def able(self) -> bool:
        """Whether this system can wake a sleeper."""
        return _inotify() is not None and hasattr(os, "pidfd_open")

    def tell(self) -> None:
        """Wake all that sleep on the file; nobody does where it cannot be opened."""
        with suppress(OSError, StateDirError):
            handle = open_private(self.path)
            try:
                os.utime(handle)
            finally:
                os.close(handle)

    @property
    def watching(self) -> bool:
        """Whether what is told now is heard."""
        return self._watch is not None

    def follow(self, pid: int) -> bool:
        """Hear from now on what that reader tells, and of its end; False: that cannot be had.

        What it tells after this call, and before :meth:`sleep`, ends that sleep at once.
        """
        if pid == self._ended:
            return False
        try:
            if self._call_r < 0:
                with self._mutex:
                    self._call_r, self._call_w = os.pipe2(_FLAGS)
            if self._watch is None:
                self._watch = self._watched()
            if self._reader is None or self._reader[0] != pid:
                self._let_go()
                self._reader = (pid, os.pidfd_open(pid))
        except (OSError, StateDirError):
            return False
        return True

    def sleep(self, longest_s: float) -> bool:
        """Sleep until something is heard; whether it was the reader (and not a call, or the time).

        Only after :meth:`follow` has said True.
        """
        if self._watch is None or self._reader is None:
            return True
        waiting = select.poll()
        for fd in (self._watch, self._reader[1], self._call_r):
            waiting.register(fd, select.POLLIN)
        ready = {fd for fd, _ in waiting.poll(max(0.0, 1000 * longest_s))}
        if self._call_r in ready:
            with suppress(BlockingIOError):
                os.read(self._call_r, 4096)
        if self._reader[1] in ready:
            self._ended = self._reader[0]
            self._let_go()
            return True
        return self._watch in ready and self.drain()

    def call(self) -> None:
        """Wake this process's own sleeper, from any thread."""
        with self._mutex, suppress(BlockingIOError):  # a full pipe wakes as well
            if self._call_w >= 0:
                os.write(self._call_w, b"x")

    def drain(self) -> bool:
        """Whether anything was told since the last time; what is read after this is newer."""
        events = b""
        with suppress(BlockingIOError):
            events = os.read(self._watch, 65536) if self._watch is not None else b""
        place = 0
        while place < len(events):
            _, mask, _, length = _EVENT.unpack_from(events, place)
            place += _EVENT.size + length
            if mask & _IN_IGNORED:
                self._unwatch()
        return bool(events)

    def close(self) -> None:
        """Hear nothing any more."""
        with self._mutex:
            self.forget()

    def forget(self) -> None:
        """:meth:`close` in the child of a fork, where nobody can have the lock back."""
        self._let_go()
        self._unwatch()
        for fd in (self._call_r, self._call_w):
            if fd >= 0:
                os.close(fd)
        self._call_r = self._call_w = -1

    def _watched(self) -> int:
        os.close(open_private(self.path))
        library = _inotify()
        if library is None:
            raise OSError("no inotify")
        watch: int = library.inotify_init1(_FLAGS)
        if watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        if library.inotify_add_watch(watch, os.fsencode(self.path), _IN_ATTRIB) < 0:
            code = ctypes.get_errno()
            os.close(watch)
            raise OSError(code, "inotify_add_watch")
        return watch

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            os.close(watch)

    def _let_go(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            os.close(reader[1])


@cache
def _inotify() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.inotify_init1, library.inotify_add_watch  # noqa: B018 - whether it has them
    except (OSError, AttributeError):
        return None
    return library
