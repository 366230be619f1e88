"""The engine ``ray`` against a real Ray head with two fake GPUs; one head for all tests."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import files_with, wait_until

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
from gpusched_ipy.process import start_ticks
from tests.engines.ray_head import RayHead

# A Ray head takes 4 to 7 s to start, each job 2 s to begin; a loaded machine many times that.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SLOW_S = 120.0


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    found = RayHead(gpus=2)
    try:
        found.start()
        yield found
    finally:
        found.close()


@pytest.fixture
def engine(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> RayEngine:
    monkeypatch.setattr("gpusched_ipy.engines.ray.CALL_S", 60.0)
    return make(Settings.load({"ray_address": head.url, "ray_token_file": str(head.token_file)}))


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


def status(engine: RayEngine, job: EngineJob) -> Status:
    return engine.status([job.key])[job.key]


def becomes(engine: RayEngine, job: EngineJob, *states: EngineState) -> Status:
    def there() -> Status | None:
        found = status(engine, job)
        if found.state in states:
            return found
        time.sleep(0.2)  # each look costs the head more than us
        return None

    return wait_until(there, timeout=SLOW_S, what=f"{job.key} becomes {states}")


# -- a job's way


def test_a_job_runs_once_with_its_gpu_and_its_end_is_told(
    head: RayHead, engine: RayEngine, jobs: Jobs
) -> None:
    job = jobs.make(
        'echo "☃ $CUDA_VISIBLE_DEVICES $SECRET" | tr a-z A-Z; exit 7', secret="canary", kind="A100"
    )
    assert status(engine, job).state is EngineState.UNKNOWN
    assert engine.submit(job) == f"gpuq-{job.key}"
    engine.submit(job)  # as after a crash between its answer and our note
    assert (ended(job).ended, ended(job).exit_code) == ("exit", 7)
    assert job.folder.logs(0).decode() in ("☃ 0 CANARY\n", "☃ 1 CANARY\n")
    assert job.folder.logs(4) == job.folder.logs(0)[4:]
    done = becomes(engine, job, EngineState.FAILED)
    assert "exit code 7" in done.text
    assert done.where
    assert jobs.ran(job) == 1
    # Neither the secret nor the token is in what everybody on the cluster can see, or on a disk.
    shown = json.dumps(head.client()._ask("GET", "/api/jobs/"))
    assert job.key in shown
    assert "canary" not in shown
    assert head.token not in shown
    assert not files_with(jobs.root, "canary")
    assert not files_with(jobs.root, head.token)


def test_what_runs_and_what_waits_can_be_ended_and_is_found_again(
    engine: RayEngine, jobs: Jobs
) -> None:
    both = jobs.make("trap '' INT; echo begun; sleep 100", gpus=2)
    waits = jobs.make("echo never")
    engine.submit(both)
    wait_until(lambda: both.folder.logs(0), timeout=SLOW_S, what="the first to run")
    engine.submit(waits)
    assert "GPUs" in becomes(engine, waits, EngineState.QUEUED).text
    assert status(engine, both).state is EngineState.RUNNING
    assert {both.key, waits.key} <= set(engine.reattach())
    # Ray cannot take back what waits: that nothing of it will run is the claim's doing.
    assert waits.folder.revoke()
    both.folder.ask_to_cancel()
    engine.cancel([both.key, waits.key, "no-such-job"])
    assert ended(both).ended == "cancel"
    assert becomes(engine, both, EngineState.CANCELLED, EngineState.FAILED)
    becomes(engine, waits, EngineState.ENDED, EngineState.CANCELLED, EngineState.FAILED)
    assert jobs.ran(waits) == 0
    assert not {both.key, waits.key} & set(engine.reattach())


def test_what_cannot_be_is_refused_in_words(engine: RayEngine, jobs: Jobs) -> None:
    with pytest.raises(RejectedError, match="3 GPUs are asked for; the largest node of Ray has 2"):
        engine.submit(jobs.make("true", gpus=3))
    nowhere = EngineJob(key=uuid.uuid4().hex, folder=JobFolder(Path("/nowhere")), name="x")
    engine.submit(nowhere)
    failed = becomes(engine, nowhere, EngineState.FAILED)
    assert "/nowhere/node.py" in failed.text  # Python's own words: the node sees no such folder
    assert "No such file" in failed.text


# -- the head


def test_who_may_not_is_told_so_and_the_token_never_shows(
    head: RayHead, engine: RayEngine, jobs: Jobs, tmp_path: Path
) -> None:
    health = engine.ping(30)
    assert (health.up, health.text, health.gpus) == (True, "Ray on 1 node", 2)
    assert health.version
    wrong = tmp_path / "wrong"
    wrong.write_text("c0ffee" * 10)
    for settings, words in (
        ({"ray_token_file": str(wrong)}, "Invalid authentication token"),
        ({"ray_token_file": str(tmp_path / "none")}, "cannot be read"),
    ):
        stranger = make(Settings.load({"ray_address": head.url, **settings}))
        health = stranger.ping(30)
        assert not health.up
        assert words in health.text
        assert "c0ffee" not in health.text
        with pytest.raises(UnreachableError, match=words):
            stranger.submit(jobs.make("true"))
    with pytest.raises(AnswerError, match="Missing authentication token"):
        RayJobs(head.url, None, limit_s=30).jobs()


def test_a_head_that_dies_is_said_to_be_down_and_its_jobs_run_no_second_time(
    head: RayHead, engine: RayEngine, jobs: Jobs
) -> None:
    runs, over = jobs.make("echo $$; exec sleep 100"), jobs.make("true")
    engine.submit(over)
    ended(over)
    engine.submit(runs)
    pid = int(wait_until(lambda: runs.folder.logs(0), timeout=SLOW_S, what="it runs"))
    head.lose_node()
    wait_until(lambda: start_ticks(pid) is None, SLOW_S, "the end of the command on a lost node")
    head.kill()
    assert not engine.ping(5).up
    assert f"{head.url} cannot be reached" in engine.ping(5).text
    for call in (
        lambda: engine.submit(jobs.make("true")),
        lambda: engine.status([runs.key]),
        lambda: engine.cancel([runs.key]),
        engine.reattach,
    ):
        with pytest.raises(UnreachableError, match="Connection refused"):
            call()
    head.start(RAY_JOB_START_TIMEOUT_SECONDS="6")  # of 15 minutes
    found = engine.status([runs.key, over.key])
    assert {one.state for one in found.values()} == {EngineState.UNKNOWN}
    assert runs.folder.result() is None
    engine.submit(runs)  # somebody believes that it never ran
    # (On a machine too loaded for those 6 s Ray gives it up instead.)
    becomes(engine, runs, EngineState.ENDED, EngineState.UNKNOWN)
    # What Ray gives up waiting for is for the queue to hand over again.
    waits = jobs.make("true", kind="NONE")
    engine.submit(waits)
    assert status(engine, waits).state is EngineState.QUEUED
    given_up = becomes(engine, waits, EngineState.UNKNOWN)
    assert "failed to start within 6.0 seconds" in given_up.text
    assert (jobs.ran(runs), jobs.ran(over), jobs.ran(waits)) == (1, 1, 0)
