"""The output of a job on disk: made private, locked by its processes, read from its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from gpusched_ipy.locks import lock_log
from gpusched_ipy.logcap import find_mark, mark
from gpusched_ipy.statedir import create_private, open_existing

_CHUNK = 64 * 1024
_CONTEXT = 64  # bytes before its place by which a reader knows that they are still the same


def create_log(path: Path) -> int:
    """A descriptor of a new log, locked; the lock lives as long as any process that inherits it.

    Raises:
        FileExistsError: an attempt of that name has a log already.
    """
    fd = create_private(path, os.O_RDWR | os.O_APPEND)
    lock_log(fd)
    return fd


def read_log(path: Path, *, last_bytes: int | None = None) -> bytes:
    """What the job has written so far, or its last bytes; what was cut is one line."""
    with LogReader(path, last_bytes=last_bytes) as reader:
        return b"".join(iter(lambda: reader.read(_CHUNK), b""))


def follow_log(path: Path, wait: Callable[[], bool]) -> Iterator[bytes]:
    """What the job has written and goes on writing; what was cut is one line.

    Args:
        wait: waits for more; False once nothing more can come.
    """
    with LogReader(path) as reader:
        goes_on = True
        while True:
            chunk = reader.read(_CHUNK)
            if chunk:
                yield chunk
            elif goes_on:
                goes_on = wait()
            else:
                return


class LogReader:
    """Reads a log from its begin while it may be written, cut in its middle, and closed up.

    On a file system without holes a log is closed up again and again while it is written: who
    follows it there may miss a piece or see one twice.

    Args:
        last_bytes: begin so far before its present end.
    """

    def __init__(self, path: Path, *, last_bytes: int | None = None) -> None:
        self._fd = open_existing(path)
        self._size = os.fstat(self._fd).st_size
        self._at = 0 if last_bytes is None else max(0, self._size - last_bytes)
        self._before = b""

    def read(self, most: int) -> bytes:
        """The next bytes; none at the present end."""
        while True:
            size = os.fstat(self._fd).st_size
            if size < self._size or self._moved():
                missing = self._find_place_again()
                if missing:
                    return mark(missing)
                size = os.fstat(self._fd).st_size
            self._size = size
            if self._at >= size:
                return b""
            data = self._next(os.SEEK_DATA, size)
            if data > self._at:
                missing, self._at = data - self._at, data
                self._before = b""
                return mark(missing)
            chunk = os.pread(self._fd, most, self._at)
            if self._next(os.SEEK_DATA, size) > self._at:
                continue  # it was cut out while it was read
            chunk = chunk[: self._next(os.SEEK_HOLE, self._at + len(chunk)) - self._at]
            self._at += len(chunk)
            self._before = (self._before + chunk)[-_CONTEXT:]
            return chunk

    @property
    def place(self) -> int:
        """How many bytes of the file lie before the next that is read."""
        return self._at

    def close(self) -> None:
        """Read no more."""
        os.close(self._fd)

    def __enter__(self) -> LogReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self, what: int, else_at: int) -> int:
        """Where the next data or the next hole begins, from our place on."""
        try:
            return os.lseek(self._fd, self._at, what)
        except OSError:  # there is none of it before the end
            return else_at

    def _moved(self) -> bool:
        """Whether other bytes stand now where ours stood."""
        before = self._before
        found = os.pread(self._fd, len(before), self._at - len(before))
        # Our bytes may as well have been cut out, which moves nothing.
        return found != before and found.strip(b"\0") != b""

    def _find_place_again(self) -> int:
        """The hole was closed: go on where we were, or behind it; how many bytes we have missed."""
        self._before = b""
        self._size = os.fstat(self._fd).st_size
        found = find_mark(self._fd)
        if found is None:
            self._at = min(self._at, self._size)
            return 0
        begin, end, cut = found
        if self._at < begin:
            return 0
        missing = max(0, begin + cut - self._at)
        self._at += missing + (end - begin) - cut
        return missing
