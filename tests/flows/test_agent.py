"""The agent's comings and goings, and what a stopped process keeps: all of it real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobKind, JobSpec, JobState
from gpusched_ipy.leftovers import holders
from gpusched_ipy.locks import GpuLocks, alive_pid, log_is_held

PYTHON = sys.executable

# Runs a module of the package; agents, also those that shims start, leave almost at once.
HASTY = """
import sys
from importlib import import_module
from gpusched_ipy import process
process.python_argv = lambda module, *rest, isolated=True: [
    sys.executable, __file__, module, *rest
]
from gpusched_ipy import agent  # what it imports takes the name over
agent.LINGER_S = 0.02
if sys.argv[1] == "agent":
    print("start", file=open(__file__ + ".starts", "a"))
sys.exit(import_module(f"gpusched_ipy.{sys.argv[1]}").main(sys.argv[2:]))
"""


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def test_of_sixteen_simultaneous_starts_one_agent_stays(queue: Queue, tmp_path: Path) -> None:
    """They wait at a gate, so that all of them reach for the lock at the same moment."""
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    gated = (
        "import os, sys, time\nfrom gpusched_ipy.agent import main\nprint('ready', flush=True)\n"
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.001)\n"
        f"sys.exit(main(['--state-dir', {str(queue.state.root)!r}]))"
    )
    jobs = queue.store.submit_all(
        [
            JobSpec(
                uid=f"u{place}", kind=JobKind.COMMAND, name="job", shell=True, cwd="/",
                argv=(f"echo {place} >> {trace}",), env={"PATH": "/usr/bin:/bin"},
            )
            for place in range(3)
        ]
    )  # fmt: skip
    argv = [PYTHON, "-c", gated]
    starts = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(16)]
    try:
        for one in starts:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        gate.touch()
        wait_until(lambda: sum(one.poll() is None for one in starts) == 1, 90, "one stays")
        (stays,) = [one for one in starts if one.poll() is None]
        assert {one.returncode for one in starts if one is not stays} == {0}
        assert running_agent(queue.state, queue.store) == stays.pid
        wait_until(lambda: all(queue.show(job.id).ended for job in jobs), 60, "they have run")
        assert trace.read_text() == "0\n1\n2\n"
    finally:
        for one in starts:
            one.terminate()
            one.wait(60)
            assert one.stdout is not None
            one.stdout.close()


def test_no_job_that_comes_while_the_agent_leaves_is_forgotten(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "hasty.py"
    script.write_text(HASTY)
    monkeypatch.setattr(
        "gpusched_ipy.summon.python_argv",
        lambda module, *rest: [PYTHON, str(script), module, *rest],
    )
    starts = 0
    for place in range(60):
        job = queue.submit(["true"])
        # Nobody helps: ``Queue.wait`` would start an agent where none is.
        wait_until(lambda job=job: queue.show(job.id).ended, what=f"job {place} has run")
        starts = Path(f"{script}.starts").read_text().count("start")
        if place >= 11 and starts >= 3:
            break
        # From its end on the agent is about to leave; the next one comes a little later each time.
        time.sleep(place % 12 * 0.005)
    assert starts >= 3, "the agent has hardly ever left: nothing was tried"


@pytest.mark.parametrize("how", ["cancel", "walltime"])
def test_what_a_dead_shim_has_left_is_ended_and_nobody_else(
    queue: Queue, tmp_path: Path, how: str
) -> None:
    """Two processes, one of them in a session of its own; and a stranger who reads the log."""
    ready = tmp_path / "ready"
    line = (
        f"trap '' INT; setsid sleep 300 & echo $! >> {ready}; sleep 300 & "
        f"echo $! >> {ready}; wait; sleep 300"
    )
    limit = 15.0 if how == "walltime" else None
    job = queue.submit([line], shell=True, time=limit)
    wait_until(lambda: ready.exists() and len(ready.read_text().split()) == 2, 60, "they run")
    reader = subprocess.Popen(["tail", "-f", str(queue.log_path(job.id))])
    member = queue.show(job.id).member
    assert member is not None
    shim = alive_pid(queue.state, member)
    assert shim
    os.kill(shim, signal.SIGKILL)
    wait_until(lambda: alive_pid(queue.state, member) is None, what="the shim is dead")
    log = queue.state.log(str(queue.show(job.id).attempt))
    if how == "cancel":
        assert len(holders(log)) >= 3
        queue.cancel(job.id)
    wait_until(lambda: queue.show(job.id).ended, 60, "it is ended")
    assert queue.show(job.id).state is JobState.LOST
    assert not log_is_held(log)
    assert reader.poll() is None
    reader.kill()
    reader.wait()


@pytest.mark.parametrize("stopped", ["job", "shim", "agent"])
def test_nobody_else_gets_the_gpu_of_what_is_stopped(
    queue: Queue, tmp_path: Path, stopped: str
) -> None:
    go, begun = tmp_path / "go", tmp_path / "begun"
    code = (
        f"import os, pathlib, time\npathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    )
    first = queue.submit([PYTHON, "-c", code])
    pid = int(wait_until(lambda: begun.exists() and begun.read_text(), 60, "it begins"))
    member = queue.show(first.id).member
    assert member is not None
    agent, shim = running_agent(queue.state, queue.store), alive_pid(queue.state, member)
    assert agent
    assert shim
    victim = {"job": pid, "shim": shim, "agent": agent}[stopped]
    os.kill(victim, signal.SIGSTOP)
    try:
        # A member of its own, which needs no agent for a start.
        other = subprocess.Popen([PYTHON, "-m", "gpusched_ipy", "run", "--name", "other", "true"])
        waiting = wait_until(lambda: [job for job in queue.list() if job.name == "other"], 60)[0]
        why = f"GPU 0: job {first.id} ({first.name}) is on it"
        wait_until(lambda: why in str(queue.show(waiting.id).reason), 60, "it says why it waits")
        assert GpuLocks(queue.state.root / "gpu").occupied("GPU-fake-0")
        go.touch()
        if stopped == "job":
            assert queue.show(waiting.id).state is JobState.PENDING
    finally:
        os.kill(victim, signal.SIGCONT)
    assert other.wait(60) == 0
    assert queue.wait(first.id, timeout=60)[0].state is JobState.COMPLETED
    ended, began = queue.show(first.id).ended_at, queue.show(waiting.id).started_at
    assert ended is not None
    assert began is not None
    assert began >= ended or stopped == "shim"
