"""Whether a job that has ended badly runs again, when, and with what; pure. It moves no job.

The store asks it in the transaction that records the end, so that whoever records an end decides
alike: a shim whose agent is dead, a kernel, a member that reaps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpusched_ipy.clock import Instant
from gpusched_ipy.job import Job, JobKind, JobState, WaitCode, WaitReason
from gpusched_ipy.text import format_bytes, format_duration

# A job that is lost again and again is likely the reason why.
MAX_REQUEUES = 3
# However often it has failed, the next try does not wait longer.
LONGEST_S = 600.0
# A job that shares a card and needs more than so much of it has it to itself on its next try.
SHARED_AT_MOST = 7 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """One more try of a job."""

    job: Job  # with what it asks for from now on, and how often it has been tried
    why: str  # for people


def after_failure(job: Job, now: Instant, *, card_bytes: int | None) -> Again | None:
    """The next try of a job that has just ended; None where there is none.

    Only a job that has failed by itself is tried again: never one that was cancelled, nor one whose
    walltime ran out, nor a block that held GPUs.

    Args:
        job: as it has ended.
        now: this moment.
        card_bytes: the memory of the smallest GPU that it had, where it is known.
    """
    if job.state is not JobState.FAILED or job.cancel_requested:
        return None
    if job.kind is JobKind.ALLOCATION or job.spec.in_place:
        return None
    if job.oom and job.request.retry_oom and not job.oom_retried:
        return _with_more_memory(job, card_bytes)
    if job.retried < job.request.retries:
        delay_s = min(job.request.retry_delay_s * 2**job.retried, LONGEST_S)
        again = replace(job, retried=job.retried + 1, not_before_mono=now.mono + delay_s)
        return Again(job=again, why=f"{_nth(again)} in {format_duration(delay_s)}")
    return None


def may_be_tried_again(job: Job) -> bool:
    """Whether this attempt may not be the last one: what the next one needs must be kept."""
    request = job.request
    return bool(request.retries or request.requeue or request.retry_oom)


def may_requeue(job: Job) -> bool:
    """Whether a job that was lost waits again: its user has asked for it, and not too often yet."""
    return job.request.requeue and job.requeued < MAX_REQUEUES


def waiting(job: Job, now: Instant) -> WaitReason | None:
    """Why the job does not start before its next try is due; None once it is."""
    if job.not_before_mono is None or job.not_before_mono <= now.mono:
        return None
    left_s = job.not_before_mono - now.mono
    text = f"{_nth(job)} in {format_duration(max(1.0, left_s))}"
    return WaitReason(code=WaitCode.BEGIN_TIME, text=text)


def _nth(job: Job) -> str:
    return f"retry {job.retried} of {job.request.retries}"


def _with_more_memory(job: Job, card_bytes: int | None) -> Again:
    """Twice what it had declared where it can still share its card, else the whole card."""
    request, declared = job.request, job.request.mem_bytes
    tried = "" if declared is None else f" with {format_bytes(declared)} declared"
    if declared is not None and card_bytes and 2 * declared <= SHARED_AT_MOST * card_bytes:
        more: int | None = 2 * declared
        how = f"with {format_bytes(more)}"
    else:
        more, how = None, "on a GPU that it has to itself"
    request = replace(request, mem_bytes=more)
    again = replace(job, spec=replace(job.spec, request=request), oom_retried=True)
    return Again(job=again, why=f"ran out of GPU memory{tried}; runs again {how}")
