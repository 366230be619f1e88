"""What every engine does alike, the queue's own GPUs included: the same submit, the same end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job, JobState

# The start of an engine is not in it: that has limits of its own.
pytestmark = pytest.mark.timeout(240, func_only=True)
_LONG_S = 120.0


def shell(queue: Queue, engine: str, line: str, **options: object) -> Job:
    return queue.submit([line], shell=True, engine=engine, **options)


def ended(queue: Queue, *jobs: Job) -> list[Job]:
    return queue.wait(*(job.id for job in jobs), timeout=_LONG_S)


def log(queue: Queue, job: Job) -> str:
    path = queue.log_path(job.id)
    return "" if path is None else path.read_text("utf-8")


def state(queue: Queue, job: Job) -> JobState:
    queue.mend({job.id: queue.show(job.id).state})
    return queue.show(job.id).state


def runs(queue: Queue, job: Job) -> bool:
    return state(queue, job) is JobState.RUNNING


def test_ends_are_told_as_they_were(queue: Queue, engine: str, tmp_path: Path) -> None:
    big = [f"BIG_{number}={'x' * 100_000}" for number in range(10)]
    well = shell(queue, engine, "echo ünïcode ☃; echo 'to stderr' >&2", name="größe ☃")
    three = shell(queue, engine, "exit 3")
    killed = shell(queue, engine, "kill -SEGV $$")
    heavy = shell(queue, engine, "echo $WORD ${#BIG_0} ${#BIG_9}", env=["WORD=s3cret", *big])
    here = shell(queue, engine, "pwd; echo job $GPUSCHED_JOB_ID", cwd=tmp_path)
    late = shell(queue, engine, "sleep 60", time=1)
    well, three, killed, heavy, here, late = ended(queue, well, three, killed, heavy, here, late)
    assert (well.state, well.exit_code) == (JobState.COMPLETED, 0)
    assert log(queue, well) == "ünïcode ☃\nto stderr\n"
    assert (three.state, three.exit_code) == (JobState.FAILED, 3)
    assert (killed.state, killed.signal) == (JobState.FAILED, signal.SIGSEGV)
    assert log(queue, heavy) == "s3cret 100000 100000\n"
    assert log(queue, here) == f"{tmp_path}\njob {here.id}\n"
    assert late.state is JobState.TIMEOUT
    assert {job.spec.engine for job in (well, three, killed, heavy, here, late)} == {engine}


def test_each_job_sees_its_own_gpus_and_no_other(queue: Queue, engine: str) -> None:
    both = shell(queue, engine, "echo $CUDA_VISIBLE_DEVICES", gpus=2)
    one = shell(queue, engine, "echo $CUDA_VISIBLE_DEVICES")
    ended(queue, both, one)
    assert len(log(queue, both).strip().split(",")) == 2
    assert len(log(queue, one).strip().split(",")) == 1


def test_higher_priority_runs_first(
    queue: Queue, engine: str, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    go = tmp_path / "go"
    first = shell(queue, engine, f"while ! test -e {go}; do sleep 0.1; done", gpus=2)
    wait_until(lambda: runs(queue, first), 60)
    jobs = [
        shell(queue, engine, f"echo {priority} >> {tmp_path}/ran", gpus=2, priority=priority)
        for priority in (0, 5, -3)
    ]
    last = shell(queue, engine, f"echo 9 >> {tmp_path}/ran", gpus=2, hold=True, priority=9)
    wait_until(lambda: queue.show(jobs[-1].id).reason, 60)
    go.touch()
    ended(queue, *jobs)
    assert counted() == ["5", "0", "-3"]
    assert queue.show(last.id).state is JobState.PENDING
    queue.release(last.id)
    ended(queue, last)
    assert counted()[-1] == "9"


def test_a_pending_and_a_running_job_are_cancelled(
    queue: Queue, engine: str, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    running = shell(queue, engine, "echo begun; sleep 300", gpus=2)
    wait_until(lambda: runs(queue, running) and "begun" in log(queue, running), 60)
    waiting = shell(queue, engine, f"echo ran >> {tmp_path}/ran", gpus=2)
    wait_until(lambda: queue.show(waiting.id).reason, 60)
    assert queue.cancel(waiting.id)[0].state is JobState.CANCELLED
    queue.cancel(running.id)
    after = shell(queue, engine, f"echo after >> {tmp_path}/ran", gpus=2)
    cancelled, after = ended(queue, running, after)
    assert cancelled.state is JobState.CANCELLED
    assert after.state is JobState.COMPLETED
    assert counted() == ["after"], "the cancelled one has never run"


def test_a_job_waits_for_those_it_comes_after(
    queue: Queue, engine: str, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    first = shell(queue, engine, f"sleep 0.3; echo first >> {tmp_path}/ran")
    bad = shell(queue, engine, "exit 1")
    then = shell(queue, engine, f"echo then >> {tmp_path}/ran", after=first)
    never = shell(queue, engine, f"echo never >> {tmp_path}/ran", after=bad)
    *_, then, never = ended(queue, first, bad, then, never)
    assert counted() == ["first", "then"]
    assert never.state is JobState.CANCELLED
    assert then.state is JobState.COMPLETED


def test_a_killed_agent_is_replaced_and_nothing_runs_twice(
    queue: Queue, engine: str, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    go = tmp_path / "go"
    line = (
        f"echo run >> {tmp_path}/ran; echo one; while ! test -e {go}; do sleep 0.1; done; echo two"
    )
    job = shell(queue, engine, line, gpus=2)
    wait_until(lambda: runs(queue, job) and counted(), 60)
    agent = running_agent(queue.state, queue.store)
    assert agent is not None
    os.kill(agent, signal.SIGKILL)
    go.touch()
    (job,) = ended(queue, job)
    assert job.state is JobState.COMPLETED
    assert log(queue, job) == "one\ntwo\n"
    assert counted() == ["run"]


def test_a_failed_job_is_tried_again(
    queue: Queue, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"test -e {tmp_path}/again || {{ touch {tmp_path}/again; exit 1; }}; echo $WORD"
    monkeypatch.setenv("GPUSCHED_RETRY_DELAY_S", "0.2")
    quick = Queue(Settings.load())
    (job,) = ended(quick, shell(quick, engine, line, retries=2, env=["WORD=kept"]))
    assert (job.state, job.attempts) == (JobState.COMPLETED, 2)
    assert log(quick, job) == "kept\n"
    quick.store.close()
