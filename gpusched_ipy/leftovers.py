"""The processes of a job whose shim is dead, found by what they hold: its log, locked (Linux).

Whoever has that lock open was started by the job, however often it has forked and whatever became
of its parents: so it is provably the job's, and it alone is signalled.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gpusched_ipy.locks import log_is_held
from gpusched_ipy.process import GRACE_S, signal_if

_STEPS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def end(log: Path, *, grace_s: float = GRACE_S) -> bool:
    """Interrupt, terminate, kill whoever holds the lock of that log; whether nobody does any more.

    Raises:
        StateDirError: something else stands where the log should be.
    """
    for step in _STEPS:
        for pid in holders(log):
            signal_if(pid, step, lambda pid=pid: holds(pid, log))  # type: ignore[misc]
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not log_is_held(log):
                return True
            time.sleep(0.02)
    return not log_is_held(log)


def holders(log: Path) -> list[int]:
    """The processes of this user that hold the lock of that log; none where that is not told."""
    if not sys.platform.startswith("linux"):
        return []
    found = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in found if pid != os.getpid() and holds(pid, log)]


def holds(pid: int, path: Path, kind: str = "FLOCK") -> bool:
    """Whether that process holds an exclusive lock of that file; False where that is not told.

    Args:
        kind: of the lock, as proc(5) names it.
    """
    with suppress(OSError):
        wanted = os.stat(path)
        return any(_is_locked(pid, fd, kind) for fd in _descriptors(pid, wanted))
    return False


def _descriptors(pid: int, wanted: os.stat_result) -> Iterator[str]:
    """The descriptors through which that process has the file open."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{fd}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                yield fd


def _is_locked(pid: int, fd: str, kind: str) -> bool:
    """Whether the lock is that descriptor's: a reader of the log has it open without one."""
    text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii", errors="replace")
    return any(
        line.startswith("lock:") and kind in line and "WRITE" in line for line in text.splitlines()
    )
