"""What the loop keeps in mind between two decisions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gpusched_ipy import lookup
from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import ArrayPlace, Job, JobKind, JobSpec, JobState, Request
from gpusched_ipy.openjobs import OpenJobs
from gpusched_ipy.policy import Decision, decide
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

KEEP_S = 3.0


class HandClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.mono = 1000.0

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=self.mono)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def opened(settings: Settings, clock: HandClock) -> Iterator[OpenJobs]:
    store = Store(open_state_dir(settings))
    yield OpenJobs(store, clock, keep_s=KEEP_S)
    store.close()


def pending(number: int, owner: str) -> Job:
    place = ArrayPlace(id=f"sweep {owner}", index=0, size=9)
    spec = JobSpec(
        uid=str(number), kind=JobKind.COMMAND, name="job", owner=owner, array=place, argv=("true",)
    )
    return Job(id=number, spec=spec, state=JobState.PENDING, priority=0, queued_mono=float(number))


def decision(opened: OpenJobs, clock: HandClock) -> Decision:
    card = Gpu(uuid="g", utilization=0.0, mem_used_bytes=0, mem_total_bytes=1 << 34, processes=())
    snapshot = Snapshot(
        backend="fake", source="test", taken_at=0.0, taken_mono=clock.mono, gpus=(card,)
    )
    return decide(opened.line, snapshot, opened.allocations(), Settings(), clock.now())


def test_notebooks_take_turns_however_long_their_jobs_run(
    opened: OpenJobs, clock: HandClock
) -> None:
    owners = "aaaabbbbcc"
    for number, owner in enumerate(owners, 1):
        opened.put(pending(number, owner))
    order = ""
    while opened.jobs:
        (start,) = decision(opened, clock).starts
        job = opened.jobs[start.job_id]
        running = replace(
            job, state=JobState.RUNNING, gpus=start.gpus, started_mono=clock.mono, epoch=1
        )
        opened.put(running)
        (allocation,) = [one for one in opened.allocations() if one.ended_mono is None]
        assert (allocation.owner, allocation.array) == (job.spec.owner, f"sweep {job.spec.owner}")
        order += job.spec.owner
        clock.mono += 10 * KEEP_S
        opened.put(replace(running, state=JobState.COMPLETED))
    assert order == "abcabcabab"


def test_of_each_notebook_only_the_last_end_is_kept(opened: OpenJobs, clock: HandClock) -> None:
    for number, owner in enumerate("aab", 1):
        running = replace(pending(number, owner), state=JobState.RUNNING, gpus=("g",), epoch=1)
        opened.put(running)
        opened.put(replace(running, state=JobState.FAILED))
    assert [one.job_id for one in opened.allocations()] == [1, 2, 3]
    clock.mono += KEEP_S + 1
    assert [one.job_id for one in opened.allocations()] == [2, 3]


def test_the_first_look_at_a_long_queue_knows_what_each_job_by_itself_tells(
    opened: OpenJobs, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_PART", 3)
    store = opened._store
    for number in range(1, 12):
        job = pending(number, "abc"[number % 3])
        request = Request(after=(1, 2) if number == 5 else (), gpus=1 + number % 2)
        engine = "slurm" if number == 7 else "local"
        store.submit(replace(job.spec, request=request, engine=engine, priority=number % 4))
    for number, state in ((1, JobState.COMPLETED), (2, JobState.STARTING), (9, None)):
        claimed = store.claim(store.job(number), ("g",), member="m")
        if state is not JobState.STARTING:
            store.take_over(number, epoch=claimed.epoch, claimed_by="m", member="m")
        if state is JobState.COMPLETED:
            store.finish_if_active(number, epoch=claimed.epoch, state=state)
    with sqlite3.connect(store.state.database) as db:
        db.execute("UPDATE jobs SET name = name || 'X' WHERE id = 4")
    db.close()

    opened.refresh()
    each = OpenJobs(store, clock, keep_s=KEEP_S)
    for job in store.jobs():
        each.put(job)
    assert [*opened.jobs] == [2, 3, *range(5, 12)]
    assert store.damaged == (4,)
    for what in ("jobs", "pending", "active", "away", "any_waits", "depend_on_members"):
        assert getattr(opened, what) == getattr(each, what), what
    assert opened.states_of_dependencies() == each.states_of_dependencies()
    assert opened.allocations() == each.allocations()
    assert [job.id for job in opened.line] == [job.id for job in each.line]
    assert decision(opened, clock) == decision(each, clock)


def test_a_job_that_ended_and_was_purged_between_two_looks_is_known_no_more(
    opened: OpenJobs, clock: HandClock
) -> None:
    store = opened._store
    for number in (1, 2):
        store.submit(pending(number, "a").spec)
    opened.refresh()
    gone = store.request_cancel(1)
    assert store.forget([gone]) == 1
    opened.refresh()
    assert list(opened.jobs) == [2]
    assert [start.job_id for start in decision(opened, clock).starts] == [2]
