"""What a job has had at a real Slurm is kept for the next one, and given back in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.engineslist import listed, row
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.locks import FileLock
from gpusched_ipy.summon import ensure_agent
from tests.engines.slurmcluster import SlurmCluster

pytestmark = pytest.mark.timeout(300)
_LONG_S = 150.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def kept(
    two_gpus: FakeScript, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Queue]:
    """A queue that keeps what its jobs have had."""
    monkeypatch.setenv("GPUSCHED_SLURM_KEEP", "5m")
    opened = Queue(Settings.load())
    yield opened
    opened.store.close()


def shell(queue: Queue, line: str, **options: object) -> Job:
    return queue.submit([line], shell=True, engine="slurm", **options)


def ended(queue: Queue, job: Job) -> Job:
    (job,) = queue.wait(job.id, timeout=_LONG_S)
    return job


def said(queue: Queue, line: str, **options: object) -> str:
    """What a job writes that completes."""
    job = ended(queue, shell(queue, line, **options))
    assert job.state is JobState.COMPLETED, job
    path = queue.log_path(job.id)
    assert path is not None
    return path.read_text().strip()


def allocations(slurm: SlurmCluster) -> list[str]:
    """The ids of what Slurm has of ours that is not over."""
    return slurm.run("squeue", "-h", "-o", "%i").split()


def test_one_allocation_serves_one_job_after_the_other(kept: Queue, slurm: SlurmCluster) -> None:
    line = "echo $SLURM_JOB_ID $CUDA_VISIBLE_DEVICES; exit 0"
    first = said(kept, line)
    assert {said(kept, line) for _ in range(3)} == {first}
    assert allocations(slurm) == [first.split()[0]]


def kept_gpus(queue: Queue) -> list[dict[str, Any]]:
    """What is kept, as ``gpusched engines`` tells it."""
    (found,) = [one for one in listed(queue.settings) if one["name"] == "slurm"]
    kept: list[dict[str, Any]] = found["kept"]
    return kept


def idle(queue: Queue, slurm: SlurmCluster) -> str:
    """The id of the one allocation that is kept, once it is idle."""
    wait_until(lambda: [one["idle_s"] for one in kept_gpus(queue)] not in ([], [None]), 60, "idle")
    (native,) = allocations(slurm)
    return native


def test_what_is_kept_is_told_and_given_back_with_a_drain(kept: Queue, slurm: SlurmCluster) -> None:
    running = shell(kept, "sleep 300")
    wait_until(lambda: kept.show(running.id).state is JobState.RUNNING, 60)
    assert [one["idle_s"] for one in kept_gpus(kept)] == [None]
    kept.cancel(running.id)
    assert ended(kept, running).state is JobState.CANCELLED
    first = idle(kept, slurm)
    (told,) = kept_gpus(kept)
    assert (told["gpus"], told["gpu_type"], told["keep_s"]) == (1, None, 300.0)
    assert told["idle_s"] < 300
    assert "keeps 1 GPU" in row(next(one for one in listed(kept.settings) if one["kept"]))[-1]
    assert said(kept, "echo $SLURM_JOB_ID") == first, "a cancelled job leaves it as it was"
    kept.drain("for others")
    wait_until(lambda: not allocations(slurm), 60, "given back")
    wait_until(lambda: not kept_gpus(kept), 60, "nothing kept")
    kept.resume()
    assert said(kept, "echo $SLURM_JOB_ID") != first


def test_a_cancelled_job_and_a_killed_one_leave_the_next_what_was_kept(
    kept: Queue, slurm: SlurmCluster, tmp_path: Path
) -> None:
    first = said(kept, "echo $SLURM_JOB_ID")
    stays = shell(kept, "sleep 300")
    wait_until(lambda: kept.show(stays.id).state is JobState.RUNNING, 60)
    kept.cancel(stays.id)
    assert ended(kept, stays).state is JobState.CANCELLED
    failed = ended(kept, shell(kept, "exit 7"))
    assert (failed.state, failed.exit_code) == (JobState.FAILED, 7)
    late = ended(kept, shell(kept, "sleep 300", time="1s"))
    assert late.state is JobState.TIMEOUT
    # Its program on the node dies without a word.
    lost = shell(kept, "sleep 300")
    wait_until(lambda: kept.show(lost.id).state is JobState.RUNNING, 60)
    (claim,) = (tmp_path / "engines").rglob("claim")
    os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
    assert said(kept, "echo $SLURM_JOB_ID") == first
    assert ended(kept, lost).state is JobState.LOST
    assert said(kept, "echo $SLURM_JOB_ID") == first
    assert allocations(slurm) == [first]


def test_an_allocation_that_is_taken_away_ends_its_job_as_a_batch_job_would_end(
    kept: Queue, slurm: SlurmCluster
) -> None:
    first = said(kept, "echo $SLURM_JOB_ID")
    job = shell(kept, "sleep 300")
    wait_until(lambda: kept.show(job.id).state is JobState.RUNNING, 60)
    slurm.run("scancel", first)
    job = ended(kept, job)
    assert (job.state, job.error) == (JobState.CANCELLED, "ended by slurm: cancelled in Slurm")
    assert said(kept, "echo $SLURM_JOB_ID") != first


def test_a_job_for_what_has_gone_unseen_goes_by_batch(
    kept: Queue, slurm: SlurmCluster, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    first = said(kept, "echo $SLURM_JOB_ID")
    idle(kept, slurm)
    (mark,) = (tmp_path / "engines").rglob("idle")
    os.kill(json.loads(mark.read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: not allocations(slurm), 60, "its end")
    assert said(kept, f"echo ran >> {tmp_path}/ran; echo $SLURM_JOB_ID") != first
    assert counted() == ["ran"]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_nothing_stays_idle_for_long_whoever_is_gone(
    kept: Queue, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("GPUSCHED_SLURM_KEEP", "4s" if how == "killed" else "5m")
    said(kept, "true")
    agent = wait_until(lambda: running_agent(kept.state, kept.store), 60, "an agent")
    if how == "killed":
        os.kill(agent, signal.SIGKILL)
    else:
        idle(kept, slurm)
        ask_to_leave(agent, kept.state)
    wait_until(lambda: not allocations(slurm), 60, "given back")
    assert kept_gpus(kept) == []


@pytest.mark.parametrize("point", ["given", "called"])
def test_an_agent_that_dies_while_it_gives_runs_nothing_twice(
    kept: Queue,
    slurm: SlurmCluster,
    tmp_path: Path,
    counted: Callable[[], list[str]],
    point: str,
) -> None:
    first = said(kept, "echo $SLURM_JOB_ID")
    idle(kept, slurm)
    agent = wait_until(lambda: running_agent(kept.state, kept.store), 60, "an agent")
    os.kill(agent, signal.SIGKILL)
    lock = FileLock(kept.state.agent_lock)
    wait_until(lambda: not lock.held_by_anybody(), 60, "its end")
    program = [sys.executable, "-m", "tests.engines.doomed", point]
    doomed = subprocess.Popen([*program, "--state-dir", str(kept.state.root)], cwd=ROOT)
    wait_until(lock.held_by_anybody, 60, "an agent")
    job = shell(kept, f"echo run >> {tmp_path}/ran; echo $SLURM_JOB_ID")
    assert doomed.wait(60) == -signal.SIGKILL
    ensure_agent(kept.state)
    assert ended(kept, job).state is JobState.COMPLETED
    path = kept.log_path(job.id)
    assert path is not None
    assert path.read_text().strip() == first
    assert counted() == ["run"]


def test_what_idles_holds_up_no_other_job_of_ours(kept: Queue, slurm: SlurmCluster) -> None:
    narrow = said(kept, "echo $SLURM_JOB_ID")
    idle(kept, slurm)
    wide = said(kept, "echo $SLURM_JOB_ID", gpus=2)
    assert wide != narrow, "both GPUs were had for it"
    # One that waits at Slurm for what we keep ourselves has it as soon as it is idle.
    line = "echo $SLURM_JOB_ID; sleep 1"
    jobs = [shell(kept, line, gpus=2) for _ in range(3)]
    logs = []
    for job in jobs:
        assert ended(kept, job).state is JobState.COMPLETED
        path = kept.log_path(job.id)
        assert path is not None
        logs.append(path.read_text().strip())
    assert logs == [wide] * 3


def test_a_job_goes_only_where_enough_time_is_left(kept: Queue, slurm: SlurmCluster) -> None:
    line = "echo $SLURM_JOB_ID"
    first = said(kept, line, time="1m")
    assert said(kept, line, time="1m") == first
    assert said(kept, line) == first, "more than half of its time is left"
    assert said(kept, line, time="30m") != first
    assert len(allocations(slurm)) == 1, "what did not do was given back"


def test_the_time_to_be_idle_is_done_without_where_it_is_too_much(
    kept: Queue, slurm: SlurmCluster
) -> None:
    slurm.run("scontrol", "update", "PartitionName=gpu", "MaxTime=3")
    try:
        assert said(kept, "squeue -h -j $SLURM_JOB_ID -o %l", time="1m") == "2:00"
    finally:
        slurm.run("scontrol", "update", "PartitionName=gpu", "MaxTime=INFINITE")
