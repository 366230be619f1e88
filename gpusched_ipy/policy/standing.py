"""Whether a job may start at all, whatever the GPUs do now; pure. A job that may not blocks nobody.

:class:`Facts` is everything a decision knows besides the jobs themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypedDict

from gpusched_ipy import retry
from gpusched_ipy.config import LOCAL, Instant, Settings
from gpusched_ipy.job import (
    FINAL,
    Allocation,
    Job,
    JobKind,
    JobState,
    Member,
    WaitCode,
    WaitReason,
)
from gpusched_ipy.policy import reasons
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.text import format_duration

STALE_INTERVALS = 3  # a reading older than so many sample intervals starts nothing …
STALE_FLOOR_S = 2.0  # … but never younger than this


class Known(TypedDict, total=False):
    """What a caller may know besides the reading; each may be left out."""

    members: Mapping[str, Member]  # the processes that use the queue, by key
    ended: Mapping[int, JobState]  # the states of jobs that others depend on; missing: not ended
    expected: Mapping[int, float]  # seconds that a job is expected to run, by id, from its history
    longest: Mapping[int, float]  # seconds that it will hardly exceed, likewise
    memory: Mapping[int, int]  # bytes that a job is expected to need on each GPU, likewise
    backlog_s: float  # what waits and runs, in seconds of the whole machine; with aging_backlog
    worst_backlog_s: float  # the largest ``Decision.backlog_s`` of the last days
    drained: bool  # the user has stopped new starts


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a decision looks at besides the jobs; see :func:`gpusched_ipy.policy.decide`."""

    snapshot: Snapshot | None
    allocations: Sequence[Allocation]
    settings: Settings
    now: Instant
    members: Mapping[str, Member] = field(default_factory=dict)
    ended: Mapping[int, JobState] = field(default_factory=dict)
    expected: Mapping[int, float] = field(default_factory=dict)
    longest: Mapping[int, float] = field(default_factory=dict)
    memory: Mapping[int, int] = field(default_factory=dict)
    backlog_s: float = 0.0
    worst_backlog_s: float = 0.0
    drained: bool = False

    @cached_property
    def gpus(self) -> tuple[Gpu, ...]:
        """What can be given: no card whose MIG instances are listed beside it."""
        listed = self.snapshot.gpus if self.snapshot is not None else ()
        parents = {gpu.parent for gpu in listed}
        return tuple(gpu for gpu in listed if gpu.uuid not in parents)

    @cached_property
    def blind(self) -> WaitReason | None:
        """Why nothing can start anywhere: there is no reading to trust."""
        snapshot = self.snapshot
        if self.drained:
            text = "the queue is drained; resume it to start jobs again"
            return WaitReason(code=WaitCode.DRAINED, text=text)
        if snapshot is None:
            return _no_reading("the GPUs have not been read yet")
        if snapshot.problem is not None:
            return _no_reading(f"the GPUs cannot be read: {snapshot.problem}")
        limit_s = max(STALE_INTERVALS * self.settings.sample_interval_s, STALE_FLOOR_S)
        age_s = snapshot.unsure_s(self.now.mono)
        if self.settings.sampling and age_s > limit_s:
            return _no_reading(f"the last reading of the GPUs is {format_duration(age_s)} old")
        return None if self.gpus else _no_reading("this machine has no GPU that can be read")

    def standing(self, job: Job) -> WaitReason | None:
        """Why ``job`` may not start whatever the GPUs do; None when it stands in the line."""
        if job.cancel_requested:
            return WaitReason(code=WaitCode.HELD, text="being cancelled")
        if job.held:
            why = f"held: {job.hold_reason}" if job.hold_reason else "held"
            return WaitReason(code=WaitCode.HELD, text=why)
        spec, request = job.spec, job.spec.request
        if request.begin_at is not None and request.begin_at > self.now.wall:
            wait = format_duration(request.begin_at - self.now.wall)
            return WaitReason(code=WaitCode.BEGIN_TIME, text=f"begins in {wait}")
        if job.not_before_mono is not None and (due := retry.waiting(job, self.now)):
            return due
        if request.after or request.after_any:
            blocked = self._dependency(request.after, request.after_any)
            if blocked is not None:
                return blocked
        if spec.engine != LOCAL:
            return WaitReason(code=WaitCode.ENGINE, text=f"waits for {spec.engine} to take it")
        if self._kernel_busy(job):
            return kernel_busy()
        return None

    def never(self, job: Job) -> WaitReason | None:
        """Why ``job`` will never start; its scheduler ends it."""
        for number in job.spec.request.after:
            state = self.ended.get(number)
            if state in FINAL and state is not JobState.COMPLETED:
                text = f"job {number} {_ENDED[state]}: it will never start"
                return WaitReason(code=WaitCode.DEPENDENCY, text=text)
        return None

    @property
    def step_s(self) -> float:
        """The seconds of waiting that are worth one step of priority."""
        settings = self.settings
        return max(settings.aging_s, settings.aging_backlog * self.backlog_s)

    def limit_s(self, job: Job) -> float | None:
        """For how long it runs at most, as far as known: its walltime, else what history says."""
        walltime = job.spec.request.time_s
        if walltime is not None:
            return walltime
        return self.longest.get(job.id, self.expected.get(job.id))

    def area_s(self, job: Job) -> float | None:
        """GPU seconds that ``job`` is expected to take, as far as known."""
        expected = self.expected.get(job.id, job.spec.request.time_s)
        return None if expected is None else job.spec.request.gpus * expected

    def _dependency(self, after: Sequence[int], after_any: Sequence[int]) -> WaitReason | None:
        waits = [number for number in (*after, *after_any) if self.ended.get(number) not in FINAL]
        if waits:
            text = f"after {reasons.numbers(waits)}"
            return WaitReason(code=WaitCode.DEPENDENCY, text=text)
        for number in after:
            state = self.ended[number]
            if state is not JobState.COMPLETED:
                text = f"job {number} {_ENDED[state]}: it will never start"
                return WaitReason(code=WaitCode.DEPENDENCY, text=text)
        return None

    def _kernel_busy(self, job: Job) -> bool:
        spec = job.spec
        if spec.kind is not JobKind.CELL or spec.in_place or spec.home is None:
            return False
        member = self.members.get(spec.home)
        return member is not None and member.busy


