"""What is kept and for how long: ended jobs, their logs and transcripts, by age and by size.

Nothing of a job that has not ended is ever touched, and nothing that some process still writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpusched_ipy.archive import Archive
from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job
from gpusched_ipy.locks import is_alive, log_is_held

_DAY_S = 86400.0
_LAST = "purged_at"


@dataclass(frozen=True, slots=True, kw_only=True)
class Purged:
    """What was removed, or would be."""

    jobs: int
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    bytes: int  # as they lie on the disk: a log may have a hole
    written_at: float
    job: int | None  # None: no job that is recorded


def now_and_then(store: Archive, settings: Settings, wall: float) -> Purged | None:
    """Purge once a day, whoever asks; None where that has been done."""
    last = store.value(_LAST)
    if last is not None and abs(wall - float(last)) < _DAY_S:
        return None
    store.set_value(_LAST, str(wall))
    return purge(store, wall=wall, keep_days=settings.keep_days, keep_size=settings.keep_size)


def purge(
    store: Archive, *, wall: float, keep_days: float, keep_size: int, dry: bool = False
) -> Purged:
    """Forget jobs that ended more than ``keep_days`` ago, and the oldest files beyond a size.

    Args:
        keep_size: bytes of logs and transcripts; those of ended jobs go, the oldest first, and the
            jobs themselves stay in the history.
        dry: only say what would go.
    """
    before = wall - keep_days * _DAY_S
    needed = _depended_on(store)
    old = {
        job.id: job
        for job in store.ended()
        if job.ended_at is not None and job.ended_at <= before and job.id not in needed
    }
    open_jobs = {job.id for job in store.jobs()}
    files = sorted(_files(store), key=lambda file: file.written_at)
    gone = [
        file
        for file in files
        if file.job in old or (file.job is None and file.written_at <= before)
    ]
    left = [file for file in files if file not in set(gone)]
    size = sum(file.bytes for file in left)
    for file in left:
        if size <= keep_size:
            break
        if file.job not in open_jobs:
            gone.append(file)
            size -= file.bytes
    gone = [file for file in gone if not log_is_held(file.path)]
    found = Purged(jobs=len(old), files=len(gone), bytes=sum(file.bytes for file in gone))
    if dry:
        return found
    for file in gone:
        file.path.unlink(missing_ok=True)
    forgotten = store.forget(old.values())
    _sweep(store, open_jobs, wall)
    return Purged(jobs=forgotten, files=found.files, bytes=found.bytes)


def _depended_on(store: Archive) -> set[int]:
    """Ended jobs that open ones come after: their outcome is still asked for."""
    return {other for job in store.jobs() for other in (*job.request.after, *job.request.after_any)}


def _files(store: Archive) -> Iterator[_File]:
    """Every log and transcript, with its job."""
    by_attempt = store.attempts()
    by_uid = {job.spec.uid: job.id for job in _all(store)}
    for folder, owners in (("logs", by_attempt), ("cells", by_uid), ("calls", by_uid)):
        for path in (store.state.root / folder).iterdir():
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                size = status.st_blocks * 512
                yield _File(path, size, status.st_mtime, owners.get(path.name.split(".")[0]))


def _all(store: Archive) -> Iterator[Job]:
    yield from store.jobs()
    yield from store.ended()


def _sweep(store: Archive, open_jobs: set[int], wall: float) -> None:
    """Files whose job or member is no more: named variables, alive locks, words of notebooks."""
    waiting = {job.spec.uid for job in store.jobs() if job.id in open_jobs}
    before = wall - _DAY_S
    for path in (store.state.root / "env").iterdir():
        with suppress(FileNotFoundError):
            # A submit writes them before its job is recorded.
            if path.stem not in waiting and os.lstat(path).st_mtime < before:
                path.unlink()
    recorded = {job.spec.uid for job in _all(store)}
    for path in (store.state.root / "away").iterdir():
        if path.name.partition(".")[2] not in recorded:
            path.unlink(missing_ok=True)
    for path in (store.state.root / "alive").iterdir():
        with suppress(FileNotFoundError):
            if os.lstat(path).st_mtime < before and not is_alive(store.state, path.name):
                path.unlink()
