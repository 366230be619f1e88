"""The folder of a job at an engine, and the program that runs it on a node: once, to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import files_with, wait_until

from gpusched_ipy.engines.folder import JobFolder, Result, Task
from gpusched_ipy.process import start_ticks


def made(tmp_path: Path, *argv: str, **more: object) -> JobFolder:
    folder = JobFolder(tmp_path / "key-1")
    secret = more.pop("secret", {})
    task = Task(argv=argv, cwd=str(tmp_path), env={"PATH": os.environ["PATH"]}, **more)  # type: ignore[arg-type]
    folder.make(task, secret)  # type: ignore[arg-type]
    return folder


def node(folder: JobFolder) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", str(folder.runner), str(folder.path)], stdout=subprocess.PIPE
    )


def run(folder: JobFolder) -> Result:
    with node(folder) as process:
        process.communicate(timeout=60)
    result = folder.result()
    assert result is not None
    return result


@pytest.fixture
def shell_sleep(tmp_path: Path) -> Iterator[tuple[JobFolder, subprocess.Popen[bytes]]]:
    """A job that sleeps on a node, begun."""
    folder = made(tmp_path, "echo begun; sleep 60", shell=True)
    with node(folder) as process:
        wait_until(lambda: folder.logs(0))
        yield folder, process
        process.communicate(timeout=60)


def test_a_folder_is_private_and_its_job_runs_once(tmp_path: Path) -> None:
    folder = made(tmp_path, "sh", "-c", "echo run ☃; exit 3")
    assert oct(folder.path.stat().st_mode)[-3:] == "700"
    assert folder.claimed is None
    result = run(folder)
    assert (result.ended, result.exit_code, result.signal) == ("exit", 3, None)
    with node(folder) as second:
        said, _ = second.communicate(timeout=60)
    assert b"claimed already" in said
    assert folder.logs(0).decode() == "run ☃\n"
    assert (folder.claimed or {})["pid"]
    assert folder.heartbeat() is not None


def test_a_revoked_folder_never_runs(tmp_path: Path) -> None:
    folder = made(tmp_path, "sh", "-c", "echo run")
    assert folder.revoke()
    assert folder.revoke(), "asking twice changes nothing"
    with node(folder) as late:
        late.communicate(timeout=60)
    assert folder.result() is None
    assert folder.logs(0) == b""


def test_what_a_node_has_claimed_cannot_be_revoked(tmp_path: Path) -> None:
    folder = made(tmp_path, "true")
    run(folder)
    assert not folder.revoke()


def test_secret_variables_reach_the_job_and_leave_the_disk(tmp_path: Path) -> None:
    many = {f"BIG_{number}": "x" * 100_000 for number in range(10)}
    folder = made(tmp_path, "sh", "-c", "echo $TOKEN ${#BIG_9}", secret={"TOKEN": "s3cret", **many})
    run(folder)
    assert folder.logs(0) == b"s3cret 100000\n"
    assert files_with(folder.path, "s3cret") == [folder.log]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    result = run(made(tmp_path, "/no/such/program"))
    assert result.exit_code == 127
    assert "cannot be run" in (result.error or "")


def test_a_walltime_ends_the_whole_group(tmp_path: Path) -> None:
    result = run(made(tmp_path, "sleep 60 & sleep 60", shell=True, time_s=0.3))
    assert result.ended == "timeout"
    assert result.signal == signal.SIGINT or result.exit_code


def test_a_wish_to_cancel_is_heard_without_the_engine(
    shell_sleep: tuple[JobFolder, subprocess.Popen[bytes]],
) -> None:
    folder, _ = shell_sleep
    folder.ask_to_cancel()
    assert wait_until(folder.result).ended == "cancel"


def test_an_engine_that_ends_the_node_program_is_told_apart(
    shell_sleep: tuple[JobFolder, subprocess.Popen[bytes]],
) -> None:
    folder, process = shell_sleep
    process.send_signal(signal.SIGTERM)
    result = wait_until(folder.result)
    assert (result.ended, result.signal) == ("engine", signal.SIGTERM)


def test_a_node_program_that_is_killed_takes_its_command_with_it(tmp_path: Path) -> None:
    folder = made(tmp_path, "echo $$; trap '' INT TERM; while :; do sleep 0.2; done", shell=True)
    with node(folder) as process:
        command = int(wait_until(lambda: folder.logs(0)))
        process.kill()
        process.communicate(timeout=60)
    wait_until(lambda: start_ticks(command) is None, 60, "the end of the command")
    assert folder.result() is None, "nobody has seen how it ended"


def test_a_large_log_keeps_its_head_and_its_tail(tmp_path: Path) -> None:
    folder = made(tmp_path, "sh", "-c", "seq 1 5000", log_cap=4000)
    run(folder)
    text = folder.log.read_text()
    assert text.startswith("1\n2\n")
    assert text.endswith("4999\n5000\n")
    assert "bytes cut" in text
    assert len(text) < 5000


def test_half_written_files_say_nothing_yet(tmp_path: Path) -> None:
    folder = made(tmp_path, "true")
    (folder.path / "result.json").write_text(json.dumps({"ended": "exit"})[:5])
    (folder.path / "claim").write_text("")
    assert folder.result() is None
    assert folder.claimed == {}
