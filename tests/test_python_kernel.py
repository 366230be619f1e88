"""The Python API in a real kernel: there it is the kernel that has the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_until
from kernels import Kernel, started

from gpusched_ipy.job import Job, JobState
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store

pytestmark = pytest.mark.kernel
SHOWN = "import os; os.environ.get('CUDA_VISIBLE_DEVICES')"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    with started(tmp_path) as kernel:
        kernel.run("from gpusched_ipy import gpuqueue, submit")
        yield kernel


@pytest.fixture
def store(kernel: Kernel) -> Iterator[Store]:
    kernel.run("%gpuq")  # the queue is there now
    found = Store(StateDir(kernel.folder / "state"))
    yield found
    found.close()


def jobs(store: Store) -> list[Job]:
    return store.jobs(ended=True)


def test_a_block_belongs_to_the_kernel(kernel: Kernel, store: Store) -> None:
    cell = kernel.run(f"with gpuqueue(name='fit') as gpu:\n    print(gpu)\n{SHOWN}")
    assert (cell.text(), cell.errors, cell.results) == ("GPU 0 (Fake A100)\n", [], [])
    (job,) = jobs(store)
    assert (job.state, job.name, job.kind) == ("completed", "fit", "allocation")
    assert list(store.member_kinds().values()).count("script") == 0
    assert store.member_kinds()[job.spec.home or ""] == "kernel"


def test_a_block_in_a_queued_cell_waits_for_nothing(kernel: Kernel, store: Store) -> None:
    cell = kernel.send("%%gpuqueue\nwith gpuqueue() as gpu:\n    print(gpu.job_id, gpu.uuid)")
    kernel.badge(cell, "ran")
    kernel.until(lambda: cell.text(), "nothing was printed")
    assert cell.text() == f"{cell.job} GPU-fake-0\n"
    assert len(jobs(store)) == 1


def test_an_interrupt_while_waiting_gives_up_the_place(kernel: Kernel, store: Store) -> None:
    kernel.fake.take()
    cell = kernel.send("with gpuqueue(): print('never')")
    kernel.until(lambda: "97 %" in cell.text("stderr"), "it never said why it waits")
    kernel.interrupt()
    kernel.until(lambda: cell.replies, "it was not interrupted")
    assert cell.errors == ["KeyboardInterrupt: "]
    wait_until(lambda: [job.state for job in jobs(store)] == [JobState.CANCELLED])


def test_a_cancel_interrupts_the_cell_and_no_other(kernel: Kernel, store: Store) -> None:
    cell = kernel.send("import time\nwith gpuqueue():\n    print('in', flush=True); time.sleep(99)")
    after = kernel.send("'the next cell'", stop=False)
    kernel.until(lambda: "in" in cell.text(), "it never began")
    (job,) = jobs(store)
    store.request_cancel(job.id)
    kernel.until(lambda: cell.replies, "it was not interrupted")
    (error,) = cell.errors
    assert "it was cancelled" in error
    assert store.job(job.id).state is JobState.CANCELLED
    again = kernel.run("'the next cell'")
    assert again.results == ["'the next cell'"]
    assert after.errors == []


def test_deferred_cells_wait_while_a_block_has_the_gpu(kernel: Kernel, store: Store) -> None:
    kernel.run("seen = []")
    holds = kernel.send("import time\nwith gpuqueue():\n    time.sleep(0.5); seen.append('block')")
    cell = kernel.send("%%gpuqueue\nseen.append('cell')")
    kernel.badge(cell, "ran")
    assert holds.errors == []
    assert kernel.run("seen").results == ["['block', 'cell']"]


def test_await_in_a_cell(kernel: Kernel) -> None:
    kernel.run("def square(x): return x * x")
    assert kernel.run("await submit(square, 6)").results == ["36"]
    assert "<table" in str(kernel.run("job = submit(square, 7); job").of("execute_result"))
    assert kernel.run("job.result(60)").results == ["49"]
    kernel.run("job.queue.wait()")


def test_a_thread_outlives_the_extension(kernel: Kernel, store: Store) -> None:
    kernel.run(
        "import threading\nleave = threading.Event()\n"
        "def work():\n    with gpuqueue(): leave.wait()\n"
        "thread = threading.Thread(target=work); thread.start()"
    )
    wait_until(lambda: [job.state for job in jobs(store)] == [JobState.RUNNING])
    kernel.run("%unload_ext gpusched_ipy")
    assert kernel.run("leave.set(); thread.join()").errors == []
    assert [job.state for job in jobs(store)] == [JobState.COMPLETED]
