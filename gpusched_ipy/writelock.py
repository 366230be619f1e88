"""The queue lock: whoever wants to write waits here, and is served in the order of coming.

Two things that do not depend on each other. What excludes is a flock, as everywhere. What orders is
a line before it: a number each, and locks on the bytes of one file (Linux), by which everybody
waits for all smaller numbers. A flock alone is not fair: who gives it back and wants it again has
it before the kernel has woken the next. Death frees either at once. The line is a courtesy: where
there is none, or somebody in it has been stopped, the flock is waited for without it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

from gpusched_ipy.errors import StateDirError, StoreError
from gpusched_ipy.leftovers import holds
from gpusched_ipy.locks import FileLock, close_inherited, open_inherited, try_flock

# After so long (s) it is said who holds the record, and the line is no longer minded.
TELL_S = 2.0
# So long (s) a person's own command waits; agents, shims and background threads never give up.
GIVE_UP_S = 30.0
_TRY_S = 0.05  # between two tries past a line that does not move
_LONG = 15  # so many times TELL_S make any line one that does not move
_ASTRAY_S = 60.0  # so long one in which somebody is stopped is not stood in again

_LINE = "q.line"  # stands beside the lock
# The file of the line: the next number, then the pids of those that drew the last ones. The lock on
# byte 0 is that of drawing, the lock on byte _SEATS + n that of number n.
_WORD = struct.Struct("<Q")
_NUMBERS = 2**40
_SHOWN = 256
_SEATS = _WORD.size * (1 + _SHOWN)
_FLOCK = "hhqqi"  # struct flock of fcntl(2); its pid is 0 for locks of open files


class WriteLock(FileLock):
    """The lock around every write of the record.

    Args:
        path: its file; the line stands beside it.
        patience_s: after so long a wait of the main thread gives up; None: never.
    """

    def __init__(self, path: Path, patience_s: float | None = None) -> None:
        super().__init__(path)
        self.patience_s = patience_s
        self._place: int | None = None
        self._astray_until = 0.0

    def acquire(self) -> None:
        """Wait for the lock, after all who have come before.

        Raises:
            StoreError: somebody holds it for longer than our patience; the message names him.
        """
        attempt = _Attempt(self.path, in_line=time.monotonic() >= self._astray_until)
        try:
            got = attempt.taken if attempt.go(wait=False) else self._wait(attempt)
        except BaseException:
            attempt.abandon()
            raise
        self._fd, self._place = got

    def release(self) -> None:
        """Give the lock back, and only then wake the next in line."""
        super().release()
        if self._place is not None:
            close_inherited(self._place)
            self._place = None

    def _wait(self, attempt: _Attempt) -> tuple[int, int | None]:
        began = time.monotonic()
        attempt.start()
        patience_s = self.patience_s if _is_main() else None
        look_s, told, passing = TELL_S, False, False
        while not attempt.done(_TRY_S if passing else TELL_S / 4):
            if passing and (fd := self._take_if_free()) is not None:
                attempt.abandon()
                return fd, None
            waited_s = time.monotonic() - began
            if waited_s >= look_s:
                look_s = 2 * waited_s
                passing = passing or self._stands_still(attempt, waited_s)
                told = told or _tell(self.path, waited_s)
            if patience_s is not None and waited_s >= patience_s:
                holder = _holder_text(self.path) or _unnamed(self.path)
                raise StoreError(f"given up after {waited_s:.0f} s, nothing has changed: {holder}")
        return attempt.taken

    def _stands_still(self, attempt: _Attempt, waited_s: float) -> bool:
        """Whether somebody in the line cannot go on: then it is passed, now and for a while."""
        if not attempt.behind_a_stopped_one():
            return waited_s >= _LONG * TELL_S  # who stands in it may not be visible from here
        self._astray_until = time.monotonic() + _ASTRAY_S
        return True

    def _take_if_free(self) -> int | None:
        fd = open_inherited(self.path)
        if try_flock(fd, fcntl.LOCK_EX):
            return fd
        close_inherited(fd)
        return None


class _Attempt:
    """One wait for the lock; a thread of its own may take it over, so that it can be given up."""

    def __init__(self, path: Path, *, in_line: bool) -> None:
        self._mutex = threading.Lock()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None
        self._wanted = True
        self._error: OSError | None = None
        self._path = path
        self._fd = open_inherited(path)
        self._line = _Line.beside(path) if in_line else None

    def go(self, *, wait: bool) -> bool:
        """Wait in line, then for the lock; without ``wait`` go only as far as that is free."""
        if self._line is not None and not self._line.is_first(wait=wait):
            return False
        if wait:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            return True
        return try_flock(self._fd, fcntl.LOCK_EX)

    def start(self) -> None:
        """Go on waiting in another thread."""
        self._thread = threading.Thread(target=self._run, name="gpusched-line", daemon=True)
        self._thread.start()

    def done(self, timeout_s: float) -> bool:
        """Whether the lock is ours by then."""
        if not self._finished.wait(timeout_s):
            return False
        if self._error is not None:
            raise self._error
        return True

    def behind_a_stopped_one(self) -> bool:
        """Whether somebody who waits before us is stopped."""
        line = self._line
        return line is not None and any(
            _is_stopped(pid) and holds(pid, line.path, "OFDLCK") and not holds(pid, self._path)
            for pid in line.ahead()
        )

    @property
    def taken(self) -> tuple[int, int | None]:
        """The descriptors that hold the lock and our place in line."""
        return self._fd, None if self._line is None else self._line.fd

    def abandon(self) -> None:
        """Want it no more: it is given back as soon as it is had."""
        with self._mutex:
            self._wanted = False
            if self._thread is None or self._finished.is_set():
                self._close()

    def _run(self) -> None:
        try:
            self.go(wait=True)
        except OSError as exc:
            self._error = exc
        with self._mutex:
            self._finished.set()
            if not self._wanted:
                self._close()

    def _close(self) -> None:
        close_inherited(self._fd)
        if self._line is not None:
            close_inherited(self._line.fd)


class _Line:
    """A number in the line: ours as long as its descriptor is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = open_inherited(path)
        self._number: int | None = None

    @classmethod
    def beside(cls, path: Path) -> _Line | None:
        """A new one for that lock, without a number yet; None where there is no line."""
        if not hasattr(fcntl, "F_OFD_SETLKW"):
            return None
        try:
            return cls(path.with_name(_LINE))
        except StateDirError:
            return None

    def ahead(self) -> set[int]:
        """The pids of those that drew the numbers before ours, gone or not."""
        number = self._number or 0
        last = range(max(0, number - _SHOWN + 1), number)
        words = (os.pread(self.fd, _WORD.size, _slot(one)) for one in last)
        return {_WORD.unpack(word)[0] for word in words if len(word) == _WORD.size} - {os.getpid()}

    def is_first(self, *, wait: bool) -> bool:
        """Whether nobody who came before is left (or, with ``wait``, is so by now)."""
        try:
            if self._number is None and not self._draw(wait=wait):
                return False
            number = self._number or 0
            # The one before us first: so one of all those who wait is woken, not every one.
            return all(
                self._lock(fcntl.F_RDLCK, first, number - first, wait=wait)
                for first in (max(0, number - 1), 0)
                if number > first
            )
        except OSError:
            return True  # a full disk, or a file system without such locks: not in order then

    def _draw(self, *, wait: bool) -> bool:
        """Take the next number; whoever else wants one waits for that."""
        if not self._byte(fcntl.F_WRLCK, 0, 1, wait=wait):
            return False
        found = os.pread(self.fd, _WORD.size, 0)
        number = _WORD.unpack(found)[0] % _NUMBERS if len(found) == _WORD.size else 0
        os.pwrite(self.fd, _WORD.pack(number + 1), 0)
        os.pwrite(self.fd, _WORD.pack(os.getpid()), _slot(number))
        self._lock(fcntl.F_WRLCK, number, 1, wait=False)
        self._number = number
        return self._byte(fcntl.F_UNLCK, 0, 1, wait=False)

    def _lock(self, kind: int, number: int, count: int, *, wait: bool) -> bool:
        return self._byte(kind, _SEATS + number, count, wait=wait)

    def _byte(self, kind: int, start: int, count: int, *, wait: bool) -> bool:
        asked = struct.pack(_FLOCK, kind, os.SEEK_SET, start, count, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, asked)
        except (BlockingIOError, PermissionError):  # EAGAIN, EACCES: fcntl(2) allows either
            return False
        return True


