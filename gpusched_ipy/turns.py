"""Several users on one machine: who goes first. Each user's members leave a ticket for what waits.

A ticket is a small file in a folder that root has made sticky: nobody can change or remove another
user's. Whose it is, the file's owner says; that its writer lives, the lock on it says. It is data
and nothing more: it can delay others by their patience, it can make nobody run anything.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpusched_ipy.config import Clock
from gpusched_ipy.job import Job

_MAX_BYTES = 4096
_MAX_TICKETS = 1000
Rank = tuple[int, float]  # sorts who goes first to the front


@dataclass(frozen=True, slots=True)
class Ticket:
    """What another user waits for."""

    uid: int
    priority: int
    since: float  # s since the epoch

    @property
    def rank(self) -> Rank:
        """Higher priority first, then who has waited longer."""
        return (-self.priority, self.since)

    @property
    def user(self) -> str:
        """The user's name, or the number where it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


class Turns:
    """The tickets as one member uses them.

    Args:
        folder: where tickets lie; None: this user is alone, and always has the turn.
        key: the member's.
        patience_s: for how long somebody ahead is waited for when a GPU could be had: who is ahead
            may be unable to use it, and a ticket is only a claim.
    """

    def __init__(self, folder: Path | None, key: str, clock: Clock, patience_s: float) -> None:
        self._folder = folder if folder is not None and folder.is_dir() else None
        self._key = key
        self._clock = clock
        self._patience_s = patience_s
        self._fd: int | None = None
        self._path: Path | None = None
        self._text = ""
        self._waiting: dict[int, float] = {}

    def announce(self, waiting: Iterable[Job]) -> None:
        """Leave a ticket for the first of the jobs that wait for a GPU, or none."""
        if self._folder is None:
            return
        jobs = list(waiting)
        self._waiting = {
            job.id: since for job in jobs if (since := self._waiting.get(job.id)) is not None
        }
        first = min(jobs, key=_rank, default=None)
        if first is None:
            self.close()
            return
        text = json.dumps({"priority": first.priority, "since": first.submitted_at})
        if text != self._text:
            with suppress(OSError):  # no room, or no right to: others then do not know of us
                self._write(text)

    def ahead_of(self, job: Job) -> str | None:
        """Why the job is not started now, though it could be: another user is ahead of it."""
        first = min(self.others(), key=lambda ticket: ticket.rank, default=None)
        if first is None or first.rank >= _rank(job):
            self._waiting.pop(job.id, None)
            return None
        now = self._clock.now().mono
        if now - self._waiting.setdefault(job.id, now) >= self._patience_s:
            return None
        return f"user {first.user} is ahead (priority {first.priority})"

    def others(self) -> Iterator[Ticket]:
        """The tickets of living members of other users."""
        if self._folder is None:
            return
        for name in sorted(os.listdir(self._folder))[:_MAX_TICKETS]:
            ticket = _read(self._folder / name)
            if ticket is not None and ticket.uid != os.geteuid():
                yield ticket

    def close(self) -> None:
        """Take the ticket back; closing twice changes nothing."""
        fd, path, self._fd, self._path, self._text = self._fd, self._path, None, None, ""
        if fd is not None and path is not None:
            with suppress(OSError):
                path.unlink()
            os.close(fd)

    def _write(self, text: str) -> None:
        assert self._folder is not None
        if self._fd is None:
            self._path = self._folder / f"{os.geteuid()}-{self._key}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o644)
            os.fchmod(self._fd, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(self._fd, text.encode(), 0)
        os.ftruncate(self._fd, len(text))
        self._text = text


def _rank(job: Job) -> Rank:
    return (-job.priority, job.submitted_at)


def _read(path: Path) -> Ticket | None:
    """A ticket, if it is one and its writer lives; whatever else stands there counts as none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        named = path.name.startswith(f"{status.st_uid}-")
        if not plain or not named or status.st_size > _MAX_BYTES:
            return None
        if not _is_held(fd):
            _remove_own(path, status)
            return None
        record = json.loads(os.read(fd, _MAX_BYTES))
        return Ticket(status.st_uid, int(record["priority"]), float(record["since"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    finally:
        os.close(fd)


def _is_held(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _remove_own(path: Path, status: os.stat_result) -> None:
    if status.st_uid == os.geteuid():
        with suppress(OSError):
            path.unlink()
