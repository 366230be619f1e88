"""Agents are killed at random while their jobs go to a real Slurm: each job runs, and runs once.

``GPUSCHED_ENGINE_KILLS`` says how many; a dozen unless it does.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.job import JobState
from gpusched_ipy.process import start_ticks
from gpusched_ipy.summon import ensure_agent
from tests.engines.slurmcluster import SlurmCluster

# Read before the tests' own environment is made.
KILLS = int(os.environ.get("GPUSCHED_ENGINE_KILLS", "12"))


def gone(pid: int) -> bool:
    """Whether it is dead with all its threads: the last one takes its locks along."""
    try:
        return start_ticks(pid) is None and len(os.listdir(f"/proc/{pid}/task")) < 2
    except OSError:
        return True


@pytest.mark.chaos
@pytest.mark.timeout(300 + 20 * KILLS)
def test_agents_die_at_random_and_each_job_runs_once(
    queue: Queue, slurm: SlurmCluster, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    dice = random.Random(7)
    killed, jobs = 0, []
    while killed < KILLS:
        while len(queue.list()) < 6:
            line = (
                f"echo $GPUSCHED_JOB_ID >> {tmp_path}/ran; echo out; sleep 0.{dice.randint(0, 9)}"
            )
            priority = dice.randint(-3, 3)
            jobs.append(queue.submit([line], shell=True, engine="slurm", priority=priority).id)
        ensure_agent(queue.state)
        agent = wait_until(lambda: running_agent(queue.state, queue.store), 60, "an agent")
        # Anywhere in what an agent does: how long that takes is what is drawn.
        time.sleep(dice.uniform(0.0, 1.5))
        with suppress(ProcessLookupError):  # it may just have left by itself
            os.kill(agent, signal.SIGKILL)
        wait_until(partial(gone, agent), 60, "its end")
        killed += 1
    ended = queue.wait(*jobs, timeout=250)
    assert {job.state for job in ended} == {JobState.COMPLETED}
    assert Counter(counted()) == Counter(map(str, jobs))
    for job in ended:
        path = queue.log_path(job.id)
        assert path is not None
        assert path.read_text() == "out\n"
    wait_until(lambda: not list((tmp_path / "engines").rglob("task.json")), 60, "no folder left")
