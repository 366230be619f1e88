"""Keeps a job's log within its cap while the job writes: the head stays, the tail stays, the middle
goes. The file is never replaced, so the job's lock on it and every reader's place in it survive.

The job appends (O_APPEND) and nothing is in the path of its output. Where the file system can, the
middle is taken out as a hole, which moves no offset and loses no byte of the tail; once nobody
writes any more the hole is closed and one line says how much was cut. It decides about no job.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import sys
import threading
from pathlib import Path

from gpusched_ipy.locks import log_is_held
from gpusched_ipy.statedir import open_existing

# Seconds between two looks: while the log grows, and at most while it does not. What is written
# between two looks may lie on the disk beyond the cap for that long.
_FAST_S, _SLOW_S = 0.05, 0.5
_BLOCK = 4096
_CHUNK = 1 << 20
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
_MARK = re.compile(rb"\n\xe2\x80\xa6 [0-9.]+ [KMGT]?i?B cut \(([0-9]+) bytes\) \xe2\x80\xa6\n")


def mark(cut: int) -> bytes:
    """The line that stands for ``cut`` bytes of a log."""
    from gpusched_ipy.text import format_bytes

    return f"\n… {format_bytes(cut)} cut ({cut} bytes) …\n".encode()


def find_mark(fd: int) -> tuple[int, int, int] | None:
    """Where the line begins and ends in a log whose hole is closed, and how many bytes are cut."""
    import mmap

    size = os.fstat(fd).st_size
    if size == 0 or os.lseek(fd, 0, os.SEEK_HOLE) < size:
        return None
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as text:
        found = _MARK.search(text)
        return None if found is None else (found.start(), found.end(), int(found[1]))


class LogCap:
    """The cap of one attempt's log, kept by its shim.

    Args:
        path: the log; it is opened anew, so the job's lock stays the job's.
        cap: bytes; half of them for the head. Less than two blocks of the disk count as two.

    Raises:
        FileNotFoundError, StateDirError: the log is gone, or something else stands there.
    """

    def __init__(self, path: Path, cap: int) -> None:
        self._path = path
        self._fd = open_existing(path, os.O_RDWR)
        self._block = max(_BLOCK, os.fstat(self._fd).st_blksize)
        self._head = max(1, cap // 2 // self._block) * self._block
        self._cap = max(cap, 2 * self._head)
        self._tail = self._head  # where in the file what follows the cut begins
        self._cut = 0
        self._holes = True
        self._seen = 0

    def keep(self, stop: threading.Event) -> None:
        """Look again and again until told to stop; for a thread of its own."""
        pause = _FAST_S
        while not stop.wait(pause):
            pause = _FAST_S if self.trim() else min(2 * pause, _SLOW_S)

    def trim(self) -> bool:
        """Cut the middle out where the log is too large; whether it has grown since last time."""
        size = os.fstat(self._fd).st_size
        grew, self._seen = size != self._seen, size
        if size < self._tail:
            self._tail, self._cut = self._head, 0  # the job itself has cut its log
        if self._head + size - self._tail > self._cap + self._block:
            keep_from = (size - self._head) // self._block * self._block
            if self._holes:
                self._holes = _punch(self._fd, self._head, keep_from - self._head)
            self._cut += keep_from - self._tail
            self._tail = keep_from
            if not self._holes:
                self._close_gap()
        return grew

    def settle(self) -> None:
        """The job is over: close the hole, so that any program can read the log."""
        try:
            self.trim()
            # Somebody may have escaped the end of the tree and write on: then the hole stays.
            if self._holes and self._cut and not log_is_held(self._path):
                self._close_gap()
        except OSError as exc:
            import logging

            # A full disk has no room for the tail in its new place. The result of the job must be
            # recorded whatever its log is like, and readers understand the hole as well.
            logging.getLogger(__name__).warning(
                "the log %s stays with a hole in it: %s", self._path, exc
            )
        finally:
            os.close(self._fd)

    def _close_gap(self) -> None:
        """Move the tail behind the head and the mark. What a job appends meanwhile may be lost."""
        line = mark(self._cut)
        at = self._head + os.pwrite(self._fd, line, self._head)
        begin, source = at, self._tail
        while chunk := os.pread(self._fd, min(_CHUNK, source - at), source):
            os.pwrite(self._fd, chunk, at)
            at, source = at + len(chunk), source + len(chunk)
        os.ftruncate(self._fd, at)
        self._tail = begin


def _punch(fd: int, offset: int, length: int) -> bool:
    """Take a range out of a file without moving what follows; False where that cannot be done."""
    if sys.platform == "darwin":
        import fcntl

        punch_hole = 99  # F_PUNCHHOLE, fcntl(2) of macOS
        try:
            fcntl.fcntl(fd, punch_hole, struct.pack("IIqq", 0, 0, offset, length))
        except OSError as exc:
            if exc.errno in _NO_HOLES:
                return False
            raise
        return True
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if fallocate is None:
        return False
    keep_size_punch_hole = 0x1 | 0x2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, fallocate(2)
    done = fallocate(fd, keep_size_punch_hole, ctypes.c_int64(offset), ctypes.c_int64(length))
    number = ctypes.get_errno()
    if done and number not in _NO_HOLES:
        raise OSError(number, os.strerror(number))
    return not done
