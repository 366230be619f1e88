"""Many jobs at once: the record comes out as if each had been changed alone, in short writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpusched_ipy import api, wishes
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import ArrayPlace, Job, JobKind, JobSpec, JobState, WaitCode, WaitReason
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.writelock import WriteLock
from tests.test_store import FakeClock

SIZE = 7


def sweep() -> list[JobSpec]:
    return [
        JobSpec(
            uid=f"job{place}", kind=JobKind.COMMAND, name="job", argv=("true",), cwd="/",
            held=place == 3, array=ArrayPlace(id="sweep", index=place, size=SIZE),
        )
        for place in range(SIZE)
    ]  # fmt: skip


def opened(folder: Path, clock: FakeClock) -> Store:
    return Store(open_state_dir(Settings.load({"state_dir": str(folder)}, environ={})), clock)


def lived(store: Store) -> list[Job]:
    """A sweep of which one has completed, one runs, one is held, and some know why they wait."""
    jobs = store.submit_all(sweep())
    for job in jobs[:2]:
        claimed = store.claim(job, (f"GPU-{job.id}",), member="m")
        store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="m")
    store.finish_if_active(jobs[0].id, epoch=1, state=JobState.COMPLETED, exit_code=0)
    why = WaitReason(code=WaitCode.PRIORITY, text="2 jobs ahead")
    store.set_reasons({job.id: why for job in jobs[4:]})
    return jobs


def record(store: Store) -> tuple[list[Job], list[Any]]:
    """All that can be read; that the checksums hold, too, and each job knows its newest event."""
    jobs = store.jobs(ended=True)
    assert store.damaged == ()
    assert len(jobs) == SIZE
    events = [event for job in jobs for event in store.events(job.id)]
    _, changed = store.changed_since(0)
    assert len(changed) == SIZE
    for job in jobs:
        revision, at_least = store.events(job.id)[-1].id, store.changed_since
        assert job.id in [one.id for one in at_least(revision - 1)[1]]
        assert job.id not in [one.id for one in at_least(revision)[1]]
    told = [(one.id, one.at, one.job_id, one.what, dict(one.data)) for one in events]
    return [replace(job, attempt=None) for job in jobs], told


@pytest.mark.parametrize("wish", ["cancel", "hold", "release", "priority"])
def test_a_wish_for_many_is_the_same_as_one_for_each(
    wish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wishes, "AT_ONCE", SIZE)
    clock = FakeClock()
    one, many = opened(tmp_path / "one", clock), opened(tmp_path / "many", clock)
    ids = [job.id for job in lived(one)]
    assert [job.id for job in lived(many)] == ids
    assert record(many) == record(one)
    clock.mono, clock.wall = clock.mono + 5, clock.wall + 5
    pending = [job.id for job in one.jobs() if job.state is JobState.PENDING]
    if wish == "cancel":
        # The one that runs comes first: its wish is recorded before the others end.
        for number in ids[1:]:
            one.request_cancel(number)
        many.cancel_many(ids)
    elif wish == "priority":
        for number in ids[1:]:
            one.set_priority(number, 9)
        many.prioritize_many(ids, 9)
    else:
        for number in pending:
            one.set_held(number, wish == "hold")
        many.hold_many(ids, wish == "hold")
    assert record(many) == record(one)


def test_many_submitted_at_once_are_the_same_as_each(tmp_path: Path) -> None:
    clock = FakeClock()
    one, many = opened(tmp_path / "one", clock), opened(tmp_path / "many", clock)
    each = [one.submit(spec) for spec in sweep()]
    assert many.submit_all(sweep()) == each
    assert record(many) == record(one)
    assert many.submit_all(sweep()) == each  # a retried submit is no second one
    twice = [replace(spec, uid="same") for spec in sweep()[:2]]
    first, second = many.submit_all(twice)
    assert first == second


def test_a_damaged_job_is_left_out_of_a_wish_for_many(tmp_path: Path) -> None:
    store = opened(tmp_path / "state", FakeClock())
    ids = [job.id for job in store.submit_all(sweep())]
    with store.writing():
        store._db.execute("UPDATE jobs SET name = 'flipped' WHERE id = ?", (ids[2],))
    store.cancel_many(ids)
    assert [job.state for job in store.jobs(ended=True)] == [JobState.CANCELLED] * (SIZE - 1)
    assert store.damaged == (ids[2],)


def test_a_sweep_that_fails_is_held_in_the_write_of_its_third_end(tmp_path: Path) -> None:
    clock = FakeClock()
    store = opened(tmp_path / "state", clock)
    jobs = store.submit_all(sweep())
    clock.mono, clock.wall = clock.mono + 1, clock.wall + 1
    for job in jobs[:3]:
        claimed = store.claim(store.job(job.id), ("GPU-0",), member="m")
        store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="m")
        if job is jobs[2]:
            store.set_held(jobs[4].id, True)  # by its user: that stays his own
        store.finish_if_active(job.id, epoch=1, state=JobState.FAILED, exit_code=1)
    rest = [store.job(job.id) for job in jobs[3:]]
    assert all(job.held for job in rest)
    assert [job.id for job in rest if job.hold_reason] == [jobs[5].id, jobs[6].id]
    assert rest[2].reason is not None
    assert rest[2].reason.text == f"held: {rest[2].hold_reason}"
    assert store.events(jobs[5].id)[-1].data == {"why": rest[2].hold_reason}
    assert store.damaged == ()


def test_a_wish_for_many_shuts_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (api, wishes):
        monkeypatch.setattr(module, "AT_ONCE", 2)
    store = opened(tmp_path / "state", FakeClock())
    queue = Queue(Settings.load({}, environ={}), store=store)
    ids = [job.id for job in lived(store)]
    writes: list[int] = []
    acquire = WriteLock.acquire
    monkeypatch.setattr(WriteLock, "acquire", lambda self: (writes.append(1), acquire(self))[1])

    held = queue.hold("array:sweep")
    assert [job.id for job in held] == ids[2:]
    assert all(job.held for job in held)
    assert len(writes) > len(held) // 2
    raised = queue.set_priority(["array:sweep"], 4)
    assert [(job.id, job.priority) for job in raised] == [(number, 4) for number in ids[1:]]
    before = json.dumps([str(job) for job in store.jobs(ended=True)])
    with pytest.raises(UserError, match=f"job {ids[1]} is running; only a pending job"):
        queue.release("array:sweep", ids[1])
    assert json.dumps([str(job) for job in store.jobs(ended=True)]) == before
    cancelled = queue.cancel("array:sweep")
    assert [job.id for job in cancelled] == ids
    assert [str(job.state) for job in cancelled] == ["completed", "running", *["cancelled"] * 5]
    with pytest.raises(UserError, match="only a pending job can be held"):
        queue.hold("array:sweep")
