"""The invariants, checked on the record of a box against what its jobs have noted.

The numbers are those of the model: I1 (no GPU given twice) is witnessed by the jobs themselves.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from pathlib import Path

from gpusched_ipy.errors import StoreError
from gpusched_ipy.job import TRANSITIONS, Job, JobState
from gpusched_ipy.locks import FileLock, GpuLocks, log_is_held
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store
from tests.chaos.ledger import Ledger


def leases_match(state: StateDir) -> list[str]:
    """I8, at any moment: every lease belongs to an active job, and every active job has its own."""
    lock = FileLock(state.queue_lock)
    if not lock.try_acquire():
        return []  # its holder may be one that is stopped: whoever waited here could not wake it
    try:
        return _leases_match(state.database)
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return []  # a stopped reader is in the middle of recovering SQLite's log
    finally:
        lock.release()


def _leases_match(database: Path) -> list[str]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        db.execute("BEGIN")
        leases = set(db.execute("SELECT job_id, epoch FROM leases"))
        active = set(
            db.execute("SELECT id, epoch FROM jobs WHERE state IN ('starting', 'running')")
        )
    db.close()
    return [f"a lease without its job, or a job without its lease: {leases ^ active}"] * (
        leases != active
    )


def drained_box(root: Path, ledger: Ledger) -> tuple[list[str], list[Job]]:
    """Everything that must hold of a box in which nothing runs any more; and its jobs."""
    state = StateDir(root)
    wrong = _intact(state.database) + leases_match(state)
    try:
        store = Store(state)
        jobs = store.jobs(ended=True)
    except StoreError as exc:
        return [*wrong, f"I6 the record cannot be read: {exc}"], []
    wrong += [f"I5 lease left: {lease}" for lease in store.leases()]
    wrong += [f"I5 lock left: {name}" for name in _held_locks(state)]
    for job in jobs:
        wrong += [f"{text} (job {job.id} {job.spec.uid})" for text in _of_job(store, job, ledger)]
    store.close()
    return wrong, jobs


def _of_job(store: Store, job: Job, ledger: Ledger) -> list[str]:
    uid, starts = job.spec.uid, ledger.starts[job.spec.uid]
    wrong = _replay(store, job)
    if not job.ended:
        wrong.append(f"I2 stuck: {job.state}")
    if uid not in ledger.tried:
        wrong.append("I9 nobody has submitted it")
    if starts > job.attempts:
        wrong.append(f"I3 started {starts} times in {job.attempts} attempts")
    if job.state is JobState.COMPLETED and not (starts and uid in ledger.ended):
        wrong.append("I4 completed without start and end")
    if job.attempt is not None and log_is_held(store.state.log(job.attempt)):
        wrong.append("I5 its log is still held")
    return wrong


def _replay(store: Store, job: Job) -> list[str]:
    """I7: the events lead along the table to the state, and the epoch rises by one per claim."""
    wrong: list[str] = []
    state, claims = JobState.PENDING, 0
    for event in store.events(job.id):
        moved = JobState(event.data.get("state", state))
        if moved != state and moved not in TRANSITIONS[state]:
            wrong.append(f"I7 {event.what}: from {state} to {moved}")
        state = moved
        claims += event.what == "claimed"
    if state != job.state:
        wrong.append(f"I7 the events lead to {state}, the record says {job.state}")
    if claims != job.epoch:
        wrong.append(f"I7 {claims} claims, but epoch {job.epoch}")
    return wrong


def _intact(database: Path) -> list[str]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        found = [row[0] for row in db.execute("PRAGMA integrity_check")]
    db.close()
    return [] if found == ["ok"] else [f"I6 {text}" for text in found]


def _held_locks(state: StateDir) -> list[str]:
    locks = (state.queue_lock, state.agent_lock)
    return [path.name for path in locks if FileLock(path).held_by_anybody()]


def held_gpus(folder: Path, gpus: int) -> list[str]:
    """I5: the GPU locks that somebody holds after all is over."""
    locks = GpuLocks(folder)
    names = [f"GPU-fake-{place}" for place in range(gpus)]
    return [f"I5 GPU lock left: {name}" for name in names if locks.occupied(name)]


def lost(ledger: Ledger, jobs: list[Job]) -> list[str]:
    """I2: the acknowledged jobs that no record has, or that have not ended."""
    known = {job.spec.uid for job in jobs if job.ended}
    return sorted(ledger.acknowledged - known)


def outcomes(jobs: list[Job]) -> dict[str, int]:
    """How many jobs ended how."""
    return dict(Counter(str(job.state) for job in jobs))
