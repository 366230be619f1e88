"""What keeps on its node what a job has had: one job after the other, and nothing for too long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy.engines.folder import JobFolder, Task
from gpusched_ipy.engines.kept import KeptFolder, Terms, kept_folders

TERMS = Terms(gpus=1, gpu_type=None, options=(), python=sys.executable)


class Node:
    """The program of one folder, as the engine would start it."""

    def __init__(self, root: Path, idle_s: float) -> None:
        self.root = root
        self.kept = KeptFolder(root / "kept" / "first")
        self.kept.make(TERMS, idle_s, None)
        argv = [sys.executable, "-I", str(self.kept.program), str(self.kept.path)]
        self.process = subprocess.Popen([*argv, str(self.job("first", "echo first").path)])

    def job(self, key: str, line: str) -> JobFolder:
        folder = JobFolder(self.root / key)
        folder.make(Task(argv=(line,), shell=True, env={"PATH": os.environ["PATH"]}), {})
        return folder

    def waits(self, turn: int) -> None:
        """Until it is idle, and waits for the job of that turn."""
        wait_until(lambda: (idle := self.kept.idle()) and idle.turn == turn, 60, f"turn {turn}")

    def call(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, 300.0)
    yield made
    made.process.kill()
    made.process.wait()


def test_jobs_run_in_turn_each_by_its_own_program(node: Node) -> None:
    node.waits(1)
    assert JobFolder(node.root / "first").log.read_text() == "first\n"
    second = node.job("second", "echo second; exit 3")
    (second.path / "node.py").write_text((second.path / "node.py").read_text() + "# another one\n")
    assert node.kept.take(1, second.path)
    assert not node.kept.take(1, None), "what is decided is decided"
    node.call()
    node.waits(2)
    result = second.result()
    assert result is not None
    assert (result.exit_code, second.log.read_text()) == (3, "second\n")
    assert (second.claimed or {})["pid"] != node.process.pid
    third = node.job("third", "kill -9 $PPID")  # its program dies without a word
    assert node.kept.take(2, third.path)
    node.waits(3)  # nobody has called: it looks by itself
    assert third.result() is None
    assert node.kept.uses() == ["second", "third"]


def test_a_program_that_is_broken_says_so_where_the_queue_looks(node: Node) -> None:
    node.waits(1)
    second = node.job("second", "true")
    (second.path / "node.py").write_text("raise ValueError('broken')")
    assert node.kept.take(1, second.path)
    node.call()
    node.waits(2)
    assert "ValueError: broken" in (second.path / "engine.log").read_text()


def test_idle_for_too_long_it_leaves_and_takes_nothing_more(tmp_path: Path) -> None:
    node = Node(tmp_path, 0.2)
    assert node.process.wait(60) == 0
    assert node.kept.uses() == [None]
    assert not node.kept.take(1, tmp_path / "late")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_leaves_what_was_just_given_to_others(
    node: Node, number: signal.Signals
) -> None:
    node.waits(1)
    node.process.send_signal(signal.SIGSTOP)
    second = node.job("second", "true")
    assert node.kept.take(1, second.path)
    node.process.send_signal(number)
    node.process.send_signal(signal.SIGCONT)
    node.process.wait(60)
    # Of two signals that wait either may be seen first; a job that has begun is not left half done.
    assert second.claimed is None or second.result() is not None


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_given_back_it_leaves(node: Node, how: str) -> None:
    node.waits(1)
    if how == "taken":
        assert node.kept.take(1, None)
    else:
        node.kept.remove()
        assert kept_folders(node.root) == []
    began = time.monotonic()
    node.process.wait(60)
    assert time.monotonic() - began < 60


def test_a_mark_that_was_never_written_is_one_for_nothing(node: Node) -> None:
    node.waits(1)
    (node.kept.path / "use-1").touch()
    assert node.process.wait(60) == 0
