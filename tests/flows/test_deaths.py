"""What deaths do that take more than one process with them: a reboot, a set clock, the table.

A reboot is played: every process of the queue is killed, and what starts afterwards runs under
another boot id. Kernels die in the tests of cells; agents, shims and jobs, one by one, in those of
commands.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Instant, Settings, SystemClock
from gpusched_ipy.job import Job, JobState, Request
from gpusched_ipy.locks import alive_pid
from gpusched_ipy.store import Store

PYTHON = sys.executable

# Runs a module of the package, and all that it starts, in another boot of the machine.
NEXT_BOOT = """
import sys
from importlib import import_module
from gpusched_ipy import process
process.boot_id = lambda: "the next boot"
process.python_argv = lambda module, *rest, isolated=True: [
    sys.executable, __file__, module, *rest
]
sys.exit(import_module(f"gpusched_ipy.{sys.argv[1]}").main(sys.argv[2:]))
"""


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


class Sleeper:
    """A command that runs until it is let go, and notes each begin and each end."""

    def __init__(self, queue: Queue, folder: Path, name: str, *, requeue: bool = False) -> None:
        self.queue, self._go, self._notes = queue, folder / f"{name}.go", folder / f"{name}.notes"
        code = (
            "import os, sys, time\n"
            f"note = lambda word: print(word, os.getpid(), file=open({str(self._notes)!r}, 'a'))\n"
            "note('begin')\n"
            f"while not os.path.exists({str(self._go)!r}): time.sleep(0.01)\n"
            "note('end')\n"
            "sys.exit(7)"
        )
        job = queue.submit([PYTHON, "-c", code], name=name, hold=True)
        if requeue:
            job = _with_requeue(queue, job)
        self.id = queue.release(job.id)[0].id

    @property
    def job(self) -> Job:
        return self.queue.show(self.id)

    @property
    def notes(self) -> list[str]:
        """What its processes have noted: begin, end."""
        return [line.split()[0] for line in self._lines()]

    @property
    def pid(self) -> int:
        return int(self._lines()[-1].split()[1])

    def begun(self) -> int:
        """Wait until it runs; the pid of its process."""
        wait_until(lambda: "begin" in self.notes, what="the command begins")
        return self.pid

    def let_go(self) -> None:
        self._go.touch()

    def _lines(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []


def _with_requeue(queue: Queue, job: Job) -> Job:
    """The same job, submitted to be run again when it is lost."""
    queue.cancel(job.id)
    spec = replace(job.spec, uid=f"{job.spec.uid}-again", request=Request(requeue=True))
    return queue.store.submit(spec)


def agent_pid(queue: Queue) -> int:
    return wait_until(lambda: running_agent(queue.state, queue.store), what="an agent lives")


def shim_pid(queue: Queue, job: Job) -> int:
    assert job.member is not None
    pid = alive_pid(queue.state, job.member)
    assert pid
    return pid


@dataclass(frozen=True)
class NextBoot:
    """The machine after its reboot."""

    script: Path

    def run(self, *argv: str) -> str:
        """The output of a command of ours."""
        done = subprocess.run(
            [PYTHON, str(self.script), "cli", *argv],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return done.stdout

    def states(self) -> dict[int, str]:
        """How each job stands."""
        return {job["id"]: job["state"] for job in json.loads(self.run("list", "--all", "--json"))}


@pytest.fixture
def reboot(queue: Queue, tmp_path: Path) -> Callable[..., NextBoot]:
    script = tmp_path / "boot.py"
    script.write_text(NEXT_BOOT)

    def power_cut(*sleepers: Sleeper) -> NextBoot:
        """Nobody survives."""
        dying = [agent_pid(queue)]
        for sleeper in sleepers:
            dying += [shim_pid(queue, sleeper.job), sleeper.pid]
        for pid in dying:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(_runs(pid) for pid in dying), what="all are gone")
        return NextBoot(script)

    return power_cut


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_reboot_keeps_the_queue_and_starts_nothing_by_itself(
    queue: Queue, tmp_path: Path, fake: FakeScript, reboot: Callable[..., NextBoot]
) -> None:
    FakeScript(fake.path, gpus=2)
    once, again = Sleeper(queue, tmp_path, "once"), Sleeper(queue, tmp_path, "again", requeue=True)
    once.begun()
    again.begun()
    behind = [queue.submit(["true"]), queue.submit(["false"])]
    wait_until(lambda: all(queue.show(job.id).reason for job in behind))
    after = reboot(once, again)

    # Nothing has been forgotten, and a submit wakes an agent, which starts nothing.
    new = int(after.run("submit", "--", "true"))
    wait_until(lambda: after.states()[once.id] == "lost", what="the agent looks")
    assert queue.show(once.id).error == "outcome unknown: its supervisor died"
    assert after.states()[again.id] == "pending"
    wait_until(lambda: queue.show(new).reason, what="the new one says why it waits")
    reason = queue.show(new).reason
    assert reason is not None
    assert "drained" in reason.text
    assert "the machine was restarted with 4 jobs queued" in (queue.drained or "")
    assert [after.states()[job.id] for job in behind] == ["pending", "pending"]

    again.let_go()
    after.run("resume")
    ends = queue.wait(again.id, *(job.id for job in behind), new, timeout=60)
    assert [(end.state, end.exit_code) for end in ends] == [
        ("failed", 7), ("completed", 0), ("failed", 1), ("completed", 0),
    ]  # fmt: skip
    assert again.notes == ["begin", "begin", "end"]
    assert once.notes == ["begin"]
    assert queue.drained is None


def test_a_reboot_of_an_idle_machine_drains_nothing(
    queue: Queue, reboot: Callable[..., NextBoot]
) -> None:
    queue.wait(queue.submit(["true"]).id, timeout=60)
    after = reboot()
    job = int(after.run("submit", "--", "true"))
    (end,) = queue.wait(job, timeout=60)
    assert end.state is JobState.COMPLETED


def test_a_drain_of_the_user_survives_a_reboot_as_it_was(
    queue: Queue, reboot: Callable[..., NextBoot]
) -> None:
    job = queue.submit(["true"], hold=True)
    queue.drain("for the night")
    after = reboot()
    assert after.states()[job.id] == "pending"
    assert queue.drained == "for the night"


class ShiftedClock:
    """The system's clock, with the wall clock set back or forth."""

    def __init__(self, shift_s: float) -> None:
        self._shift_s = shift_s

    def now(self) -> Instant:
        real = SystemClock().now()
        return Instant(mono=real.mono, wall=real.wall + self._shift_s)


