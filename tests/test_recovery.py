"""What is left of an attempt after a death or a reboot, and what it counts for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.locks import Membership
from gpusched_ipy.openjobs import OpenJobs
from gpusched_ipy.process import ProcessId
from gpusched_ipy.reap import orphans, reap
from gpusched_ipy.runners.command import MAX_STARTS_IN_VAIN, _settle
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.supervision import call_agent


@pytest.fixture
def store() -> Iterator[Store]:
    found = Store(open_state_dir(Settings.load()))
    yield found
    found.close()


@pytest.fixture
def job(store: Store) -> Job:
    return store.submit(JobSpec(uid="u", kind=JobKind.COMMAND, name="u", argv=("true",)))


def claimed_by_the_dead(store: Store, job: Job) -> Job:
    """Claimed, and its member died before the job began."""
    member = Membership(store.state)
    claimed = store.claim(job, ("GPU-0",), member=member.key)
    member.leave()
    return claimed


def test_the_deaths_of_others_cost_a_job_none_of_its_starts(store: Store, job: Job) -> None:
    for _ in range(2 * MAX_STARTS_IN_VAIN):
        (job,) = reap(store, [claimed_by_the_dead(store, job)])
        assert job.state is JobState.PENDING
    for _ in range(MAX_STARTS_IN_VAIN - 1):
        _settle(store, store.claim(job, ("GPU-0",), member="m"), -9)
        job = store.job(job.id)
        assert job.state is JobState.PENDING
    _settle(store, store.claim(job, ("GPU-0",), member="m"), -9)
    job = store.job(job.id)
    assert (job.state, job.error) == (
        "failed", "its shim ended with status -9 before the job began",
    )  # fmt: skip


def test_a_start_that_went_well_wipes_out_those_in_vain(store: Store, job: Job) -> None:
    for place in range(3 * MAX_STARTS_IN_VAIN):
        claimed = store.claim(store.job(job.id), ("GPU-0",), member="m")
        if place % MAX_STARTS_IN_VAIN == 0:
            store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="shim")
            store.unclaim(store.job(job.id), "outcome unknown; queued again as asked")
        else:
            _settle(store, claimed, -9)
    assert store.job(job.id).state is JobState.PENDING


def test_a_pid_of_another_boot_is_nobodys(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reboot a stranger has that pid, and by chance the same start ticks too."""
    starting = store.claim(job, ("GPU-0",), member="m")
    running = store.take_over(job.id, epoch=starting.epoch, claimed_by="m", member="shim")
    assert running is not None
    assert running.attempt is not None
    stranger = ProcessId.of(os.getpid())
    assert stranger is not None
    store.set_process(running.attempt, stranger)
    assert store.process_of(running) == stranger
    for module in ("process", "lookup", "store"):
        monkeypatch.setattr(f"gpusched_ipy.{module}.boot_id", lambda: "the next boot")
    # The job is written in this boot, which says nothing about its process.
    store.request_cancel(job.id)
    assert store.process_of(store.job(job.id)) is None
    seen = OpenJobs(store, store._clock, keep_s=0.0)
    seen.refresh()
    assert seen.leaders() == {}
    assert seen.pids_by_gpu() == {"GPU-0": ((job.id, None),)}
    assert not stranger.alive


def test_the_end_of_a_job_reads_none_of_those_that_wait(
    store: Store, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be 100,000 of them, and each one ends like that."""
    called: list[object] = []
    monkeypatch.setattr("gpusched_ipy.summon.ensure_agent", called.append)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_read", lambda _row: pytest.fail("a job was read"))
        call_agent(store)
    assert called == [store.state]
    store.set_held(job.id, True)
    store.submit(JobSpec(uid="c", kind=JobKind.CELL, name="c", code="1", home="kernel"))
    call_agent(store)
    assert called == [store.state], "neither what is held nor a cell is the agent's to start"


def test_a_kernel_is_asked_once_however_many_of_its_cells_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def alive(_state: object, key: str) -> bool:
        asked.append(key)
        return key == "alive"

    monkeypatch.setattr("gpusched_ipy.reap.is_alive", alive)
    cells = [
        store.submit(JobSpec(uid=f"{home}{at}", kind=JobKind.CELL, name="c", code="1", home=home))
        for at in range(3)
        for home in ("alive", "dead")
    ]
    assert [job.spec.home for job in orphans(store, cells)] == ["dead"] * 3
    assert sorted(asked) == ["alive", "dead"]
