"""Nodes that die, and what Slurm's accounts say afterwards: two nodes, slurmdbd, a database."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import wait_until
from requires import require

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.engines import EngineState
from gpusched_ipy.engines.registry import make_engine
from gpusched_ipy.job import Job, JobState
from tests.engines import slurmaccounts, slurmcluster
from tests.engines.slurmcluster import SlurmCluster

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def accounted() -> Iterator[SlurmCluster]:
    """A Slurm of two nodes, with accounts."""
    lacks = slurmcluster.missing() or slurmaccounts.missing()
    require("slurm", not lacks, f"Slurm with accounting is not installed: there is no {lacks}")
    cluster = SlurmCluster(nodes=2, accounting=True, node_timeout=6)
    yield cluster
    cluster.stop()


@pytest.fixture
def two_nodes(
    accounted: SlurmCluster, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    """That Slurm, empty, and found by what the test starts."""
    monkeypatch.setenv("SLURM_CONF", str(accounted.conf))
    yield accounted
    accounted.empty()


def claims(root: Path) -> dict[str, int]:
    """The process of each job that a node runs, by the key of its folder."""
    found = {}
    for path in root.rglob("claim"):
        text = path.read_text()
        if text:
            found[path.parent.name] = json.loads(text)["pid"]
    return found


def test_a_node_that_dies_loses_its_jobs_and_asked_ones_run_again(
    queue: Queue, two_nodes: SlurmCluster, tmp_path: Path, counted: Callable[[], list[str]]
) -> None:
    two_nodes.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")

    def runs(word: str, **options: object) -> Job:
        line = f"echo {word} $SLURMD_NODENAME >> {tmp_path}/ran; "
        line += "test $SLURMD_NODENAME = n2 || sleep 300"
        return queue.submit([line], shell=True, engine="slurm", **options)

    once, again = runs("once"), runs("again", requeue=True)
    wait_until(lambda: len(counted()) == 2, 100, "both on the first node")
    there = claims(tmp_path / "engines")
    keys = sorted(there, key=lambda key: once.spec.uid not in key)
    two_nodes.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    two_nodes.kill_node("n1", *there.values())
    try:
        lost, done = queue.wait(once.id, again.id, timeout=250)
    finally:
        two_nodes.start_node("n1")
    assert lost.state is JobState.LOST
    assert "its node failed (NODE_FAIL)" in (lost.error or "")
    assert (done.state, done.attempts) == (JobState.COMPLETED, 2)
    assert sorted(counted()) == ["again n1", "again n2", "once n1"]
    # What the controller has forgotten, its accounts still know.
    engine = make_engine("slurm", Settings.load())
    assert engine.ping(20.0).up
    two_nodes.forget()
    status = engine.status([*keys, "f0-1-none"])
    assert {status[key].state for key in keys} == {EngineState.FAILED}
    assert status[keys[0]].text == "its node failed (NODE_FAIL)"
    assert status["f0-1-none"].state is EngineState.UNKNOWN
    # They are never needed: without them all is as where a site has none.
    assert two_nodes.accounts is not None
    two_nodes.accounts.stop_daemon()
    assert engine.status(keys)[keys[0]].state is EngineState.UNKNOWN
    two_nodes.accounts.start_daemon()
