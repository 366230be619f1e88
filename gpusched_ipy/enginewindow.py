"""Which of our jobs an engine may have, in their order, and why each other one waits. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gpusched_ipy.job import ACTIVE, Job, JobState, WaitCode, WaitReason, effective_priority
from gpusched_ipy.policy import REASONS
from gpusched_ipy.policy.standing import Facts
from gpusched_ipy.text import clean

_LONGEST = 600  # characters of a reason


def wanted(jobs: Iterable[Job], facts: Facts) -> list[Job]:
    """The pending ones of an engine's open jobs that it may have, the next one first."""
    if facts.drained:
        return []
    known, found = list(jobs), []
    for job in known:
        standing = facts.standing(job) if job.state is JobState.PENDING else None
        if standing is not None and standing.code is WaitCode.ENGINE:
            found.append(job)
    aging_s, mono = facts.settings.aging_s, facts.now.mono
    found.sort(key=lambda job: (-effective_priority(job, aging_s, mono), job.id))
    return _within_arrays(found, known)


def _within_arrays(jobs: list[Job], known: list[Job]) -> list[Job]:
    """Those of them that the ``max_running`` of their sweeps lets through."""
    running: dict[str, int] = {}
    for job in known:
        if job.state in ACTIVE and job.spec.array is not None:
            running[job.spec.array.id] = running.get(job.spec.array.id, 0) + 1
    found = []
    for job in jobs:
        array, limit = job.spec.array, job.request.max_running
        if array is not None and limit is not None:
            if running.get(array.id, 0) >= limit:
                continue
            running[array.id] = running.get(array.id, 0) + 1
        found.append(job)
    return found


def reason(job: Job, facts: Facts, place: int | None, said: str | None, engine: str) -> WaitReason:
    """Why a pending job waits.

    Args:
        place: how many jobs the engine may have before it; None: it may not have it.
        said: what the engine, or what it lacks, says about it.
    """
    standing = facts.standing(job)
    if standing is not None and standing.code is not WaitCode.ENGINE:
        return standing
    if facts.drained and facts.blind is not None:
        return facts.blind
    if place is None:
        text = f"{job.request.max_running} of its sweep run already"
        return WaitReason(code=WaitCode.MAX_RUNNING, text=text)
    text = f"waits for {engine}: {_ahead(place)}" if said is None else said
    return WaitReason(code=WaitCode.ENGINE, text=clean(text, _LONGEST))


def _ahead(place: int) -> str:
    """How many are; of many not the number, which would be written anew with every start."""
    if place > REASONS:
        return f"more than {REASONS} jobs ahead"
    if place == 0:
        return "jobs of ours have its GPUs"
    return f"{place} job{'' if place == 1 else 's'} ahead"
