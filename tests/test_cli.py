"""The terminal, as its users and their scripts meet it: real processes, a scripted GPU."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, files_with, wait_until

from gpusched_ipy import cli
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.terminal import plain_table, safe_text
from gpusched_ipy.verbs import exit_status

GPUSCHED = [sys.executable, "-m", "gpusched_ipy"]


class Result:
    """What one call of gpusched gave."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status = done.returncode
        self.out = done.stdout
        self.err = done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def gpusched(*argv: str, status: int = 0, timeout: float = 120.0) -> Result:
    """Call gpusched in a process of its own and compare its exit status."""
    done = subprocess.run(
        [*GPUSCHED, *argv], capture_output=True, text=True, timeout=timeout, check=False
    )
    result = Result(done)
    assert result.status == status, (argv, result.status, result.out, result.err)
    assert "Traceback" not in result.err, result.err
    return result


def start(*argv: str, **more: Any) -> subprocess.Popen[str]:
    """Start gpusched and leave it running, in a session without a terminal."""
    return subprocess.Popen(
        [*GPUSCHED, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,
    )


def submit(*argv: str) -> int:
    """Submit and give the id, which stands alone on stdout."""
    out = gpusched("submit", *argv).out
    assert out.strip().isdigit(), out
    assert out.count("\n") == 1
    return int(out)


def job(job_id: int) -> Any:
    return gpusched("show", str(job_id), "--json").json


PYTHON = sys.executable


def test_submit_waits_with_a_reason_and_runs_when_the_gpu_is_free(fake: FakeScript) -> None:
    fake.busy()
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['GPUSCHED_JOB_ID'])"
    low = submit("-p", "1", "-n", "low", "--", PYTHON, "-c", code)
    high = submit("-p", "3", "-n", "high", "--", PYTHON, "-c", code)
    wait_until(lambda: "97 %" in (job(high)["reason"] or ""), what="a reason that names the usage")
    assert "user1" in job(high)["reason"]
    assert "1 job ahead" in wait_until(lambda: job(low)["reason"])
    listed = gpusched("list", "--json").json
    assert [(entry["id"], entry["state"]) for entry in listed] == [(1, "pending"), (2, "pending")]

    fake.free()
    gpusched("wait")

    done = {entry["name"]: entry for entry in gpusched("list", "--all", "--json").json}
    assert done["high"]["started_at"] < done["low"]["started_at"]
    assert done["high"]["gpus"] == ["GPU-fake-0"]
    assert done["high"]["exit_code"] == 0
    assert done["high"]["reason"] is None
    assert gpusched("log", "low").out == f"GPU-fake-0 {low}\n"
    assert gpusched("list", "--json").json == []
    assert [entry["id"] for entry in gpusched("history", "--json", "--limit", "1").json] == [high]


def test_the_plain_table_has_a_row_for_each_job(fake: FakeScript) -> None:
    submit("--hold", "-n", "one", "--", "ls")
    submit("--hold", "-n", "two words", "--", "ls")
    lines = gpusched("list").out.splitlines()
    assert lines[0].split() == [
        *("id", "name", "state", "priority", "GPU", "since", "why", "owner")
    ]
    assert lines[1].startswith("1   one        held")
    assert lines[2].startswith("2   two words  held")


def test_a_command_may_stand_without_the_two_dashes(fake: FakeScript) -> None:
    first = submit("-p", "2", "--hold", "python3", "train.py", "--lr", "0.1", "--", "-x")
    argv = job(first)["argv"]
    assert argv[1:] == ["train.py", "--lr", "0.1", "--", "-x"]
    assert job(first)["priority"] == 2
    second = submit("--hold", "--", "python3", "-p", "7")
    assert job(second)["argv"][1:] == ["-p", "7"]
    assert job(second)["priority"] == 0