@pytest.mark.parametrize("shift_s", [-86400.0, 86400.0])
def test_a_clock_set_by_a_day_changes_no_order_and_no_walltime(
    queue: Queue, fake: FakeScript, tmp_path: Path, shift_s: float
) -> None:
    """Submitted before and after the clock was set; what runs meanwhile has its walltime."""
    FakeScript(fake.path, gpus=2)
    submitted = time.monotonic()
    timed = queue.submit([PYTHON, "-c", "import time; time.sleep(600)"], time=2.0)
    first = Sleeper(queue, tmp_path, "first")
    first.begun()
    trace = tmp_path / "trace"
    code = f"import os; open({str(trace)!r}, 'a').write(os.environ['GPUSCHED_JOB_NAME'])"
    shifted = Store(queue.state, ShiftedClock(shift_s))
    with_other_clock = Queue(queue.settings, store=shifted, clock=ShiftedClock(shift_s))
    names = "abcd"
    jobs = [
        (queue if place % 2 else with_other_clock).submit(
            [PYTHON, "-c", code], name=name, gpus=2
        )
        for place, name in enumerate(names)
    ]  # fmt: skip
    first.let_go()
    ends = queue.wait(timed.id, *(job.id for job in jobs), timeout=60)
    assert ends[0].state is JobState.TIMEOUT
    assert ends[0].run_s is not None
    assert 1.9 <= ends[0].run_s <= time.monotonic() - submitted
    assert [end.state for end in ends[1:]] == ["completed"] * 4
    assert trace.read_text() == names
    shifted.close()


