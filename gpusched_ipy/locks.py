"""The operating system's locks: the truth about who lives and whose GPU it is.

Four kinds, none with a time-out: the queue lock (around every write), the alive lock of each member
(POSIX, not inherited by forks), the GPU locks and the log lock of a job (flock, inherited by the
job's processes on purpose). A dead process holds no lock, however it died; a stopped one keeps its.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from gpusched_ipy.errors import StateDirError
from gpusched_ipy.statedir import StateDir, open_existing, open_private, shared_locks

# struct flock, as fcntl(2) of each system has it.
_FLOCK_LINUX = "hhqqi"
_FLOCK_MACOS = "qqihh"

# Descriptors that a forked child must close (never unlock: the lock is the parent's as well).
_INHERITED: set[int] = set()
# Alive files of this process: opening and closing one of them again would drop its lock.
_OWN_KEYS: set[str] = set()


class FileLock:
    """An exclusive flock on a file of the state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> None:
        """Wait for the lock, in no certain order."""
        fd = open_inherited(self.path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except BaseException:
            close_inherited(fd)
            raise
        self._fd = fd

    def try_acquire(self) -> bool:
        """Take the lock if it is free."""
        fd = open_inherited(self.path)
        if not try_flock(fd, fcntl.LOCK_EX):
            close_inherited(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Give the lock back; releasing twice changes nothing."""
        if self._fd is not None:
            close_inherited(self._fd)
            self._fd = None

    def held_by_anybody(self) -> bool:
        """Whether some process, this one included, holds the lock now."""
        if self.held:
            return True
        if self.try_acquire():
            self.release()
            return False
        return True

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Membership:
    """The proof that a member lives: a lock that falls with its process."""

    def __init__(self, state: StateDir) -> None:
        self.key = os.urandom(16).hex()
        self._path = state.alive(self.key)
        self._fd: int | None = open_private(self._path)
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._pid = os.getpid()
        _OWN_KEYS.add(self.key)

    def leave(self) -> None:
        """End the membership, as dying would."""
        if self._fd is None or self._pid != os.getpid():
            return
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)
        self._fd = None
        _OWN_KEYS.discard(self.key)


def is_alive(state: StateDir, key: str) -> bool:
    """Whether the member of that key lives (µs; never wrong about a zombie, a stop or a fork)."""
    return alive_pid(state, key) is not None


def alive_pid(state: StateDir, key: str) -> int | None:
    """The pid of that member, or None when it is dead (0: alive, in another pid namespace)."""
    if key in _OWN_KEYS:
        return os.getpid()
    try:
        fd = open_existing(state.alive(key), os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return _lock_holder(fd)
    finally:
        os.close(fd)


def is_member(state: StateDir, pid: int) -> bool:
    """Whether the process of that pid holds the alive lock of some member now."""
    return any(alive_pid(state, path.name) == pid for path in (state.root / "alive").iterdir())


def forget_member(state: StateDir, key: str) -> None:
    """Remove the alive file of a dead member."""
    if key not in _OWN_KEYS:
        with suppress(FileNotFoundError):
            state.alive(key).unlink()


def _lock_holder(fd: int) -> int | None:
    """The holder of a POSIX write lock on the file of ``fd``."""
    if sys.platform == "darwin":
        asked = struct.pack(_FLOCK_MACOS, 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        _, _, pid, kind, _ = struct.unpack(_FLOCK_MACOS, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    else:
        asked = struct.pack(_FLOCK_LINUX, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK_LINUX, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else max(0, int(pid))


class GpuLocks:
    """The locks that say "a job of ours is on this GPU".

    An exclusive job holds its GPU's lock exclusively, jobs that share it hold it shared. The
    descriptors are handed to the job, so the lock falls with the last of its processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, state: StateDir, lock_dir: Path | None) -> GpuLocks:
        """Where containers or users share the GPUs, else in the state directory."""
        return cls(shared_locks(lock_dir) or state.root / "gpu")

    def try_lock(self, gpu: str, *, shared: bool) -> int | None:
        """A descriptor that holds the GPU's lock, or None while somebody else's job holds it.

        Raises:
            StateDirError: the lock file cannot be opened.
        """
        fd = self._open(gpu)
        if not try_flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            os.close(fd)
            return None
        _INHERITED.add(fd)
        return fd

    def try_lock_all(self, gpus: tuple[str, ...], *, shared: bool) -> tuple[int, ...] | None:
        """The locks of all of ``gpus``, or None (and none of them held)."""
        held: list[int] = []
        try:
            for gpu in gpus:
                fd = self.try_lock(gpu, shared=shared)
                if fd is None:
                    self.close(held)
                    return None
                held.append(fd)
        except BaseException:
            self.close(held)
            raise
        return tuple(held)

    def occupied(self, gpu: str) -> bool:
        """Whether any job of ours holds that GPU's lock."""
        fd = self.try_lock(gpu, shared=False)
        if fd is None:
            return True
        self.close([fd])
        return False

    def refuses(self, gpu: str, *, shared: bool) -> bool:
        """Whether that GPU's lock cannot be had now, because it is held or cannot be opened."""
        try:
            fd = self.try_lock(gpu, shared=shared)
        except StateDirError:
            return True
        if fd is None:
            return True
        self.close([fd])
        return False

    def close(self, fds: list[int] | tuple[int, ...]) -> None:
        """Close our copies; the lock stays while the job's processes have theirs."""
        for fd in fds:
            close_inherited(fd)

    def _open(self, gpu: str) -> int:
        path = self.folder / lock_name(gpu)
        try:
            # An administrator's lock files are root's and read-only: that is enough for a flock.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            # For reading too: the job, whose standard input it is, shall not write into it.
            return open_private(path, os.O_RDONLY)
        except OSError as exc:
            raise StateDirError(f"the GPU lock {path} cannot be opened ({exc.strerror})") from exc
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
            os.close(fd)
            raise StateDirError(f"the GPU lock {path} is not a plain file of ours or of root's")
        return fd


def lock_name(gpu: str) -> str:
    """The name of that GPU's lock file, whatever its UUID holds."""
    from urllib.parse import quote

    return f"{quote(gpu, safe='')}.lock"


def lock_log(fd: int) -> None:
    """Lock the open file that is a job's output: held while any process of the job has it open."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def log_is_held(path: Path) -> bool:
    """Whether any process of the attempt that writes this log still lives.

    Raises:
        StateDirError: something else stands where the log should be.
    """
    try:
        fd = open_existing(path)
    except FileNotFoundError:
        return False
    try:
        return not try_flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def try_flock(fd: int, kind: int) -> bool:
    """Take a flock if it is free; whether it was."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_inherited(path: Path) -> int:
    """A descriptor for a lock of this process alone: its forked children close theirs."""
    fd = open_private(path)
    _INHERITED.add(fd)
    return fd


def close_inherited(fd: int) -> None:
    """Close what :func:`open_inherited` has opened, and give back what it holds."""
    _INHERITED.discard(fd)
    os.close(fd)


def _forget_in_child() -> None:
    for fd in _INHERITED:
        with suppress(OSError):
            os.close(fd)
    _INHERITED.clear()
    _OWN_KEYS.clear()


os.register_at_fork(after_in_child=_forget_in_child)
