"""Parked interpreters: the Python of a call or an isolated cell that waits, started in advance."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import JobHandle, Queue, interpreter, parcel, submit
from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.interpreter import ParkedInterpreter, matters_early, recipe
from gpusched_ipy.job import JobKind, JobState
from gpusched_ipy.locks import log_is_held
from gpusched_ipy.orders import Orders
from gpusched_ipy.output import create_log
from gpusched_ipy.parcel import Parcel
from gpusched_ipy.process import python_argv

WAITS = "gpusched_ipy.parkedmain"


@pytest.fixture
def queue(fake: FakeScript) -> Iterator[Queue]:
    found = Queue()
    yield found
    found.store.close()


def parked() -> list[psutil.Process]:
    """The interpreters below the shims of this test that wait parked, or became jobs."""
    root, found = os.environ["GPUSCHED_STATE_DIR"], []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            shim = process.parent()
            if WAITS in " ".join(process.cmdline()) and shim and root in shim.cmdline():
                found.append(process)
    return found


def shims() -> list[psutil.Process]:
    """All shims of this test."""
    root, found = os.environ["GPUSCHED_STATE_DIR"], []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if root in words and "gpusched_ipy.shim" in " ".join(words):
                found.append(process)
    return found


def one_parked() -> psutil.Process:
    (found,) = wait_until(parked, what="an interpreter waits parked")
    # Its imports are over once it only waits.
    wait_until(lambda: found.status() == psutil.STATUS_SLEEPING, what="it waits")
    return found


def account() -> dict[str, Any]:
    """All that a job can tell of how it was started."""
    held = {}
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            held[fd] = os.readlink(f"/proc/self/fd/{fd}"), os.get_inheritable(fd)
        except OSError:
            continue  # the one that lists them
    below = subprocess.run(
        ["/bin/sh", "-c", "readlink /proc/$$/fd/0; env"], capture_output=True, text=True, check=True
    )
    return {
        "env": dict(os.environ),
        "below": sorted(line for line in below.stdout.splitlines() if not line.startswith("_=")),
        "cwd": os.getcwd(),
        "argv": sys.argv[:2],
        "flags": repr(sys.flags),
        "path": sys.path,
        "leads": os.getsid(0) == os.getpid(),
        "streams": [held[fd][0] for fd in (0, 1, 2)],
        "held": sorted({Path(what).suffix for what, inherited in held.values() if inherited}),
        "stdin": sys.stdin.read(),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "umask": os.umask(0o077),
    }


def tell() -> tuple[dict[str, Any], bool]:
    return account(), WAITS in Path("/proc/self/cmdline").read_text(encoding="utf-8")


def in_line(queue: Queue, fake: FakeScript, **options: Any) -> JobHandle[Any]:
    """A call that waits for its GPU."""
    fake.busy()
    handle: JobHandle[Any] = submit(tell, queue=queue, **options)
    wait_until(lambda: queue.show(handle.id).reason, what="a reason to wait")
    return handle


def test_a_job_cannot_tell_that_its_python_had_waited(
    queue: Queue, fake: FakeScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    found = []
    for wanted in ("true", "false"):
        options = {"cwd": folder, "env": ["CANARY=secret", "PLAIN"], "gpus": 1, "name": "tells"}
        monkeypatch.setenv("PLAIN", "given")
        monkeypatch.setenv("GPUSCHED_PARK_PYTHON", wanted)
        handle = in_line(queue, fake, **options)
        if wanted == "true":
            waiting = one_parked()
            environ = waiting.environ()
            assert "CUDA_VISIBLE_DEVICES" not in environ
            assert "CANARY" not in environ
            assert waiting.cwd() == "/"
            assert not [file for file in waiting.open_files() if "state" in file.path]
        fake.free()
        said, was_parked = handle.result(timeout=120)
        assert was_parked == (wanted == "true")
        assert said["leads"]
        assert said["streams"][1].endswith(f"{queue.show(handle.id).attempt}.log")
        assert ".lock" in said["held"]  # what it starts keeps its GPU
        found.append(_without_its_own(said, handle.id))
        agent_leaves(queue)
        # The job's shim may start the next agent, as this one was set.
        wait_until(lambda: not shims(), what="the shims have left")
    assert found[0] == found[1]
    assert found[0]["env"]["CANARY"] == "secret"


def _without_its_own(said: dict[str, Any], job: int) -> dict[str, Any]:
    """What is to be the same for two jobs of one kind."""
    assert said["env"].pop("GPUSCHED_JOB_ID") == str(job)
    said["env"].pop("GPUSCHED_PARK_PYTHON")
    said["below"] = [
        line
        for line in said["below"]
        if not line.startswith(("GPUSCHED_JOB_ID=", "GPUSCHED_PARK_PYTHON="))
    ]
    said["streams"] = [Path(name).suffix for name in said["streams"]]
    return said


def agent_leaves(queue: Queue) -> None:
    agent = running_agent(queue.state, queue.store)
    if agent is not None:
        ask_to_leave(agent, queue.state)


def test_one_that_has_died_is_no_fault_of_the_job(queue: Queue, fake: FakeScript) -> None:
    handle = in_line(queue, fake)
    waiting = one_parked()
    waiting.kill()
    wait_until(lambda: not alive(waiting), what="it is dead")
    fake.free()
    _, was_parked = handle.result(timeout=120)
    assert not was_parked
    assert queue.show(handle.id).attempts == 1


def test_it_waits_only_while_such_a_job_is_next(queue: Queue, fake: FakeScript) -> None:
    first = in_line(queue, fake)
    waiting = one_parked()
    command = queue.submit(["true"], priority=5)
    wait_until(lambda: not alive(waiting), what="a command is next: it is dismissed")
    queue.cancel(command.id)
    again = one_parked()
    assert again.pid != waiting.pid
    first.cancel()
    wait_until(lambda: not alive(again), what="nothing is in line: it is dismissed")


def test_none_waits_where_that_is_turned_off(
    queue: Queue, fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUSCHED_PARK_PYTHON", "false")
    handle = in_line(queue, fake)
    fake.free()
    assert handle.result(timeout=120)[1] is False


def test_a_folder_that_is_gone_is_said_as_ever(
    queue: Queue, fake: FakeScript, tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    handle = in_line(queue, fake, cwd=folder)
    one_parked()
    folder.rmdir()
    fake.free()
    (job,) = queue.wait(handle.id, timeout=120)
    assert (job.state, job.exit_code) == ("failed", 127)
    assert str(folder) in (job.error or "")


def test_a_cell_runs_in_it_as_in_a_fresh_python(queue: Queue, fake: FakeScript) -> None:
    fake.busy()
    source = (
        "import os, sys\n"
        "seen = open('/proc/self/cmdline').read(), os.environ['CUDA_VISIBLE_DEVICES'], sys.argv\n"
        "print('printed')"
    )
    uid = "c" * 32
    parcel.send(queue.state, uid, Parcel(source=source, outputs=("seen",), log_cap=1 << 20))
    argv = python_argv("isolatedmain", str(queue.state.root), uid, isolated=False)
    job = queue.submit(argv, kind=JobKind.ISOLATED, code=source, uid=uid)
    one_parked()
    fake.free()
    (job,) = queue.wait(job.id, timeout=120)
    assert job.state is JobState.COMPLETED
    line, gpu, arguments = JobHandle[Any](queue, job.id).result()["seen"]
    assert WAITS in line
    assert gpu == "GPU-fake-0"
    assert arguments == ["-c", str(queue.state.root), uid]
    assert "printed" in queue.state.transcript(uid).read_text(encoding="utf-8")


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# What is started in advance, and when


ARGV = ("/py", "-P", "-c", "x; from gpusched_ipy.callmain import main; y", "root", "uid")


def test_jobs_whose_python_starts_alike_have_one_recipe() -> None:
    one = recipe("callable", ARGV, {"PATH": "/bin", "GPUSCHED_SWEEP_LR": "1"}, ())
    other = recipe("callable", (*ARGV[:5], "uid2"), {"PATH": "/bin"}, ("MY_TOKEN",))
    assert one == other
    assert one is not None
    assert one["argv"] == [
        *("/py", "-P", "-c", "x; from gpusched_ipy.parkedmain import main; y", "callmain")
    ]
    assert one != recipe("callable", ARGV, {"PATH": "/bin", "LANG": "C"}, ())


@pytest.mark.parametrize(
    ("kind", "argv", "env", "named"),
    [
        ("command", ARGV, {}, ()),
        ("isolated", ARGV, {}, ()),  # of another kind of job
        ("callable", (*ARGV[:1], "-I", *ARGV[2:]), {}, ()),
        ("callable", ARGV[:5], {}, ()),
        ("callable", ARGV, {"PYTHONPATH": "/project"}, ()),
        ("callable", ARGV, {}, ("PYTHONHASHSEED",)),
        ("callable", ARGV, {}, ("FINE", "LD_PRELOAD")),
        ("callable", ARGV, {"LC_ALL": "x" * 40_000}, ()),
    ],
)
def test_what_starts_only_with_its_job(
    kind: str, argv: tuple[str, ...], env: dict[str, str], named: tuple[str, ...]
) -> None:
    assert recipe(kind, argv, env, named) is None


SPY = """
import os, sys
class Spy(type(os.environ)):
    read = set()
    def __getitem__(self, name):
        Spy.read.add(name)
        return super().__getitem__(name)
