"""Who holds memory and does nothing, from readings."""

from __future__ import annotations

import pytest

from gpusched_ipy.monitor.idle import GAP_S, IdleProcesses
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot


def reading(
    mono: float, *, card: float | None = 0.0, own: float | None = None, listed: bool = True
) -> Snapshot:
    process = GpuProcess(pid=7, started_at=1.0, mem_bytes=2**30, utilization=own)
    gpu = Gpu(uuid="GPU-0", utilization=card, processes=(process,) if listed else None)
    return Snapshot(backend="fake", source="", taken_at=0, taken_mono=mono, gpus=(gpu,))


def idle(watch: IdleProcesses, snapshot: Snapshot) -> float | None:
    processes = watch.mark(snapshot).gpus[0].processes
    return processes[0].idle_s if processes else None


def test_it_rests_from_the_first_quiet_reading_on() -> None:
    watch = IdleProcesses(0.1)
    found = [idle(watch, reading(float(mono))) for mono in range(0, 91, 30)]
    assert found == [None, None, 60.0, 90.0]


@pytest.mark.parametrize("busy", [{"card": 0.9}, {"own": 0.2}, {"card": None}])
def test_work_or_ignorance_ends_the_rest(busy: dict[str, float | None]) -> None:
    watch = IdleProcesses(0.1)
    for mono in (0.0, 30.0, 60.0):
        idle(watch, reading(mono))
    assert idle(watch, reading(70.0, **busy)) is None
    assert idle(watch, reading(100.0)) is None


def test_its_own_rest_counts_where_the_driver_tells_it() -> None:
    watch = IdleProcesses(0.1)
    found = [idle(watch, reading(float(mono), card=1.0, own=0.0)) for mono in (0, 40, 80)]
    assert found == [None, None, 80.0]


def test_readings_without_lists_change_nothing_and_a_long_pause_forgets() -> None:
    watch = IdleProcesses(0.1)
    idle(watch, reading(0.0))
    idle(watch, reading(30.0, listed=False))
    assert idle(watch, reading(60.0)) == 60.0
    assert idle(watch, reading(61.0 + GAP_S)) is None