_ENDED = {
    JobState.FAILED: "failed",
    JobState.CANCELLED: "was cancelled",
    JobState.TIMEOUT: "ran out of time",
    JobState.LOST: "was lost",
}


def always_stands(job: Job) -> bool:
    """Whether :meth:`Facts.standing` is None for ``job``, whatever the facts are.

    Most jobs are such; of a long line it is asked once of each, not at every decision.
    """
    spec, request = job.spec, job.spec.request
    return not (
        job.held
        or job.cancel_requested
        or job.not_before_mono is not None
        or request.begin_at is not None
        or request.after
        or request.after_any
        or spec.engine != LOCAL
        or spec.kind is JobKind.CELL
    )


def kernel_busy() -> WaitReason:
    """The cell's kernel runs something else."""
    return WaitReason(code=WaitCode.KERNEL_BUSY, text="its kernel is busy")


def matching(on_gpu: str, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs that ``on_gpu`` means: a UUID or a number (a card's stands for its instances), or a
    part of the name (a MIG profile is one), in this order."""
    wanted = on_gpu.strip().casefold()
    tests: tuple[Callable[[Gpu], bool], ...] = (
        lambda gpu: wanted in (gpu.uuid.casefold(), (gpu.parent or "").casefold()),
        lambda gpu: wanted in (str(gpu.index), gpu.number),
        lambda gpu: wanted in gpu.name.casefold(),
    )
    for fits in tests:
        found = tuple(gpu for gpu in gpus if fits(gpu))
        if found:
            return found
    return ()


def _no_reading(text: str) -> WaitReason:
    return WaitReason(code=WaitCode.NO_READING, text=text)
