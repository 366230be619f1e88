"""The private folder of one user's queue on one machine: where it is, and that it is private.

Everything the queue keeps lies here: the record, the locks, logs, inputs and outputs. Folders are
0700, files 0600, whatever the umask; nothing is ever created through a symbolic link.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gpusched_ipy.errors import StateDirError

if TYPE_CHECKING:
    from gpusched_ipy.config import Settings

# File systems of other hosts: SQLite's write-ahead log and flock cannot be trusted there.
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "lustre", "gpfs", "beegfs"),
    *("ceph", "fuse.ceph", "afs", "panfs", "glusterfs", "fuse.glusterfs"),
)
# Where an administrator's `gpusched admin init` puts the GPU locks that all users share.
SHARED_LOCKS = Path("/run/gpusched")
# Where the queue is kept when the home is of another host.
LOCAL = Path("/var/tmp")
_FOLDERS = ("alive", "gpu", "logs", "cells", "env", "calls", "readings", "away", "ring")


class StateDir(NamedTuple):
    """The folder, opened and checked."""

    root: Path
    note: str | None = None  # why it is not where it usually is; said once

    @property
    def database(self) -> Path:
        """The record."""
        return self.root / "queue.db"

    @property
    def queue_lock(self) -> Path:
        """Held around every write of the record."""
        return self.root / "q.lock"

    @property
    def agent_lock(self) -> Path:
        """Held by the agent while it lives."""
        return self.root / "agent.lock"

    @property
    def bell(self) -> Path:
        """Touched after every change of the record: members watch it.

        In a folder of its own: who watches a file is woken by whatever happens beside it.
        """
        return self.root / "ring" / "bell"

    def alive(self, key: str) -> Path:
        """Locked by that member while it lives."""
        return self.root / "alive" / _plain(key)

    def log(self, attempt: str) -> Path:
        """The output of one attempt; the job's processes hold a lock on it."""
        return self.root / "logs" / f"{_plain(attempt)}.log"

    def transcript(self, job_uid: str) -> Path:
        """The recorded messages of a cell."""
        return self.root / "cells" / f"{_plain(job_uid)}.jsonl"

    def call(self, job_uid: str) -> Path:
        """The pickled function and arguments of a call."""
        return self.root / "calls" / f"{_plain(job_uid)}.in"

    def call_result(self, job_uid: str) -> Path:
        """The pickled result of a call, or its exception."""
        return self.root / "calls" / f"{_plain(job_uid)}.out"

    def call_error(self, job_uid: str) -> Path:
        """What the record is to say of a call or isolated cell that has failed: one line."""
        return self.root / "calls" / f"{_plain(job_uid)}.err"

    def environment(self, job_uid: str) -> Path:
        """Variables named by ``--env``: read once when the job starts, then deleted."""
        return self.root / "env" / f"{_plain(job_uid)}.json"

    def away(self, name: str) -> Path:
        """There while a notebook has an isolated cell away."""
        return self.root / "away" / _plain(name)


def usual_root(settings: Settings) -> Path:
    """Where the state directory is, made or not."""
    return _default_root()[0] if settings.state_dir is None else settings.state_dir.absolute()


def open_state_dir(settings: Settings) -> StateDir:
    """The state directory, made where it is missing.

    Raises:
        StateDirError: it cannot be made, is not ours, others may write it, or it is not local.
    """
    if settings.state_dir is not None:
        root, note = settings.state_dir.absolute(), None
        found = network_file_system(root)
        if found:
            raise StateDirError(
                f"state directory {root} is on a network file system ({found}), where locks cannot "
                "be trusted; set GPUSCHED_STATE_DIR to a local folder"
            )
    else:
        root, note = _default_root()
    private_folder(root)
    for name in _FOLDERS:
        private_folder(root / name)
    return StateDir(root, note)


def create_private(path: Path, flags: int = os.O_RDWR) -> int:
    """A new file descriptor of a new file, 0600; fails where anything stands at ``path`` already.

    Raises:
        FileExistsError: the name is taken, a dangling symbolic link included.
    """
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)
    return fd


