"""Tests on a real NVIDIA GPU: skipped with the reason where there is none, figures at the end."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import wait_until
from requires import require

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends.nvml import NvmlBackend, open_nvml
from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, Health

WORK = Path(__file__).with_name("work.py")
GIB = 1 << 30
_figures: list[tuple[str, str]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One table of what was measured."""
    if _figures:
        terminalreporter.section("figures on a real GPU")
        width = max(len(name) for name, _ in _figures)
        for name, value in _figures:
            terminalreporter.write_line(f"{name:{width}}  {value}")


@pytest.fixture
def figure() -> Callable[[str, str], None]:
    """Put a line into the table at the end."""
    return lambda name, value: _figures.append((name, value))


@pytest.fixture
def nvml() -> Iterator[NvmlBackend]:
    """NVML of this machine, where it shows a healthy card that nobody works on."""
    why = ""
    backend: NvmlBackend | None = None
    try:
        backend = open_nvml(Settings(), SystemClock())
        why = _why_none_is_free(backend)
    except BackendUnavailableError as exc:
        why = str(exc)
    require("gpu", not why, f"there is no NVIDIA GPU to test on: {why}")
    assert backend is not None
    yield backend
    backend.close()


def _why_none_is_free(backend: NvmlBackend) -> str:
    """Nothing where a card is free; a driver that has just woken up is given a while."""
    deadline = time.monotonic() + 15
    while True:
        snapshot = backend.read(Detail.FULL)
        if snapshot.problem is None and any(_is_free(gpu) for gpu in snapshot.gpus):
            return ""
        if snapshot.problem is not None or time.monotonic() > deadline:
            return snapshot.problem or "every GPU of this machine is in use"
        time.sleep(0.2)


@pytest.fixture
def card(nvml: NvmlBackend) -> Iterator[Gpu]:
    """The first healthy card that nobody works on; it is left so for the next test."""

    def free() -> Gpu | None:
        return next((gpu for gpu in nvml.read().gpus if _is_free(gpu)), None)

    found = wait_until(free, timeout=30, what="a free card")
    yield found
    wait_until(lambda: _is_free(nvml.read().gpu(found.uuid)), timeout=30, what="the card free")


def _is_free(gpu: Gpu | None) -> bool:
    if gpu is None:
        return False
    used, total = gpu.mem_used_bytes, gpu.mem_total_bytes
    known = gpu.health is Health.OK and used is not None and total is not None
    return known and (gpu.utilization or 0) <= 0.1 and (used or 0) < 0.05 * (total or 0)


class Work:
    """One run of ``work.py``, by us or by the queue; what it saw is in its file."""

    def __init__(self, out: Path, **options: Any) -> None:
        self.out = out
        flags = [item for key, value in options.items() for item in (f"--{key}", str(value))]
        self.argv = [sys.executable, str(WORK), "--out", str(out), *flags]

    def seen(self) -> dict[str, Any] | None:
        """What it has written so far."""
        try:
            found: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def ready(self, timeout: float = 60) -> dict[str, Any]:
        """What it saw when its context stood."""
        return wait_until(self.seen, timeout=timeout, what="the context of the work")

    def ended(self) -> dict[str, Any]:
        """What it saw, all of it."""
        seen = self.seen()
        assert seen is not None
        assert "ended" in seen
        return seen


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., Work]:
    """Make a :class:`Work` of the options of ``work.py``."""
    made: list[Work] = []

    def make(**options: Any) -> Work:
        made.append(Work(tmp_path / f"work-{len(made)}.json", **options))
        return made[-1]

    return make


@pytest.fixture
def stranger(
    work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Work, subprocess.Popen[bytes]]]]:
    """Start work that the queue knows nothing of, on one card."""
    running: list[subprocess.Popen[bytes]] = []

    def start(uuid: str, **options: Any) -> tuple[Work, subprocess.Popen[bytes]]:
        made = work(**options)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuid)
        child = subprocess.Popen(made.argv)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        running.append(child)
        return made, child

    yield start
    for child in running:
        child.kill()
        child.wait(30)


@pytest.fixture
def gpusched(state_dir: Path) -> Callable[..., str]:
    """Run the command line; its output, without the last line break."""

    def run(*argv: str, timeout: float = 60, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gpusched_ipy", *argv],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == status, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.rstrip("\n")

    return run


@pytest.fixture
def submit(gpusched: Callable[..., str]) -> Callable[..., str]:
    """Queue work for one card; the id."""
    return lambda uuid, made, *options: gpusched(
        "submit", "--on-gpu", uuid, *options, "--", *made.argv
    )


@pytest.fixture
def show(gpusched: Callable[..., str]) -> Callable[[str], dict[str, Any]]:
    """One job as JSON."""

    def look(job: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(gpusched("show", job, "--json"))
        return found

    return look


@pytest.fixture(params=["driver", "torch", "cupy"])
def engine(request: pytest.FixtureRequest) -> str:
    """How the GPU is used: libcuda always, the frameworks where they are installed."""
    name: str = request.param
    if name != "driver" and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name != "driver" and subprocess.run([sys.executable, "-c", _USABLE[name]]).returncode:
        pytest.skip(f"{name} is here and finds no GPU that it can use")
    return name


# In a process of its own, so that no context of the tests holds the card.
_USABLE = {
    "torch": "import torch; torch.ones(1, device='cuda')",
    "cupy": "import cupy; cupy.ones(1).sum()",
}
