"""What CPython asks of its own executors, asked of ours: its tests, run from the test package.

Left out are the tests that name the executor inside ``concurrent.futures`` in the source of another
Python; ``test_python_api.py`` asks the same of ours. With some distributions the test package is
one of its own; then it is looked for beside the system's Python of the same version.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import time
import unittest
import weakref
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import GpuExecutor
from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.locks import alive_pid
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store

_NAME = "test.test_concurrent_futures"


def _suites() -> list[ModuleType]:
    """The modules of CPython's tests that hold the parts we use; none where they are missing."""
    try:
        package = importlib.import_module("test")
    except ModuleNotFoundError:
        return []
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    others = [Path(root) / version / "test" for root in ("/usr/lib", "/usr/local/lib")]
    package.__path__.extend(str(path) for path in others if path.is_dir())
    try:
        found = importlib.import_module(_NAME)
    except ModuleNotFoundError:
        return []
    if not hasattr(found, "__path__"):
        return [found]
    parts = ("util", "executor", "test_shutdown", "test_as_completed", "test_wait")
    return [importlib.import_module(f"{_NAME}.{part}") for part in parts]


SUITES = _suites()
if not SUITES:
    pytest.skip(f"this Python has no {_NAME}", allow_module_level=True)
for suite in SUITES:
    # The Python of a call knows nothing of a test package in another place.
    cloudpickle.register_pickle_by_value(suite)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One queue for all tests here, on GPUs that five calls can share."""
    folder = tmp_path_factory.mktemp("executor")
    FakeScript(folder / "fake.json", gpus=2)
    yield folder
    state = StateDir(folder / "state")
    store = Store(state)
    agent = running_agent(state, store)
    if agent is not None:
        ask_to_leave(agent, state)
    members = set(store.member_kinds())
    wait_until(lambda: not any(alive_pid(state, key) for key in members), what="all have left")
    store.close()


@pytest.fixture(autouse=True)
def shared_queue(private_environment: None, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(room / "state"))
    monkeypatch.setenv("GPUSCHED_FAKE", str(room / "fake.json"))
    monkeypatch.setenv("GPUSCHED_SAMPLE_INTERVAL_S", "0.1")
    monkeypatch.setenv("GPUSCHED_QUIET_S", "0.3")


def _part(name: str) -> Any:
    return next(getattr(suite, name) for suite in SUITES if hasattr(suite, name))


def _names_its_executor(test: object) -> bool:
    return inspect.isfunction(test) and "import {executor_type}" in inspect.getsource(test)


class Patient:
    """Those tests of CPython that a loaded machine fails, with patience: our calls are processes.

    Each of its limits is a proof only if the sleeping call outlasts it, so both grow together.
    """

    executor: GpuExecutor

    def test_map_timeout(self) -> None:
        for limit_s in (5, 20, 80):
            results: list[None] = []
            calls = self.executor.map(time.sleep, [0, 0, limit_s + 1], timeout=limit_s)
            with pytest.raises(futures.TimeoutError):
                results.extend(calls)
            if results == [None, None]:
                break
        assert results == [None, None]

    def test_timeout(self) -> None:
        names = ("CANCELLED_AND_NOTIFIED_FUTURE", "EXCEPTION_FUTURE", "SUCCESSFUL_FUTURE")
        over = [_part(name) for name in names]
        for limit_s in (5, 20, 80):
            quick = self.executor.submit(pow, 2, 5)
            slow = self.executor.submit(time.sleep, limit_s + 1)
            finished, pending = futures.wait([*over, quick, slow], timeout=limit_s)
            if quick in finished:
                break
        assert (finished, pending) == ({*over, quick}, {slow})

    def test_free_reference(self) -> None:
        for made in self.executor.map(_part("make_dummy_object"), range(10)):
            seen = weakref.ref(made)
            del made
            gc.collect()
            # As CPython's own since 3.12: the thread that brought it may be about to let it go.
            wait_until(lambda seen=seen: seen() is None, what="nobody holds the result")


def _tests(case: type) -> list[str]:
    return [name for name in vars(case) if name.startswith("test_")]


def _ours(part: str) -> type[unittest.TestCase]:
    """CPython's tests of one subject, with our executor."""
    tests = _part(part)
    left_out = {name: None for name, test in vars(tests).items() if _names_its_executor(test)}
    ours = {
        "executor_type": GpuExecutor,
        "executor_kwargs": {"mem": "1G"},
        "worker_count": 5,
        **left_out,
        **{name: test for name, test in vars(Patient).items() if name in _tests(tests)},
    }
    return type(f"Gpu{part}", (tests, _part("ExecutorMixin"), unittest.TestCase), ours)


GpuExecutorTest = _ours("ExecutorTest")
GpuExecutorShutdownTest = _ours("ExecutorShutdownTest")
GpuAsCompletedTests = _ours("AsCompletedTests")
GpuWaitTests = _ours("WaitTests")
