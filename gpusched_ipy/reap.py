"""End what the dead have left. Called under the queue lock; it asks the locks, never a clock.

A dead member's job that never began goes back to the line; one that ran is lost, because nobody can
know how it ended, but only once no process of it lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial

from gpusched_ipy.config import LOCAL
from gpusched_ipy.errors import DamagedJobError
from gpusched_ipy.job import ACTIVE, BOUND_KINDS, Job, JobKind, JobState
from gpusched_ipy.locks import forget_member, is_alive, log_is_held
from gpusched_ipy.retry import may_requeue
from gpusched_ipy.store import Store


def orphans(store: Store, jobs: Iterable[Job]) -> list[Job]:
    """Those of ``jobs`` whose member is dead and that can be ended or returned now."""
    # Thousands of cells may wait for one kernel: its lock is asked once.
    alive = cache(partial(is_alive, store.state))
    return [job for job in jobs if _responsible_is_dead(alive, job) and not _still_runs(store, job)]


def reap(store: Store, jobs: Iterable[Job]) -> list[Job]:
    """End or return every orphan among ``jobs`` and give back how they stand now."""
    reaped = []
    with store.writing():
        for job in orphans(store, jobs):
            # What cannot be read costs nobody else anything; its own locks keep its GPUs.
            with suppress(DamagedJobError):
                reaped.append(_reap_one(store, job))
    return reaped


def forget_dead_members(store: Store, jobs: Iterable[Job]) -> None:
    """Drop the descriptions of members that are dead and that no open job names."""
    named = {key for job in jobs for key in (job.member, job.spec.home)}
    for key in set(store.members()) - named:
        if not is_alive(store.state, key):
            store.leave(key)
            forget_member(store.state, key)


def _responsible_is_dead(alive: Callable[[str], bool], job: Job) -> bool:
    if job.spec.engine != LOCAL:
        return False  # it runs elsewhere, whoever has handed it over
    if job.state in ACTIVE:
        return job.member is None or not alive(job.member)
    if job.state is JobState.PENDING and job.kind in BOUND_KINDS:
        return job.spec.home is None or not alive(job.spec.home)
    return False


def _still_runs(store: Store, job: Job) -> bool:
    """Whether processes of a started job live on without their shim."""
    if job.state is not JobState.RUNNING or job.kind in BOUND_KINDS or job.attempt is None:
        return False
    return log_is_held(store.state.log(job.attempt))


def _reap_one(store: Store, job: Job) -> Job:
    current = store.job(job.id)
    if (current.state, current.epoch) != (job.state, job.epoch):
        return current  # somebody else was quicker
    if job.state is JobState.PENDING:
        return store.end_pending(job, JobState.LOST, f"{_home(job)} gone")
    if job.kind in BOUND_KINDS:
        return _lose(store, job, f"{_home(job)} died")
    if job.state is JobState.STARTING:
        return store.unclaim(job, "the member that had claimed it died before it began")
    if may_requeue(job):
        return store.unclaim(job, "outcome unknown; queued again as asked", lost=True)
    often = f", as {job.requeued} times before" if job.requeued else ""
    return _lose(store, job, f"outcome unknown: its supervisor died{often}")


def _home(job: Job) -> str:
    """What the member is whose end is the end of the job."""
    return "kernel" if job.kind is JobKind.CELL else "its process"


def _lose(store: Store, job: Job, why: str) -> Job:
    lost = store.finish_if_active(job.id, epoch=job.epoch, state=JobState.LOST, error=why)
    return lost or store.job(job.id)
