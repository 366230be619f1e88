"""What a submit would do, and when: the question put to the real policy, and nothing queued."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpusched_ipy import backlog, policy, sweep
from gpusched_ipy.config import LOCAL, Clock, Instant, Settings
from gpusched_ipy.job import ExpectedStart, Job, JobSpec, JobState, Member, WaitCode, WaitReason
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.outlook import Outlook
from gpusched_ipy.policy.forecast import forecast
from gpusched_ipy.records import expected_text, iso
from gpusched_ipy.rows import key_of
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean

_LINES = 20  # of the members of a sweep
_REASON_LIMIT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What would become of one job."""

    spec: JobSpec
    gpus: tuple[str, ...] = ()  # UUIDs on which it would start at once
    labels: tuple[str, ...] = ()  # what people call them
    reason: WaitReason | None = None  # why it would wait
    start: ExpectedStart | None = None  # when it would start; None: not known
    stands: Job | None = None  # the job that its key stands for: it would not be queued

    @property
    def starts(self) -> bool:
        """Whether it would start at once."""
        return bool(self.gpus)

    def record(self) -> dict[str, Any]:
        """For other programs."""
        spec = self.spec
        return {
            "name": spec.name,
            "priority": spec.priority,
            "sweep": dict(spec.sweep),
            "starts_now": self.starts,
            "gpus": list(self.gpus),
            "reason": None if self.reason is None else self.reason.text,
            "reason_code": None if self.reason is None else str(self.reason.code),
            "expected_start": None if self.start is None else iso(self.start.at),
            "expected_start_range": self.start and [iso(self.start.low), iso(self.start.high)],
            "job": None if self.stands is None else self.stands.id,
        }

    def line(self, now: Instant) -> str:
        """For people."""
        if self.stands is not None:
            return f"would not be queued: job {self.stands.id} stands ({self.stands.state})"
        if self.starts:
            return f"would start now on {', '.join(self.labels)}"
        why = clean(self.reason.text, _REASON_LIMIT) if self.reason else "others are ahead"
        if self.reason is not None and self.reason.code is WaitCode.KERNEL_BUSY:
            why = "a kernel runs one cell at a time"
        when = expected_text(self.start, now) if self.start else "at a time that is not known"
        return f"would wait: {why}; starts {when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What would become of everything that was asked for."""

    jobs: tuple[Expected, ...]
    now: Instant  # when it was worked out

    def record(self) -> list[dict[str, Any]]:
        """For other programs: one object a job."""
        return [one.record() for one in self.jobs]

    def lines(self) -> list[str]:
        """For people."""
        first = self.jobs[0]
        if len(self.jobs) == 1 and not first.spec.sweep:
            return [f"{clean(first.spec.name, 60)} {first.line(self.now)}; nothing is queued"]
        starts = sum(one.starts for one in self.jobs)
        stand = sum(one.stands is not None for one in self.jobs)
        rest = len(self.jobs) - starts - stand
        counts = [f"{starts} would start now", f"{rest} would wait"]
        counts += [f"{stand} stand already"] if stand else []
        head = f"{clean(first.spec.name, 60)}: a sweep of {len(self.jobs)} jobs"
        shown = [
            f"  {clean(sweep.label(one.spec.sweep), 80)}: {one.line(self.now)}"
            for one in self.jobs[:_LINES]
        ]
        more = len(self.jobs) - len(shown)
        tail = [f"  … and {more} more"] if more else []
        return [f"{head}: {', '.join(counts)}; nothing is queued", *shown, *tail]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class _Onlooker(Outlook):
    """A member that asks only; a kernel that asks is not busy by its asking."""

    def __init__(
        self, store: Store, monitor: Monitor, settings: Settings, clock: Clock, home: str | None
    ) -> None:
        super().__init__(store, monitor, "preview", (), settings, clock)
        self._home = home

    def _members(self) -> Mapping[str, Member]:
        members = dict(super()._members())
        if self._home in members:
            members[self._home] = replace(members[self._home], busy=False)
        return members

    def expected(self, snapshot: Snapshot) -> Mapping[int, ExpectedStart]:
        """When the pending jobs are expected to start, where that can be said."""
        now, jobs = self._clock.now(), self.open.jobs
        known = self._known()
        known["ended"] = self.open.states_of_dependencies()
        known["drained"] = self._store.drained is not None
        known["worst_backlog_s"] = backlog.worst_s(self._store, now.wall)
        return forecast(
            self.open.line,
            {job.id: job for job in self.open.active},
            snapshot,
            self._learned.with_ends(self.open.allocations(), jobs, now.mono),
            self._settings,
            now,
            self._learned.within_walltime,
            **known,
        )


