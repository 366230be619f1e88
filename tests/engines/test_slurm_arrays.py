"""Sweeps at a real Slurm: one array, whose members stay jobs of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.job import JobState
from tests.engines.slurmcluster import SlurmCluster

pytestmark = pytest.mark.timeout(300)


def tasks(slurm: SlurmCluster) -> dict[str, str]:
    """The state of each task that waits or runs, by its place in its array."""
    listed = slurm.run("squeue", "-r", "-h", "-o", "%K|%T").split()
    return dict(line.split("|") for line in listed)


def test_the_members_of_an_array_are_held_cancelled_and_tried_again_alone(
    queue: Queue, slurm: SlurmCluster, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    go, again = tmp_path / "go", tmp_path / "again"
    line = (
        f"echo $GPUSCHED_ARRAY_INDEX ${{SLURM_ARRAY_TASK_ID-none}} >> {tmp_path}/ran; "
        f"while ! test -e {go}; do sleep 0.1; done; "
        f"test $GPUSCHED_ARRAY_INDEX != 1 || test -e {again} || {{ touch {again}; exit 1; }}"
    )
    jobs = queue.submit_all(
        [line], shell=True, engine="slurm", sweep={"n": range(5)}, retries=1, name="five"
    ).jobs
    there = {"0": "RUNNING", "1": "RUNNING", "2": "PENDING", "3": "PENDING"}
    wait_until(lambda: tasks(slurm) == there, 60, "an array of four")
    queue.cancel(jobs[3].id)
    wait_until(lambda: "3" not in tasks(slurm), 60, "one cancelled")
    assert tasks(slurm)["2"] == "PENDING", "the one beside it waits on"
    queue.hold(jobs[2].id)
    wait_until(lambda: "2" not in tasks(slurm), 60, "one taken back")
    assert [tasks(slurm)[place] for place in "01"] == ["RUNNING"] * 2
    queue.release(jobs[2].id)
    go.touch()
    ended = queue.wait(*(job.id for job in jobs), timeout=150)
    well = JobState.COMPLETED
    assert [job.state for job in ended] == [well, well, well, JobState.CANCELLED, well]
    assert [job.attempts for job in ended] == [1, 2, 1, 0, 1]
    once = ["0 none", "2 none", "4 none"]
    assert Counter(counted()) == Counter([*once, "1 none", "1 none"])


def test_a_sweep_is_cancelled_as_a_whole(queue: Queue, slurm: SlurmCluster) -> None:
    jobs = queue.submit_all(
        ["sleep 300"], shell=True, engine="slurm", sweep={"n": range(4)}, name="four"
    ).jobs
    wait_until(lambda: Counter(tasks(slurm).values())["RUNNING"] == 2, 60, "two run")
    queue.cancel("four")
    ended = queue.wait(*(job.id for job in jobs), timeout=100)
    assert {job.state for job in ended} == {JobState.CANCELLED}
    wait_until(lambda: not tasks(slurm), 60, "nothing there")
