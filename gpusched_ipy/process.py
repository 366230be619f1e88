"""Start, recognise and end processes. It never signals what is not provably the one that was meant.

A process is (pid, start ticks, boot): the pid alone may have been given to a stranger since. Start
ticks are raw, not a date, because dates move with the wall clock. Where the system has pidfds they
are held while signalling.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import psutil

# Seconds between asking politely (SIGINT), firmly (SIGTERM) and not asking (SIGKILL).
GRACE_S = 3.0
_PF_EXITING = 0x4  # proc(5), the flags of a process that has begun to end
_LINUX = sys.platform.startswith("linux")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])


class ProcessId(NamedTuple):
    """One process for ever, not whoever has its pid now."""

    pid: int
    start_ticks: int | None  # clock ticks after boot; None where the system does not tell
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The identity of a living process, or None when there is none."""
        ticks = start_ticks(pid)
        if ticks is None and not _exists(pid):
            return None
        return cls(pid, ticks, boot_id())

    @property
    def alive(self) -> bool:
        """Whether exactly this process still runs (a zombie does not)."""
        if self.boot != boot_id():
            return False
        return start_ticks(self.pid) == self.start_ticks if self.start_ticks is not None else False


@cache
def boot_id() -> str:
    """A name of this boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        pass
    if sys.platform.startswith("darwin"):
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
        return asked.stdout.strip()
    import psutil

    return f"boot-{int(psutil.boot_time())}"


def start_ticks(pid: int) -> int | None:
    """When the process started, in the system's own unit; None when there is no such process."""
    if _LINUX:
        fields = _stat_fields(pid)
        return None if fields is None or fields[0] in "ZX" else int(fields[19])
    import psutil

    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else int(found.create_time() * 100)
    except psutil.Error:
        return None


def is_dying(pid: int) -> bool:
    """Whether the process is dead, or was killed and has only not let go of its files yet (Linux).

    Elsewhere a process that is being killed cannot be told from one that lives.
    """
    fields = _stat_fields(pid)
    if not _LINUX or fields is None:
        return start_ticks(pid) is None
    if fields[0] in "ZX" or int(fields[6]) & _PF_EXITING:
        return True
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    pending = next((line for line in lines.splitlines() if line.startswith("ShdPnd:")), "ShdPnd: 0")
    return bool(int(pending.split()[1], 16) >> (signal.SIGKILL - 1) & 1)


