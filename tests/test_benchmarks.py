"""The benchmark against the peers: ours is driven there as its user drives it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_nvml import need_cc
from helpers import wait_until

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    need_cc()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _peers import measures
    from _peers.ours import Ours

    with measures.scene(Ours, tmp_path, tmp_path) as made:
        yield made
    assert made.peer.processes() == []


@pytest.mark.cc
@pytest.mark.timeout(300)
def test_ours_is_driven_as_by_its_user(scene: object) -> None:
    from _peers.machine import Stranger
    from _peers.measures import Scene, gaps

    assert isinstance(scene, Scene)
    ours, trace = scene.peer, scene.trace
    gate = scene.blocker()
    assert ours.fate(scene.ids["gate"]) == "running"
    assert os.getpid() != ours.daemon()
    assert ours.daemon() in ours.processes()
    assert ours.cost().mem_mib > 1
    scene.submit("alone", 50)
    ours.fill([scene.job("many1"), scene.job("many2")])
    assert ours.accepted == 2
    assert [run.name for run in trace.runs()] == ["gate"]
    gate.open()
    wait_until(lambda: trace.done() == 4, timeout=120)
    assert [run.name for run in trace.runs()] == ["gate", "alone", "many1", "many2"]
    assert all(gap > 0 for gap in gaps(trace.ended()))
    wait_until(lambda: ours.fate(scene.ids["alone"]) == "completed", timeout=120)
    assert ours.log(scene.ids["alone"]).split() == ["alone"]
    # The card shows a stranger, and ours waits until he leaves.
    he = Stranger(ours.machine)
    scene.submit("late")
    wait_until(lambda: "GPU 0" in ours.reason(scene.ids["late"]), timeout=120)
    left = he.leave()
    wait_until(lambda: trace.began("late") is not None, timeout=120)
    assert (trace.began("late") or 0) > left
