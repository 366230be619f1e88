"""Idle kernels that hold GPU memory: named as the reason, and asked to give their stock back."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels import Kernel, started

from gpusched_ipy import framework

# A stand-in for PyTorch: 20 GiB of a card in its hands, 2 of them in a live array.
TORCH = """
import json, os, sys, types
from pathlib import Path
GIB = 2**30
script = Path(os.environ["GPUSCHED_FAKE"])
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(
    live=2 * GIB, held=20 * GIB, emptied=0,
    is_initialized=lambda: True, device_count=lambda: 1,
    memory_reserved=lambda place: torch.cuda.held,
)
def show():
    state = json.loads(script.read_text())
    me = {"pid": os.getpid(), "user": "me", "name": "python", "memory": torch.cuda.held}
    state["gpus"][0] |= {"memory_used": torch.cuda.held, "utilization": 0.0, "processes": [me]}
    spare = script.with_suffix(".spare")
    spare.write_text(json.dumps(state))
    spare.replace(script)
def empty_cache():
    import threading
    assert threading.current_thread() is threading.main_thread()
    torch.cuda.held, torch.cuda.emptied = torch.cuda.live, torch.cuda.emptied + 1
    show()
torch.cuda.empty_cache = empty_cache
sys.modules["torch"] = torch
show()
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[tuple[Kernel, Kernel]]:
    """A kernel that holds memory, and one that wants it; they share the queue and the GPU."""
    for folder in ("holder", "waiting"):
        (tmp_path / folder).mkdir()
    with started(tmp_path / "holder", JPY_SESSION_NAME="a.ipynb") as holder:
        shared = {
            name: holder.environment[name] for name in ("GPUSCHED_STATE_DIR", "GPUSCHED_FAKE")
        }
        with started(tmp_path / "waiting", **shared) as waiting:
            holder.run("%gpuq")  # it is a member now
            holder.run(TORCH)
            yield holder, waiting


@pytest.mark.kernel
def test_a_waiting_job_gets_the_stock_of_an_idle_kernel_and_none_of_a_busy_one(
    kernels: tuple[Kernel, Kernel], tmp_path: Path
) -> None:
    holder, waiting = kernels
    go = tmp_path / "go"
    busy = holder.send(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
    cell = waiting.run("%%gpuqueue\nprint('mine now')")
    waiting.badge(cell, "a.ipynb holds 20.0 GiB")
    waiting.until(lambda: "asked" in record(waiting), "nobody was asked")
    assert "✓" not in cell.badges[-1]
    go.touch()
    holder.until(lambda: busy.replies, "it never ended")
    # Idle from now on, it obeys; its live array stays.
    waiting.badge(cell, "✓ done")
    waiting.until(lambda: cell.text() == "mine now\n", "it has not said what it is to say")
    told = holder.run("print(torch.cuda.emptied, torch.cuda.held == torch.cuda.live)").text()
    assert told == "1 True\n"
    # What is left can be given back by hand as well, and the magic says what came of it.
    holder.run("torch.cuda.held = 5 * GIB; show()")
    assert holder.run("%gpufree").text() == "given back: 3.0 GiB (PyTorch 3.0 GiB)\n"
    listens = "get_ipython()._gpusched.session.gives_back"
    assert holder.run(listens).results == ["True"]
    holder.run("%config GpuQueue.release_caches = 'never'")
    assert holder.run(listens).results == ["False"]


def record(kernel: Kernel) -> str:
    """What the record says of questions: the members that were asked."""
    import sqlite3

    path = Path(kernel.environment["GPUSCHED_STATE_DIR"]) / "queue.db"
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT key FROM members WHERE asked IS NOT NULL").fetchall()
    db.close()
    return "asked" if rows else ""


class Pool:
    """The memory pool of a framework: what it holds, of which some is in use."""

    def __init__(self, held: int, live: int) -> None:
        self.held, self.live = held, live

    def total_bytes(self) -> int:
        return self.held

    def free_all_blocks(self) -> None:
        self.held = self.live


def test_each_framework_tells_what_it_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, pinned = Pool(9, 4), Pool(0, 0)
    cupy = types.ModuleType("cupy")
    cupy.get_default_memory_pool = lambda: pool  # type: ignore[attr-defined]
    cupy.get_default_pinned_memory_pool = lambda: pinned  # type: ignore[attr-defined]
    torch = types.ModuleType("torch")
    mps = Pool(7, 7)
    torch.mps = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: True,
        driver_allocated_memory=mps.total_bytes,
        empty_cache=mps.free_all_blocks,
    )

    def broken() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True,
        device_count=lambda: 2,
        memory_reserved=lambda _place: 5,
        empty_cache=broken,
    )
    for name, module in {"torch": torch, "cupy": cupy, "jax": types.ModuleType("jax")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert framework.has_stock()
    freed = framework.free_caches()
    assert freed.bytes == {"CuPy": 5, "PyTorch (MPS)": 0}
    assert freed.total_bytes == 5
    assert freed.keepers == ("JAX",)
    assert freed.faults == ("PyTorch: RuntimeError: CUDA error: unspecified launch failure",)


def test_stock_beside_cuda_is_given_back_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = types.ModuleType("torch")
    mps = Pool(7, 0)
    torch.cuda = types.SimpleNamespace(is_initialized=lambda: False)  # type: ignore[attr-defined]
    torch.mps = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: True,
        driver_allocated_memory=mps.total_bytes,
        empty_cache=mps.free_all_blocks,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert (framework.has_context(), framework.has_stock()) == (False, True)
    assert framework.free_caches().bytes == {"PyTorch (MPS)": 7}
    assert not framework.has_stock()
