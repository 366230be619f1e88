"""Uses the Python API as a typed program would; a test runs a strict type checker on it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from datetime import timedelta
from typing import assert_type

from gpusched_ipy import (
    GpuAllocation,
    GpuExecutor,
    GpuFuture,
    JobHandle,
    JobState,
    Queue,
    Snapshot,
    gpuqueue,
    gpus,
    submit,
)


def length(text: str) -> int:
    """Something to queue."""
    return len(text)


def blocks() -> str:
    """A block that has a GPU."""
    with gpuqueue(priority=3, mem="8G", time=timedelta(hours=1), timeout=60) as gpu:
        assert_type(gpu, GpuAllocation)
        return gpu.uuid


@gpuqueue(gpus=2)
def decorated(x: float) -> float:
    """A function that has two GPUs."""
    return x


async def handles() -> None:
    """Handles know what they give."""
    first = submit(length, "abc", priority=1, label={"a": "b"})
    assert_type(first, JobHandle[int])
    assert_type(await first, int)
    assert_type(first.result(timeout=1), int)
    assert_type(first.state, JobState)
    assert_type(submit(["true"], after=[first], env=["A=1"]), JobHandle[int])


def executor() -> Iterator[int]:
    """An executor is one of the standard library."""
    with GpuExecutor(max_workers=2, mem="1G") as pool:
        standard: Executor = pool
        assert_type(pool.submit(length, "abc"), GpuFuture[int])
        assert_type(pool.submit(length, "abc").result(), int)
        standard.submit(length, text="abc")
        return pool.map(length, ["a", "b"], chunksize=2)


def queue() -> list[int]:
    """The queue and the GPUs."""
    assert_type(gpus(), Snapshot)
    assert_type(decorated(1.0), float)
    return [job.id for job in Queue().list(all=True)]