def session_of(pid: int) -> int | None:
    """The session that the process belongs to."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


def parent_of(pid: int) -> int | None:
    """The parent of the process, or None when it is gone."""
    if _LINUX:
        fields = _stat_fields(pid)
        return None if fields is None else int(fields[1])
    import psutil

    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def owner_among(pid: int, roots: dict[int, int | str]) -> int | str | None:
    """Whose process it is: the value in ``roots`` of its nearest ancestor, or of its session."""
    seen: set[int] = set()
    at: int | None = pid
    while at is not None and at > 1 and at not in seen:
        if at in roots:
            return roots[at]
        seen.add(at)
        at = parent_of(at)
    session = session_of(pid)
    return None if session is None else roots.get(session)


def python_argv(module: str, *arguments: str, isolated: bool = True) -> list[str]:
    """The argv that runs a module of this package, isolated from the working directory.

    ``-I`` keeps the environment and the working directory out of the import path; the folder that
    holds this package comes last, so that it can shadow nothing.

    Args:
        isolated: False heeds the variables of Python (``PYTHONPATH`` …): for code of the user's.
    """
    # Nothing that is imported becomes garbage: looking for it is a fifth of what a start costs.
    start = (
        f"import gc, sys; gc.disable(); sys.path.append({_PACKAGE_ROOT!r}); "
        f"from gpusched_ipy.{module} import main; gc.freeze(); gc.enable(); "
        "sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-I" if isolated else "-P", "-c", start, *arguments]


def spawn_detached(
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    on_exit: Callable[[int], None] | None = None,
) -> int:
    """Start a process in a session of its own and return its pid; its end is collected by a thread.

    It survives the interrupt, the restart and the death of its starter, and writes nowhere.
    """
    child = subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )

    def collect() -> None:
        status = child.wait()
        if on_exit is not None:
            on_exit(status)

    threading.Thread(target=collect, name=f"gpusched-wait-{child.pid}", daemon=True).start()
    return child.pid


def survive_signals(*numbers: signal.Signals) -> None:
    """Outlive these signals, without handing that on: a handler, unlike SIG_IGN, ends at exec."""
    for number in numbers:
        signal.signal(number, lambda *_: None)


def become_subreaper() -> None:
    """Adopt every orphan among our descendants, so that none can leave by a double fork (Linux)."""
    if not _LINUX:
        return
    import ctypes

    set_child_subreaper = 36  # PR_SET_CHILD_SUBREAPER, prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0)


def has_descendants() -> bool:
    """Whether anything below this process lives or waits to be collected (µs).

    Complete only for a subreaper: without that, who left by a double fork is not seen.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants(pid: int) -> list[psutil.Process]:
    """All living processes below ``pid``, its sessions' strays included."""
    import psutil

    try:
        found = {child.pid: child for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        found = {}
    for candidate in psutil.process_iter():
        if candidate.pid not in found and session_of(candidate.pid) == pid and candidate.pid != pid:
            found[candidate.pid] = candidate
    return [child for child in found.values() if _runs(child)]


def end_tree(
    root: int,
    *,
    grace_s: float = GRACE_S,
    first: signal.Signals = signal.SIGINT,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """End every process below ``root`` (not ``root`` itself): interrupt, terminate, kill.

    ``root`` must be the caller or a process that the caller knows to be its own; psutil compares
    each process with its identity before it signals.
    """
    steps = [first, signal.SIGTERM, signal.SIGKILL]
    for step in dict.fromkeys(steps):
        _signal(descendants(root), step)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not descendants(root):
                return
            wait(0.02)


def signal_if(pid: int, number: signal.Signals, is_the_one: Callable[[], bool]) -> None:
    """Signal the process of that pid if it is the one that is meant.

    It is held first and recognised then, so that no other can have its pid in between (Linux).
    """
    with suppress(ProcessLookupError):
        if not hasattr(os, "pidfd_open"):
            if is_the_one():
                os.kill(pid, number)
            return
        held = os.pidfd_open(pid)
        try:
            if is_the_one():
                signal.pidfd_send_signal(held, number)
        finally:
            os.close(held)


class ExitWatch:
    """Tells at once, and once, when any of a set of processes ends (pidfd on Linux)."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._over: set[int] = set()  # watched ones whose end has been told

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that become readable when their process ends."""
        return tuple(self._fds.values())

    def watch(self, pids: Iterable[int]) -> None:
        """Watch exactly these processes; what cannot be watched is left to sampling."""
        wanted = set(pids)
        self._over &= wanted
        for pid in set(self._fds) - wanted:
            os.close(self._fds.pop(pid))
        if not hasattr(os, "pidfd_open"):
            return
        for pid in wanted - set(self._fds) - self._over:
            with suppress(OSError):
                self._fds[pid] = os.pidfd_open(pid)

    def told(self, fds: Iterable[int]) -> set[int]:
        """These were readable: the pids that have ended by that and are not watched any more."""
        ready = set(fds)
        ended = {pid for pid, fd in self._fds.items() if fd in ready}
        for pid in ended:
            os.close(self._fds.pop(pid))
        self._over |= ended
        return ended

    def close(self) -> None:
        """Watch nothing any more."""
        self.watch(())


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    import psutil

    for found in processes:
        with suppress(psutil.Error, PermissionError):
            signal_if(found.pid, number, found.is_running)


def _runs(found: psutil.Process) -> bool:
    import psutil

    try:
        return found.is_running() and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (proc(5)); the name may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
