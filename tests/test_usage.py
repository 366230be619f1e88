"""What a job has drawn of its GPUs, from scripted readings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.excess import Excess
from gpusched_ipy.job import Allocation, JobKind, JobSpec, Request
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.usage import UsageTracker
from gpusched_ipy.view import job_rows

GIB = 2**30


def reading(mono: float, *gpus: Gpu, problem: str | None = None) -> Snapshot:
    return Snapshot(
        backend="fake", source="test", taken_at=0, taken_mono=mono, gpus=gpus, problem=problem
    )


def gpu(**values: object) -> Gpu:
    return Gpu(**{"uuid": "GPU-0", **values})


ALONE = Allocation(job_id=1, gpus=("GPU-0",), started_mono=100.0)


def test_mean_peak_and_energy() -> None:
    tracker = UsageTracker()
    for mono, share, memory, power in [(100, 0.0, 1, 50), (105, 0.5, 4, 100), (115, 1.0, 2, 300)]:
        tracker.observe(
            reading(mono, gpu(utilization=share, mem_used_bytes=memory * GIB, power_w=power)),
            [ALONE],
        )
    used = tracker.take(1)
    assert used is not None
    assert used.mean_utilization == (0.5 * 5 + 1.0 * 10) / 15
    assert used.peak_mem_bytes == 4 * GIB
    assert used.energy_j == 100 * 5 + 300 * 10
    assert used.peak_utilization == 1.0
    assert tracker.take(1) is None


def test_unknown_stays_unknown() -> None:
    tracker = UsageTracker()
    tracker.observe(reading(100, gpu()), [ALONE])
    tracker.observe(reading(101, gpu()), [ALONE])
    used = tracker.take(1)
    assert used is not None
    assert (used.mean_utilization, used.peak_mem_bytes, used.energy_j) == (None, None, None)
    assert used.peak_utilization is None


def test_a_problem_and_an_old_reading_count_nothing() -> None:
    tracker = UsageTracker()
    tracker.observe(reading(100, gpu(utilization=1.0)), [ALONE])
    tracker.observe(reading(101, problem="gone"), [ALONE])
    tracker.observe(reading(100, gpu(utilization=0.0)), [ALONE])
    tracker.observe(reading(102, gpu(utilization=0.25)), [ALONE])
    used = tracker.take(1)
    assert used is not None
    assert used.mean_utilization == 0.25


def test_on_a_shared_card_only_its_own_memory_counts() -> None:
    shared = Allocation(job_id=1, gpus=("GPU-0",), shared=True, started_mono=100.0)
    processes = (GpuProcess(pid=1, mem_bytes=GIB, job=1), GpuProcess(pid=2, mem_bytes=8 * GIB))
    tracker = UsageTracker()
    for mono in (100, 101):
        listed = gpu(mem_used_bytes=9 * GIB, power_w=100, processes=processes)
        tracker.observe(reading(mono, listed), [shared])
    used = tracker.take(1)
    assert used is not None
    assert (used.peak_mem_bytes, used.energy_j) == (GIB, None)


def test_a_long_gap_is_not_filled() -> None:
    tracker = UsageTracker()
    tracker.observe(reading(100, gpu(power_w=100)), [ALONE])
    tracker.observe(reading(500, gpu(power_w=100)), [ALONE])
    used = tracker.take(1)
    assert used is not None
    assert used.energy_j is None  # 400 s of which nothing is known are not 0 J


@pytest.mark.parametrize("ends", [False, True])
def test_a_job_far_over_its_memory_is_told_once_and_ended_only_if_set(
    settings: Settings, ends: bool
) -> None:
    store = Store(open_state_dir(settings))
    excess = Excess(store, replace(settings, end_over_memory=ends))
    request = Request(mem_bytes=8 * GIB)
    spec = JobSpec(uid="1", kind=JobKind.COMMAND, name="train", argv=("true",), request=request)
    claimed = store.claim(store.submit(spec), ("GPU-0",), member="m")
    job = store.take_over(claimed.id, epoch=claimed.epoch, claimed_by="m", member="m")
    assert job is not None
    excess.look([(job, 9 * GIB), (job, None)])
    assert store.job(job.id).peak_mem_bytes is None, "an eighth more is not far"
    excess.look([(job, 12 * GIB)])
    excess.look([(job, 13 * GIB)])
    told = [event.data for event in store.events(job.id) if event.what == "over memory"]
    assert [(data["used"], data["declared"]) for data in told] == [(12 * GIB, 8 * GIB)]
    now = store.job(job.id)
    assert now.cancel_requested is ends
    (row,) = job_rows([now], SystemClock().now())
    assert "used 12.0 GiB of GPU memory, declared 8.0 GiB" in row.why
    store.close()
