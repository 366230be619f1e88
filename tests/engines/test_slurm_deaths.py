"""The submitting process, or the notebook's kernel, dies between the first mark of a job and the
last: the job is found again by its uid, and runs once. (Agents: ``test_slurm.py``.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import wait_until
from kernels import started

from gpusched_ipy.api import Queue
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.summon import ensure_agent
from tests.engines.doomed import KERNELS, SUBMITTERS
from tests.engines.slurmcluster import SlurmCluster
from tests.engines.victims import gone

pytestmark = pytest.mark.timeout(300)
_LONG_S = 150.0
ROOT = Path(__file__).parents[2]


def came_home_once(queue: Queue, uid: str, counted: Callable[[], list[str]]) -> Job:
    """The job of that uid, once it has run, and run once."""
    (job,) = [job for job in queue.list(all=True) if job.spec.uid == uid]
    (job,) = queue.wait(job.id, timeout=_LONG_S)
    assert (job.state, job.attempts) == (JobState.COMPLETED, 1)
    assert counted() == ["run"]
    return job


@pytest.mark.parametrize("point", SUBMITTERS)
def test_a_submitting_process_that_dies_on_the_way_can_be_repeated(
    queue: Queue,
    slurm: SlurmCluster,
    tmp_path: Path,
    counted: Callable[[], list[str]],
    point: str,
) -> None:
    line = f"echo run >> {tmp_path}/ran; echo $WORD"
    rest = ["submit", "--engine", "slurm", "--key", "once", "--env", "WORD=kept", "--shell", line]
    argv = [sys.executable, "-m", "tests.engines.doomed", point, *rest]
    done = subprocess.run(argv, cwd=ROOT, timeout=_LONG_S, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, "it was to die there"
    before = [job.spec.uid for job in queue.list(all=True)]
    assert len(before) == (point != "kept"), "it stands in the record from its commit on"
    # Whoever does not know whether his submit went through repeats it.
    whole = [sys.executable, "-m", "gpusched_ipy", *rest]
    number = subprocess.check_output(whole, cwd=ROOT, timeout=_LONG_S, text=True)
    job = queue.show(int(number))
    assert before in ([], [job.spec.uid])
    job = came_home_once(queue, job.spec.uid, counted)
    path = queue.log_path(job.id)
    assert path is not None
    assert path.read_text() == "kept\n"


@pytest.mark.kernel
@pytest.mark.parametrize("point", KERNELS)
def test_a_kernel_that_dies_while_it_sends_a_cell_off_finds_it_again(
    queue: Queue,
    slurm: SlurmCluster,
    tmp_path: Path,
    counted: Callable[[], list[str]],
    point: str,
) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    found = {
        "SLURM_CONF": str(slurm.conf),
        "GPUSCHED_ENGINE_DIR": os.environ["GPUSCHED_ENGINE_DIR"],
        "GPUSCHED_STATE_DIR": str(queue.state.root),
    }
    with started(folder, **found) as kernel:
        armed = kernel.run(f"from tests.engines.doomed import arm; arm({point!r}); x = 1")
        assert armed.errors == []
        pid = kernel.manager.provisioner.pid
        kernel.send(
            "%%gpuqueue --engine slurm -n sent --in x --out y\n"
            f"with open('{tmp_path}/ran', 'a') as ran: print('run', file=ran)\ny = x + 1"
        )
        wait_until(lambda: gone(pid), 60, "it was to die there")
        jobs = queue.list(all=True)
        assert len(jobs) == (point != "parcelled"), "it stands in the record from its commit on"
        if jobs:
            ensure_agent(queue.state)  # as the next cell of any notebook would
            came_home_once(queue, jobs[0].spec.uid, counted)
        kernel.restart()
        assert kernel.run("%load_ext gpusched_ipy").errors == []
        if jobs:
            assert kernel.run("%gpuq fetch sent").errors == []
            assert kernel.run("y").results == ["2"]
        assert counted() == ["run"] * len(jobs)
