"""What past runs teach, and when each pending job is expected to start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript
from hypothesis import given, settings
from hypothesis import strategies as st

from gpusched_ipy import backlog
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.expected import ExpectedStarts
from gpusched_ipy.job import (
    Allocation,
    ExpectedStart,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Request,
)
from gpusched_ipy.learned import Learned
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.outlook import Outlook
from gpusched_ipy.policy import Line, decide
from gpusched_ipy.policy.estimate import Estimate, Run, by_walltime, estimate, remaining_s
from gpusched_ipy.policy.forecast import HIGH, LOW, _place, forecast
from gpusched_ipy.policy.timeline import Piece, Timeline
from gpusched_ipy.records import expected_text
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

GIB = 2**30
NOW = Instant(mono=1e5, wall=1.8e9)


def runs(*seconds: float | None, mem: int | None = None) -> list[Run]:
    """Past runs, the newest first."""
    return [Run(run_s, mem) for run_s in seconds]


def known(seconds: float, count: int = 100) -> Estimate:
    """A job that always takes as long."""
    found = estimate(runs(*[seconds] * count))
    assert found is not None
    return found


class TestEstimate:
    def test_of_nothing_nothing_is_said(self) -> None:
        assert estimate([]) is None
        assert estimate(runs(None, None)) is None, "none of them completed"

    def test_one_outlier_hardly_matters(self) -> None:
        sound = estimate(runs(*[100.0] * 9))
        spoilt = estimate(runs(*[100.0] * 4, 1e6, *[100.0] * 4))
        assert sound is not None
        assert spoilt is not None
        assert spoilt.mid_s == pytest.approx(sound.mid_s, rel=0.05)

    def test_recent_runs_weigh_more(self) -> None:
        found = estimate(runs(*[100.0] * 10, *[1000.0] * 10))
        assert found is not None
        assert found.mid_s < 150.0

    def test_few_runs_leave_a_wide_spread(self) -> None:
        one, many = estimate(runs(100.0)), estimate(runs(*[100.0] * 20))
        assert one is not None
        assert many is not None
        assert (one.runs, many.runs) == (1, 20)
        assert one.high_s > 250.0, "one run: up to about three times as long"
        assert many.high_s < 115.0

    def test_memory_is_a_bound_of_several_runs_also_of_failed_ones(self) -> None:
        few = estimate(runs(60.0, 60.0, mem=GIB))
        assert few is not None
        assert few.mem_bytes is None
        failed = estimate([Run(None, 9 * GIB), *runs(60.0, 60.0, mem=GIB)])
        assert failed is not None
        assert failed.mem_bytes is not None
        assert failed.mem_bytes > 9 * GIB

    def test_a_walltime_ends_it(self) -> None:
        assert max(by_walltime(30.0, known(100.0)).shares) == 30.0
        assert by_walltime(30.0).runs == 0
        assert max(by_walltime(30.0).shares) < 30.0

    @settings(deadline=None)
    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
    def test_its_shares_rise_and_enclose_what_was_seen(self, seconds: list[float]) -> None:
        found = estimate(runs(*seconds))
        assert found is not None
        assert list(found.shares) == sorted(found.shares)
        assert found.shares[0] <= max(*seconds, 0.01) * (1 + 1e-9)
        assert found.shares[-1] >= min(seconds) * (1 - 1e-9)

    @settings(deadline=None)
    @given(st.floats(0, 1e5), st.floats(0, 0.999))
    def test_what_runs_goes_on(self, ran_s: float, share: float) -> None:
        assert remaining_s(known(100.0), ran_s, share) >= 0.0


class Clock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.mono, self.wall = NOW.mono, NOW.wall

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=self.wall)


class Past:
    """A record whose jobs run as long as the test says."""

    def __init__(self, root: Path) -> None:
        self.clock = Clock()
        settings = Settings.load({"state_dir": str(root)}, environ={})
        self.store = Store(open_state_dir(settings), self.clock)
        self._count = 0

    def submit(self, name: str, *argv: str, **values: Any) -> Job:
        self._count += 1
        kind = values.pop("kind", JobKind.COMMAND)
        return self.store.submit(
            JobSpec(uid=str(self._count), kind=kind, name=name, argv=argv or None, **values)
        )

    def ran(self, job: Job, run_s: float, state: JobState = JobState.COMPLETED) -> Job:
        claimed = self.store.claim(job, ("GPU-0",), member="m")
        begun = self.store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="m")
        assert begun is not None
        self.clock.mono += run_s
        self.clock.wall += run_s
        ended = self.store.finish_if_active(job.id, epoch=claimed.epoch, state=state)
        assert ended is not None
        return ended


@pytest.fixture
def past(tmp_path: Path) -> Iterator[Past]:
    found = Past(tmp_path / "state")
    yield found
    found.store.close()


class TestLearned:
    def test_the_same_command_counts_alone_once_it_ran_twice(self, past: Past) -> None:
        for run_s in (100.0, 100.0, 100.0):
            past.ran(past.submit("train", "train.py", "--big"), run_s)
        past.ran(past.submit("train", "train.py", "--small"), 5.0)
        again = past.submit("train", "train.py", "--small")
        found = Learned(past.store).of(again)
        assert found is not None
        assert found.runs == 4, "one run of its own is too few: all of its name count"
        past.ran(again, 5.0)
        found = Learned(past.store).of(past.submit("train", "train.py", "--small"))
        assert found is not None
        assert found.runs == 2
        assert found.mid_s == pytest.approx(5.0, rel=0.3)

    def test_members_of_a_sweep_share_what_their_name_teaches(self, past: Past) -> None:
        """One estimate, so that a forecast takes what is uncertain of it as common to them."""
        for seed in range(3):
            past.ran(past.submit("train", "train.py", str(seed)), 100.0)
        learned = Learned(past.store)
        one, other = (past.submit("train", "train.py", seed) for seed in ("8", "9"))
        before = learned.of(one)
        assert before is not None
        assert learned.of(other) is before
        learned.saw(past.ran(past.submit("train", "train.py", "3"), 100.0))
        found = learned.of(one)
        assert found is not None
        assert found.runs == 4
        assert learned.of(other) is found

    def test_names_that_nobody_gave_teach_nothing_of_each_other(self, past: Past) -> None:
        past.ran(past.submit("cell", kind=JobKind.CELL, code="a()", home="m"), 100.0)
        other = past.submit("cell", kind=JobKind.CELL, code="b()", home="m")
        same = past.submit("cell", kind=JobKind.CELL, code="a()", home="m")
        learned = Learned(past.store)
        assert learned.of(other) is None
        assert learned.of(same) is not None

    def test_it_follows_the_record_without_reading_it_again(
        self, past: Past, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        learned = Learned(past.store)
        waiting = past.submit("train", "train.py")
        assert learned.of(waiting) is None
        monkeypatch.setattr(past.store, "past", lambda *_: pytest.fail("read a second time"))
        learned.saw(past.ran(past.submit("train", "train.py"), 50.0))
        found = learned.of(waiting)
        assert found is not None
        assert found.runs == 1
        learned.saw(past.ran(past.submit("train", "train.py"), 70.0, JobState.FAILED))
        found = learned.of(waiting)
        assert found is not None
        assert found.runs == 1, "what failed says nothing of how long it takes"

    def test_a_decision_takes_it_for_a_backfill(self, past: Past) -> None:
        """A short job passes a reservation where its history lets it; an unknown one does not."""
        for _ in range(5):
            past.ran(past.submit("short", "short.py"), 10.0)
        learned = Learned(past.store)
        wide = past.submit("wide", "wide.py", request=Request(gpus=2))
        unknown, short = past.submit("new", "new.py"), past.submit("short", "short.py")
        jobs = {job.id: job for job in (wide, unknown, short)}
        taken = Allocation(job_id=99, gpus=("GPU-0",), expected_end_mono=past.clock.mono + 3600.0)
        decision = decide(
            Line(jobs.values()), idle(2, past.clock.now()), [taken], Settings(), past.clock.now(),
            **learned.known(jobs),
        )  # fmt: skip
        assert [start.job_id for start in decision.starts] == [short.id]

    def test_the_longest_backlog_is_kept_for_some_days(self, past: Past) -> None:
        store, wall = past.store, past.clock.wall
        backlog.note(store, 100.0, wall)
        backlog.note(store, 105.0, wall)
        assert backlog.worst_s(store, wall) == 100.0, "not worth a write"
        backlog.note(store, 300.0, wall + 86400.0)
        assert backlog.worst_s(store, wall + 2 * 86400.0) == 300.0
        assert backlog.worst_s(store, wall + 9 * 86400.0) == 0.0


def idle(count: int, now: Instant = NOW, **values: Any) -> Snapshot:
    cards = tuple(
        Gpu(
            uuid=f"GPU-{place}",
            index=place,
            utilization=0.0,
            mem_used_bytes=0,
            mem_total_bytes=40 * GIB,
            processes=(),
        )
        for place in range(count)
    )
    taken = {"taken_at": now.wall, "taken_mono": now.mono}
    return replace(Snapshot(backend="fake", source="test", gpus=cards, **taken), **values)


def waiting(number: int, **request: Any) -> Job:
    spec = JobSpec(uid=str(number), kind=JobKind.COMMAND, name="job", request=Request(**request))
    return Job(
        id=number,
        spec=spec,
        state=JobState.PENDING,
        priority=0,
        queued_mono=NOW.mono - 100 + number,
    )


def running(number: int, gpu: int, since_s: float, **values: Any) -> tuple[Job, Allocation]:
    job = replace(waiting(number), state=JobState.RUNNING)
    one = Allocation(job_id=number, gpus=(f"GPU-{gpu}",), started_mono=NOW.mono - since_s, **values)
    return job, one


def starts(
    jobs: list[Job],
    *active: tuple[Job, Allocation],
    gpus: int = 1,
    lasts: float | dict[int, float | None] = 100.0,
    snapshot: Snapshot | None = None,
    **values: Any,
) -> dict[int, float]:
    """Seconds from now to each start, in the middle."""

    def of(job: Job) -> Estimate | None:
        seconds = lasts.get(job.id, 100.0) if isinstance(lasts, dict) else lasts
        return None if seconds is None else known(seconds)

    found = forecast(
        Line(jobs),
        {job.id: job for job, _ in active},
        snapshot or idle(gpus),
        [one for _, one in active],
        Settings(),
        NOW,
        of,
        **values,
    )
    for one in found.values():
        assert one.low <= one.at <= one.high
    return {number: one.at - NOW.wall for number, one in found.items()}


class TestForecast:
    def test_one_after_the_other(self) -> None:
        found = starts([waiting(1), waiting(2), waiting(3)], running(9, 0, 40.0))
        assert found == {number: pytest.approx(at, rel=0.1) for number, at in
                         [(1, 60.0), (2, 160.0), (3, 260.0)]}  # fmt: skip

    def test_an_idle_gpu_is_had_now_whatever_is_known(self) -> None:
        assert starts([waiting(1)], lasts={1: None}) == {1: 0.0}

    def test_what_nobody_knows_is_not_said(self) -> None:
        jobs = [waiting(1), waiting(2)]
        assert starts(jobs, running(9, 0, 5.0), lasts={9: None}) == {}
        assert list(starts(jobs, running(9, 0, 5.0), lasts={1: None})) == [1]

    def test_a_stranger_or_a_hold_has_no_end(self) -> None:
        taken = idle(1).gpus[0]
        process = GpuProcess(pid=7, user="user1", name="python", mem_bytes=30 * GIB)
        busy = replace(taken, utilization=0.9, mem_used_bytes=30 * GIB, processes=(process,))
        assert starts([waiting(1)], snapshot=idle(1, gpus=(busy,))) == {}
        assert starts([replace(waiting(1), held=True), waiting(2)]) == {2: 0.0}
        assert starts([waiting(1)], drained=True) == {}

    def test_a_wide_job_waits_for_all_and_a_short_one_passes_it(self) -> None:
        jobs = [waiting(1, gpus=2), waiting(2), waiting(3)]
        found = starts(jobs, running(9, 0, 0.0), gpus=2, lasts={1: 50.0, 2: 30.0, 3: 500.0})
        assert found[1] == pytest.approx(100.0, rel=0.1)
        assert found[2] == 0.0, "it is over before the wide one starts"
        assert found[3] == pytest.approx(150.0, rel=0.1)

    def test_dependencies_and_begin_times_count(self) -> None:
        jobs = [waiting(1, after=(2,)), waiting(2), waiting(3, begin_at=NOW.wall + 900.0),
                waiting(4, after=(77,))]  # fmt: skip
        found = starts(jobs, gpus=4)
        assert found[1] == pytest.approx(100.0, rel=0.1)
        assert (found[2], found[3]) == (0.0, 900.0)
        assert 4 not in found, "nobody knows when 77 ends"

    def test_jobs_share_a_gpu_by_their_memory(self) -> None:
        jobs = [waiting(number, mem_bytes=15 * GIB) for number in (1, 2, 3)]
        found = starts(jobs)
        assert (found[1], found[2]) == (0.0, 0.0)
        assert found[3] == pytest.approx(100.0, rel=0.1)

    def test_what_is_behind_the_limit_changes_nothing_before_it(self) -> None:
        jobs = [waiting(number) for number in range(1, 8)]
        found = starts(jobs, limit=3)
        assert list(found) == [1, 2, 3]
        assert found[3] == pytest.approx(starts(jobs)[3], rel=0.1)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(0.1, 500.0), st.floats(0.0, 300.0), st.booleans()),
        max_size=25,
    )
)
def test_no_gpu_is_promised_twice(asked: list[tuple[int, float, float, bool]]) -> None:
    timeline = Timeline([40.0] * 4)
    booked: list[tuple[float, float, float]] = []
    for number, (width, run_s, ready, shares) in enumerate(asked):
        piece = Piece(
            job_id=number, places=(0, 1, 2, 3), width=width, ready=ready,
            mem_bytes=15 if shares else None,
        )  # fmt: skip
        start = timeline.place(piece, run_s)
        assert start >= ready
        booked.append((start, start + run_s, width * (15 if shares else 40)))
    for moment in {start for start, _, _ in booked}:
        used = sum(share for start, end, share in booked if start <= moment < end - 1e-6)
        assert used <= 160


@pytest.mark.parametrize(
    ("after_s", "runs_", "text"),
    [
        ((-600, 0, 600), 6, "about {}:{} "),
        ((0.0, 0.0, 0.0), None, "about now"),
        ((600, 900, 1200), 1, "; 1 past run)"),
        ((600, 900, 1200), 0, "; by walltimes)"),
    ],
)
def test_it_is_said_in_words(
    after_s: tuple[float, float, float], runs_: int | None, text: str
) -> None:
    low, at, high = (NOW.wall + 7200 * (after_s[0] < 0) + value for value in after_s)
    said = expected_text(ExpectedStart(at=at, low=low, high=high, runs=runs_), NOW)
    assert said.startswith("about ")
    if "{}" not in text:
        assert text in said
    else:
        assert said.endswith("; 6 past runs)")
        assert said.count(":") == 3


@pytest.mark.parametrize("courses", [8, 11, 20, 40])
def test_what_will_happen_is_one_more_course(courses: int) -> None:
    """Of so many courses and one more, all alike, the last falls into the range in 80 of 100."""
    low, high = _place(LOW, courses), _place(HIGH, courses)
    assert (high - low) / (courses + 1) == pytest.approx(0.8, abs=0.5 / (courses + 1) + 0.01)
    assert low == courses - 1 - high


def test_the_spread_of_one_run_is_the_one_stated() -> None:
    found = estimate(runs(100.0))
    assert found is not None
    assert found.shares[-2] / 100.0 == pytest.approx(exp(1.1), rel=0.35)


def test_a_member_orders_by_what_it_has_learned(past: Past, fake: FakeScript) -> None:
    for name, run_s in (("long", 500.0), ("short", 5.0)):
        for _ in range(3):
            past.ran(past.submit(name, f"{name}.py"), run_s)
    long, short = past.submit("long", "long.py"), past.submit("short", "short.py")
    chosen = Settings.load({"order": "shortest", "sampling": "false"})
    monitor = Monitor(chosen, past.clock)
    outlook = Outlook(past.store, monitor, "m", [JobKind.COMMAND], chosen, past.clock)
    try:
        outlook.open.refresh()
        decision = outlook.decide(outlook.look())
    finally:
        monitor.stop()
    assert [start.job_id for start in decision.starts] == [short.id], "not the one that came first"
    assert long.id in decision.reasons
    assert decision.starts[0].expected_end_mono == pytest.approx(past.clock.mono + 10, abs=10)
    # So long a backlog is kept for all members.
    assert backlog.worst_s(past.store, past.clock.wall) == pytest.approx(505.0, rel=0.3)


def test_the_starts_of_a_real_queue(past: Past, fake: FakeScript) -> None:
    for _ in range(3):
        past.ran(past.submit("train", "train.py"), 100.0)
    settings = Settings.load()
    monitor = Monitor(settings, past.clock)
    queue = Queue(settings, store=past.store, monitor=monitor, clock=past.clock)
    expected = ExpectedStarts(queue, monitor)
    try:
        assert expected.now() == {}
        first = past.submit("train", "train.py")
        claimed = past.store.claim(first, ("GPU-fake-0",), member="m")
        past.store.take_over(first.id, epoch=claimed.epoch, claimed_by="m", member="m")
        second = past.submit("train", "train.py", request=Request(time_s=30.0))
        held = past.submit("train", "train.py", held=True)
        third = past.submit("train", "train.py")
        found = expected.now()
        assert set(found) == {second.id, third.id}
        assert held.id not in found
        assert found[second.id].at - past.clock.wall == pytest.approx(100.0, rel=0.3)
        assert found[third.id].at - found[second.id].at == pytest.approx(30.0, rel=0.5)
        assert found[second.id].runs == 3
    finally:
        monitor.stop()
