"""Commands from submit to result, with the real agent and real shims, and what each death does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FakeScript, files_with, wait_until

from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import JobNotFoundError, UserError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.locks import alive_pid
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.summon import ensure_agent

PYTHON = sys.executable


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def ended(queue: Queue, *jobs: Job, timeout: float = 60) -> list[Job]:
    return queue.wait(*(job.id for job in jobs), timeout=timeout)


def running(queue: Queue, job: Job) -> Job:
    wait_until(lambda: queue.show(job.id).state is JobState.RUNNING, what=f"job {job.id} runs")
    return queue.show(job.id)


def why(queue: Queue, job: Job) -> str:
    reason = queue.show(job.id).reason
    return "" if reason is None else reason.text


def log(queue: Queue, job: Job) -> str:
    path = queue.log_path(job.id)
    return "" if path is None else path.read_text()


def shim_pid(queue: Queue, job: Job) -> int:
    member = queue.show(job.id).member
    assert member is not None
    pid = alive_pid(queue.state, member)
    assert pid
    return pid


def sleeper(queue: Queue, tmp_path: Path, **options: object) -> tuple[Job, Path]:
    """A command that runs until a file appears, and says when it has begun."""
    go = tmp_path / f"go-{time.monotonic_ns()}"
    code = (
        "import os,sys,time\nprint('began', os.getpid(), flush=True)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\nprint('over')"
    )
    return queue.submit([PYTHON, "-c", code], **options), go


def test_a_command_sees_its_gpu_and_reports_its_end(queue: Queue) -> None:
    show = (
        "import os; e = os.environ;"
        "print(e['CUDA_VISIBLE_DEVICES'], e['CUDA_DEVICE_ORDER'], e['GPUSCHED_JOB_ID'])"
    )
    good = queue.submit([PYTHON, "-c", show])
    bad = queue.submit([PYTHON, "-c", "import sys; print('oops', file=sys.stderr); sys.exit(3)"])
    killed = queue.submit([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"])
    good_end, bad_end, killed_end = ended(queue, good, bad, killed)
    assert (good_end.state, good_end.exit_code) == ("completed", 0)
    assert log(queue, good) == f"GPU-fake-0 PCI_BUS_ID {good.id}\n"
    assert (bad_end.state, bad_end.exit_code) == ("failed", 3)
    assert log(queue, bad) == "oops\n"
    assert (killed_end.state, killed_end.exit_code, killed_end.signal) == ("failed", None, 9)
    assert good_end.run_s is not None
    assert good_end.gpus == ("GPU-fake-0",)


def test_never_two_at_once_and_in_order(queue: Queue, fake: FakeScript, tmp_path: Path) -> None:
    fake.busy()
    trace = tmp_path / "trace"
    note = f"import os; f = open({str(trace)!r}, 'a'); n = os.environ['GPUSCHED_JOB_NAME'];"
    code = note + "f.write('<' + n); f.flush(); import time; time.sleep(0.05); f.write(n + '>')"
    jobs = [
        queue.submit([PYTHON, "-c", code], name=name, priority=priority)
        for name, priority in [("a", 0), ("b", 0), ("c", 5)]
    ]
    wait_until(lambda: why(queue, jobs[0]))
    fake.free()
    ended(queue, *jobs)
    assert trace.read_text() == "<cc><aa><bb>"


def test_cancel_interrupts_a_python_job(queue: Queue, tmp_path: Path) -> None:
    job, _ = sleeper(queue, tmp_path)
    wait_until(lambda: "began" in log(queue, job))
    queue.cancel(job.id)
    (end,) = ended(queue, job)
    assert end.state is JobState.CANCELLED
    assert "KeyboardInterrupt" in log(queue, job)


def test_cancel_ends_a_whole_tree_that_will_not_listen(queue: Queue, tmp_path: Path) -> None:
    stubborn = tmp_path / "stubborn.py"
    stubborn.write_text(
        "import os, signal, subprocess, sys, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "if len(sys.argv) == 1:\n"
        "    for new in (False, True):\n"
        "        subprocess.Popen([sys.executable, __file__, 'child'], start_new_session=new)\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork(): os._exit(0)\n"
        "print(os.getpid(), flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    job = queue.submit([PYTHON, str(stubborn)])
    wait_until(lambda: len(log(queue, job).split()) == 4)
    pids = [int(word) for word in log(queue, job).split()]
    queue.cancel(job.id)
    (end,) = ended(queue, job)
    assert end.state is JobState.CANCELLED
    assert end.signal == signal.SIGKILL
    wait_until(lambda: not [pid for pid in pids if os.path.exists(f"/proc/{pid}")])


def test_walltime(queue: Queue, tmp_path: Path) -> None:
    job, _ = sleeper(queue, tmp_path, time=0.5)
    (end,) = ended(queue, job)
    assert (end.state, end.error) == ("timeout", "its walltime ran out")


def test_what_is_left_in_the_background_ends_with_the_command(queue: Queue) -> None:
    job = queue.submit(["sleep 1000 & echo $!"], shell=True)
    (end,) = ended(queue, job)
    assert end.state is JobState.COMPLETED
    wait_until(lambda: not os.path.exists(f"/proc/{log(queue, job).strip()}"))


def test_what_cannot_run_says_so(queue: Queue, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no program\n")
    script.chmod(0o700)
    gone = tmp_path / "gone"
    gone.mkdir()
    job = queue.submit(["true"], cwd=gone, hold=True)
    gone.rmdir()
    queue.release(job.id)
    unreadable = queue.submit([str(script)])
    (first, second) = ended(queue, job, unreadable)
    assert (first.state, first.exit_code) == ("failed", 127)
    assert str(gone) in (first.error or "")
    assert (second.state, second.exit_code) == ("failed", 126)


def test_named_variables_reach_the_job_and_stay_out_of_the_record(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-unnamed")
    monkeypatch.setenv("MY_TOKEN", "canary-named")
    code = "import os; print(os.environ['MY_TOKEN'], 'AWS_SECRET_ACCESS_KEY' in os.environ)"
    job = queue.submit([PYTHON, "-c", code.replace("print", "x=")], env=["MY_TOKEN", "PLAIN=1"])
    # Before it starts, only the private file beside the record knows the value.
    known = files_with(queue.state.root, "canary-named")
    assert {path.parent.name for path in known} <= {"env"}
    seen = queue.submit([PYTHON, "-c", code], env=["MY_TOKEN"])
    ended(queue, job, seen)
    assert log(queue, seen) == "canary-named False\n"
    left = files_with(queue.state.root, "canary")
    assert [path.name for path in left] == [f"{queue.show(seen.id).attempt}.log"]


def test_bad_submits_queue_nothing(queue: Queue) -> None:
    for bad, message in [
        (lambda: queue.submit([]), "no command"),
        (lambda: queue.submit(["no-such-program-here"]), "no-such-program-here"),
        (lambda: queue.submit(["true"], cwd="/no/such"), "/no/such"),
        (lambda: queue.submit(["true"], gpus=3), "this machine has 1"),
        (lambda: queue.submit(["true"], mem=80 * 2**30), "largest GPU here has 40.0 GiB"),
        (lambda: queue.submit(["true"], priority=5000), "priority 5000"),
        (lambda: queue.submit(["true"], name="x" * 300), "at most 256"),
        (lambda: queue.submit(["true"], env=["NOT SET"]), "NOT SET"),
        (lambda: queue.submit(["true"], after=["nothing"]), "no job nothing"),
        (lambda: queue.submit(["true"], colour="red"), "colour"),
    ]:
        with pytest.raises(UserError, match=message):
            bad()
    assert queue.list(all=True) == []
    with pytest.raises(JobNotFoundError):
        queue.cancel(1)


def test_dependencies(queue: Queue, tmp_path: Path) -> None:
    first, go = sleeper(queue, tmp_path, name="prep")
    after = queue.submit(["true"], after=["prep"])
    doomed = queue.submit(["true"], after=[queue.submit(["false"], name="bad").id])
    anyway = queue.submit(["true"], after_any=["bad"])
    running(queue, first)
    wait_until(lambda: "after #1" in why(queue, after))
    go.touch()
    ends = ended(queue, first, after, doomed, anyway)
    assert [end.state for end in ends] == ["completed", "completed", "cancelled", "completed"]
    assert "failed" in (ends[2].error or "")


def test_what_it_drew_of_its_gpu_is_recorded(
    queue: Queue, fake: FakeScript, tmp_path: Path
) -> None:
    fake.change(job_load={"utilization": 0.5, "memory": "8GiB"}, power=100)
    job, go = sleeper(queue, tmp_path)
    running(queue, job)
    monitor = Monitor(queue.settings, state_dir=queue.state.root)
    with monitor.wanting("test"):  # the agent reads already: these are its readings
        wait_until(lambda: len(monitor.history(60)) >= 10, what="some readings of it")
    monitor.stop()
    go.touch()
    ended(queue, job)
    wait_until(lambda: queue.show(job.id).peak_mem_bytes)
    found = queue.show(job.id)
    assert found.peak_mem_bytes == 8 * 2**30
    assert found.mean_utilization is not None
    assert 0.2 < found.mean_utilization <= 0.5
    assert found.energy_j is not None
    (told,) = [event.data for event in queue.events(found.id) if event.what == "usage"]
    assert told["peak_utilization"] == 0.5


def test_verbs(queue: Queue, fake: FakeScript) -> None:
    fake.busy()
    one, two = queue.submit(["true"], name="one"), queue.submit(["true"], name="two", priority=9)
    assert queue.top("one").priority == 10
    assert [job.held for job in queue.hold("1-2")] == [True, True]
    assert [job.held for job in queue.release("one", "two")] == [False, False]
    assert [job.priority for job in queue.set_priority(["*"], -3)] == [-3, -3]
    queue.drain()
    fake.free()
    wait_until(lambda: "drained" in why(queue, one))
    queue.resume()
    ended(queue, one, two)
    (again,) = queue.requeue("one")
    assert again.id == one.id
    (end,) = ended(queue, again)
    assert (end.state, end.attempts) == ("completed", 2)


# What each death does


def agent_pid(queue: Queue) -> int:
    return wait_until(lambda: running_agent(queue.state, queue.store), what="an agent lives")


def test_agent_killed_loses_nothing(queue: Queue, tmp_path: Path) -> None:
    """The kill -9 table: A runs, B and C wait, the daemon dies."""
    first, go = sleeper(queue, tmp_path)
    behind = [queue.submit(["true"]), queue.submit(["false"])]
    running(queue, first)
    os.kill(agent_pid(queue), signal.SIGKILL)
    go.touch()
    ends = ended(queue, first, *behind)
    assert [(end.state, end.exit_code) for end in ends] == [
        ("completed", 0), ("completed", 0), ("failed", 1),
    ]  # fmt: skip
    assert [end.attempts for end in ends] == [1, 1, 1]


def test_shim_killed_keeps_the_gpu_until_the_job_is_gone(queue: Queue, tmp_path: Path) -> None:
    first, go = sleeper(queue, tmp_path)
    running(queue, first)
    wait_until(lambda: "began" in log(queue, first))
    next_one = queue.submit(["true"])
    os.kill(shim_pid(queue, first), signal.SIGKILL)
    wait_until(lambda: why(queue, next_one))
    assert queue.show(first.id).state is JobState.RUNNING
    assert queue.show(next_one.id).state is JobState.PENDING
    go.touch()
    lost, done = ended(queue, first, next_one)
    assert lost.state is JobState.LOST
    assert "outcome unknown" in (lost.error or "")
    assert done.state is JobState.COMPLETED
    assert "over" in log(queue, first)


def test_a_stopped_shim_keeps_its_gpu(queue: Queue, tmp_path: Path) -> None:
    first, go = sleeper(queue, tmp_path)
    running(queue, first)
    pid = shim_pid(queue, first)
    os.kill(pid, signal.SIGSTOP)
    try:
        go.touch()
        second = queue.submit(["true"])
        wait_until(lambda: why(queue, second))
        assert queue.show(second.id).state is JobState.PENDING
    finally:
        os.kill(pid, signal.SIGCONT)
    ends = ended(queue, first, second)
    assert [end.state for end in ends] == ["completed", "completed"]


def test_requeue_runs_a_lost_job_again(queue: Queue, tmp_path: Path) -> None:
    job, go = sleeper(queue, tmp_path)
    running(queue, job)
    wait_until(lambda: "began" in log(queue, job))
    os.kill(int(log(queue, job).split()[1]), signal.SIGSTOP)
    os.kill(shim_pid(queue, job), signal.SIGKILL)
    os.kill(int(log(queue, job).split()[1]), signal.SIGKILL)
    (end,) = ended(queue, job)
    assert end.state is JobState.LOST
    go.touch()
    queue.requeue(job.id)
    (again,) = ended(queue, job)
    assert (again.state, again.attempts) == ("completed", 2)


def test_sixteen_starts_give_one_agent(queue: Queue, fake: FakeScript) -> None:
    fake.busy()
    queue.submit(["true"])
    for _ in range(15):
        ensure_agent(queue.state)
    agent_pid(queue)

    def agents() -> int:
        kinds = queue.store.member_kinds().items()
        return sum(1 for key, kind in kinds if kind == "agent" and alive_pid(queue.state, key))

    assert wait_until(agents) == 1
    fake.free()
    ended(queue, queue.show(1))
    assert agents() == 1


def test_agent_leaves_when_there_is_nothing_to_do(queue: Queue) -> None:
    (end,) = ended(queue, queue.submit(["true"]))
    assert end.state is JobState.COMPLETED
    pid = agent_pid(queue)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), what="the agent leaves")


def test_a_closed_submitter_does_not_matter(settings: Settings, tmp_path: Path) -> None:
    code = (
        "from gpusched_ipy.api import Queue; import sys\n"
        "print(Queue().submit([sys.executable, '-c', 'print(42)']).id)"
    )
    out = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    queue = Queue(settings)
    (end,) = queue.wait(int(out.stdout), timeout=60)
    assert end.state is JobState.COMPLETED
    assert log(queue, end) == "42\n"
    queue.store.close()
