"""What must hold of every decision, whatever the jobs, the readings and the allocations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import (
    Allocation,
    ArrayPlace,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Member,
    Request,
    WaitCode,
    effective_priority,
)
from gpusched_ipy.policy import Decision, backlog_s, confirm, decide
from gpusched_ipy.policy.order import Line
from gpusched_ipy.policy.standing import Facts, always_stands
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, Snapshot

NOW = Instant(mono=1e5, wall=1.7e9)
GIB = 1024**3
TOTAL = 24 * GIB
KERNELS = ("k1", "k2")


@dataclass(frozen=True)
class Scene:
    """All that one decision is given."""

    jobs: tuple[Job, ...]
    snapshot: Snapshot | None
    allocations: tuple[Allocation, ...]
    settings: Settings
    members: dict[str, Member]
    ended: dict[int, JobState]
    expected: dict[int, float]

    def decide(self) -> Decision:
        return decide(
            self.jobs,
            self.snapshot,
            self.allocations,
            self.settings,
            NOW,
            members=self.members,
            ended=self.ended,
            expected=self.expected,
        )

    def refusal(self, job: Job, uuid: str, given: tuple[Allocation, ...]) -> object:
        return confirm(
            job,
            (uuid,),
            self.snapshot,
            (*self.allocations, *given),
            self.settings,
            NOW,
            members=self.members,
        )


def _plain(
    number: int, priority: int = 0, *, since: float = 0.0, request: Request | None = None
) -> Job:
    spec = JobSpec(uid=str(number), kind=JobKind.COMMAND, name="job", request=request or Request())
    return Job(id=number, spec=spec, state=JobState.PENDING, priority=priority, queued_mono=since)


def _maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


processes = st.builds(
    GpuProcess,
    pid=st.integers(1, 99),
    name=st.sampled_from(["python", "Xorg"]),
    kind=st.sampled_from(["compute", "graphics"]),
    mem_bytes=_maybe(st.integers(0, TOTAL // 2)),
    job=_maybe(st.integers(901, 904)),
    member=_maybe(st.sampled_from(KERNELS)),
)


@st.composite
def gpus(draw: st.DrawFn, index: int) -> Gpu:
    # Mostly idle: a machine on which nothing can start says little.
    idle = draw(st.integers(0, 2))
    if idle:
        return Gpu(
            uuid=f"GPU-{index}",
            index=index,
            utilization=0.0,
            mem_used_bytes=0,
            mem_total_bytes=TOTAL,
            processes=(),
        )
    return Gpu(
        uuid=f"GPU-{index}",
        index=index,
        health=draw(st.sampled_from([Health.OK, Health.OK, Health.LOST, Health.ASLEEP])),
        utilization=draw(_maybe(st.sampled_from([0.0, 0.05, 0.5, 1.0]))),
        mem_used_bytes=draw(_maybe(st.integers(0, TOTAL))),
        mem_total_bytes=draw(_maybe(st.just(TOTAL))),
        processes=draw(_maybe(st.lists(processes, max_size=3).map(tuple))),
        quiet_s=draw(_maybe(st.sampled_from([0.5, 3.0]))),
        quiet_samples=draw(st.sampled_from([0, 1, 4])),
    )


@st.composite
def jobs(draw: st.DrawFn, number: int) -> Job:
    kind = draw(st.sampled_from([JobKind.COMMAND, JobKind.COMMAND, JobKind.CELL]))
    return Job(
        id=number,
        spec=JobSpec(
            uid=str(number),
            kind=kind,
            name="job",
            owner=draw(st.sampled_from("abc")),
            home=draw(st.sampled_from(KERNELS)) if kind is JobKind.CELL else None,
            array=draw(_maybe(st.just(ArrayPlace(id="s", index=0, size=9)))),
            request=Request(
                gpus=draw(st.sampled_from([1, 1, 1, 2, 3])),
                mem_bytes=draw(_maybe(st.integers(1, TOTAL))),
                on_gpu=draw(st.sampled_from([None, None, None, "0", "GPU-1"])),
                after=draw(st.sampled_from([(), (), (), (700,), (701,), (1,)])),
                time_s=draw(_maybe(st.sampled_from([10.0, 100.0, 1000.0]))),
                max_running=draw(_maybe(st.integers(1, 3))),
            ),
        ),
        state=JobState.PENDING,
        priority=draw(st.integers(-2, 2)),
        held=draw(st.integers(0, 9)) == 0,
        queued_mono=NOW.mono - draw(st.sampled_from([0.0, 1.0, 5.0, 700.0, 5000.0])),
    )


@st.composite
def allocations(draw: st.DrawFn, number: int, wide: int) -> Allocation:
    shared = draw(st.booleans())
    return Allocation(
        job_id=number,
        gpus=tuple(draw(st.sets(st.sampled_from([f"GPU-{n}" for n in range(wide)]), min_size=1))),
        shared=shared,
        mem_bytes=draw(_maybe(st.integers(1, TOTAL // 2))) if shared else None,
        expected_end_mono=draw(_maybe(st.sampled_from([NOW.mono - 5, NOW.mono + 50]))),
        ended_mono=draw(st.sampled_from([None, None, NOW.mono - 0.05, NOW.mono - 3])),
        owner=draw(st.sampled_from("abc")),
        array=draw(_maybe(st.just("s"))),
    )


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    wide = draw(st.integers(1, 4))
    snapshot = Snapshot(
        backend="fake",
        source="test",
        taken_at=NOW.wall,
        taken_mono=NOW.mono - 0.1,
        gpus=tuple(draw(gpus(n)) for n in range(wide)),
    )
    pending = tuple(draw(jobs(n)) for n in range(1, draw(st.integers(1, 12)) + 1))
    return Scene(
        jobs=pending,
        snapshot=snapshot,
        allocations=tuple(draw(allocations(901 + n, wide)) for n in range(draw(st.integers(0, 3)))),
        settings=Settings(
            order=draw(st.sampled_from(["fair", "fair", "shortest"])),
            aging_s=draw(st.sampled_from([1.0, 600.0])),
        ),
        members={
            key: Member(
                key=key,
                label=key,
                busy=draw(st.booleans()),
                pinned_gpus=draw(st.sampled_from([None, ("GPU-0",), ("GPU-0", "GPU-1")])),
            )
            for key in KERNELS
        },
        ended={700: JobState.COMPLETED, 701: JobState.FAILED},
        expected={job.id: draw(st.sampled_from([5.0, 500.0])) for job in pending[::2]},
    )


def _given(scene: Scene, decision: Decision) -> Iterator[tuple[Job, tuple[Allocation, ...]]]:
    """Each job that starts, with the allocations made before it in the same decision."""
    by_id = {job.id: job for job in scene.jobs}
    made: tuple[Allocation, ...] = ()
    for start in decision.starts:
        job = by_id[start.job_id]
        yield job, made
        booked = Allocation(
            job_id=job.id, gpus=start.gpus, shared=start.shared, mem_bytes=job.request.mem_bytes
        )
        made = (*made, booked)


@given(scenes())
def test_a_gpu_has_one_exclusive_job_or_jobs_that_share(scene: Scene) -> None:
    decision = scene.decide()
    held = [one for one in scene.allocations if one.ended_mono is None]
    for start in decision.starts:
        assert len(set(start.gpus)) == len(start.gpus)
        for uuid in start.gpus:
            others = [one for one in (*held, *decision.starts) if uuid in one.gpus]
            assert others == [start] or (start.shared and all(one.shared for one in others))


@given(scenes())
def test_confirm_accepts_every_start_on_the_same_reading(scene: Scene) -> None:
    decision = scene.decide()
    for start, (job, made) in zip(decision.starts, _given(scene, decision), strict=True):
        assert len(start.gpus) == job.request.gpus
        for uuid in start.gpus:
            assert scene.refusal(job, uuid, made) is None


def _idle(wide: int) -> Snapshot:
    cards = (
        Gpu(
            uuid=f"GPU-{n}",
            index=n,
            utilization=0.0,
            mem_used_bytes=0,
            mem_total_bytes=TOTAL,
            processes=(),
        )
        for n in range(wide)
    )
    return Snapshot(
        backend="fake", source="test", taken_at=0, taken_mono=NOW.mono, gpus=tuple(cards)
    )


@given(
    st.integers(1, 2),
    st.lists(st.integers(1, 20), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 10)), max_size=2),
)
def test_declared_memory_never_exceeds_a_card(
    wide: int, asked: list[int], held: list[tuple[int, int]]
) -> None:
    pending = [
        _plain(number, request=Request(mem_bytes=mem * GIB)) for number, mem in enumerate(asked, 1)
    ]
    before = [
        Allocation(job_id=901 + n, gpus=(f"GPU-{where}",), shared=True, mem_bytes=mem * GIB)
        for n, (where, mem) in enumerate(held)
    ]
    decision = decide(pending, _idle(wide), before, Settings(), NOW)
    for uuid in [f"GPU-{n}" for n in range(wide)]:
        mine = [asked[one.job_id - 1] * GIB for one in decision.starts if uuid in one.gpus]
        theirs = [one.mem_bytes or 0 for one in before if uuid in one.gpus]
        if mine:
            assert sum(mine) + sum(theirs) + Settings().memory_margin <= TOTAL


@given(
    st.lists(
        st.tuples(st.integers(1, 4), _maybe(st.sampled_from([10.0, 50.0, 60.0]))), max_size=10
    ),
    _maybe(st.just(NOW.mono + 50)),
)
def test_who_passes_a_reservation_does_not_delay_it(
    asked: list[tuple[int, float | None]], end: float | None
) -> None:
    pending = [
        _plain(number, since=number, request=Request(gpus=gpus, time_s=time_s))
        for number, (gpus, time_s) in enumerate(asked, 1)
    ]
    before = [Allocation(job_id=901, gpus=("GPU-0",), expected_end_mono=end)]
    decision = decide(pending, _idle(4), before, Settings(), NOW)
    for kept in decision.reservations:
        for start in decision.starts:
            if start.job_id > kept.job_id and not set(kept.gpus).isdisjoint(start.gpus):
                assert kept.at_mono is not None
                assert start.expected_end_mono is not None
                assert start.expected_end_mono <= kept.at_mono


@given(scenes(), st.sampled_from(["none", "problem", "stale", "empty"]))
def test_nothing_starts_blind(scene: Scene, how: str) -> None:
    assert scene.snapshot is not None
    blind = {
        "none": None,
        "problem": replace(scene.snapshot, problem="driver lost"),
        "stale": replace(scene.snapshot, taken_mono=NOW.mono - 3.01),
        "empty": replace(scene.snapshot, gpus=()),
    }[how]
    assert not replace(scene, snapshot=blind).decide().starts


@given(scenes(), st.randoms(use_true_random=False))
def test_neither_the_order_of_input_nor_a_second_time_matters(scene: Scene, dice: object) -> None:
    shuffled = list(scene.jobs)
    dice.shuffle(shuffled)
    first = scene.decide()
    assert first == scene.decide()
    assert first == replace(scene, jobs=tuple(shuffled)).decide()


@given(scenes())
def test_every_job_starts_or_has_a_reason_and_never_both(scene: Scene) -> None:
    decision = scene.decide()
    started = {start.job_id for start in decision.starts}
    assert started.isdisjoint(decision.reasons)
    assert started | set(decision.reasons) == {job.id for job in scene.jobs}
    assert all(reason.text for reason in decision.reasons.values())
    assert set(decision.never) == {
        job.id
        for job in scene.jobs
        if 701 in job.request.after and decision.reasons[job.id].code is WaitCode.DEPENDENCY
    }


# Reasons that say that the job itself may not start, or may not pass one ahead of it.
_OUT_OF_LINE = {
    WaitCode.HELD,
    WaitCode.DEPENDENCY,
    WaitCode.KERNEL_BUSY,
    WaitCode.MAX_RUNNING,
    WaitCode.TOO_BIG,
    WaitCode.PINNED,
}


@given(scenes())
def test_no_lower_priority_before_a_higher_one_that_fits(scene: Scene) -> None:
    # One notebook, and no waits long enough to age: then priority alone decides.
    jobs = tuple(
        replace(job, queued_mono=NOW.mono, spec=replace(job.spec, owner="a")) for job in scene.jobs
    )
    scene = replace(scene, jobs=jobs, settings=Settings())
    decision = scene.decide()
    kept = {uuid for reservation in decision.reservations for uuid in reservation.gpus}
    for job, made in _given(scene, decision):
        for higher in jobs:
            reason = decision.reasons.get(higher.id)
            if higher.priority <= job.priority or reason is None or reason.code in _OUT_OF_LINE:
                continue
            free = [
                gpu.uuid
                for gpu in scene.snapshot.gpus
                if gpu.uuid not in kept and scene.refusal(higher, gpu.uuid, made) is None
            ]
            assert len(free) < higher.request.gpus


def _facts(scene: Scene) -> Facts:
    return Facts(
        snapshot=scene.snapshot, allocations=scene.allocations, settings=scene.settings, now=NOW
    )


@given(scenes())
def test_turns_never_change_which_priority_has_which_place(scene: Scene) -> None:
    aging_s = scene.settings.aging_s
    in_turn = [job.priority for job in Line(scene.jobs).fair(_facts(scene), lambda job: True)]
    by_aging = sorted(
        scene.jobs, key=lambda job: (-effective_priority(job, aging_s, NOW.mono), -job.priority)
    )
    assert in_turn == [job.priority for job in by_aging]


@given(
    scenes(),
    st.integers(0, 11),
    st.sampled_from([{}, {"cancel_requested": True}, {"not_before_mono": NOW.mono + 9}]),
    st.sampled_from([{}, {"begin_at": NOW.wall + 9}, {"after_any": (1,)}]),
    st.sampled_from([{}, {"engine": "slurm"}]),
)
def test_what_always_stands_is_never_refused(
    scene: Scene, which: int, state: dict, request: dict, spec: dict
) -> None:
    job = scene.jobs[which % len(scene.jobs)]
    wanted = replace(job.spec.request, **request)
    job = replace(job, **state, spec=replace(job.spec, request=wanted, **spec))
    if always_stands(job):
        assert _facts(scene).standing(job) is None


@given(scenes(), st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=30))
def test_a_line_kept_through_events_is_one_made_anew(
    scene: Scene, events: list[tuple[int, bool]]
) -> None:
    kept, known = Line(scene.jobs[::2]), {job.id: job for job in scene.jobs[::2]}
    for place, put in events:
        job = scene.jobs[place % len(scene.jobs)]
        if put:
            job = replace(job, priority=job.priority + place % 2, queued_mono=float(place))
            kept.put(job)
            known[job.id] = job
        else:
            kept.drop(job.id)
            known.pop(job.id, None)
    anew = Line(known.values())
    assert {job.id for job in kept} == {job.id for job in anew}
    assert [*kept.fair(_facts(scene), lambda job: not job.held)] == [
        *anew.fair(_facts(scene), lambda job: not job.held)
    ]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60))
def test_no_notebook_waits_for_more_than_one_turn_of_each_other(owners: list[str]) -> None:
    line = Line(
        Job(
            id=number,
            spec=JobSpec(uid=str(number), kind=JobKind.COMMAND, name="job", owner=owner),
            state=JobState.PENDING,
            priority=0,
            queued_mono=float(number),
        )
        for number, owner in enumerate(owners, 1)
    )
    facts = Facts(snapshot=None, allocations=(), settings=Settings(), now=NOW)
    ordered = [job.spec.owner for job in line.fair(facts, lambda job: True)]
    others = len(set(owners)) - 1
    for owner in set(owners):
        places = [place for place, one in enumerate(ordered) if one == owner]
        for turn, place in enumerate(places):
            assert place <= turn + (turn + 1) * others


def _stream(first: Job, later: Iterator[Job], settings: Settings, run_s: float) -> float:
    """After how many seconds ``first`` starts on one GPU that ``later`` keeps busy for ever."""
    waiting, mono, worst = [first], 0.0, 0.0
    gpu = Gpu(uuid="g", utilization=0.0, mem_used_bytes=0, mem_total_bytes=TOTAL, processes=())
    while mono < 1e4:
        waiting.append(replace(next(later), queued_mono=mono))
        snapshot = Snapshot(backend="fake", source="test", taken_at=0, taken_mono=mono, gpus=(gpu,))
        expected = {job.id: 100.0 if job.id == first.id else run_s for job in waiting}
        moment = Instant(mono=mono, wall=mono)
        work_s = backlog_s(waiting, snapshot, [], settings, moment, expected=expected)
        decision = decide(
            waiting,
            snapshot,
            [],
            settings,
            moment,
            expected=expected,
            worst_backlog_s=worst,
            backlog_s=work_s,
        )
        worst = max(worst, decision.backlog_s)
        (start,) = decision.starts
        if start.job_id == first.id:
            return mono
        waiting = [job for job in waiting if job.id != start.job_id]
        mono += run_s
    raise AssertionError("it starves")


@settings(max_examples=20)
@given(st.integers(0, 6), st.sampled_from([2.0, 10.0]))
def test_a_low_priority_waits_one_aging_step_for_each_step_of_priority(
    steps: int, aging_s: float
) -> None:
    later = (_plain(number, steps) for number in count(2))
    waited = _stream(_plain(1, 0), later, Settings(aging_s=aging_s), run_s=1.0)
    assert waited <= steps * aging_s + 1


@pytest.mark.parametrize(("steps", "share"), [(0, 0.4), (1, 0.2), (4, 0.4)])
def test_a_step_by_backlog_is_that_share_of_all_that_waits(steps: int, share: float) -> None:
    later = (_plain(number, steps) for number in count(2))
    by_work = Settings(aging_s=2.0, aging_backlog=share)
    waited = _stream(_plain(1, 0), later, by_work, run_s=1.0)
    # 100 s of its own and one short job are all that ever waits.
    assert steps * 100 * share - 1 <= waited <= steps * 101 * share + 1


@pytest.mark.parametrize("steps", [0, 2])
def test_shortest_passes_a_large_job_no_longer_than_its_patience(steps: int) -> None:
    later = (_plain(number, steps) for number in count(2))
    waited = _stream(_plain(1, 0), later, Settings(order="shortest", aging_s=10), run_s=1.0)
    # 100 s of its own and one short job are all that ever waits.
    assert 80 <= waited <= 0.9 * 101 + steps * 10 + 1
