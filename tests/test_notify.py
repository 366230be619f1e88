"""One notification a batch: at its end, at its first failure, after a long wait; by one member."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import notify
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import ArrayPlace, Job, JobKind, JobSpec, JobState
from gpusched_ipy.notify import Batches, Message, Notifier, run_hook
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

PYTHON = sys.executable


def job(number: int, state: JobState = JobState.PENDING, **values: object) -> Job:
    spec = JobSpec(
        uid=str(number), kind=JobKind.COMMAND, name=f"job{number}", owner="notebook a.ipynb"
    )
    ended = 1000.0 + number if state not in (JobState.PENDING, JobState.RUNNING) else None
    made = Job(id=number, spec=spec, state=state, priority=0, ended_at=ended)
    return replace(made, **values)  # type: ignore[arg-type]


def told(batches: Batches, mono: float) -> list[tuple[str, int, dict[str, int]]]:
    return [(one.event, one.job.id, one.counts) for one in batches.due(mono)]


def test_a_batch_is_told_once_when_nothing_of_it_is_left() -> None:
    batches = Batches()
    for number in (1, 2, 3):
        batches.saw(job(number), 0.0)
    batches.saw(job(1, JobState.COMPLETED), 1.0)
    assert told(batches, 9.0) == []
    batches.saw(job(2, JobState.CANCELLED), 9.0)
    batches.saw(job(3, JobState.COMPLETED), 10.0)
    assert told(batches, 10.5) == [], "one more may be on its way"
    assert told(batches, 11.5) == [("ended", 3, {"completed": 2, "cancelled": 1})]
    batches.saw(job(3, JobState.COMPLETED, energy_j=5.0), 12.0)
    assert told(batches, 99.0) == [], "its usage has been added"


def test_a_failure_is_told_at_once_and_only_the_first() -> None:
    batches = Batches()
    for number in (1, 2, 3):
        batches.saw(job(number), 0.0)
    batches.saw(job(2, JobState.FAILED, error="ValueError: x"), 1.0)
    (message,) = batches.due(1.0)
    assert (message.event, message.job.id) == ("failed", 2)
    assert message.text == "notebook a.ipynb: 1 failed; #2 job2: ValueError: x"
    assert message.title == "gpusched: job 2 failed"
    batches.saw(job(1, JobState.FAILED, exit_code=3), 2.0)
    assert told(batches, 5.0) == []
    batches.saw(job(3, JobState.COMPLETED), 5.0)
    (message,) = batches.due(6.5)
    assert message.title == "gpusched: 3 jobs ended, 2 not well"
    assert "#1 job1: exit status 3" in message.text


def test_a_retry_is_no_failure_and_what_is_held_keeps_no_batch_open() -> None:
    batches = Batches()
    batches.saw(job(1), 0.0)
    batches.saw(job(1, JobState.RUNNING), 0.0)
    batches.saw(job(1, retried=1), 1.0)
    batches.saw(job(2, held=True), 1.0)
    assert told(batches, 50.0) == []
    batches.saw(job(1, JobState.FAILED), 50.0)
    assert told(batches, 52.0) == [("ended", 1, {"failed": 1})]


def test_sweeps_are_batches_and_what_its_user_cancelled_is_not_told() -> None:
    batches = Batches()
    spec = replace(job(1).spec, array=ArrayPlace(id="s", index=0, size=1))
    batches.saw(job(1, JobState.COMPLETED, spec=spec), 0.0)
    batches.saw(job(2), 0.0)
    assert [message.batch for message in batches.due(2.0)] == ["sweep job1"]
    batches.saw(job(2, JobState.CANCELLED), 3.0)
    assert told(batches, 9.0) == []


def test_the_first_start_after_a_long_wait_is_told() -> None:
    batches = Batches()
    for number, started_at in ((1, 30.0), (2, 720.0), (3, 900.0)):
        batches.saw(job(number, JobState.RUNNING, started_at=started_at), 0.0)
    (message,) = batches.due(0.0)
    assert (message.event, message.job.id) == ("started", 2)
    assert message.text == "notebook a.ipynb: #2 job2 waited 12 min"


HOOK = """
import json, sys
with open(sys.argv[1], "a") as notes:
    print(json.dumps([sys.argv[2:], json.load(sys.stdin)]), file=notes)
"""


def hook(notes: Path) -> list[str]:
    return [PYTHON, "-c", HOOK, str(notes), "{title}", "<{text}>"]


def lines(notes: Path) -> list[tuple[list[str], dict[str, object]]]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


@pytest.fixture
def queue(fake: FakeScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    config = tmp_path / "home" / "config" / "gpusched_ipy" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f"notify = {json.dumps(hook(tmp_path / 'notes'))}\n")
    found = Queue(Settings.load(), owner="terminal <b>pts/3</b>")
    yield found
    found.store.close()


def test_the_agent_runs_the_hook_once_for_a_batch(queue: Queue, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    go = tmp_path / "go"
    bad = queue.submit([PYTHON, "-c", "import sys; sys.exit(3)"], name="bad")
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    good = queue.submit([PYTHON, "-c", wait], name="good")
    wait_until(lambda: lines(notes), timeout=60, what="the failure is told")
    ((arguments, message),) = lines(notes)
    assert (message["event"], message["jobs"], message["counts"]) == (
        "failed",
        [bad.id],
        {"failed": 1},
    )
    assert arguments[0] == message["title"] == f"gpusched: job {bad.id} failed"
    shown = "<terminal \u2039b\u203apts/3\u2039/b\u203a: 1 failed; #1 bad"
    assert arguments[1].startswith(shown), "what a desktop takes for markup is replaced"
    go.touch()
    queue.wait(good.id, timeout=60)
    wait_until(lambda: len(lines(notes)) == 2, timeout=60, what="the end is told")
    _, message = lines(notes)[1]
    assert (message["event"], message["jobs"]) == ("ended", [bad.id, good.id])
    assert isinstance(message["job"], dict)
    assert message["job"]["name"] == "good"


def test_of_two_members_one_tells(tmp_path: Path) -> None:
    state = open_state_dir(Settings.load())
    stores = [Store(state), Store(state)]
    notes = tmp_path / "notes"
    members = [Notifier(store, hook(notes)) for store in stores]
    spec = JobSpec(uid="u", kind=JobKind.COMMAND, name="job", argv=("true",), owner="me")
    done = stores[0].submit(spec)
    stores[0].end_pending(done, JobState.FAILED, "could not be")
    for member in members:
        member.stop()  # it tells what is over first
    assert [message["text"] for _, message in lines(notes)] == [
        "me: 1 failed; #1 job: could not be"
    ]
    for store in stores:
        store.close()


MESSAGE = Message(event="ended", batch="b", text="t", job=job(1), counts={}, jobs=(1,))
NOW = Instant(mono=0.0, wall=0.0)


def test_a_hook_that_fails_is_said_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "HOOK_S", 1.0)
    caplog.set_level(logging.WARNING)
    run_hook(["/no/such/program"], MESSAGE, NOW)
    run_hook([PYTHON, "-c", "import sys; sys.exit('no \x1b[31mdisplay')"], MESSAGE, NOW)
    run_hook([PYTHON, "-c", "import time; time.sleep(600)"], MESSAGE, NOW)
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "cannot be run" in first
    assert second.endswith("ended with 1: no \\x1b[31mdisplay")
    assert third.endswith("was ended after 1 s")


def test_the_bell_rings_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pipe, terminal = io.StringIO(), Terminal()
    notify.ring(pipe)
    notify.ring(terminal)
    assert (pipe.getvalue(), terminal.getvalue()) == ("", "\a")