def preview(
    specs: Sequence[JobSpec], store: Store, monitor: Monitor, settings: Settings, clock: Clock
) -> Preview:
    """What would happen if these jobs were queued now.

    A GPU whose stranger has just fallen quiet is watched for the length of the quiet window.
    """
    now = clock.now()
    stand = {spec.uid: job for spec in specs if (job := _standing(store, spec)) is not None}
    if specs[0].engine != LOCAL:
        return Preview(jobs=tuple(_away(spec, stand.get(spec.uid)) for spec in specs), now=now)
    onlooker = _Onlooker(store, monitor, settings, clock, specs[0].home)
    onlooker.open.refresh()
    base = max(onlooker.open.jobs, default=0) + 1
    asked: dict[int, JobSpec] = {
        base + at: spec for at, spec in enumerate(specs) if spec.uid not in stand
    }
    for number, spec in asked.items():
        job = Job(
            id=number,
            spec=spec,
            state=JobState.PENDING,
            priority=spec.priority,
            held=spec.held,
            submitted_at=now.wall,
            queued_mono=now.mono,
        )
        onlooker.open.put(job)
    snapshot, decision = _decided(onlooker, asked, settings)
    starts = onlooker.expected(snapshot)
    found = {
        spec.uid: _expected(number, spec, decision, snapshot, starts.get(number), now.wall)
        for number, spec in asked.items()
    }
    jobs = tuple(
        Expected(spec=spec, stands=stand[spec.uid]) if spec.uid in stand else found[spec.uid]
        for spec in specs
    )
    return Preview(jobs=jobs, now=now)


def _away(spec: JobSpec, stands: Job | None) -> Expected:
    """A job of an engine: this machine's GPUs say nothing about it."""
    text = f"{spec.engine} decides when it starts"
    return Expected(spec=spec, stands=stands, reason=WaitReason(code=WaitCode.ENGINE, text=text))


def _standing(store: Store, spec: JobSpec) -> Job | None:
    key = key_of(spec)
    job = None if key is None else store.standing(key)
    return None if job is None or job.hold_reason is not None else job


def _decided(
    onlooker: Outlook, asked: Mapping[int, JobSpec], settings: Settings
) -> tuple[Snapshot, policy.Decision]:
    window_s = settings.quiet_s + (settings.quiet_samples + 1) * settings.sample_interval_s
    deadline = time.monotonic() + window_s
    while True:
        snapshot = onlooker.read_now()
        decision = onlooker.decide(snapshot, limit=len(onlooker.open.line), record=False)
        reasons = [why for job, why in decision.reasons.items() if job in asked]
        if time.monotonic() >= deadline or not any(w.code is WaitCode.QUIET for w in reasons):
            return snapshot, decision
        time.sleep(settings.sample_interval_s)


def _expected(
    number: int,
    spec: JobSpec,
    decision: policy.Decision,
    snapshot: Snapshot,
    forecasted: ExpectedStart | None,
    wall: float,
) -> Expected:
    start = next((one for one in decision.starts if one.job_id == number), None)
    if start is not None:
        labels = []
        for uuid in start.gpus:
            gpu = snapshot.gpu(uuid)
            known = gpu is not None and gpu.number is not None
            labels.append(f"GPU {gpu.number} ({clean(gpu.name)})" if gpu and known else uuid)
        return Expected(spec=spec, gpus=start.gpus, labels=tuple(labels), start=_at(wall))
    reason = decision.reasons.get(number)
    begins = reason is not None and reason.code is WaitCode.BEGIN_TIME
    if forecasted is None and begins and spec.request.begin_at is not None:
        forecasted = _at(spec.request.begin_at)
    return Expected(spec=spec, reason=reason, start=forecasted)


def _at(wall: float) -> ExpectedStart:
    return ExpectedStart(at=wall, low=wall, high=wall)