def _slot(number: int) -> int:
    return _WORD.size * (1 + number % _SHOWN)


def _tell(path: Path, waited_s: float) -> bool:
    """Say who holds that lock, once; whether it was said."""
    holder = _holder_text(path)
    if holder is None and waited_s < 2 * TELL_S:
        return False  # it has just changed hands, or is free
    text = f"waiting for the record of the queue: {holder or _unnamed(path)}"
    # A command's own thread shows it to whoever waits for the command.
    if _is_main():
        from gpusched_ipy.terminal import note

        note(text)
    else:
        import logging

        logging.getLogger(__name__).warning("%s", text)
    return True


def _holder_text(path: Path) -> str | None:
    pid = _holder(path)
    if pid is None:
        return None
    if _is_stopped(pid):
        return (
            f"pid {pid} ({_name(pid)}) holds it and is stopped; `kill -CONT {pid}` lets it go on, "
            f"`kill -9 {pid}` ends it"
        )
    return f"pid {pid} ({_name(pid)}) holds it"


def _holder(path: Path) -> int | None:
    """The process that holds that flock; None where the system does not tell (proc(5): Linux)."""
    with suppress(OSError):
        inode = f":{path.stat().st_ino}"
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(inode) and holds(int(words[4]), path):
                return int(words[4])
    return None


def _unnamed(path: Path) -> str:
    return f"a process that cannot be named from here holds it (`lsof {path}` may tell)"


def _name(pid: int) -> str:
    import psutil

    try:
        from gpusched_ipy.text import clean

        return clean(psutil.Process(pid).name(), 40)
    except psutil.Error:
        return "its name is not told"


def _is_stopped(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
