"""Out of GPU memory is recognised, recorded, and tried again once with more of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import GIB, FakeScript, wait_until
from kernels import started
from requires import require

from gpusched_ipy import oom
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobState

PYTHON = sys.executable
TORCH = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 39.39 GiB"

# Last lines of real failures, one for each framework and driver; and of others that only look so.
SAID = [
    f"torch.OutOfMemoryError: {TORCH} of which 1.12 GiB is free.",
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB",
    "RuntimeError: CUDA out of memory. Tried to allocate 64.00 MiB (GPU 0; 7.79 GiB total)",
    "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 16.00 GiB.",
    "RuntimeError: MPS backend out of memory (MPS allocated: 17.72 GB, other allocations: 6 GB)",
    "RuntimeError: CUDA error: out of memory",
    "terminate called ... what():  CUDA error 2: out of memory",
    "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 8,589,934,592 bytes",
    "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to",
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Failed to allocate request for 8.0GiB",
    "OOM when allocating tensor with shape[9] on /job:localhost/task:0/device:GPU:0 by GPU_0_bfc",
    "ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory",
    "numba.cuda.cudadrv.driver.CudaAPIError: [2] Call to cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
]
NOT_SAID = [
    "MemoryError",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes",
    "grpc: RESOURCE_EXHAUSTED: Received message larger than max (4194305 vs. 4194304)",
    "OOM when allocating tensor with shape[9] on /job:localhost/replica:0/task:0/device:CPU:0",
    "Out of memory: Killed process 4242 (python)",
    "saved the report on CUDA memory, out of 12 steps",
]


@pytest.mark.parametrize("line", SAID)
def test_the_last_words_of_each_framework_are_known(line: str) -> None:
    text = f"Traceback (most recent call last):\n  File ...\n{line}\nand a line after it\n"
    assert oom.in_text(text) == line


@pytest.mark.parametrize("line", NOT_SAID)
def test_too_little_of_something_else_is_something_else(line: str) -> None:
    assert oom.in_text(f"{line}\n") is None


def test_only_the_end_of_a_log_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        stream.write(f"{SAID[0]}\n".encode())
        stream.write(b"handled: smaller batches from here on\n" * 2000)
    log.chmod(0o600)
    assert oom.in_log(log) is None
    with log.open("ab") as stream:
        stream.write(b"\xff\xfe" + b"x" * 5000 + SAID[1].encode())
    found = oom.in_log(log)
    assert found is not None
    assert len(found) <= 200
    assert found.startswith("CUDA out of memory. Tried to allocate")
    assert oom.in_log(tmp_path / "none") is None


def made(module: str, name: str, *bases: type[BaseException]) -> type[BaseException]:
    """A class as that framework has it: its module, its name, its bases."""
    return type(name, bases or (RuntimeError,), {"__module__": module})


def test_exceptions_are_known_by_their_classes_and_what_led_to_them() -> None:
    cupy = made("cupy.cuda.memory", "OutOfMemoryError", MemoryError)("Out of memory allocating 8")
    assert oom.in_exception(cupy)
    assert oom.in_exception(type("Mine", (type(cupy),), {"__module__": "__main__"})("…"))
    xla = made("jaxlib._jax", "XlaRuntimeError")
    assert oom.in_exception(xla("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9"))
    assert not oom.in_exception(xla("INVALID_ARGUMENT: shapes differ"))
    tensorflow = made("tensorflow.python.framework.errors_impl", "ResourceExhaustedError")
    assert oom.in_exception(tensorflow("OOM when allocating tensor … device:GPU:0"))
    assert not oom.in_exception(tensorflow("OOM when allocating tensor … device:CPU:0"))
    assert not oom.in_exception(MemoryError())
    assert not oom.in_exception(None)
    wrapped = ValueError("the training has failed")
    wrapped.__context__ = cupy
    assert oom.in_exception(wrapped)
    assert oom.in_exception(ExceptionGroup("both", [KeyError("x"), wrapped]))
    wrapped.__suppress_context__ = True
    assert not oom.in_exception(wrapped), "raised `from None`: it has nothing to do with that"


def test_an_exception_whose_text_fails_is_no_fault() -> None:
    class AwkwardError(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    loop = AwkwardError()
    loop.__cause__ = ValueError()
    loop.__cause__.__cause__ = loop
    assert not oom.in_exception(loop)


@pytest.fixture
def queue(settings: Settings, fake: FakeScript) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def short_of_memory(notes: Path, times: int = 1) -> list[str]:
    """A command that runs out of GPU memory, the first ``times`` times that it runs."""
    code = (
        f"open({str(notes)!r}, 'a').write('begun\\n')\n"
        f"if len(open({str(notes)!r}).readlines()) <= {times}:\n"
        "    class OutOfMemoryError(RuntimeError): __module__ = 'torch'\n"
        f"    raise OutOfMemoryError({TORCH!r})"
    )
    return [PYTHON, "-c", code]


def test_a_command_is_tried_again_once_with_twice_the_memory(queue: Queue, tmp_path: Path) -> None:
    job = queue.submit(short_of_memory(tmp_path / "a"), mem="8G", retry_oom=True)
    twice = queue.submit(short_of_memory(tmp_path / "b", 2), mem="30G", retry_oom=True)
    plain = queue.submit(short_of_memory(tmp_path / "c"), mem="8G")
    job, twice, plain = queue.wait(job.id, twice.id, plain.id, timeout=90)
    assert (job.state, job.attempts, job.oom) == (JobState.COMPLETED, 2, False)
    assert job.request.mem_bytes == 16 * GIB
    (told,) = [event.data["why"] for event in queue.events(job.id) if event.what == "retried"]
    assert told == "ran out of GPU memory with 8.0 GiB declared; runs again with 16.0 GiB"
    # 60 GiB are more than the card has: the second try has it to itself, and there is no third.
    assert (twice.state, twice.attempts, twice.request.mem_bytes) == (JobState.FAILED, 2, None)
    assert (plain.state, plain.attempts) == (JobState.FAILED, 1)
    for failed in (twice, plain):
        assert failed.oom
        assert failed.error == f"out of GPU memory: torch.OutOfMemoryError: {TORCH}"


def test_the_retry_of_an_exclusive_job_waits_for_idle_kernels_to_let_go(
    queue: Queue, fake: FakeScript, tmp_path: Path
) -> None:
    """Beside an idle notebook there was room enough to begin, and then not enough."""
    join = (
        "import os, sys\nfrom pathlib import Path\nfrom gpusched_ipy.locks import Membership\n"
        "from gpusched_ipy.statedir import StateDir\nfrom gpusched_ipy.store import Store\n"
        f"state = StateDir(Path({str(queue.state.root)!r}))\n"
        "member, store = Membership(state), Store(state)\n"
        "store.join(member.key, 'kernel', 'notebook a.ipynb')\n"
        "store.set_busy(member.key, False)\nprint('joined', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [PYTHON, "-c", join], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as idle:
        assert idle.stdout is not None
        assert idle.stdout.readline() == "joined\n"
        held = {"pid": idle.pid, "user": "me", "name": "python", "memory": "4GiB"}
        fake.change(memory_used="4GiB", processes=[held])
        job = queue.submit(short_of_memory(tmp_path / "notes"), retry_oom=True)
        wait_until(lambda: queue.show(job.id).oom, timeout=60, what="it runs out of memory")
        wait_until(
            lambda: "notebook a.ipynb holds 4.0 GiB and has been idle" in reason(queue, job.id),
            timeout=60,
            what="the reason names the idle holder",
        )
        assert queue.show(job.id).attempts == 1
        fake.free()
        (done,) = queue.wait(job.id, timeout=60)
        assert (done.state, done.attempts) == (JobState.COMPLETED, 2)
        assert idle.stdin is not None
        idle.stdin.close()


def reason(queue: Queue, job_id: int) -> str:
    found = queue.show(job_id).reason
    return "" if found is None else found.text


@pytest.mark.kernel
def test_a_cell_that_raises_torchs_own_error_is_tried_again(tmp_path: Path) -> None:
    require("torch", importlib.util.find_spec("torch"), "PyTorch is not installed")
    with started(tmp_path) as kernel:
        kernel.run("import torch\ntries = []")
        body = f"tries.append(1)\nif len(tries) < 2: raise torch.cuda.OutOfMemoryError({TORCH!r})"
        good = kernel.run(f"%%gpuqueue --retry-oom --mem 8G --name good\n{body}")
        kernel.badge(good, "✓ done")
        assert any("runs again with 16.0 GiB" in text for text in good.badges) or good.errors
        bad = kernel.run("%%gpuqueue --name bad\nraise torch.OutOfMemoryError('CUDA out of …')")
        kernel.badge(bad, "✗ failed")
        listed = json.loads(kernel.run("%gpuq list --all --json").text())
        jobs = {job["name"]: job for job in listed}
        assert (jobs["good"]["state"], jobs["good"]["attempts"]) == ("completed", 2)
        assert jobs["good"]["request"]["mem_bytes"] == 16 * GIB
        assert (jobs["bad"]["oom"], jobs["good"]["oom"]) == (True, False)
        assert jobs["bad"]["error"] == "out of GPU memory: OutOfMemoryError: CUDA out of …"
