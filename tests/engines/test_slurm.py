"""A real Slurm: its reasons and refusals in its own words, its faults, and deaths on our side."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.engines import EngineState
from gpusched_ipy.engines.registry import make_engine
from gpusched_ipy.engineslist import listed
from gpusched_ipy.errors import UserError
from gpusched_ipy.facts import facts
from gpusched_ipy.handle import submit
from gpusched_ipy.job import Job, JobState, Place
from gpusched_ipy.look import job_record
from gpusched_ipy.summon import AgentLock, ensure_agent
from tests.engines.doomed import POINTS
from tests.engines.slurmcluster import SlurmCluster

pytestmark = pytest.mark.timeout(300)
_LONG_S = 150.0
ROOT = Path(__file__).parents[2]


def shell(queue: Queue, line: str, **options: object) -> Job:
    return queue.submit([line], shell=True, engine="slurm", **options)


def ended(queue: Queue, job: Job) -> Job:
    (job,) = queue.wait(job.id, timeout=_LONG_S)
    return job


def reason(queue: Queue, job: Job, words: str) -> str:
    """The wait reason of a job, once it says so."""

    def said() -> str | None:
        queue.mend({job.id: queue.show(job.id).state})
        why = queue.show(job.id).reason
        return why.text if why is not None and words in why.text else None

    return wait_until(said, 60, words) or ""


def test_it_is_listed_with_its_version_and_gpus(queue: Queue, slurm: SlurmCluster) -> None:
    (found,) = [one for one in listed(queue.settings) if one["name"] == "slurm"]
    assert (found["ready"], found["gpus"]) == (True, 2)
    assert found["version"]


def test_where_a_job_ran_and_what_it_cost_is_recorded(queue: Queue, slurm: SlurmCluster) -> None:
    job = ended(queue, shell(queue, "sleep 0.5", gpus=2))
    assert job.place == Place(engine="slurm", count=2, host=socket.gethostname(), gpus="0,1")
    record = job_record(queue, job)
    assert (record["gpus"], record["place"]["gpus"]) == ([], "0,1")
    assert record["gpu_s"] == pytest.approx(2 * record["run_s"], abs=0.002)
    told = dict(facts(record))
    assert told["place"] == f"{socket.gethostname()}, GPUs 0,1"
    (outcome,) = queue.store.outcomes(0.0)
    assert outcome.gpu_s == pytest.approx(record["gpu_s"], abs=0.002)


def test_its_own_reason_is_told_in_plain_words(queue: Queue, slurm: SlurmCluster) -> None:
    first = shell(queue, "sleep 300", gpus=2)
    wait_until(lambda: queue.show(first.id).state is JobState.RUNNING, 60)
    second = shell(queue, "true", gpus=2)
    assert reason(queue, second, "(Resources)") == "slurm: no GPU or node is idle (Resources)"
    # Ended there by hand, as an administrator would.
    slurm.run("scancel", *slurm.run("squeue", "-h", "-t", "R", "-o", "%i").split())
    first = ended(queue, first)
    assert first.state is JobState.CANCELLED
    assert "ended by slurm" in (first.error or "")
    assert ended(queue, second).state is JobState.COMPLETED


@pytest.mark.parametrize(
    ("options", "setting", "words"),
    [
        ({"gpus": 64}, "", "node configuration is not available"),
        ({"gpu_type": "h100"}, "", "node configuration is not available"),
        ({}, "--partition=nope", "invalid partition specified: nope"),
    ],
)
def test_what_it_refuses_has_failed_in_its_own_words(
    queue: Queue,
    slurm: SlurmCluster,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    setting: str,
    words: str,
) -> None:
    monkeypatch.setenv("GPUSCHED_SLURM_OPTIONS", setting)
    job = ended(queue, shell(queue, "true", **options))
    assert job.state is JobState.FAILED
    assert words in (job.error or "")


def test_a_node_that_does_not_see_the_folder_is_named_with_it(
    queue: Queue, slurm: SlurmCluster, tmp_path: Path
) -> None:
    probe = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True)
    if probe.returncode != 0:
        pytest.skip("no mounts of one's own are allowed here")
    folder = tmp_path / "engines"
    folder.mkdir(mode=0o700)
    slurm.kill("slurmd-n1")
    slurm.start_node(blind=folder)
    try:
        job = ended(queue, shell(queue, "true"))
    finally:
        slurm.kill("slurmd-n1")
        slurm.start_node()
    assert job.state is JobState.FAILED
    said = "slurm ended it before it began: its node could not start it (JobLaunchFailure); is "
    assert (job.error or "").startswith(f"{said}{folder}/")
    assert (job.error or "").endswith("/slurm seen by n1? (setting engine_dir)")


def test_a_frozen_and_a_dead_controller_cost_no_job(
    queue: Queue, slurm: SlurmCluster, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    slurm.signal("slurmctld", signal.SIGSTOP)
    try:
        job = shell(queue, f"echo frozen >> {tmp_path}/ran")
        reason(queue, job, "waits for slurm")
    finally:
        slurm.signal("slurmctld", signal.SIGCONT)
    assert ended(queue, job).state is JobState.COMPLETED
    slurm.kill_controller()
    dead = shell(queue, f"echo dead >> {tmp_path}/ran")
    assert "does not answer" in reason(queue, dead, "waits for slurm: its controller")
    slurm.start_controller()
    assert ended(queue, dead).state is JobState.COMPLETED
    assert counted() == ["frozen", "dead"]


def test_more_jobs_than_one_argument_holds_are_asked_for(slurm: SlurmCluster) -> None:
    keys = [f"{number:032x}-1-beef" for number in range(5000)]
    found = make_engine("slurm", Settings.load()).status(keys)
    assert found.keys() == set(keys)
    assert {status.state for status in found.values()} == {EngineState.UNKNOWN}


def test_a_function_and_its_result_go_through_a_folder(queue: Queue, slurm: SlurmCluster) -> None:
    def double(text: str) -> tuple[str, str]:
        import os

        return 2 * text, os.environ["CUDA_VISIBLE_DEVICES"]

    handle = submit(double, "ü☃", engine="slurm", queue=queue)
    assert handle.result(_LONG_S) in (("ü☃ü☃", "0"), ("ü☃ü☃", "1"))

    def bad() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        submit(bad, engine="slurm", queue=queue).result(_LONG_S)


@pytest.mark.parametrize(
    ("point", "members"),
    [*((point, 1) for point in POINTS), *((point, 3) for point in ("intended", "taken", "told"))],
)
def test_an_agent_that_dies_on_the_way_loses_nothing_and_runs_nothing_twice(
    queue: Queue,
    slurm: SlurmCluster,
    tmp_path: Path,
    counted: Callable[[], list[str]],
    point: str,
    members: int,
) -> None:
    lock = AgentLock(queue.state)
    assert lock.take(), "so that the submit starts no agent"
    line = f"echo $GPUSCHED_JOB_ID >> {tmp_path}/ran; echo out"
    asked: dict[str, object] = {"sweep": {"n": range(members)}} if members > 1 else {}
    jobs = queue.submit_all(
        [line], shell=True, engine="slurm", env=["WORD=kept"], name="doomed", **asked
    ).jobs
    lock.release()
    argv = [sys.executable, "-m", "tests.engines.doomed", point]
    argv += ["--state-dir", str(queue.state.root)]
    done = subprocess.run(argv, cwd=ROOT, timeout=_LONG_S, check=False)
    assert done.returncode == -signal.SIGKILL, "it was to die there"
    ensure_agent(queue.state)
    for job in queue.wait(*(job.id for job in jobs), timeout=_LONG_S):
        assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
        path = queue.log_path(job.id)
        assert path is not None
        assert path.read_text() == "out\n"
    assert sorted(map(int, counted())) == [job.id for job in jobs]


def test_what_cannot_leave_this_process_says_so(queue: Queue) -> None:
    preview = queue.preview(["true"], engine="slurm")
    assert "would wait: slurm decides when it starts" in str(preview)
    with pytest.raises(UserError, match="--mem shares a GPU of this machine"):
        shell(queue, "true", mem="8G")
    with pytest.raises(UserError, match="is no engine; there are local"):
        queue.submit(["true"], engine="moon")


def test_without_slurm_its_jobs_wait_with_a_word(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = [one for one in listed(Settings.load()) if one["name"] == "slurm"]
    assert found["ready"] is False
    assert found["about"] == "there is no scontrol on this machine"
    job = queue.submit(["/bin/true"], engine="slurm")
    assert reason(queue, job, "waits for slurm") == (
        "waits for slurm: there is no scontrol on this machine"
    )