def test_shell_cwd_and_env_reach_the_job(fake: FakeScript, tmp_path: Path) -> None:
    folder = tmp_path / "with blanks"
    folder.mkdir()
    line = 'pwd; echo "$TOKEN" | tr a-z A-Z; exit 5'
    number = submit("--cwd", str(folder), "--env", "TOKEN=s3cret", "--shell", line)
    assert gpusched("wait", str(number), status=5).out == ""
    assert gpusched("log", str(number)).out == f"{folder}\nS3CRET\n"
    assert "s3cret" not in gpusched("show", str(number), "--json").out
    found = files_with(tmp_path / "state", "s3cret")
    assert [path for path in found if "logs" not in path.parts] == []
    refused = gpusched("requeue", str(number), status=1).err
    assert "what --env gave it (TOKEN) was deleted when it first started" in refused
    assert refused.count("\n") == 1
    assert job(number)["state"] == "failed"


def test_what_env_gave_is_kept_for_another_try_and_gone_with_the_last(
    fake: FakeScript, tmp_path: Path
) -> None:
    line = 'test "$TOKEN" = s3cret && test -e again || { touch again; exit 1; }'
    number = submit(
        *("--retries", "1", "--cwd", str(tmp_path), "--env", "TOKEN=s3cret"),
        *("--set", "retry_delay_s=0.1", "--shell", line),
    )
    gpusched("wait", str(number))
    assert job(number)["attempts"] == 2
    wait_until(lambda: not files_with(tmp_path / "state", '"s3cret"'), what="its values gone")


def facts_of(reference: str) -> dict[str, str]:
    lines = gpusched("show", reference).out.splitlines()
    return {line[:20].rstrip(): line[20:].strip() for line in lines if not line.startswith("20")}


def test_show_tells_people_what_is_known_and_no_more(fake: FakeScript) -> None:
    given = ["--mem", "2G", "--time", "2h", "--retries", "2", "--label", "team=a b", "-n", "prep"]
    number = submit(*given, "--", "sh", "-c", "exit 0")
    submit("--after", "prep", "--hold", "-n", "next", "--", "true")
    gpusched("wait", str(number))
    told = facts_of("prep")
    assert told["request"].startswith("gpus 1, mem 2.0 GiB, time 2 h 00, retries 2, retry delay ")
    assert told["labels"] == "team=a b"
    assert told["argv"].endswith("sh -c 'exit 0'")
    assert (told["exit code"], told["state"], told["priority"]) == ("0", "completed", "0")
    assert not told.keys() & {"engine", "held", "oom", "retried", "usage", "array", "error"}
    told = {
        line[:20].rstrip(): line[20:].strip() for line in gpusched("show", "2").out.splitlines()
    }
    assert told["held"] == "yes"
    assert told["request"] == "gpus 1, after 1"
    assert "gpus GPU-fake-0; state starting" in gpusched("show", "prep").out
    assert "{" not in "".join(told.values())


def test_verbs_change_waiting_jobs(fake: FakeScript) -> None:
    fake.busy()
    for name in ("a", "b", "c"):
        submit("-n", name, "--", "true")
    assert gpusched("hold", "1-2").out == "job 1 held\njob 2 held\n"
    assert [entry["held"] for entry in gpusched("list", "--json").json] == [True, True, False]
    gpusched("release", "a,b")
    gpusched("priority", "1", "2", "-5")
    assert [entry["priority"] for entry in gpusched("list", "--json").json] == [-5, -5, 0]
    gpusched("top", "a")
    assert job(1)["priority"] == 1
    assert gpusched("cancel", "b").out == "job 2 cancelled\n"
    assert job(2)["state"] == "cancelled"
    gpusched("cancel", "2")  # to cancel it again changes nothing, and is no fault
    gpusched("wait", "2", status=1)  # it never ran
    gpusched("requeue", "2")
    assert job(2)["state"] == "pending"
    assert gpusched("requeue", "1", status=1).err.count("\n") == 1


def test_drain_and_resume(fake: FakeScript) -> None:
    gpusched("drain")
    answer = gpusched("submit", "--", "true")
    assert answer.out == "1\n"
    assert "drained" in answer.err
    wait_until(lambda: "drained" in (job(1)["reason"] or ""))
    assert "drained" in gpusched("list").err
    gpusched("resume")
    gpusched("wait", "1")


