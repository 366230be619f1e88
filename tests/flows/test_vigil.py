"""An agent that was killed: who misses it; no submit falls into the moment of its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until
from kernels import started

from gpusched_ipy import vigil
from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StoreError
from gpusched_ipy.job import JobState
from gpusched_ipy.process import start_ticks
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.summon import IDLE, AgentLock, ensure_agent

# Takes the agent's lock and as much memory as costs the kernel a while when it dies: only then, at
# the very last, the lock falls.
HEAVY = """
import mmap, sys
from pathlib import Path
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.summon import AgentLock
lock = AgentLock(StateDir(Path(sys.argv[1])))
assert lock.take()
memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
print("here", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def agent_of(queue: Queue) -> int:
    return wait_until(lambda: running_agent(queue.state, queue.store), 60, "an agent")


def killed(queue: Queue) -> int:
    """The agent, which is dead now."""
    pid = agent_of(queue)
    os.kill(pid, signal.SIGKILL)
    # The last of its threads takes its locks along.
    wait_until(lambda: running_agent(queue.state, queue.store) != pid, 60, "its end")
    return pid


def state(queue: Queue, number: int) -> JobState:
    """Without the help that a wait would give."""
    return queue.show(number).state


@pytest.mark.skipif(sys.platform != "linux", reason="dying processes can be told on Linux only")
def test_a_submit_in_the_moment_of_an_agents_death_starts_the_next_one(queue: Queue) -> None:
    lock, seen = AgentLock(queue.state), False
    for _ in range(20):
        argv = [sys.executable, "-c", HEAVY, str(queue.state.root)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as dying:
            assert dying.stdout is not None
            assert dying.stdout.readline() == b"here\n"
            assert lock.holder == dying.pid
            dying.kill()
            job = queue.submit(["true"])
            seen = lock.held_by_anybody() and start_ticks(dying.pid) is not None
        wait_until(lambda job=job: state(queue, job.id) is JobState.COMPLETED, 60, "it has run")
        if seen:
            break
        agent = running_agent(queue.state, queue.store)
        if agent is not None:
            ask_to_leave(agent, queue.state)
        wait_until(lambda: not lock.held_by_anybody(), 60, "nobody has the lock")
    assert seen, "it was always dead too soon: nothing was tried"


def test_an_agent_that_is_told_to_leave_leaves_the_next_submit_to_the_next_one(
    queue: Queue, fake: FakeScript
) -> None:
    fake.busy()
    first = queue.submit(["true"])
    agent = agent_of(queue)
    os.kill(agent, signal.SIGTERM)
    lock = AgentLock(queue.state)
    wait_until(lambda: lock.holder != agent, 60, "it says that it leaves")
    second = queue.submit(["true"])
    fake.free()
    wait_until(lambda: state(queue, second.id) is JobState.COMPLETED, 60, "it has run")
    assert state(queue, first.id) is JobState.COMPLETED


def test_whoever_listens_has_an_agent_that_was_killed_replaced(
    queue: Queue, fake: FakeScript
) -> None:
    fake.busy()
    leave = queue.subscribe(lambda: None)
    try:
        job = queue.submit(["true"])
        before = killed(queue)
        assert agent_of(queue) != before
        fake.free()
        wait_until(lambda: state(queue, job.id) is JobState.COMPLETED, 60, "it has run")
    finally:
        leave()
    assert vigil._standing == {}


def test_who_cannot_stand_by_leaves_no_listener_behind(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_store: object) -> None:
        raise StoreError("the record is locked")

    monkeypatch.setattr(vigil, "stand", broken)
    before = set(threading.enumerate())
    with pytest.raises(StoreError, match="the record is locked"):
        queue.subscribe(lambda: None)
    assert set(threading.enumerate()) <= before


def test_one_that_was_stopped_stays_stopped_until_it_is_wanted(
    queue: Queue, fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.busy()
    monkeypatch.setattr(vigil, "SETTLE_S", 0.05)
    leave = queue.subscribe(lambda: None)
    try:
        job = queue.submit(["true"])
        ask_to_leave(agent_of(queue), queue.state)
        queue.set_priority([job.id], 1)  # rings, and is a wish
        agent_of(queue)
        ask_to_leave(agent_of(queue), queue.state)
        asked: list[object] = []
        monkeypatch.setattr(vigil, "ensure_agent", asked.append)
        for _ in range(20):
            queue.store.set_reasons({})
            queue.store.set_drained(None)
        assert asked == []
    finally:
        leave()
    queue.resume()
    fake.free()
    wait_until(lambda: state(queue, job.id) is JobState.COMPLETED, 60, "it has run")


def test_agents_that_die_at_once_are_started_ever_more_slowly(
    queue: Queue, fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.busy()
    for name, value in (("SETTLE_S", 0.01), ("FIRST_S", 0.1), ("LONGEST_S", 1000.0)):
        monkeypatch.setattr(vigil, name, value)
    starts: list[float] = []

    def dies_at_once(_state: object) -> None:
        starts.append(queue.clock.now().mono)

    monkeypatch.setattr(vigil, "ensure_agent", dies_at_once)
    queue.submit(["true"])
    killed(queue)
    leave = queue.subscribe(lambda: None)
    try:
        wait_until(lambda: len(starts) >= 4, 60, "four starts")
        between = [after - before for before, after in pairwise(starts)]
        assert all(b >= 0.1 * 2**place for place, b in enumerate(between)), between
    finally:
        leave()


def test_an_open_kernel_has_what_it_sent_off_brought_home(queue: Queue, tmp_path: Path) -> None:
    """No cell is run, and nobody asks, after the agent has died."""
    folder = tmp_path / "kernel"
    folder.mkdir()
    with started(folder, GPUSCHED_STATE_DIR=str(queue.state.root)) as kernel:
        kernel.fake.take()
        assert kernel.run("%gpurun -n away -- true").errors == []
        before = killed(queue)
        assert agent_of(queue) != before
        kernel.fake.free()
        (job,) = [job for job in queue.list(all=True) if job.name == "away"]
        wait_until(lambda: state(queue, job.id) is JobState.COMPLETED, 60, "it has run")


def test_a_followed_log_goes_on_after_the_agent_was_killed(queue: Queue, fake: FakeScript) -> None:
    fake.busy()
    job = queue.submit(["echo", "well"])
    argv = [sys.executable, "-m", "gpusched_ipy", "log", "-f", str(job.id)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as follows:
        before = killed(queue)
        assert agent_of(queue) != before
        fake.free()
        assert follows.communicate(timeout=60)[0] == "well\n"


def test_the_lock_is_another_namespaces_where_it_says_so(queue: Queue) -> None:
    """Pids of a container mean nothing here: whoever holds the lock there is left alone."""
    lock = AgentLock(queue.state)
    assert lock.take()
    assert lock.holder == os.getpid()
    words = lock.word.split()
    lock.leave_word(" ".join([*words[:3], "pid:[1]"]))
    assert AgentLock(queue.state).holder == 0
    lock.leave_word("1 1 another-boot " + words[3])
    assert AgentLock(queue.state).holder is None
    lock.release()
    assert AgentLock(queue.state).holder is None
    ensure_agent(queue.state)
    agent_of(queue)


def test_half_a_word_of_the_lock_names_nobody(state_dir: Path) -> None:
    """An older version may have written a short word over a long one, and not yet cut it."""
    lock = AgentLock(open_state_dir(Settings.load()))
    assert lock.take()
    assert lock.holder == os.getpid()
    lock.leave_word(IDLE)
    assert lock.word == IDLE
    lock.path.write_text("idle3 782606 boot pid:[4026531836]")
    assert lock.holder is None
    lock.release()


def test_a_ring_after_the_end_is_written_into_nobodys_file(state_dir: Path) -> None:
    store = Store(open_state_dir(Settings.load()))
    watcher = vigil.Vigil(store)
    mine = {watcher._wake_r, watcher._wake_w}
    watcher.close()
    read, write = os.pipe()  # they take the numbers that have become free
    try:
        assert mine & {read, write}
        os.set_blocking(read, False)
        watcher._heard()
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    finally:
        os.close(read)
        os.close(write)
        store.close()
