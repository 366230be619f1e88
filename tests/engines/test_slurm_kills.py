"""Agents, submitting processes and kernels are killed at random while their jobs go to a real
Slurm: each job runs, and runs once.

``GPUSCHED_ENGINE_KILLS`` says how many; forty unless it does. With ``-s`` it tells what was done.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.handle import result_of
from gpusched_ipy.job import Job, JobKind, JobState
from tests.engines.slurmcluster import SlurmCluster
from tests.engines.victims import KINDS, Victims

# Read before the tests' own environment is made.
KILLS = int(os.environ.get("GPUSCHED_ENGINE_KILLS", "40"))
# Of 20 kills: a kernel takes seconds to start.
SHARES = dict(zip(KINDS, (12, 5, 3), strict=True))
MOST_OPEN = 6


@pytest.mark.chaos
@pytest.mark.kernel
@pytest.mark.timeout(300 + 20 * KILLS)
def test_whoever_dies_at_random_each_job_runs_once(
    queue: Queue, slurm: SlurmCluster, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    dice, began = random.Random(7), time.monotonic()
    environment = {
        "SLURM_CONF": str(slurm.conf),
        "GPUSCHED_ENGINE_DIR": str(tmp_path / "engines"),
    }
    victims = Victims(queue, tmp_path, dice, environment)
    order = [kind for kind, share in SHARES.items() for _ in range(-(-share * KILLS // 20))]
    dice.shuffle(order)
    for kind in order[:KILLS]:
        while len(queue.list()) < MOST_OPEN:
            victims.submit()
        victims.kill(kind)
    victims.close()
    queue.wait(timeout=250)
    jobs = queue.list(all=True)
    names = {job.name for job in jobs}
    ran = Counter(counted())
    told = (
        f"{sum(victims.kills.values())} kills {victims.kills}, {len(jobs)} jobs, ran twice "
        f"{sum(count > 1 for count in ran.values())}, lost {len(victims.must - ran.keys())}, "
        f"{time.monotonic() - began:.0f} s"
    )
    print(f"\n{told}")
    assert {job.state for job in jobs} == {JobState.COMPLETED}, told
    assert len(names) == len(jobs), "none stands twice in the record"
    assert victims.must <= names <= victims.must | victims.cells, told
    assert ran == Counter(names), told
    for job in jobs:
        came_home(queue, job)
    wait_until(lambda: not list((tmp_path / "engines").rglob("task.json")), 60, "no folder left")


def came_home(queue: Queue, job: Job) -> None:
    """What it has written, and what a cell has made, is here."""
    path = queue.log_path(job.id)
    assert path is not None
    if job.kind is JobKind.ISOLATED:
        assert "out" in path.read_text()
        assert result_of(queue, job) == {"y": 8}
    else:
        assert path.read_text() == "out kept\n"
