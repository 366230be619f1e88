"""The output of a job on disk: made private, locked by its processes, read from its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gpusched_ipy.locks import lock_log
from gpusched_ipy.statedir import create_private

_CHUNK = 64 * 1024


def create_log(path: Path) -> int:
    """A descriptor of a new log, locked; the lock lives as long as any process that inherits it.

    Raises:
        FileExistsError: an attempt of that name has a log already.
    """
    fd = create_private(path, os.O_RDWR | os.O_APPEND)
    lock_log(fd)
    return fd


def read_log(path: Path, *, last_bytes: int | None = None) -> bytes:
    """What the job has written so far, or its last bytes."""
    with path.open("rb") as stream:
        if last_bytes is not None:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, end - last_bytes))
        return stream.read()


def follow_log(path: Path, wait: Callable[[], bool]) -> Iterator[bytes]:
    """What the job has written and goes on writing.

    Args:
        wait: waits for more; False once nothing more can come.
    """
    with path.open("rb") as stream:
        goes_on = True
        while True:
            chunk = stream.read(_CHUNK)
            if chunk:
                yield chunk
            elif goes_on:
                goes_on = wait()
            else:
                return