def test_cancel_ends_a_running_job_and_wait_tells_its_signal(fake: FakeScript) -> None:
    number = submit("--", PYTHON, "-c", "import time; print('up', flush=True); time.sleep(600)")
    wait_until(lambda: job(number)["state"] == "running")
    wait_until(lambda: Path(job(number)["log"]).read_text() == "up\n")
    assert gpusched("cancel", str(number)).out == f"job {number} is being ended\n"
    gpusched("wait", str(number), status=128 + signal.SIGINT)
    assert job(number)["signal"] == "SIGINT"
    assert job(number)["state"] == "cancelled"
    assert "over already" in gpusched("cancel", str(submit_true()), status=1).err


def submit_true() -> int:
    number = submit("--", "true")
    gpusched("wait", str(number))
    return number


def test_log_follows_from_the_begin_to_the_end(fake: FakeScript, tmp_path: Path) -> None:
    fake.busy()
    gate = tmp_path / "gate"
    code = (
        "import os, sys, time; print('first', flush=True)\n"
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        "print('last')"
    )
    number = submit("--", PYTHON, "-c", code)
    refused = gpusched("log", str(number), status=1).err
    assert "has not begun" in refused
    with start("log", "-f", str(number)) as following:
        assert following.stdout is not None
        fake.free()
        assert following.stdout.readline() == "first\n"
        gate.touch()
        assert following.stdout.read() == "last\n"
        assert following.wait(60) == 0


# -- run


@pytest.mark.parametrize(
    ("line", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("exit 130", 130)]
)
def test_run_ends_with_the_status_of_its_command(fake: FakeScript, line: str, status: int) -> None:
    result = gpusched("run", "--shell", f"echo $CUDA_VISIBLE_DEVICES; {line}", status=status)
    assert result.out == "GPU-fake-0\n"
    record = job(1)
    assert record["kind"] == "allocation"
    assert record["state"] == ("failed" if status else "completed")
    assert (record["exit_code"], record["signal"]) == (
        (None, "SIGKILL") if status == 137 else (status, None)
    )


