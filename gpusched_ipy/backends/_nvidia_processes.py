"""Who a pid in NVIDIA's process lists is: user, name, start, and whether it may be looked up here.

The driver counts pids in the namespace of the host (some versions translate them). Inside a
container the same number is somebody else in ``/proc``; there a pid is looked up only once it is
proven: the process holds NVIDIA's device files open.
"""

from __future__ import annotations

import os
import pwd
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

# PROC_PID_INIT_INO of the Linux kernel: the inode of the first pid namespace.
_FIRST_NAMESPACE = "pid:[4026531836]"
_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of a pid; ``visible`` False: it must not be looked up here."""

    user: str | None = None
    name: str | None = None
    started_at: float | None = None
    visible: bool = True


_HIDDEN = Identity(visible=False)
_GONE = Identity()


class Identities:
    """Looks processes up once each: kept by pid and by the identity of its ``/proc`` entry.

    Args:
        host_pids: whether the driver's pids are those of our ``/proc``; None finds out.
        proc: the folder of processes.
    """

    def __init__(self, host_pids: bool | None = None, proc: Path = Path("/proc")) -> None:
        self.host_pids = in_first_namespace() if host_pids is None else host_pids
        self._proc = str(proc)
        self._known: dict[int, tuple[tuple[int, int], Identity]] = {}
        self._now: dict[int, Identity] = {}  # as found in this reading

    def begin(self) -> None:
        """A new reading begins: each pid is asked for once in it, on however many GPUs it is."""
        self._now.clear()

    def find(self, pid: int) -> Identity:
        """Who ``pid`` is; a process that is gone or hidden has no name."""
        found = self._now.get(pid)
        if found is None:
            found = self._now[pid] = self._ask(pid)
        return found

    def _ask(self, pid: int) -> Identity:
        try:
            entry = os.stat(f"{self._proc}/{pid}")
        except OSError:
            # Without a /proc (macOS) psutil still knows; NVIDIA's driver is not found there.
            return _GONE if self.host_pids else _HIDDEN
        # A pid that is given out again gets a new entry: cheaper to ask than the start time.
        stamp = (entry.st_ino, entry.st_ctime_ns)
        known = self._known.get(pid)
        if known is not None and known[0] == stamp:
            return known[1]
        if not self.host_pids and not self._holds_nvidia_files(pid):
            return _HIDDEN
        if len(self._known) >= _KEPT:
            self._known.clear()
        identity = _look_up(pid)
        self._known[pid] = (stamp, identity)
        return identity

    def _holds_nvidia_files(self, pid: int) -> bool:
        folder = f"{self._proc}/{pid}/fd"
        try:
            return any(
                os.readlink(f"{folder}/{name}").startswith("/dev/nvidia")
                for name in os.listdir(folder)
            )
        except OSError:
            return False


def in_first_namespace() -> bool:
    """Whether our pids are those of the host; unknown counts as no."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_NAMESPACE
    except OSError:
        return False


def _look_up(pid: int) -> Identity:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return Identity(
                user=_user(process.uids().real),
                name=process.name() or None,
                started_at=process.create_time(),
            )
    except (psutil.Error, OSError):
        return _GONE


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
