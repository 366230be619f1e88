"""The engine ``ray`` against a real Ray head with two fake GPUs; one head for all tests."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

import pytest
from helpers import files_with, wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.engines import (
    EngineJob,
    EngineState,
    RejectedError,
    Status,
    UnreachableError,
)
from gpusched_ipy.engines.folder import JobFolder, Result, Task
from gpusched_ipy.engines.ray import RayEngine, make
from gpusched_ipy.engines.rayjobs import AnswerError, RayJobs
from gpusched_ipy.engineslist import listed
from gpusched_ipy.job import JobState
from gpusched_ipy.process import start_ticks
from tests.engines.ray_head import RayHead

# A Ray head takes 4 to 7 s to start, each job 2 s to begin; a loaded machine many times that.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300, func_only=True)]
SLOW_S = 120.0


@pytest.fixture
def ray_engine(ray_head: RayHead, monkeypatch: pytest.MonkeyPatch) -> RayEngine:
    monkeypatch.setattr("gpusched_ipy.engines.ray.CALL_S", 60.0)
    return make(
        Settings.load({"ray_address": ray_head.url, "ray_token_file": str(ray_head.token_file)})
    )


class Jobs:
    """Makes jobs in a folder of this test."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(
        self, script: str, *, gpus: int = 1, secret: str = "", kind: str | None = None
    ) -> EngineJob:
        """A job of one line for the shell; each run of it writes a line into ``ran.<key>``."""
        key = uuid.uuid4().hex
        folder = JobFolder(self.root / key)
        task = Task(
            argv=(f"echo run >> {self.root}/ran.{key}; {script}",),
            shell=True,
            cwd=str(self.root),
            env={"PATH": os.environ["PATH"]},
        )
        folder.make(task, {"SECRET": secret} if secret else {})
        return EngineJob(key=key, folder=folder, name="☃ train", gpus=gpus, gpu_type=kind)

    def ran(self, job: EngineJob) -> int:
        """How often it has run, as it says itself."""
        path = self.root / f"ran.{job.key}"
        return path.read_text().count("run\n") if path.exists() else 0


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    root = tmp_path / "jobs"
    root.mkdir()
    return Jobs(root)


def ended(job: EngineJob) -> Result:
    return wait_until(job.folder.result, timeout=SLOW_S, what=f"the result of {job.key}")


def status(ray_engine: RayEngine, job: EngineJob) -> Status:
    return ray_engine.status([job.key])[job.key]


def becomes(ray_engine: RayEngine, job: EngineJob, *states: EngineState) -> Status:
    def there() -> Status | None:
        found = status(ray_engine, job)
        if found.state in states:
            return found
        time.sleep(0.2)  # each look costs the head more than us
        return None

    return wait_until(there, timeout=SLOW_S, what=f"{job.key} becomes {states}")


# -- a job's way


def test_a_job_runs_once_with_its_gpu_and_its_end_is_told(
    ray_head: RayHead, ray_engine: RayEngine, jobs: Jobs
) -> None:
    job = jobs.make(
        'echo "☃ $CUDA_VISIBLE_DEVICES $SECRET" | tr a-z A-Z; exit 7', secret="canary", kind="A100"
    )
    assert status(ray_engine, job).state is EngineState.UNKNOWN
    assert ray_engine.submit(job) == f"gpuq-{job.key}"
    ray_engine.submit(job)  # as after a crash between its answer and our note
    assert (ended(job).ended, ended(job).exit_code) == ("exit", 7)
    assert job.folder.logs(0).decode() in ("☃ 0 CANARY\n", "☃ 1 CANARY\n")
    assert job.folder.logs(4) == job.folder.logs(0)[4:]
    done = becomes(ray_engine, job, EngineState.FAILED)
    assert "exit code 7" in done.text
    assert done.where
    assert jobs.ran(job) == 1
    # Neither the secret nor the token is in what everybody on the cluster can see, or on a disk.
    shown = json.dumps(ray_head.client()._ask("GET", "/api/jobs/"))
    assert job.key in shown
    assert "canary" not in shown
    assert ray_head.token not in shown
    assert not files_with(jobs.root, "canary")
    assert not files_with(jobs.root, ray_head.token)


def test_what_runs_and_what_waits_can_be_ended_and_is_found_again(
    ray_engine: RayEngine, jobs: Jobs
) -> None:
    both = jobs.make("trap '' INT; echo begun; sleep 100", gpus=2)
    waits = jobs.make("echo never")
    ray_engine.submit(both)
    wait_until(lambda: both.folder.logs(0), timeout=SLOW_S, what="the first to run")
    ray_engine.submit(waits)
    assert "GPUs" in becomes(ray_engine, waits, EngineState.QUEUED).text
    assert status(ray_engine, both).state is EngineState.RUNNING
    assert {both.key, waits.key} <= set(ray_engine.reattach())
    # Ray cannot take back what waits: that nothing of it will run is the claim's doing.
    assert waits.folder.revoke()
    both.folder.ask_to_cancel()
    ray_engine.cancel([both.key, waits.key, "no-such-job"])
    assert ended(both).ended == "cancel"
    assert becomes(ray_engine, both, EngineState.CANCELLED, EngineState.FAILED)
    becomes(ray_engine, waits, EngineState.ENDED, EngineState.CANCELLED, EngineState.FAILED)
    assert jobs.ran(waits) == 0
    assert not {both.key, waits.key} & set(ray_engine.reattach())


