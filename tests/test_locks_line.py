"""Whoever wants to write stands in line: order, deaths, stops and forks, with real processes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpusched_ipy import writelock
from gpusched_ipy.errors import StoreError
from gpusched_ipy.writelock import WriteLock
from tests.helpers import wait_until

WRITER = """
import os, sys
from pathlib import Path
from gpusched_ipy.writelock import WriteLock
path, name, times, stays = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
served = os.open(path.with_name("served"), os.O_WRONLY | os.O_APPEND)
lock = WriteLock(path)
for _ in range(times):
    with lock:
        os.write(served, name.encode())
        if stays:
            sys.stdin.read()
"""
Spawn = Callable[..., "subprocess.Popen[bytes]"]

linux = pytest.mark.skipif(
    not hasattr(fcntl, "F_OFD_SETLKW"), reason="this system has no locks of open files: no line"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "served").touch()
    return tmp_path / "q.lock"


@pytest.fixture
def spawn(path: Path) -> Iterator[Spawn]:
    """Starts a process that writes ``times`` times; it returns once that stands in line."""
    started: list[subprocess.Popen[bytes]] = []

    def one(name: str, times: int = 1, *, stays: bool = False) -> subprocess.Popen[bytes]:
        before = numbers_drawn(path)
        more = ["stays"] if stays else []
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(path), name, str(times), *more],
                stdin=subprocess.PIPE,
            )
        )
        if stays:
            wait_until(lambda: name in served(path))
        else:
            wait_until(lambda: numbers_drawn(path) > before)
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.communicate()


def numbers_drawn(path: Path) -> int:
    line = path.with_name("q.line")
    return int.from_bytes(line.read_bytes()[:8], "little") if line.exists() else 0


def served(path: Path) -> str:
    return path.with_name("served").read_text()


@linux
def test_writers_are_served_in_the_order_in_which_they_came(path: Path, spawn: Spawn) -> None:
    lock = WriteLock(path)
    lock.acquire()
    writers = [spawn(name, times=20) for name in "abc"]
    lock.release()
    lock.acquire()  # at once again: and yet after all who waited
    before_us = served(path)
    lock.release()
    for writer in writers:
        assert writer.wait() == 0
    assert before_us[:3] == "abc"
    assert sorted(served(path)) == sorted("abc" * 20)


@linux
def test_the_death_of_who_waits_and_of_who_writes_moves_the_line_on(
    path: Path, spawn: Spawn
) -> None:
    writing = spawn("w", stays=True)
    first, second, third = (spawn(name) for name in "abc")
    second.kill()
    second.wait()
    assert served(path) == "w"
    writing.kill()
    assert (first.wait(), third.wait()) == (0, 0)
    assert served(path) == "wac"


@linux
def test_who_is_stopped_in_line_is_passed(
    path: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writelock, "TELL_S", 0.1)
    lock, behind = WriteLock(path), WriteLock(path)
    lock.acquire()
    stopped = spawn("s")
    stopped.send_signal(signal.SIGSTOP)
    os.waitpid(stopped.pid, os.WUNTRACED)
    lock.release()
    with behind:
        assert served(path) == ""
    with behind:  # not two seconds each time
        assert served(path) == ""
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait() == 0
    assert served(path) == "s"


@linux
def test_who_is_stopped_in_a_write_is_named(
    path: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writelock, "TELL_S", 0.1)
    writing = spawn("w", stays=True)
    writing.send_signal(signal.SIGSTOP)
    os.waitpid(writing.pid, os.WUNTRACED)
    lock = WriteLock(path, patience_s=0.5)
    with pytest.raises(StoreError, match=rf"given up after .* pid {writing.pid} .* is stopped"):
        lock.acquire()
    assert not lock.held
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"pid {writing.pid}" in told
    assert f"kill -CONT {writing.pid}" in told
    # Others than the main thread wait on, and what was given up keeps nobody out.
    patient = threading.Thread(target=lambda: (lock.acquire(), lock.release()))
    patient.start()
    wait_until(lambda: numbers_drawn(path) >= 3)
    writing.send_signal(signal.SIGCONT)
    writing.communicate()
    patient.join()
    with lock:
        assert served(path) == "w"


def test_a_fork_neither_keeps_the_line_nor_gives_it_up(path: Path, spawn: Spawn) -> None:
    lock = WriteLock(path)
    read, write = os.pipe()
    lock.acquire()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    one = WriteLock(path)
    assert one.held_by_anybody()
    lock.release()
    with one:
        assert not lock.held
    os.close(write)
    os.waitpid(child, 0)


@pytest.mark.parametrize("damage", ["no locks of open files", "no file", "a wrong number"])
def test_without_a_line_it_still_excludes(
    path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "no locks of open files":
        monkeypatch.delattr(fcntl, "F_OFD_SETLKW", raising=False)
    elif damage == "no file":
        path.with_name("q.line").mkdir()
    else:
        path.with_name("q.line").write_bytes(b"\xff" * 8)
        path.with_name("q.line").chmod(0o600)
    inside, most = 0, 0

    def write() -> None:
        nonlocal inside, most
        lock = WriteLock(path)
        for _ in range(50):
            with lock:
                inside += 1
                most = max(most, inside)
                os.sched_yield() if hasattr(os, "sched_yield") else None
                inside -= 1

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert most == 1
