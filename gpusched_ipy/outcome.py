"""How a job ended, and the one way in which whoever knows it records it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpusched_ipy import environment

if TYPE_CHECKING:
    from gpusched_ipy.job import Job, JobState
    from gpusched_ipy.store import Store

# What a shim is answered once the end that it has told is recorded.
RECORDED = b"recorded\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the command ended."""

    state: JobState
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    oom: bool = False  # it ran out of GPU memory


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What a shim tells whoever has started it: that its job is over, and how."""

    job: Job  # as it was claimed
    member: str  # the shim's key; it leaves
    outcome: Outcome
    answer: Callable[[bool], None]  # tells it whether the end is recorded


def record(store: Store, job: Job, outcome: Outcome) -> None:
    """Record how the job ended, unless its claim has fallen meanwhile."""
    ended = store.finish_if_active(
        job.id,
        epoch=job.epoch,
        state=outcome.state,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        error=outcome.error,
        oom=outcome.oom,
    )
    if ended is not None and ended.ended:
        environment.drop(store.state, job.spec.uid)  # kept for another try