def test_the_table_of_kill_9(queue: Queue, tmp_path: Path) -> None:
    """A runs, B, C and D were queued a second before the daemon is killed. No peer passes all five.

    The columns: nothing accepted is lost · A is found again · with its true exit status · never two
    jobs on a card · and the queue goes on by itself.
    """
    runs = Sleeper(queue, tmp_path, "A")
    runs.begun()
    trace = tmp_path / "trace"
    code = (
        "import os, time; n = os.environ['GPUSCHED_JOB_NAME']\n"
        f"alone = 'end' in open({str(tmp_path / 'A.notes')!r}).read()\n"
        f"f = open({str(trace)!r}, 'a'); f.write('<' + n if alone else 'beside A'); f.flush()\n"
        "time.sleep(0.1); f.write(n + '>')"
    )
    queued = [queue.submit([PYTHON, "-c", code], name=name) for name in "BCD"]
    wait_until(lambda: all(queue.show(job.id).reason for job in queued))
    time.sleep(1.0)  # the one second of the table
    os.kill(agent_pid(queue), signal.SIGKILL)
    wait_until(lambda: running_agent(queue.state, queue.store) is None)

    listed = {job.id: job.state for job in queue.list()}
    accepted = [listed.get(job.id) for job in queued]
    found_again = listed[runs.id] is JobState.RUNNING and runs.notes == ["begin"]
    runs.let_go()
    # Nobody submits, looks or helps: the end of A is what starts the next agent.
    ends = queue.wait(runs.id, *(job.id for job in queued), timeout=60)
    columns = {
        "nothing accepted is lost": accepted == ["pending"] * 3,
        "A is found again": found_again,
        "its true exit status": (ends[0].state, ends[0].exit_code) == ("failed", 7),
        "never two on a card": trace.read_text() == "<BB><CC><DD>" and runs.notes[1:] == ["end"],
        "goes on by itself": [end.state for end in ends[1:]] == ["completed"] * 3,
    }
    assert columns == dict.fromkeys(columns, True)


def test_what_a_launcher_has_started_keeps_its_gpu_from_other_containers(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shim and its leader are killed; it has closed every descriptor but 0, 1 and 2."""
    locks = tmp_path / "locks"
    locks.mkdir(mode=0o700)
    monkeypatch.setenv("GPUSCHED_LOCK_DIR", str(locks))
    go, pids = tmp_path / "go", tmp_path / "pids"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    launch = (
        "import os, subprocess, sys\n"
        "assert sys.stdin.read() == ''\n"
        f"child = subprocess.Popen([sys.executable, '-c', {wait!r}])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "child.wait()"
    )
    here = Queue(Settings.load())
    job = here.submit([PYTHON, "-c", launch])
    wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), what="it has launched")
    leader, child = map(int, pids.read_text().split())
    for pid in (shim_pid(here, here.show(job.id)), leader):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _runs(leader), what="the leader is gone")
    assert _runs(child)

    there = Queue(Settings.load({"state_dir": str(tmp_path / "other")}))
    try:
        other = there.submit(["true"])
        wait_until(
            lambda: "a process left by one" in str(there.show(other.id).reason),
            what="the other one waits for what is left",
        )
        assert here.show(job.id).state is JobState.RUNNING
        go.touch()
        assert there.wait(other.id, timeout=60)[0].state is JobState.COMPLETED
        assert here.wait(job.id, timeout=60)[0].state is JobState.LOST
        ask_to_leave(agent_pid(there), there.state)
    finally:
        go.touch()
        for found in (here, there):
            found.store.close()