def open_private(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of our own regular file at ``path``, made where it is missing; never a link.

    Raises:
        StateDirError: something else stands there, or the file is not ours alone.
    """
    try:
        return create_private(path, flags)
    except FileExistsError:
        pass
    except OSError as exc:
        raise StateDirError(f"{path} cannot be made ({exc.strerror})") from exc
    return open_existing(path, flags)


def open_existing(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of our own regular file at ``path``; never through a link, never waiting.

    Raises:
        FileNotFoundError: nothing stands there.
        StateDirError: something else stands there, or the file is not ours alone.
    """
    try:
        # Not blocking: a pipe that somebody put there would hold us for ever.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise StateDirError(
            f"{path} cannot be opened ({exc.strerror}); remove what stands there"
        ) from exc
    status = os.fstat(fd)
    if not is_ours_alone(status):
        os.close(fd)
        if status.st_nlink == 0:
            raise FileNotFoundError(path)  # removed while we opened it
        raise StateDirError(f"{path} is not a plain file of ours; remove what stands there")
    return fd


def read_private(path: Path) -> str:
    """The text of our own file at ``path``.

    Raises:
        FileNotFoundError, StateDirError: as :func:`open_existing` does.
    """
    with os.fdopen(open_existing(path), encoding="utf-8") as stream:
        return stream.read()


def is_ours_alone(status: os.stat_result) -> bool:
    """Whether it is a regular file of this user under one name only."""
    plain = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return plain and status.st_nlink == 1


def network_file_system(path: Path) -> str | None:
    """The type of the network file system that holds ``path``, or None where it is local."""
    if sys.platform != "linux":
        return None
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in _mounts():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind if kind in _NETWORK else None


def _mounts() -> list[str]:
    """What is mounted where, proc(5); nothing where the system does not tell."""
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def shared_locks(lock_dir: Path | None) -> Path | None:
    """The folder of GPU locks shared with others: the setting, or root's own where it was made."""
    if lock_dir is not None:
        return lock_dir
    try:
        status = os.lstat(SHARED_LOCKS)
    except OSError:
        return None
    safe = stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and not status.st_mode & 0o022
    return SHARED_LOCKS if safe else None


def machine_id() -> str:
    """A short name that keeps two hosts that share a home apart."""
    import hashlib
    import socket

    try:
        text = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        text = ""
    # Hashed: systemd asks that the id itself is shown to nobody.
    return hashlib.sha256((text or socket.gethostname()).encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    """``name``, which is to be one part of a path and nothing more."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise StateDirError(f"{name!r} cannot be the name of a file")
    return name


def _default_root() -> tuple[Path, str | None]:
    from platformdirs import user_state_path

    usual = user_state_path("gpusched_ipy", appauthor=False) / machine_id()
    found = network_file_system(usual)
    if found is None:
        return usual, None
    local = LOCAL / f"gpusched-{os.geteuid()}" / machine_id()
    private_folder(local.parent)  # anybody may have made it before us
    return local, f"{usual} is on a network file system ({found}); the queue is kept in {local}"


def private_folder(path: Path) -> None:
    """Make a folder that is ours alone, with all that is missing above it, or see that it is.

    Raises:
        StateDirError: it cannot be made, is not ours, or others may write it.
    """
    try:
        for missing in [path, *path.parents][::-1]:
            # One by one: mkdir(parents=True) would leave the modes of parents to the umask.
            if not missing.exists():
                missing.mkdir(mode=0o700, exist_ok=True)
                missing.chmod(0o700)
        status = os.lstat(path)
    except OSError as exc:
        raise StateDirError(
            f"state directory {path} cannot be used ({exc.strerror}); "
            "mend its permissions or set GPUSCHED_STATE_DIR"
        ) from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise StateDirError(
            f"state directory {path} is not a folder of yours; set GPUSCHED_STATE_DIR"
        )
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise StateDirError(f"state directory {path} is writable by others; run: chmod 700 {path}")
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise StateDirError(
            f"state directory {path} is on a read-only file system; set GPUSCHED_STATE_DIR to a "
            "folder that can be written"
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StateDirError(f"state directory {path} is not writable; run: chmod 700 {path}")
    if stat.S_IMODE(status.st_mode) != 0o700:
        path.chmod(0o700)