os.environ.__class__ = Spy
from gpusched_ipy import parkedmain
parkedmain.prepare('isolatedmain')
print(sorted(Spy.read))
print(sorted(name.partition('.')[0] for name in sys.modules))
before = set(sys.modules)
from gpusched_ipy.isolatedshell import make_shell
class Tape:
    def message(self, *shown): pass
make_shell(Tape()).run_cell('x = 1', store_history=True)
print(len(set(sys.modules) - before))
"""


def test_what_is_imported_in_advance() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SPY], capture_output=True, text=True, check=True, timeout=120
    )
    read, modules, later = map(ast.literal_eval, done.stdout.splitlines())
    # What --env may still change has not been looked at.
    assert [name for name in read if not matters_early(name)] == []
    heavy = {"torch", "numpy", "matplotlib", "jax", "tensorflow", "cupy", "multiprocessing"}
    assert heavy & set(modules) == set()
    # And the first cell finds nearly all that it needs: without that it imports 29 modules more.
    assert later <= 5


def test_a_python_that_loads_a_gpu_framework_by_itself_does_not_wait(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import torch\n")
    (tmp_path / "torch.py").touch()
    ours, theirs = socket.socketpair()
    start = recipe("callable", argv_of("callmain"), {}, ())
    assert start is not None
    with ours, theirs:
        done = subprocess.run(
            [*start["argv"], str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            pass_fds=[theirs.fileno()],
            timeout=120,
            check=False,
        )
        theirs.close()
        assert done.returncode == 0
        assert ours.recv(1) == b""


def argv_of(module: str, *arguments: str) -> list[str]:
    return python_argv(module, *(arguments or ("root", "uid")), isolated=False)


# What a shim does with one


@pytest.fixture
def waiting() -> Iterator[ParkedInterpreter]:
    found = ParkedInterpreter()
    yield found
    found.dismiss()


def begin(
    waiting: ParkedInterpreter, start: Any, tmp_path: Path
) -> tuple[subprocess.Popen[bytes] | None, Path]:
    path = tmp_path / "a.log"
    log = create_log(path)
    said = {"arguments": [str(tmp_path), "uid"], "env": dict(os.environ), "cwd": str(tmp_path)}
    try:
        return waiting.begin(start, said, (log,)), path
    finally:
        os.close(log)


def the_parked() -> psutil.Process:
    """The one interpreter that waits here; other tests may have left other processes."""
    (found,) = [one for one in psutil.Process().children() if "parkedmain" in str(one.cmdline())]
    return found


def test_one_of_another_recipe_is_dismissed_before_the_job_begins(
    waiting: ParkedInterpreter, tmp_path: Path
) -> None:
    start = recipe("callable", argv_of("callmain"), dict(os.environ), ())
    waiting.park(start)
    child = the_parked()
    other = recipe("callable", argv_of("callmain"), {"LANG": "C"}, ())
    assert begin(waiting, other, tmp_path)[0] is None
    assert not child.is_running()


def test_a_python_that_cannot_be_started_is_none(
    waiting: ParkedInterpreter, tmp_path: Path
) -> None:
    start = recipe("callable", ["/nothing/is/here", *argv_of("callmain")[1:]], {}, ())
    waiting.park(start)
    assert begin(waiting, start, tmp_path)[0] is None


def test_a_stopped_one_is_the_process_of_the_job(
    waiting: ParkedInterpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may go on at any time: a second start beside it could run the job twice."""
    start = recipe("callable", argv_of("callmain"), dict(os.environ), ())
    waiting.park(start)
    found = the_parked()
    found.suspend()
    wait_until(lambda: found.status() == psutil.STATUS_STOPPED, what="it is stopped")
    monkeypatch.setattr(interpreter, "PATIENCE_S", 0.1)
    child, log = begin(waiting, start, tmp_path)
    assert child is not None
    assert child.pid == found.pid
    assert log_is_held(log)  # by what is on its way to it
    found.resume()
    assert child.wait(timeout=60) == 1  # there is no such call
    assert not log_is_held(log)
    assert b"the call is gone" in log.read_bytes()


def test_who_obeys_at_once_and_hangs_up_has_been_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for untold it would be killed in its work, and the job begun a second time."""
    ours, theirs = socket.socketpair()
    real = socket.send_fds

    def send_fds(channel: socket.socket, lines: list[bytes], fds: tuple[int, ...]) -> int:
        sent = real(channel, lines, fds)
        with theirs:
            assert Orders(theirs).receive() == {"arguments": []}
            theirs.sendall(interpreter.BEGUN)
        return sent

    monkeypatch.setattr(socket, "send_fds", send_fds)
    with ours:
        assert interpreter._told(ours, {"arguments": []}, ())


def test_it_leaves_when_nobody_can_give_it_an_order(waiting: ParkedInterpreter) -> None:
    waiting.park(recipe("callable", argv_of("callmain"), dict(os.environ), ()))
    found = the_parked()
    assert waiting._channel is not None
    waiting._channel.close()
    wait_until(lambda: not alive(found), what="it has left")