def test_what_cannot_be_is_refused_in_words(ray_engine: RayEngine, jobs: Jobs) -> None:
    with pytest.raises(RejectedError, match="3 GPUs are asked for; the largest node of Ray has 2"):
        ray_engine.submit(jobs.make("true", gpus=3))
    nowhere = EngineJob(key=uuid.uuid4().hex, folder=JobFolder(Path("/nowhere")), name="x")
    ray_engine.submit(nowhere)
    failed = becomes(ray_engine, nowhere, EngineState.FAILED)
    assert "/nowhere/node.py" in failed.text  # Python's own words: the node sees no such folder
    assert "No such file" in failed.text


# -- the head


def test_who_may_not_is_told_so_and_the_token_never_shows(
    ray_head: RayHead, ray_engine: RayEngine, jobs: Jobs, tmp_path: Path
) -> None:
    health = ray_engine.ping(30)
    assert (health.up, health.text, health.gpus) == (True, "Ray on 1 node", 2)
    assert health.version
    wrong = tmp_path / "wrong"
    wrong.write_text("c0ffee" * 10)
    for settings, words in (
        ({"ray_token_file": str(wrong)}, "Invalid authentication token"),
        ({"ray_token_file": str(tmp_path / "none")}, "cannot be read"),
    ):
        stranger = make(Settings.load({"ray_address": ray_head.url, **settings}))
        health = stranger.ping(30)
        assert not health.up
        assert words in health.text
        assert "c0ffee" not in health.text
        with pytest.raises(UnreachableError, match=words):
            stranger.submit(jobs.make("true"))
    with pytest.raises(AnswerError, match="Missing authentication token"):
        RayJobs(ray_head.url, None, limit_s=30).jobs()


def test_without_its_head_a_job_waits_and_says_so(
    ray_head: RayHead, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setenv("GPUSCHED_RAY_ADDRESS", nobody)
    monkeypatch.setenv("GPUSCHED_RAY_TOKEN_FILE", str(ray_head.token_file))
    job = queue.submit(["true"], engine="ray")

    def said() -> str:
        reason = queue.show(job.id).reason
        return reason.text if reason is not None and nobody in reason.text else ""

    text = wait_until(said, SLOW_S, "a reason that names the head")
    assert text.startswith(f"waits for ray: {nobody} cannot be reached: ")
    assert "Connection refused" in text
    assert queue.cancel(job.id)[0].state is JobState.CANCELLED
    for address, ready in ((nobody, False), (ray_head.url, True)):
        monkeypatch.setenv("GPUSCHED_RAY_ADDRESS", address)
        (ray,) = (one for one in listed(Settings.load()) if one["name"] == "ray")
        assert ray["ready"] is ready, ray["about"]
        assert ray["gpus"] == (2 if ready else None)


def test_a_head_that_dies_is_said_to_be_down_and_its_jobs_run_no_second_time(
    ray_head: RayHead, ray_engine: RayEngine, jobs: Jobs
) -> None:
    runs, over = jobs.make("echo $$; exec sleep 100"), jobs.make("true")
    ray_engine.submit(over)
    ended(over)
    ray_engine.submit(runs)
    pid = int(wait_until(lambda: runs.folder.logs(0), timeout=SLOW_S, what="it runs"))
    ray_head.lose_node()
    wait_until(lambda: start_ticks(pid) is None, SLOW_S, "the end of the command on a lost node")
    ray_head.kill()
    assert not ray_engine.ping(5).up
    assert f"{ray_head.url} cannot be reached" in ray_engine.ping(5).text
    for call in (
        lambda: ray_engine.submit(jobs.make("true")),
        lambda: ray_engine.status([runs.key]),
        lambda: ray_engine.cancel([runs.key]),
        ray_engine.reattach,
    ):
        with pytest.raises(UnreachableError, match="Connection refused"):
            call()
    ray_head.start(RAY_JOB_START_TIMEOUT_SECONDS="6")  # of 15 minutes
    found = ray_engine.status([runs.key, over.key])
    assert {one.state for one in found.values()} == {EngineState.UNKNOWN}
    assert runs.folder.result() is None
    ray_engine.submit(runs)  # somebody believes that it never ran
    # (On a machine too loaded for those 6 s Ray gives it up instead.)
    becomes(ray_engine, runs, EngineState.ENDED, EngineState.UNKNOWN)
    # What Ray gives up waiting for is for the queue to hand over again.
    waits = jobs.make("true", kind="NONE")
    ray_engine.submit(waits)
    assert status(ray_engine, waits).state is EngineState.QUEUED
    given_up = becomes(ray_engine, waits, EngineState.UNKNOWN)
    assert "failed to start within 6.0 seconds" in given_up.text
    assert (jobs.ran(runs), jobs.ran(over), jobs.ran(waits)) == (1, 1, 0)
