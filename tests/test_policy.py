"""Tables of the decision: one GPU after another, one reason after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

from gpusched_ipy.config import Instant, Settings, parse_bytes
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
)
from gpusched_ipy.policy import Decision, Line, confirm, decide, reason_for
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind, Snapshot

NOW = Instant(mono=10_000.0, wall=1_700_000_000.0)
GIB = 1024**3
TOTAL = 40 * GIB


def gpu(index: int = 0, **values: Any) -> Gpu:
    """An idle 40 GiB card; ``used`` in GiB."""
    used = values.pop("used", 0)
    base: dict[str, Any] = {
        "uuid": f"GPU-{index}",
        "index": index,
        "name": "Test A100",
        "utilization": 0.0,
        "mem_used_bytes": None if used is None else int(used * GIB),
        "mem_total_bytes": TOTAL,
        "processes": (),
    }
    return Gpu(**{**base, **values})


def stranger(mem: float | None = 30, pid: int = 812, **values: Any) -> GpuProcess:
    held = None if mem is None else int(mem * GIB)
    base: dict[str, Any] = {"user": "user1", "name": "python", "kind": "compute"}
    return GpuProcess(pid=pid, mem_bytes=held, **{**base, **values})


def snap(*gpus: Gpu, age: float = 0.1, problem: str | None = None) -> Snapshot:
    return Snapshot(
        backend="fake",
        source="test",
        taken_at=NOW.wall - age,
        taken_mono=NOW.mono - age,
        problem=problem,
        gpus=gpus,
    )


def job(
    number: int = 1,
    *,
    priority: int = 0,
    waited: float = 0.0,
    held: bool = False,
    cancel: bool = False,
    spec: dict[str, Any] | None = None,
    **request: Any,
) -> Job:
    if isinstance(request.get("mem"), str):
        request["mem_bytes"] = parse_bytes(request.pop("mem"))
    return Job(
        id=number,
        spec=JobSpec(
            uid=f"u{number}",
            **{"kind": JobKind.COMMAND, "name": f"j{number}", **(spec or {})},
            request=Request(**request),
        ),
        state=JobState.PENDING,
        priority=priority,
        held=held,
        cancel_requested=cancel,
        queued_mono=NOW.mono - waited,
    )


def cell(number: int = 1, home: str = "k1", **values: Any) -> Job:
    spec = {"kind": JobKind.CELL, "home": home, "in_place": values.pop("in_place", False)}
    return job(number, spec=spec, **values)


def held_by(number: int, *uuids: str, **values: Any) -> Allocation:
    label = f"job {number} (train)"
    return Allocation(job_id=number, gpus=uuids, started_mono=NOW.mono - 60, label=label, **values)


def run(
    jobs: list[Job],
    *gpus: Gpu,
    allocations: list[Allocation] | None = None,
    settings: Settings | None = None,
    snapshot: Snapshot | None = None,
    **known: Any,
) -> Decision:
    return decide(
        jobs,
        snapshot or snap(*gpus),
        allocations or [],
        settings or Settings(),
        NOW,
        **known,
    )


def started(decision: Decision) -> dict[int, tuple[str, ...]]:
    return {start.job_id: start.gpus for start in decision.starts}


# The free rule: a card's reading, and what an exclusive job hears (None: it starts).
QUIET = {"quiet_s": 2.5, "quiet_samples": 3}
VIEWER = stranger(0.15, name="nvtop")
FREE_RULE: dict[str, tuple[dict[str, Any], WaitCode | None, str]] = {
    "idle": ({}, None, ""),
    "stranger busy": (
        {"used": 30, "utilization": 0.97, "processes": (stranger(),)},
        WaitCode.GPU_BUSY,
        "GPU 0: 97 % used by python (pid 812, user user1)",
    ),
    "stranger holds memory": (
        {"used": 30, "processes": (stranger(),), **QUIET},
        WaitCode.GPU_BUSY,
        "GPU 0: 30.0 GiB held by python (pid 812, user user1)",
    ),
    "two strangers": (
        {"used": 30, "processes": (stranger(10), stranger(20, pid=9, name="train", user=None))},
        WaitCode.GPU_BUSY,
        "GPU 0: 30.0 GiB held by train (pid 9) and 1 more",
    ),
    "small stranger, quiet": ({"used": 0.15, "processes": (VIEWER,), **QUIET}, None, ""),
    "small stranger, not yet quiet": (
        {"used": 0.15, "processes": (VIEWER,), "quiet_s": 1.2, "quiet_samples": 2},
        WaitCode.QUIET,
        "GPU 0: quiet for 1.2 of 2 s",
    ),
    "quiet for long enough in too few readings": (
        {"used": 0.15, "processes": (VIEWER,), "quiet_s": 5.0, "quiet_samples": 2},
        WaitCode.QUIET,
        "GPU 0: quiet for 2 of 2 s",
    ),
    "small stranger computes": (
        {"used": 0.15, "utilization": 0.5, "processes": (VIEWER,)},
        WaitCode.GPU_BUSY,
        "GPU 0: 50 % used by nvtop (pid 812, user user1)",
    ),
    "spike in a quiet window": (
        {"used": 0.15, "utilization": 0.11, "processes": (VIEWER,), **QUIET},
        WaitCode.GPU_BUSY,
        "GPU 0: 11 % used by nvtop (pid 812, user user1)",
    ),
    "utilization alone, nobody there": ({"utilization": 1.0}, None, ""),
    "memory that no process explains": (
        {"used": 3},
        WaitCode.GPU_BUSY,
        "GPU 0: 3.0 GiB held by processes that cannot be seen",
    ),
    "processes unknown, idle but not quiet": (
        {"processes": None},
        WaitCode.QUIET,
        "GPU 0: quiet for 0 of 2 s",
    ),
    "processes unknown, quiet": ({"processes": None, **QUIET}, None, ""),
    "processes unknown, busy": (
        {"processes": None, "utilization": 0.9},
        WaitCode.GPU_BUSY,
        "GPU 0: 90 % used by processes that cannot be seen",
    ),
    "under 5 % of the card": ({"used": 1.9, **QUIET}, None, ""),
    "desktop ignored": (
        {"used": 2.5, "processes": (stranger(2.4, name="/usr/lib/xorg/Xorg", kind="graphics"),)},
        None,
        "",
    ),
    "graphics client without memory": (
        {"processes": (stranger(None, name="firefox", kind="graphics"),), "utilization": 0.3},
        None,
        "",
    ),
    "no utilization, memory free": ({"utilization": None, "processes": (VIEWER,)}, None, ""),
    "no utilization, memory taken": (
        {"utilization": None, "used": 30, "processes": None},
        WaitCode.GPU_BUSY,
        "GPU 0: 30.0 GiB held by processes that cannot be seen",
    ),
    "nothing known": ({"utilization": None, "used": None, "processes": None}, None, ""),
    "only a stranger known": (
        {"utilization": None, "used": None, "processes": (stranger(None),)},
        WaitCode.GPU_BUSY,
        "GPU 0: used by python (pid 812, user user1)",
    ),
    "memory unknown, nobody there, quiet": ({"used": None, **QUIET}, None, ""),
    "memory unknown, nobody there, not quiet": (
        {"used": None},
        WaitCode.QUIET,
        "GPU 0: quiet for 0 of 2 s",
    ),
    "asleep": (
        {"health": Health.ASLEEP, "utilization": None, "used": None, "processes": None},
        None,
        "",
    ),
    "lost": (
        {"health": Health.LOST, "health_text": "fell off the bus"},
        WaitCode.GPU_BUSY,
        "GPU 0: fell off the bus",
    ),
    "reset required": (
        {"health": Health.RESET_REQUIRED},
        WaitCode.GPU_BUSY,
        "GPU 0: its state is reset required",
    ),
    "driver mismatch": (
        {"health": Health.DRIVER_MISMATCH},
        WaitCode.GPU_BUSY,
        "GPU 0: its state is driver mismatch",
    ),
    "state unknown": (
        {"health": Health.UNKNOWN},
        WaitCode.GPU_BUSY,
        "GPU 0: its state is unknown",
    ),
    "prohibited": (
        {"compute_mode": "prohibited"},
        WaitCode.GPU_BUSY,
        "GPU 0: its compute mode is prohibited",
    ),
    "one process only, and it is there": (
        {"compute_mode": "exclusive_process", "used": 0.1, "processes": (VIEWER,), **QUIET},
        WaitCode.GPU_BUSY,
        "GPU 0: used by nvtop (pid 812, user user1)",
    ),
    "unified, normal pressure": (
        {"used": 30, "processes": None, "mem_kind": MemoryKind.UNIFIED, "mem_pressure": "normal"}
        | QUIET,
        None,
        "",
    ),
    "unified, under pressure": (
        {"processes": None, "mem_kind": MemoryKind.UNIFIED, "mem_pressure": "warn"} | QUIET,
        WaitCode.MEMORY,
        "GPU 0: memory pressure of the machine is warn",
    ),
}


@pytest.mark.parametrize("case", FREE_RULE)
def test_free_rule(case: str) -> None:
    reading, code, text = FREE_RULE[case]
    decision = run([job()], gpu(**reading))
    reason = decision.reasons.get(1)
    assert (reason.code if reason else None, reason.text if reason else "") == (code, text)
    assert started(decision) == ({} if code else {1: ("GPU-0",)})
    verdict = confirm(job(), ("GPU-0",), snap(gpu(**reading)), [], Settings(), NOW)
    assert (verdict.code if verdict else None) == code


@pytest.mark.parametrize(
    ("snapshot", "text"),
    [
        (None, "the GPUs have not been read yet"),
        (snap(problem="driver lost"), "the GPUs cannot be read: driver lost"),
        (snap(gpu(), age=3.5), "the last reading of the GPUs is 4 s old"),
        (snap(), "this machine has no GPU that can be read"),
    ],
)
def test_blind_starts_nothing(snapshot: Snapshot | None, text: str) -> None:
    decision = decide([job()], snapshot, [], Settings(), NOW)
    assert not decision.starts
    assert decision.reasons[1].code is WaitCode.NO_READING
    assert decision.reasons[1].text == text
    verdict = confirm(job(), ("GPU-0",), snapshot, [], Settings(), NOW)
    assert verdict is not None
    assert verdict.code is WaitCode.NO_READING


def test_without_sampling_leases_alone_decide() -> None:
    settings = Settings(sampling=False)
    busy = gpu(used=30, utilization=1.0, processes=(stranger(),))
    old = snap(busy, age=3600)
    assert started(decide([job()], old, [], settings, NOW)) == {1: ("GPU-0",)}
    taken = decide([job()], old, [held_by(9, "GPU-0")], settings, NOW)
    assert taken.reasons[1].code is WaitCode.GPU_ALLOCATED


def test_exclusive_never_gets_company() -> None:
    for shared in (False, True):
        taken = [held_by(9, "GPU-0", shared=shared, mem_bytes=GIB if shared else None)]
        decision = run([job()], gpu(), allocations=taken)
        assert decision.reasons[1].text == "GPU 0: job 9 (train) is on it"
    shared = run([job(mem="1G")], gpu(), allocations=[held_by(9, "GPU-0")])
    assert shared.reasons[1].code is WaitCode.GPU_ALLOCATED


def test_two_exclusive_jobs_take_two_gpus() -> None:
    decision = run([job(1), job(2), job(3)], gpu(0), gpu(1))
    assert started(decision) == {1: ("GPU-0",), 2: ("GPU-1",)}
    assert decision.reasons[3].code is WaitCode.GPU_ALLOCATED


def test_parent_card_is_never_given() -> None:
    card = gpu(0, uuid="GPU-card")
    parts = [gpu(n, uuid=f"MIG-{n}", parent="GPU-card", name="A100 1g.5gb") for n in (1, 2)]
    decision = run([job(1), job(2), job(3)], card, *parts)
    assert started(decision) == {1: ("MIG-1",), 2: ("MIG-2",)}
    assert started(run([job(on_gpu="1g.5gb")], card, *parts)) == {1: ("MIG-1",)}
    assert started(run([job(on_gpu="GPU-card")], card, *parts)) == {1: ("MIG-1",)}
    twins = [replace(part, index=0, instance=n) for n, part in enumerate(parts)]
    assert started(run([job(on_gpu="0:1")], card, *twins)) == {1: ("MIG-2",)}
    assert started(run([job(1, on_gpu="0"), job(2, on_gpu="0")], card, *twins)) == {
        1: ("MIG-1",), 2: ("MIG-2",),
    }  # fmt: skip
    # CUDA shows a process one instance at most.
    assert run([job(gpus=2)], card, *parts).reasons[1].code is WaitCode.TOO_BIG


class TestAfterOneOfOurs:
    """The card is given on at once when a job of ours ends."""

    def ended(self, ago: float) -> list[Allocation]:
        return [held_by(9, "GPU-0", ended_mono=NOW.mono - ago)]

    def test_the_window_is_not_waited_out(self) -> None:
        busy = gpu(used=0.15, utilization=0.99, processes=(VIEWER,))
        assert started(run([job()], busy, allocations=self.ended(0.2))) == {1: ("GPU-0",)}

    def test_an_older_reading_still_shows_the_job(self) -> None:
        mine = stranger(30, job=9)
        busy = gpu(used=30, utilization=0.99, processes=(mine,))
        # The reading is 0.1 s old, the end 0.05 s: the process in it has gone.
        assert started(run([job()], busy, allocations=self.ended(0.05))) == {1: ("GPU-0",)}

    def test_but_a_process_that_is_left_over_counts(self) -> None:
        busy = gpu(used=30, utilization=0.0, processes=(stranger(30, job=9),))
        decision = run([job()], busy, allocations=self.ended(0.5))
        assert decision.reasons[1].code is WaitCode.GPU_BUSY

    def test_nor_does_it_excuse_a_stranger_for_long(self) -> None:
        busy = gpu(used=0.15, utilization=0.99, processes=(VIEWER,))
        decision = run([job()], busy, allocations=self.ended(1.5))
        assert decision.reasons[1].code is WaitCode.GPU_BUSY

    def test_memory_of_strangers_counts_at_once(self) -> None:
        busy = gpu(used=30, processes=(stranger(),))
        decision = run([job()], busy, allocations=self.ended(0.05))
        assert decision.reasons[1].code is WaitCode.GPU_BUSY


class TestSharing:
    """Declared and measured memory, and a margin."""

    def test_jobs_share_while_memory_lasts(self) -> None:
        jobs = [job(n, mem="12G") for n in (1, 2, 3, 4)]
        decision = run(jobs, gpu())
        # 3 x 12 GiB and a margin of 0.5 fit in 40; the fourth does not.
        assert started(decision) == dict.fromkeys((1, 2, 3), ("GPU-0",))
        assert decision.reasons[4].text == "GPU 0: 12.0 GiB asked, 3.5 GiB left to share"

    def test_what_runs_counts_declared_or_measured_whichever_is_more(self) -> None:
        for measured, fits in ((2, True), (30, False)):
            mine = stranger(measured, job=9)
            card = gpu(used=measured, utilization=1.0, processes=(mine,))
            taken = [held_by(9, "GPU-0", shared=True, mem_bytes=20 * GIB)]
            assert bool(run([job(mem="15G")], card, allocations=taken).starts) is fits

    def test_booked_until_its_process_shows(self) -> None:
        taken = [held_by(9, "GPU-0", shared=True, mem_bytes=30 * GIB)]
        assert not run([job(mem="15G")], gpu(), allocations=taken).starts
        undeclared = [held_by(9, "GPU-0", shared=True)]
        assert not run([job(mem="20G")], gpu(), allocations=undeclared).starts
        assert run([job(mem="19G")], gpu(), allocations=undeclared).starts

    def test_strangers_memory_counts_and_their_utilization_too(self) -> None:
        calm = gpu(used=20, processes=(stranger(20),), **QUIET)
        assert run([job(mem="19G")], calm).starts
        assert run([job(mem="20G")], calm).reasons[1].code is WaitCode.MEMORY
        busy = replace(calm, utilization=0.9)
        assert run([job(mem="1G")], busy).reasons[1].code is WaitCode.GPU_BUSY

    def test_memory_that_the_driver_does_not_attribute_is_ours_up_to_what_we_booked(self) -> None:
        taken = [held_by(9, "GPU-0", shared=True, mem_bytes=20 * GIB)]
        card = gpu(used=18, processes=None)
        assert run([job(mem="19G")], card, allocations=taken).starts
        assert not run(
            [job(mem="19G")], replace(card, mem_used_bytes=25 * GIB), allocations=taken
        ).starts

    def test_unknown_memory_means_one_at_a_time(self) -> None:
        card = gpu(used=None, **QUIET)
        decision = run([job(1, mem="1G"), job(2, mem="1G")], card)
        assert started(decision) == {1: ("GPU-0",)}
        assert decision.reasons[2].text.endswith("its memory cannot be read, so one job at a time")

    def test_the_fullest_card_that_fits_is_chosen(self) -> None:
        taken = [held_by(9, "GPU-1", shared=True, mem_bytes=20 * GIB)]
        decision = run([job(1, mem="8G"), job(2)], gpu(0), gpu(1), allocations=taken)
        assert started(decision) == {1: ("GPU-1",), 2: ("GPU-0",)}


class TestIdleMembers:
    """Kernels of the same user that hold memory and do nothing."""

    members: ClassVar = {
        "k1": Member(key="k1", label="notebook train.ipynb", idle_s=720),
        "k2": Member(key="k2", label="notebook other.ipynb", busy=True),
    }

    def card(self, held: float, member: str = "k1", **values: Any) -> Gpu:
        return gpu(used=held, processes=(stranger(held, member=member),), **(QUIET | values))

    def test_it_waits_and_names_the_notebook(self) -> None:
        decision = run([job()], self.card(30), members=self.members)
        assert decision.reasons[1].code is WaitCode.MEMORY
        assert decision.reasons[1].text == (
            "GPU 0: notebook train.ipynb holds 30.0 GiB and has been idle for 12 min"
        )

    def test_beside_it_when_four_fifths_are_free(self) -> None:
        assert run([job()], self.card(8), members=self.members).starts
        assert not run([job()], self.card(8.1), members=self.members).starts

    def test_beside_it_when_the_history_says_it_fits(self) -> None:
        known = {"members": self.members, "memory": {1: 10 * GIB}}
        assert run([job()], self.card(30), **known).starts
        assert not run([job()], self.card(31), **known).starts

    def test_a_busy_member_is_a_stranger_with_a_name(self) -> None:
        card = self.card(30, "k2", utilization=0.8)
        decision = run([job()], card, members=self.members)
        assert decision.reasons[1].text == "GPU 0: 80 % used by notebook other.ipynb (unqueued)"

    def test_its_own_memory_is_no_strangers(self) -> None:
        card = self.card(30, quiet_samples=0)
        assert started(run([cell(home="k1")], card, members=self.members)) == {1: ("GPU-0",)}
        assert not run([cell(home="k3")], card, members=self.members).starts


class TestStanding:
    """Who may not start whatever the GPUs do, and blocks nobody."""

    @pytest.mark.parametrize(
        ("waiting", "known", "text"),
        [
            (job(1, held=True), {}, "held"),
            (job(1, cancel=True), {}, "being cancelled"),
            (job(1, begin_at=NOW.wall + 7200), {}, "begins in 2 h 00"),
            (job(1, after=(12,)), {}, "after #12"),
            (job(1, after=(12,), after_any=(13,)), {}, "after #12, #13"),
            (job(1, after=(12,)), {"ended": {12: JobState.RUNNING}}, "after #12"),
            (job(1, gpus=2), {}, "needs 2 GPUs; this machine has 1"),
            (job(1, on_gpu="H100"), {}, "needs 1 GPU matching 'H100'; this machine has 0"),
            (
                job(1, mem="40G"),
                {},
                "asks 40.0 GiB, and 512 MiB are kept clear; the largest GPU for it has 40.0 GiB",
            ),
            (job(1, spec={"engine": "slurm"}), {}, "waits for slurm to take it"),
            (
                cell(1),
                {"members": {"k1": Member(key="k1", label="n", busy=True)}},
                "its kernel is busy",
            ),
            (
                cell(1),
                {"members": {"k1": Member(key="k1", label="n", pinned_gpus=("GPU-7",))}},
                "its kernel is pinned to GPUs that are not listed now",
            ),
        ],
    )
    def test_reason_and_the_next_goes(self, waiting: Job, known: dict[str, Any], text: str) -> None:
        waiting = replace(waiting, priority=5)
        decision = run([waiting, job(2)], gpu(), **known)
        assert started(decision) == {2: ("GPU-0",)}
        assert decision.reasons[1].text == text
        assert not decision.reservations

    def test_dependencies_that_are_met(self) -> None:
        ended = {12: JobState.COMPLETED, 13: JobState.FAILED}
        assert run([job(1, after=(12,), after_any=(13,))], gpu(), ended=ended).starts

    @pytest.mark.parametrize(
        ("state", "words"),
        [
            (JobState.FAILED, "failed"),
            (JobState.CANCELLED, "was cancelled"),
            (JobState.TIMEOUT, "ran out of time"),
            (JobState.LOST, "was lost"),
        ],
    )
    def test_a_dependency_that_failed(self, state: JobState, words: str) -> None:
        decision = run([job(1, after=(12, 14))], gpu(), ended={12: state})
        assert not decision.starts
        assert decision.never[1].text == f"job 12 {words}: it will never start"

    def test_a_busy_kernel_lets_its_in_place_cell_go(self) -> None:
        members = {"k1": Member(key="k1", label="n", busy=True)}
        jobs = [cell(1, priority=5), cell(2, in_place=True)]
        assert started(run(jobs, gpu(), members=members)) == {2: ("GPU-0",)}

    def test_a_kernel_gets_one_cell_at_a_time(self) -> None:
        decision = run([cell(1), cell(2), cell(3, home="k2")], gpu(0), gpu(1))
        assert started(decision) == {1: ("GPU-0",), 3: ("GPU-1",)}
        assert decision.reasons[2].code is WaitCode.KERNEL_BUSY

    def test_a_pinned_kernel_waits_for_its_gpu_only(self) -> None:
        members = {"k1": Member(key="k1", label="n", pinned_gpus=("GPU-1",))}
        taken = [held_by(9, "GPU-1")]
        decision = run([cell(1), job(2)], gpu(0), gpu(1), members=members, allocations=taken)
        assert started(decision) == {2: ("GPU-0",)}
        assert decision.reasons[1].text == "GPU 1: job 9 (train) is on it"

    @pytest.mark.parametrize("wanted", ["GPU-1", "gpu-1", "1", "V100"])
    def test_on_gpu(self, wanted: str) -> None:
        cards = (gpu(0), gpu(1, name="Test V100"))
        assert started(run([job(on_gpu=wanted)], *cards)) == {1: ("GPU-1",)}

    def test_max_running_of_a_sweep(self) -> None:
        place = ArrayPlace(id="a", index=0, size=4)
        jobs = [job(n, spec={"array": place}, max_running=2) for n in (1, 2, 3)]
        taken = [held_by(9, "GPU-2", array="a")]
        decision = run([*jobs, job(4)], gpu(0), gpu(1), gpu(2), allocations=taken)
        assert started(decision) == {1: ("GPU-0",), 4: ("GPU-1",)}
        assert decision.reasons[2].text == "2 of its sweep run at once, not more"

    def test_drained(self) -> None:
        decision = run([job()], gpu(), drained=True)
        assert not decision.starts
        assert decision.reasons[1].code is WaitCode.DRAINED


class TestOrder:
    """Who comes first."""

    def test_higher_priority_first_then_the_older(self) -> None:
        jobs = [job(1), job(2, priority=3), job(3, priority=3, waited=1)]
        cards = [gpu(n) for n in range(3)]
        assert list(started(run(jobs, *cards))) == [3, 2, 1]
        assert run(jobs, gpu()).reasons[1].text == "1 job ahead"

    def test_aging_lifts_a_job_that_has_waited(self) -> None:
        jobs = [job(1, priority=2), job(2, waited=1199), job(3, priority=2, waited=1)]
        assert list(started(run(jobs, gpu()))) == [3]
        jobs[1] = replace(jobs[1], queued_mono=NOW.mono - 1202)
        assert list(started(run(jobs, gpu()))) == [2]

    def test_a_sweep_does_not_shut_out_another_notebook(self) -> None:
        sweep = [job(n, waited=3000, spec={"owner": "a"}) for n in range(1, 500)]
        fresh = job(999, waited=1, spec={"owner": "b"})
        taken = [held_by(0, "GPU-0", ended_mono=NOW.mono, owner="a")]
        assert list(started(run([*sweep, fresh], gpu(), allocations=taken))) == [999]
        running = [held_by(0, "GPU-0", owner="a")]
        decision = run([*sweep, fresh], gpu(0), gpu(1), allocations=running)
        assert started(decision) == {999: ("GPU-1",)}

    def test_turns_change_nothing_between_priorities(self) -> None:
        busy = [held_by(0, "GPU-0", owner="a")]
        jobs = [job(1, priority=1, spec={"owner": "a"}), job(2, spec={"owner": "b"})]
        assert list(started(run(jobs, gpu(0), gpu(1), allocations=busy))) == [1]

    def test_a_turn_taken_at_one_priority_counts_at_the_next(self) -> None:
        jobs = [
            job(1, priority=1, spec={"owner": "a"}),
            job(2, waited=2, spec={"owner": "a"}),
            job(3, waited=1, spec={"owner": "b"}),
        ]
        assert list(started(run(jobs, gpu(0), gpu(1)))) == [1, 3]

    def test_shortest_takes_the_smallest_area(self) -> None:
        settings = Settings(order="shortest")
        jobs = [job(1), job(2, gpus=2), job(3), job(4, priority=1)]
        expected = {1: 90.0, 2: 40.0, 3: 100.0, 4: 1e6}
        for ends in ([4], [4, 2], [4, 2]):
            cards = [gpu(n) for n in range(1 + 2 * (len(ends) - 1))]
            decision = run(jobs, *cards, settings=settings, expected=expected)
            assert list(started(decision)) == ends

    def test_shortest_keeps_gpus_only_for_whom_patience_is_up(self) -> None:
        settings, expected = Settings(order="shortest"), {1: 50.0, 2: 100.0, 3: 400.0}
        taken = [held_by(9, "GPU-0", expected_end_mono=NOW.mono + 30)]
        cards = (gpu(0), gpu(1))
        for waited, ends in ((100, [2]), (600, [])):
            jobs = [job(1, gpus=2, waited=waited), job(2)]
            decision = run(
                jobs,
                *cards,
                settings=settings,
                allocations=taken,
                expected=expected,
                worst_backlog_s=500.0,
            )
            assert list(started(decision)) == ends
            assert bool(decision.reservations) is not bool(ends)
            assert decision.backlog_s == (2 * 50 + 100 + 30) / 2

    def test_shortest_knows_nothing_and_takes_the_oldest(self) -> None:
        settings = Settings(order="shortest")
        jobs = [job(1, waited=1), job(2, waited=3), job(3, waited=2)]
        assert list(started(run(jobs, gpu(), settings=settings))) == [2]

    def test_a_line_that_is_kept_decides_the_same(self) -> None:
        jobs = [job(n, priority=n % 3, waited=n % 7) for n in range(1, 60)]
        line = Line(jobs[:40])
        for one in jobs[40:]:
            line.put(one)
        for number in range(1, 20):
            line.drop(number)
        line.put(replace(jobs[30], priority=9))
        rest = [replace(one, priority=9) if one.id == 31 else one for one in jobs[19:]]
        cards = [gpu(n) for n in range(4)]
        kept = decide(line, snap(*cards), [], Settings(), NOW)
        assert kept == run(rest, *cards)
        assert len(line) == 40
        assert 31 in line


class TestReservations:
    """A job that does not fit is not passed by those that would delay it."""

    def test_a_wide_job_keeps_the_gpus_it_waits_for(self) -> None:
        taken = [held_by(9, "GPU-0", expected_end_mono=NOW.mono + 100)]
        jobs = [
            job(1, gpus=2, waited=3),
            job(2, waited=2),
            job(3, waited=1, time_s=101),
            job(4, time_s=100),
        ]
        decision = run(jobs, gpu(0), gpu(1), allocations=taken)
        assert started(decision) == {4: ("GPU-1",)}
        kept = decision.reservations[0]
        assert (kept.job_id, kept.at_mono) == (1, NOW.mono + 100)
        assert decision.reasons[2].text == "GPU 1: kept for job 1, which is ahead"
        assert decision.reasons[1].text == "needs 2 GPUs, 1 free; GPU 0: job 9 (train) is on it"

    def test_gpus_beyond_the_reservation_are_for_all(self) -> None:
        taken = [held_by(9, "GPU-0", expected_end_mono=NOW.mono + 100)]
        cards = [gpu(n) for n in range(3)]
        decision = run([job(1, gpus=3, waited=1), job(2)], *cards, allocations=taken)
        assert not decision.starts
        jobs = [job(1, gpus=2, waited=2), job(2, gpus=3, waited=1), job(3)]
        decision = run(jobs, *cards, allocations=[held_by(9, "GPU-0"), held_by(8, "GPU-1")])
        assert not decision.starts

    def test_no_end_known_no_backfill(self) -> None:
        decision = run(
            [job(1, gpus=2, waited=1), job(2, time_s=1)],
            gpu(0),
            gpu(1),
            allocations=[held_by(9, "GPU-0")],
        )
        assert not decision.starts
        assert decision.reservations[0].at_mono is None

    def test_learned_durations_let_jobs_pass(self) -> None:
        taken = [held_by(9, "GPU-0", expected_end_mono=NOW.mono + 100)]
        jobs = [job(1, gpus=2, waited=1), job(2)]
        decision = run(jobs, gpu(0), gpu(1), allocations=taken, expected={2: 90.0})
        assert started(decision) == {2: ("GPU-1",)}

    def test_nobody_is_kept_waiting_for_a_stranger(self) -> None:
        busy = gpu(0, used=30, processes=(stranger(),))
        decision = run([job(1, gpus=2, waited=1), job(2)], busy, gpu(1))
        assert started(decision) == {2: ("GPU-1",)}
        assert not decision.reservations

    def test_a_job_that_shares_keeps_memory_only(self) -> None:
        taken = [
            held_by(8, "GPU-0", shared=True, mem_bytes=20 * GIB, expected_end_mono=NOW.mono + 50)
        ]
        jobs = [job(1, mem="25G", waited=2), job(2, mem="14G", waited=1), job(3, mem="15G")]
        decision = run(jobs, gpu(), allocations=taken)
        assert started(decision) == {2: ("GPU-0",)}
        assert decision.reservations[0].at_mono == NOW.mono + 50


class TestReasons:
    """What people read."""

    def test_jobs_ahead(self) -> None:
        jobs = [job(n, waited=9 - n) for n in (1, 2, 3, 4)]
        decision = run(jobs, gpu(), allocations=[held_by(9, "GPU-0")])
        texts = [decision.reasons[n].text for n in (1, 2, 3, 4)]
        assert texts == [
            "GPU 0: job 9 (train) is on it",
            "1 job ahead",
            "2 jobs ahead",
            "3 jobs ahead",
        ]

    def test_many_gpus_are_summed_up(self) -> None:
        cards = [gpu(n) for n in range(7)] + [
            gpu(7, used=30, utilization=0.97, processes=(stranger(),))
        ]
        taken = [held_by(90 + n, f"GPU-{n}") for n in range(7)]
        text = run([job()], *cards, allocations=taken).reasons[1].text
        assert text == (
            "8 GPUs taken: 7 with jobs of this queue, 1 used by others "
            "(GPU 7: 97 % used by python (pid 812, user user1))"
        )

    def test_the_first_200_now_the_rest_on_view(self) -> None:
        jobs = [job(n, waited=1000 - n) for n in range(1, 500)]
        taken = [held_by(999, "GPU-0")]
        decision = run(jobs, gpu(), allocations=taken)
        assert sorted(decision.reasons) == list(range(1, 201))
        reason = reason_for(450, jobs, snap(gpu()), taken, Settings(), NOW)
        assert reason is not None
        assert reason.text == "449 jobs ahead"
        assert reason_for(7777, jobs, snap(gpu()), taken, Settings(), NOW) is None


def test_confirm_sees_what_has_changed() -> None:
    free, settings = snap(gpu()), Settings()
    assert confirm(job(), ("GPU-0",), free, [], settings, NOW) is None
    mine = [held_by(1, "GPU-0")]
    assert confirm(job(), ("GPU-0",), free, mine, settings, NOW) is None
    gone = confirm(job(), ("GPU-5",), free, [], settings, NOW)
    assert gone is not None
    assert gone.text == "GPU-5 cannot be given any more"
    members = {"k1": Member(key="k1", label="n", pinned_gpus=("GPU-1",))}
    assert confirm(cell(), ("GPU-0",), free, [], settings, NOW, members=members) is not None


def test_order_of_input_does_not_matter() -> None:
    jobs = [job(n, priority=n % 4, waited=n % 5, gpus=1 + n % 3) for n in range(1, 40)]
    cards = [gpu(n) for n in range(4)]
    assert run(jobs, *cards) == run(jobs[::-1], *cards)
