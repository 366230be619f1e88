"""Whose the processes on a GPU are, with real processes and what is remembered of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from gpusched_ipy import attribution
from gpusched_ipy.attribution import Owners, attribute
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids whose ancestors have been asked for."""
    asked: list[int] = []
    real = attribution.owner_among

    def owner_among(pid: int, roots: dict[int, int | str]) -> int | str | None:
        asked.append(pid)
        return real(pid, roots)

    monkeypatch.setattr(attribution, "owner_among", owner_among)
    return asked


def reading(*processes: GpuProcess) -> Snapshot:
    gpu = Gpu(uuid="GPU-a", processes=processes)
    return Snapshot(backend="nvml", source="t", taken_at=1.0, taken_mono=1.0, gpus=(gpu,))


def whose(snapshot: Snapshot, members: dict[int, str], owners: Owners | None) -> list[str | None]:
    marked = attribute(snapshot, (), leaders={}, members=members, owners=owners)
    return [found.member for found in marked.gpus[0].processes or ()]


def test_each_process_is_looked_up_once_while_the_members_stay(
    child: int, looked_up: list[int]
) -> None:
    owners, us = Owners(), {os.getpid(): "us"}
    seen = GpuProcess(pid=child, started_at=psutil.Process(child).create_time())
    init = GpuProcess(pid=1, started_at=5.0)
    assert whose(reading(seen, init), us, owners) == ["us", None]
    assert whose(reading(seen, init), us, owners) == ["us", None]
    assert whose(reading(seen, init), dict(us), owners) == ["us", None]
    assert looked_up == [child, 1]
    # A reading without lists says nothing about who is there.
    bare = Snapshot(
        backend="nvml", source="t", taken_at=1.0, taken_mono=1.0, gpus=(Gpu(uuid="GPU-a"),)
    )
    assert attribute(bare, (), leaders={}, members=us, owners=owners) is bare
    assert whose(reading(seen), us, owners) == ["us"]
    assert looked_up == [child, 1]
    # Who has gone is forgotten.
    assert whose(reading(seen, init), us, owners) == ["us", None]
    assert looked_up == [child, 1, 1]


def test_other_members_and_another_process_of_that_pid_are_looked_up(
    child: int, looked_up: list[int]
) -> None:
    owners, us = Owners(), {os.getpid(): "us"}
    seen = GpuProcess(pid=child, started_at=1.0)
    assert whose(reading(seen), us, owners) == ["us"]
    assert whose(reading(seen), {}, owners) == [None]
    assert whose(reading(seen), us, owners) == ["us"]
    assert whose(reading(GpuProcess(pid=child, started_at=2.0)), {child: "it"}, owners) == ["it"]
    unknown = GpuProcess(pid=child)  # when it began is not known: it may be another each time
    before = len(looked_up)
    assert whose(reading(unknown), us, owners) == ["us"]
    assert whose(reading(unknown), us, owners) == ["us"]
    assert len(looked_up) == before + 2
