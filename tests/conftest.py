"""Fixtures of all tests: nothing reaches the user's own queue, configuration or GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until
from hypothesis import HealthCheck
from hypothesis import settings as examples

from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StoreError
from gpusched_ipy.locks import alive_pid
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store

# How long an example takes says nothing on a loaded machine; the benchmarks measure.
examples.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
examples.load_profile("patient")

# A shell without job control starts what it puts in the background deaf to interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Settings of the tests themselves: everything else named GPUSCHED_ is taken away.
_KEPT = ("GPUSCHED_CAPTURES", "GPUSCHED_TRACES", "GPUSCHED_REQUIRE")


@pytest.fixture(autouse=True)
def private_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the user's counts, and nothing is written to the user's folders."""
    for name in os.environ:
        if name.startswith("GPUSCHED_") and name not in _KEPT:
            monkeypatch.delenv(name)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A private state directory; what still runs in it when the test ends is ended."""
    root = tmp_path / "state"
    yield root
    if (root / "queue.db").exists():
        _end_members(StateDir(root))


@pytest.fixture
def fake(tmp_path: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> FakeScript:
    """One scripted GPU, free at first, and settings under which a test need not wait long."""
    script = FakeScript(tmp_path / "fake.json")
    monkeypatch.setenv("GPUSCHED_FAKE", str(script.path))
    monkeypatch.setenv("GPUSCHED_SAMPLE_INTERVAL_S", "0.1")
    monkeypatch.setenv("GPUSCHED_QUIET_S", "0.3")
    return script


@pytest.fixture
def settings(fake: FakeScript) -> Settings:
    """The settings in force, with the scripted GPU."""
    return Settings.load()


def _end_members(state: StateDir) -> None:
    """Cancel what a test has left and wait until its agent and its shims are gone."""
    try:
        store = Store(state)
    except StoreError:  # a test of damage: nobody can have gone on working with it
        return
    try:
        for job in store.jobs():
            store.request_cancel(job.id)
        agent = running_agent(state, store)
        if agent is not None:
            ask_to_leave(agent, state)
        helpers = {key for key, kind in store.member_kinds().items() if kind in ("agent", "shim")}
        wait_until(
            lambda: not any(alive_pid(state, key) for key in helpers), what="agent and shims gone"
        )
    finally:
        store.close()