def test_run_waits_for_its_turn_and_passes_input_through(fake: FakeScript) -> None:
    fake.busy()
    with start("run", "--", "cat", stdin=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert "97 %" in running.stderr.readline()
        assert job(1)["state"] == "pending"
        fake.free()
        out, err = running.communicate("through\n", timeout=60)
    assert out == "through\n"
    assert "begins on GPU 0 (Fake A100)" in err
    assert running.returncode == 0


def test_run_holds_its_gpu_against_other_jobs(fake: FakeScript, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    line = f"echo up; while [ ! -e {gate} ]; do sleep 0.05; done"
    with start("run", "--shell", line) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        other = submit("--", "true")
        assert "job 1" in wait_until(lambda: job(other)["reason"])
        gate.touch()
        assert running.wait(60) == 0
    gpusched("wait", str(other))
    ended, begun = job(1)["ended_at"], job(other)["started_at"]
    assert ended <= begun


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_run_passes_signals_on(fake: FakeScript, number: signal.Signals) -> None:
    code = (
        "import signal, sys\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    with start("run", "--", PYTHON, "-c", code) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.wait(60) == 42
    assert job(1)["exit_code"] == 42


def test_run_that_is_ended_while_it_waits_never_ran(fake: FakeScript) -> None:
    fake.busy()
    with start("run", "--", "true") as running:
        assert running.stderr is not None
        assert "waits" in running.stderr.readline()
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 1
    assert job(1)["state"] == "cancelled"


def test_a_cancel_from_elsewhere_ends_what_run_runs(fake: FakeScript) -> None:
    with start("run", "--shell", "echo up; sleep 600 & wait") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        gpusched("cancel", "1")
        running.wait(60)
    assert job(1)["state"] == "cancelled"
    assert running.returncode > 0


def test_killing_run_loses_the_job_and_keeps_its_gpu_while_the_command_lives(
    fake: FakeScript, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    line = f"echo up $$; while [ ! -e {gate} ]; do sleep 0.05; done; echo over >> {gate}"
    with start("run", "--shell", line) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("up ")
        running.kill()
        running.wait(60)
        other = submit("--", "true")
        wait_until(lambda: job(1)["state"] == "lost")
        wait_until(lambda: "a process left by one" in (job(other)["reason"] or ""))
        gate.touch()
        gpusched("wait", str(other))
        assert gate.read_text() == "over\n"


def test_ctrl_c_at_a_terminal_reaches_the_command_once(fake: FakeScript) -> None:
    code = (
        "import signal, sys, time\n"
        "count = []\n"
        "signal.signal(signal.SIGINT, lambda *_: count.append(1))\n"
        "print('ready', flush=True)\n"
        "while not count: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "print('interrupts:', len(count), flush=True)"
    )
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*GPUSCHED, "run", "--", PYTHON, "-c", code])
    with terminal_output(master) as shown:
        wait_until(lambda: "ready" in shown())
        os.write(master, b"\x03")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, shown()
        wait_until(lambda: "interrupts: 1" in shown())


class terminal_output:  # noqa: N801 - used as a function
    """Reads what is written to a pseudo-terminal, as a context."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Callable[[], str]:
        self._thread.start()
        return lambda: b"".join(self._parts).decode(errors="replace")

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._master, 4096)
            except OSError:  # the other side is closed
                return
            if not chunk:
                return
            self._parts.append(chunk)


# -- gpus, doctor, agent, engines


def test_gpus_json_has_every_key(fake: FakeScript) -> None:
    fake.busy()
    fake.change(power=None)
    shown = gpusched("gpus", "--json").json
    assert shown["backend"] == "fake"
    assert shown["problem"] is None
    (gpu,) = shown["gpus"]
    assert gpu["utilization"] == 0.97
    assert gpu["mem_used_bytes"] == 30 * 2**30
    assert gpu["power_w"] is None
    assert gpu["processes"] == [
        {"pid": 4242, "user": "user1", "name": "python", "mem_bytes": 30 * 2**30, "job": None}
    ]


def test_gpus_table_shows_unknown_as_a_dash(fake: FakeScript) -> None:
    fake.change(utilization=None, power=None)
    header, row = gpusched("gpus").out.splitlines()
    assert header.split("  ")[0] == "index"
    assert row.split("  ")[0] == "0"
    assert row.count("\u2013") == 2
    assert "0 %" not in row


def test_a_failed_reading_is_a_failure_and_never_a_number(fake: FakeScript) -> None:
    fake.problem("driver lost")
    result = gpusched("gpus", status=1)
    assert result.out == ""
    assert "driver lost" in result.err
    shown = gpusched("gpus", "--json", status=1).json
    assert shown["problem"] == "driver lost"
    assert shown["gpus"] == []


def test_gpus_watch_shows_changes_until_interrupted(fake: FakeScript) -> None:
    with start("gpus", "--watch", "--json", "--interval", "0.05s") as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["gpus"][0]["utilization"] == 0.0
        fake.busy(utilization=0.5)
        wait_until(lambda: '"utilization": 0.5' in watching.stdout.readline())  # type: ignore[union-attr]
        watching.send_signal(signal.SIGINT)
        watching.stdout.read()
        assert watching.wait(60) == 0
        assert watching.stderr is not None
        assert watching.stderr.read() == ""


def test_doctor_tells_settings_with_their_sources_and_finds_no_fault(fake: FakeScript) -> None:
    shown = gpusched("--set", "quiet_samples=5", "doctor").out
    assert "quiet_samples = 5  (set)" in shown
    assert "quiet_s = 0.3  (environment)" in shown
    assert "max_foreign_memory = 500MiB  (default)" in shown
    assert "fake (in use): script" in shown
    assert "nvml: " in shown
    assert "mode 0700" in shown
    assert "no fault found" in shown


def test_doctor_says_what_to_do_about_faults(
    fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.raw("{nonsense")
    monkeypatch.setenv("GPUSCHED_QUITE_S", "3")
    shown = gpusched("doctor", status=1).out
    assert "GPUSCHED_QUITE_S is no setting" in shown
    assert "mend the script" in shown
    assert "2 faults found" in shown


def test_doctor_goes_on_after_a_broken_setting(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUSCHED_QUIET_S", "soon")
    shown = gpusched("doctor", status=1).out
    assert "FAULT setting quiet_s (environment): soon is not a number" in shown


def test_agent_status_and_stop(fake: FakeScript) -> None:
    assert "no agent" in gpusched("agent", "status", status=1).out
    fake.busy()
    submit("--", "true")
    pid = wait_until(lambda: running_agent_pid())
    assert f"agent {pid} has left" in gpusched("agent", "stop").out
    assert "no agent" in gpusched("agent", "stop").out


def running_agent_pid() -> int | None:
    done = subprocess.run([*GPUSCHED, "agent", "status"], capture_output=True, text=True)
    return int(done.stdout.split()[1]) if done.returncode == 0 else None


def test_agent_run_dispatches_in_the_foreground_until_interrupted(fake: FakeScript) -> None:
    with start("agent", "run") as agent:
        wait_until(running_agent_pid)
        number = submit("--", "true")
        gpusched("wait", str(number))
        assert running_agent_pid() == agent.pid
        agent.send_signal(signal.SIGINT)
        assert agent.wait(60) == 0


def test_engines_are_only_what_there_is(fake: FakeScript) -> None:
    found = gpusched("engines", "--json").json
    assert [engine["name"] for engine in found][:2] == ["local", "slurm"]
    assert found[0]["ready"] is found[0]["default"] is True
    assert found[0]["gpus"] == 1
    assert "local (default)" in gpusched("engines").out
    refused = gpusched("--set", "engine=moon", "submit", "--", "true", status=2)
    assert "setting engine" in refused.err, "it does not run here instead"
    assert "moon" in refused.err


# -- bad input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["submit", "--prio", "3", "--", "ls"], "--prio"),
        (["submit", "-p", "9999", "--", "ls"], "-1000 to 1000"),
        (["submit", "--mem", "lots", "--", "ls"], "is not a size"),
        (["submit", "--gpus", "0", "--", "ls"], "1 or more"),
        (["submit"], "write it after --"),
        (["submit", "--shell", "ls", "--", "ls"], "takes the place"),
        (["cancel"], "ID"),
        (["priority", "1", "high"], "not a whole number"),
        (["list", "--set", "quiet_s=soon"], "quiet_s"),
        (["--set", "nonsense=1", "list"], "no setting 'nonsense'"),
        (["frobnicate"], "frobnicate"),
        ([], "command"),
        (["submit", "--env", "A B=s3cret", "--", "ls"], "'A B' is not the name of a variable"),
        (["submit", "--shell", " "], "the line of --shell is empty"),
    ],
)
def test_a_fault_of_usage_is_one_line_and_status_2(
    fake: FakeScript, argv: list[str], words: str
) -> None:
    result = gpusched(*argv, status=2)
    assert words in result.err
    assert "s3cret" not in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""
    assert gpusched("list", "--all", "--json").json == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["show", "99"], "there is no job 99"),
        (["log", "nothing"], "there is no job nothing"),
        (["cancel", "1,x*"], "there is no job"),
        (["wait", "7"], "there is no job 7"),
        (["cancel", "9" * 5000], "there is no job 999"),
        (["submit", "--", "no-such-program"], "no program 'no-such-program'"),
        (["submit", "--cwd", "/nowhere", "--", "ls"], "/nowhere does not exist"),
        (["submit", "--gpus", "2", "--", "ls"], "this machine has 1"),
        (["submit", "--mem", "100G", "--", "ls"], "the largest GPU here has 40.0 GiB"),
        (["submit", "--after", "5", "--", "ls"], "there is no job 5"),
        (["submit", "--env", "NOT_SET_HERE", "--", "ls"], "NOT_SET_HERE"),
        (["run", "--", "no-such-program"], "no program 'no-such-program'"),
    ],
)
def test_what_fails_is_one_line_and_status_1_and_queues_nothing(
    fake: FakeScript, argv: list[str], words: str
) -> None:
    result = gpusched(*argv, status=1)
    assert words in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""
    assert gpusched("list", "--all", "--json").json == []


@pytest.mark.parametrize("quote", ["'", '"', "it's", 'say "'])
def test_a_line_with_an_open_quote_is_the_shells_business(fake: FakeScript, quote: str) -> None:
    number = submit("--shell", f"echo {quote}")
    gpusched("wait", str(number), status=2)


def test_an_unusable_state_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    place.write_text("not a folder")
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(place))
    for argv in (["list"], ["submit", "--", "ls"], ["gpus"], ["run", "--", "ls"]):
        result = gpusched(*argv, status=1)
        assert str(place) in result.err
        assert result.err.count("\n") == 1
    assert place.read_text() == "not a folder"


# -- what a terminal is sent


def test_names_of_others_cannot_move_the_cursor(fake: FakeScript) -> None:
    fake.busy()
    fake.change(processes=[{"pid": 7, "user": "u\x1b[2J", "name": "evil\r\nname", "memory": 1}])
    submit("--hold", "-n", "a\x1b]0;title\x07b", "--", "ls")
    shown = gpusched("list").out + gpusched("gpus").out + gpusched("show", "1").out
    assert not any(mark in shown for mark in ("\x1b", "\r", "\x07"))
    assert "a\\x1b]0;title\\x07b" in shown


def test_a_log_keeps_colours_and_loses_commands() -> None:
    text = "\x1b[31mred\x1b[0m\ta\r\n\x1b[2J\x1b]52;c;eA==\x07\x9b\u202e"
    assert safe_text(text) == ("\x1b[31mred\x1b[0m\ta\r\n\\x1b[2J\\x1b]52;c;eA==\\x07\\x9b\\u202e")


def test_a_log_is_made_safe_on_a_terminal_only(fake: FakeScript) -> None:
    number = submit("--", PYTHON, "-c", "print('\\x1b[2J\\x1b[32mdone\\x1b[0m')")
    gpusched("wait", str(number))
    raw = subprocess.run([*GPUSCHED, "log", "1"], capture_output=True, check=True).stdout
    assert raw == b"\x1b[2J\x1b[32mdone\x1b[0m\n"
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*GPUSCHED, "log", "1"])
    with terminal_output(master) as shown:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        wait_until(lambda: "done" in shown())
        assert "\\x1b[2J\x1b[32mdone\x1b[0m" in shown()


def test_a_table_on_a_terminal_takes_nothing_for_markup(fake: FakeScript) -> None:
    submit("--hold", "-n", "[red]x[/red]", "--", "ls")
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*GPUSCHED, "list"])
    with terminal_output(master) as shown:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        wait_until(lambda: "[red]x[/red]" in shown())


def test_a_narrow_terminal_gets_fewer_columns(
    fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit("--hold", "-n", "a-name-of-some-length", "--", "ls")
    monkeypatch.setenv("COLUMNS", "40")
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*GPUSCHED, "list"])
    with terminal_output(master) as shown:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        wait_until(lambda: "held" in shown())
        assert "owner" not in shown()
        assert "priority" not in shown()
        assert len(shown().splitlines()) <= 6, shown()


def test_plain_columns_keep_several_lines_of_a_cell_apart() -> None:
    table = plain_table(("a", "b"), [("1", ("x", "yy")), ("22", ())])
    assert table == ["a   b", "1   x", "    yy", "22"]


def test_a_reader_that_leaves_early_is_no_fault(fake: FakeScript) -> None:
    submit("--hold", "--", "ls")
    line = (
        f"{sys.executable} -m gpusched_ipy list --json --all | head -c 1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_ctrl_c_is_quiet(fake: FakeScript) -> None:
    fake.busy()
    number = submit("--", "true")
    with start("wait", str(number)) as waiting:
        wait_until(lambda: _listens_to_the_bell(waiting.pid), what="it waits")
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(60) == 130
        assert waiting.stderr is not None
        assert waiting.stderr.read() == ""
    assert job(number)["state"] == "pending"


def _listens_to_the_bell(pid: int) -> bool:
    """Whether the process has come so far that it watches the record."""
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(FileNotFoundError):  # closed since it was listed
            if "inotify" in os.readlink(link):
                return True
    return False


def test_a_terminal_that_knows_only_ascii_is_no_fault(
    fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    fake.change(power=None)
    assert "\\u2013" in gpusched("gpus").out


# -- small parts


@pytest.mark.parametrize(
    ("state", "started", "code", "number", "status"),
    [
        (JobState.COMPLETED, 1.0, 0, None, 0),
        (JobState.FAILED, 1.0, 3, None, 3),
        (JobState.FAILED, 1.0, None, 11, 139),
        (JobState.FAILED, 1.0, None, None, 1),  # a cell that raised
        (JobState.CANCELLED, None, None, None, 1),
        (JobState.CANCELLED, 1.0, 0, None, 1),  # interrupted, and it ended well all the same
        (JobState.TIMEOUT, 1.0, None, 15, 143),
        (JobState.LOST, 1.0, None, None, 1),
    ],
)
def test_exit_status_of_a_job(
    state: JobState, started: float | None, code: int | None, number: int | None, status: int
) -> None:
    ended = Job(
        id=1,
        spec=JobSpec(uid="u", kind=JobKind.COMMAND, name="n"),
        state=state,
        priority=0,
        started_at=started,
        exit_code=code,
        signal=number,
    )
    assert exit_status(ended) == status


def test_help_and_version_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert cli.main(["submit", "--help"]) == 0
    assert "--priority" in capsys.readouterr().out


def test_settings_may_stand_before_and_after_the_verb() -> None:
    asked = cli.parse(["--set", "quiet_s=1", "list", "--set", "order=shortest"])
    assert (asked.set, asked.set_after) == (["quiet_s=1"], ["order=shortest"])


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def test_list_of_many_jobs_is_quick(queue: Queue) -> None:
    spec = {"kind": JobKind.COMMAND, "argv": ("true",), "held": True}
    with queue.store.writing() as store:
        for number in range(2000):
            store.submit(JobSpec(uid=str(number), name=f"job {number}", **spec))
    began = time.monotonic()
    gpusched("--version")
    bare = time.monotonic() - began
    began = time.monotonic()
    assert len(gpusched("list", "--json").json) == 2000
    assert time.monotonic() - began < 10 + 10 * bare


def test_errors_name_the_command() -> None:
    with pytest.raises(UserError, match="gpusched cancel --help"):
        cli.parse(["cancel"])


def in_a_shell(line: str) -> subprocess.CompletedProcess[bytes]:
    command = shlex.join(GPUSCHED)
    return subprocess.run(["bash", "-c", line.format(g=command)], capture_output=True, check=False)


def test_closed_and_full_outputs_are_no_tracebacks(fake: FakeScript) -> None:
    done = in_a_shell("{g} submit --hold -n first -- true >&-")
    assert (done.returncode, done.stderr) == (0, b""), "it is queued: a script must not try again"
    assert gpusched("show", "first", "--json").json["state"] == "pending"
    done = in_a_shell("{g} list >/dev/full")
    assert done.returncode == 1
    assert (
        done.stderr.decode() == "gpusched: the output cannot be written: No space left on device\n"
    )
    assert in_a_shell("{g} list >&- 2>&-").returncode == 0
    done = in_a_shell("{g} submit --hold -- true >/dev/full")
    assert done.returncode == 1
    assert (
        done.stderr == b"gpusched: queued as 2, which cannot be written: No space left on device\n"
    )


def test_bytes_that_are_no_text_are_refused_in_one_line(fake: FakeScript, tmp_path: Path) -> None:
    for line, status in (
        ("{g} submit -n $'\\xff' -- true", 2),
        ("{g} submit --key $'\\xff' -- true", 2),
        ("{g} submit --after $'\\xff' -- true", 1),
        ("{g} show $'\\xff'", 1),
        ("{g} show ''", 1),
    ):
        done = in_a_shell(line)
        assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), (line, done.stderr)
    program = f"{tmp_path}/t$'\\xe9'"
    done = in_a_shell(f"cp /bin/true {program} && {{g}} submit --hold -- {program}")
    assert done.returncode == 0, done.stderr
    assert "t\\udce9" in gpusched("list").out


def test_purge_takes_one_word_for_what_goes(fake: FakeScript) -> None:
    refused = gpusched("purge", "--older-than", "1d", "--all", status=2)
    assert "not allowed with argument" in refused.err
