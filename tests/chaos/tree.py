"""The processes of a run: everything below its controller, which adopts whoever is orphaned."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One living process of the run, and what it is."""

    pid: int
    parent: int
    kind: str  # submitter, kernel, commander, agent, shim, job, worker, fork


def processes(root: int, members: dict[int, str]) -> list[Process]:
    """Everything alive below ``root``; ``members`` tells what its forks are."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
                fields = text.rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    parents[int(entry)] = int(fields[1])
    return [
        Process(pid, parent, _kind(pid, members))
        for pid, parent in parents.items()
        if pid != root and _below(pid, root, parents)
    ]


def send(process: Process, number: signal.Signals) -> bool:
    """Signal exactly that process; False when it is gone."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def _below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid > 1:
        pid = parents.get(pid, 0)
        if pid == root:
            return True
    return False


def _kind(pid: int, members: dict[int, str]) -> str:
    if pid in members:
        return members[pid]
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    for word, kind in ((b"chaos-shim", "shim"), (b"chaos-agent", "agent"), (b"worker", "worker")):
        if word in words:
            return kind
    return "job" if any(word.endswith(b"/job.py") for word in words) else "fork"
