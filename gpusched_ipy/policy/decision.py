"""The decision: which job starts on which GPU now, and why each other one waits. Pure.

State in, decision out: it reads no clock, no file, no GPU, and changes nothing. The order is in
``order.py``, what lets a job stand in the line in ``standing.py``, the rule for one GPU in
``fit.py``, starts, reservations and backfill in ``plan.py``; here they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import Allocation, Job, WaitCode, WaitReason
from gpusched_ipy.policy.order import Line, Patience
from gpusched_ipy.policy.plan import Plan, Reservation, Start
from gpusched_ipy.policy.shapes import Shapes
from gpusched_ipy.policy.standing import Facts, Known
from gpusched_ipy.snapshot import Snapshot

__all__ = ["REASONS", "Decision", "Line", "Reservation", "Start", "confirm", "decide", "reason_for"]

REASONS = 200  # so many reasons are worked out at every decision; the rest on view


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now. Up to ``limit`` jobs have a reason, those nearest to their turn first."""

    starts: tuple[Start, ...]
    reasons: Mapping[int, WaitReason]
    reservations: tuple[Reservation, ...]
    never: Mapping[int, WaitReason]  # jobs to end: what they depend on has ended badly
    backlog_s: float = 0.0  # of the whole machine, for all that waits and runs; order shortest only


def decide(
    jobs: Iterable[Job] | Line,
    snapshot: Snapshot | None,
    allocations: Sequence[Allocation],
    settings: Settings,
    now: Instant,
    *,
    limit: int = REASONS,
    **known: Unpack[Known],
) -> Decision:
    """Which pending jobs start now, and why the others wait.

    Args:
        jobs: the pending jobs in any order, or a :class:`Line` of them kept between decisions.
        snapshot: the newest reading, its processes attributed to jobs and members.
        allocations: the GPUs of ours now, and those given back within the last minutes.
        settings: the thresholds and the order.
        now: this moment.
        limit: for how many jobs to say why they wait.
        known: what else is known, all of it optional: members, ended, expected, memory,
            worst_backlog_s, drained (see :class:`~gpusched_ipy.policy.standing.Known`).
    """
    line = jobs if isinstance(jobs, Line) else Line(jobs)
    facts = Facts(snapshot=snapshot, allocations=allocations, settings=settings, now=now, **known)
    plan = Plan(facts, limit)
    if settings.order == "fair":
        backlog_s, ordered = 0.0, line.fair(facts, plan.stands)
    else:
        patience = Patience([job for job in line if plan.stands(job)], facts)
        plan.patience_s = patience.limit_s
        backlog_s, ordered = patience.backlog_s, patience.ordered()
    for job in ordered:
        plan.consider(job)
        if plan.done():
            break
    return Decision(
        starts=tuple(plan.starts),
        reasons=plan.reasons,
        reservations=tuple(plan.reservations),
        never=plan.never,
        backlog_s=backlog_s,
    )


def backlog_s(
    jobs: Iterable[Job],
    snapshot: Snapshot | None,
    allocations: Sequence[Allocation],
    settings: Settings,
    now: Instant,
    **known: Unpack[Known],
) -> float:
    """How long the whole machine would need for ``jobs`` and all that runs, s."""
    facts = Facts(snapshot=snapshot, allocations=allocations, settings=settings, now=now, **known)
    return Patience([job for job in jobs if not job.held], facts).backlog_s


def reason_for(
    job_id: int,
    jobs: Iterable[Job] | Line,
    snapshot: Snapshot | None,
    allocations: Sequence[Allocation],
    settings: Settings,
    now: Instant,
    **known: Unpack[Known],
) -> WaitReason | None:
    """Why that one job waits, however far behind it is; None when it starts now or is not there."""
    line = jobs if isinstance(jobs, Line) else Line(jobs)
    decision = decide(line, snapshot, allocations, settings, now, limit=len(line), **known)
    return decision.reasons.get(job_id)


def confirm(
    job: Job,
    gpus: Sequence[str],
    snapshot: Snapshot | None,
    allocations: Sequence[Allocation],
    settings: Settings,
    now: Instant,
    **known: Unpack[Known],
) -> WaitReason | None:
    """Check one start again, on a reading taken under the lock; None when it may go ahead.

    It looks at the GPUs only: order, holds and dependencies were decided. An allocation of ``job``
    itself does not count, so it may be called before or after the claim.
    """
    others = [one for one in allocations if one.job_id != job.id]
    facts = Facts(snapshot=snapshot, allocations=others, settings=settings, now=now, **known)
    facts = replace(facts, drained=False)
    if facts.blind is not None:
        return facts.blind
    shape = Shapes(facts).of(job)
    rooms = {room.gpu.uuid: room for room in shape.pool.rooms}
    for uuid in gpus:
        if uuid not in rooms:
            return WaitReason(code=WaitCode.NO_READING, text=f"{uuid} cannot be given any more")
        refusal = rooms[uuid].refusal(shape.ask)
        if refusal is not None:
            return refusal
    return None
