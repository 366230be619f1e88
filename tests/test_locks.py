"""The locks against real processes: forks, deaths, zombies, stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpusched_ipy.config import Settings
from gpusched_ipy.locks import (
    FileLock,
    GpuLocks,
    Membership,
    alive_pid,
    forget_member,
    is_alive,
    log_is_held,
)
from gpusched_ipy.output import create_log
from gpusched_ipy.statedir import StateDir, open_state_dir
from tests.helpers import wait_until

HOLDER = """
import sys
from pathlib import Path
from gpusched_ipy.locks import GpuLocks, Membership
from gpusched_ipy.statedir import StateDir
state = StateDir(Path(sys.argv[1]))
membership = Membership(state)
fd = GpuLocks(state.root / "gpu").try_lock("GPU-0", shared=sys.argv[2] == "shared")
{more}
print(membership.key, fd is not None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return open_state_dir(Settings.load({"state_dir": str(tmp_path / "state")}, environ={}))


@contextmanager
def holder(
    state: StateDir, mode: str = "exclusive", more: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str, bool]]:
    """Another member, which tries to hold GPU-0's lock until it is told to leave."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(more=more), str(state.root), mode],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    key, got = child.stdout.readline().split()
    try:
        yield child, key, got == "True"
    finally:
        child.kill()
        child.communicate()


def test_a_member_is_alive_until_it_dies(state: StateDir) -> None:
    with holder(state) as (child, key, _):
        assert alive_pid(state, key) == child.pid
        child.send_signal(signal.SIGSTOP)
        assert is_alive(state, key)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        assert not is_alive(state, key)


def test_an_unknown_member_is_dead(state: StateDir) -> None:
    assert not is_alive(state, "nobody")


def test_asking_about_oneself_does_not_drop_the_lock(state: StateDir) -> None:
    membership = Membership(state)
    asked = (
        "import sys; from pathlib import Path; from gpusched_ipy.locks import is_alive;"
        "from gpusched_ipy.statedir import StateDir;"
        "print(is_alive(StateDir(Path(sys.argv[1])), sys.argv[2]))"
    )
    for _ in range(2):
        assert alive_pid(state, membership.key) == os.getpid()
        forget_member(state, membership.key)
        seen = subprocess.run(
            [sys.executable, "-c", asked, str(state.root), membership.key],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert seen.stdout.strip() == "True"
    membership.leave()
    assert not is_alive(state, membership.key)


def test_a_fork_neither_is_the_member_nor_ends_it(state: StateDir) -> None:
    membership = Membership(state)
    locks = GpuLocks(state.root / "gpu")
    fd = locks.try_lock("GPU-0", shared=False)
    assert fd is not None
    child = os.fork()
    if child == 0:
        membership.leave()  # a child that cleans up what is not its own
        os._exit(0)
    os.waitpid(child, 0)
    assert state.alive(membership.key).exists()
    assert locks.occupied("GPU-0")
    membership.leave()
    locks.close([fd])
    assert not locks.occupied("GPU-0")


def test_a_forked_child_does_not_keep_the_gpu(state: StateDir) -> None:
    forks = "import os\nif os.fork() == 0:\n    sys.stdin.read(); os._exit(0)"
    with holder(state, more=forks) as (child, _, got):
        assert got
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        # The child lives on; it may not have come to run yet when its parent died.
        wait_until(lambda: not GpuLocks(state.root / "gpu").occupied("GPU-0"))


@pytest.mark.parametrize(
    ("ours", "theirs", "both"),
    [("exclusive", "exclusive", False), ("exclusive", "shared", False),
     ("shared", "exclusive", False), ("shared", "shared", True)],
)  # fmt: skip
def test_who_may_share_a_gpu(state: StateDir, ours: str, theirs: str, both: bool) -> None:
    locks = GpuLocks(state.root / "gpu")
    fd = locks.try_lock("GPU-0", shared=ours == "shared")
    assert fd is not None
    with holder(state, theirs) as (_, _, got):
        assert got is both
    locks.close([fd])


def test_all_locks_or_none(state: StateDir) -> None:
    locks = GpuLocks(state.root / "gpu")
    with holder(state) as (_, _, got):
        assert got
        assert locks.try_lock_all(("GPU-1", "GPU-0"), shared=False) is None
        assert not locks.occupied("GPU-1")


def test_a_gpu_is_named_by_any_text(state: StateDir) -> None:
    locks = GpuLocks(state.root / "gpu")
    fd = locks.try_lock("amd:0000:03:00.0/../../x", shared=False)
    assert fd is not None
    locks.close([fd])
    assert {path.parent for path in state.root.rglob("*.lock")} <= {state.root, state.root / "gpu"}


def test_the_log_is_held_by_grandchildren(state: StateDir, tmp_path: Path) -> None:
    path = state.log("attempt")
    log = create_log(path)
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    # A child that leaves its session and closes every descriptor but its output, as launchers do.
    job = subprocess.Popen(
        ["sh", "-c", f"setsid sh -c 'read x < {fifo}' & exit 0"], stdout=log, stderr=log
    )
    os.close(log)
    assert job.wait() == 0
    assert log_is_held(path)
    fifo.write_text("go\n")
    reader = os.open(path, os.O_RDONLY)
    import fcntl

    fcntl.flock(reader, fcntl.LOCK_EX)  # returns when the last of them is gone
    os.close(reader)
    assert not log_is_held(path)


def test_one_holder_of_a_file_lock(state: StateDir) -> None:
    one, other = FileLock(state.agent_lock), FileLock(state.agent_lock)
    assert one.try_acquire()
    assert not other.try_acquire()
    assert other.held_by_anybody()
    one.release()
    assert not other.held_by_anybody()
