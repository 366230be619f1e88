"""Jobs that are tried again: after a failure, after a loss; never twice at once, never for ever."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import wait_until
from kernels import started

from gpusched_ipy import cli, policy
from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState, Request, may_move
from gpusched_ipy.lines import parse_cell, parse_run
from gpusched_ipy.locks import Membership
from gpusched_ipy.reap import reap
from gpusched_ipy.retry import MAX_REQUEUES
from gpusched_ipy.statedir import StateDir, open_state_dir
from gpusched_ipy.store import Store

PYTHON = sys.executable


@dataclass
class HandClock:
    mono: float = 1000.0
    wall: float = 1.7e9

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=self.wall)

    def go_on(self, seconds: float) -> None:
        self.mono += seconds
        self.wall += seconds


@pytest.fixture
def state() -> StateDir:
    return open_state_dir(Settings.load())


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store(state: StateDir, clock: HandClock) -> Iterator[Store]:
    found = Store(state, clock)
    yield found
    found.close()


def submitted(store: Store, uid: str = "u", **request: object) -> Job:
    wanted = Request(**request)  # type: ignore[arg-type]
    return store.submit(
        JobSpec(uid=uid, kind=JobKind.COMMAND, name="job", argv=("true",), request=wanted)
    )


def begun(store: Store, job: Job) -> Job:
    claimed = store.claim(job, ("GPU-0",), member="m")
    running = store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="shim")
    assert running is not None
    return running


def failed(store: Store, job: Job, **how: object) -> Job:
    running = begun(store, job)
    ended = store.finish_if_active(
        job.id, epoch=running.epoch, **{"state": JobState.FAILED, "exit_code": 3, **how}  # type: ignore[arg-type]
    )  # fmt: skip
    assert ended is not None
    return ended


def why(store: Store, clock: HandClock) -> str:
    decision = policy.decide(store.jobs(), None, (), Settings.load(), clock.now())
    (reason,) = decision.reasons.values()
    return reason.text


def test_a_failed_job_waits_longer_each_time_and_then_stays_failed(
    store: Store, state: StateDir, clock: HandClock
) -> None:
    job = submitted(store, retries=7)
    waited = []
    while (job := failed(store, job)).state is JobState.PENDING:
        assert job.not_before_mono is not None
        waited.append(job.not_before_mono - clock.mono)
        assert why(store, clock).startswith(f"retry {len(waited)} of 7 in ")
        clock.go_on(waited[-1])
        assert "retry" not in why(store, clock), "its time has come"
    assert waited == [10, 20, 40, 80, 160, 320, 600]
    assert (job.state, job.attempts, job.retried, job.exit_code) == ("failed", 8, 7, 3)
    rows = store._query("SELECT outcome FROM attempts WHERE job_id = ?", (job.id,))
    assert [row["outcome"] for row in rows] == 8 * ["failed"]


def test_the_wait_survives_a_restart_of_everything_but_not_of_the_machine(
    store: Store, state: StateDir, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(store, submitted(store, retries=3))
    again = Store(state, clock)
    assert why(again, clock) == "retry 1 of 3 in 10 s"
    clock.wall -= 86400
    assert why(again, clock) == "retry 1 of 3 in 10 s", "the wall clock decides nothing"
    monkeypatch.setattr("gpusched_ipy.lookup.boot_id", lambda: "the next boot")
    (job,) = again.jobs()
    assert (job.retried, job.not_before_mono) == (1, None), "a reboot has taken longer"
    again.close()


def test_the_last_error_stands_until_the_next_try_begins(store: Store) -> None:
    waits = failed(store, submitted(store, retries=1), error="ZeroDivisionError")
    assert (waits.error, waits.exit_code, waits.started_at) == ("ZeroDivisionError", 3, None)
    claimed = store.claim(waits, ("GPU-0",), member="m")
    assert (claimed.error, claimed.exit_code, claimed.epoch) == (None, None, 2)
    assert store.finish_if_active(waits.id, epoch=1, state=JobState.COMPLETED) is None


def test_the_events_of_a_retried_job_replay_to_its_state(store: Store) -> None:
    job = failed(store, failed(store, submitted(store, retries=1)))
    at = JobState.PENDING
    for event in store.events(job.id):
        if "state" in event.data:
            assert may_move(at, JobState(event.data["state"])), event
            at = JobState(event.data["state"])
    assert at is job.state is JobState.FAILED


@pytest.mark.parametrize("state_", [JobState.CANCELLED, JobState.TIMEOUT, JobState.COMPLETED])
def test_only_a_failure_is_tried_again(store: Store, state_: JobState) -> None:
    assert failed(store, submitted(store, retries=3), state=state_).state is state_


def test_what_its_user_has_ended_is_not_tried_again(store: Store) -> None:
    assert failed(store, submitted(store, retries=3), retry=False).state is JobState.FAILED
    running = begun(store, submitted(store, "other", retries=3))
    store.request_cancel(running.id)
    ended = store.finish_if_active(running.id, epoch=running.epoch, state=JobState.FAILED)
    assert ended is not None
    assert ended.state is JobState.FAILED, "it failed while it was being cancelled"


def test_a_cancel_ends_the_wait_and_a_requeue_begins_the_count_anew(store: Store) -> None:
    waits = failed(store, submitted(store, retries=1))
    assert store.request_cancel(waits.id).state is JobState.CANCELLED
    fresh = store.requeue(store.job(waits.id))
    assert (fresh.retried, fresh.not_before_mono) == (0, None)
    assert failed(store, fresh).state is JobState.PENDING


def test_a_job_that_is_lost_again_and_again_stays_lost(store: Store, state: StateDir) -> None:
    """The shim dies each time, with all processes of the job."""
    job = submitted(store, requeue=True)
    for lost in range(MAX_REQUEUES + 1):
        assert (job.state, job.requeued) == (JobState.PENDING, lost)
        peer, shim = Membership(state), Membership(state)
        claimed = store.claim(job, ("GPU-0",), member=peer.key)
        store.take_over(job.id, epoch=claimed.epoch, claimed_by=peer.key, member=shim.key)
        assert reap(store, store.jobs()) == [], "it lives"
        shim.leave()
        peer.leave()
        (job,) = reap(store, store.jobs())
    assert job.state is JobState.LOST
    assert job.error == "outcome unknown: its supervisor died, as 3 times before"


def test_a_record_of_before_takes_the_new_columns(store: Store) -> None:
    """Values of theirs are covered by the checksum, their absence is not."""
    job = submitted(store)
    store._db.execute("UPDATE jobs SET retried = 1 WHERE id = ?", (job.id,))
    with pytest.raises(UserError, match="checksum does not match"):
        store.job(job.id)


def test_one_definition_for_magic_terminal_and_python(settings: Settings) -> None:
    wanted = {"retries": 2, "requeue": True, "retry_oom": True}
    line = "--retries 2 --requeue --retry-oom"
    assert parse_cell(line)[0] == wanted
    assert parse_run(f"{line} -- true").items() >= wanted.items()
    asked = cli.parse(["submit", *line.split(), "--", "true"])
    assert {name: getattr(asked, name) for name in wanted} == wanted
    queue = Queue(settings)
    request = queue.submit(["true"], hold=True, **wanted).request
    assert (request.retries, request.requeue, request.retry_oom) == (2, True, True)
    for bad in ("-1", "many", "101"):
        with pytest.raises(UserError, match=f"--retries {bad} is not a whole number"):
            parse_cell(f"--retries {bad}")
    with pytest.raises(UserError, match="runs in its own process"):
        queue.submit(["true"], kind=JobKind.ALLOCATION, retries=1)
    queue.store.close()


def fails_until(file: Path, times: int) -> list[str]:
    """A command that notes each begin, and fails until it has begun ``times`` times."""
    code = (
        "import os, sys, time\n"
        f"with open({str(file)!r}, 'a') as notes: notes.write(f'{{os.getpid()}}\\n')\n"
        f"begins = len(open({str(file)!r}).readlines())\n"
        f"while os.path.exists({str(file)!r} + '.wait') and begins == 1: time.sleep(0.01)\n"
        f"sys.exit(0 if begins >= {times} else 7)"
    )
    return [PYTHON, "-c", code]


@pytest.fixture
def queue(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setenv("GPUSCHED_RETRY_DELAY_S", "0.2")
    found = Queue(Settings.load())
    yield found
    found.store.close()


def test_each_try_gets_the_named_variables_and_the_last_leaves_none(
    queue: Queue, tmp_path: Path
) -> None:
    check = "import os, sys; print(os.environ['SECRET']); sys.exit(3)"
    job = queue.submit([PYTHON, "-c", check], env=["SECRET=canary"], retries=1)
    once = queue.submit([PYTHON, "-c", check], env=["SECRET=canary"])
    job, once = queue.wait(job.id, once.id, timeout=60)
    for ended in (job, once):
        path = queue.log_path(ended.id)
        assert path is not None
        assert (ended.exit_code, path.read_text()) == (3, "canary\n")
        assert not queue.state.environment(ended.spec.uid).exists()
    assert job.attempts == 2


def test_commands_are_tried_again_until_they_succeed(queue: Queue, tmp_path: Path) -> None:
    good = queue.submit(fails_until(tmp_path / "good", 3), retries=2)
    bad = queue.submit(fails_until(tmp_path / "bad", 9), retries=1)
    good, bad = queue.wait(good.id, bad.id, timeout=60)
    assert (good.state, good.attempts, good.retried) == ("completed", 3, 2)
    assert (bad.state, bad.attempts, bad.exit_code) == ("failed", 2, 7)
    assert len((tmp_path / "good").read_text().split()) == 3
    assert len((tmp_path / "bad").read_text().split()) == 2
    told = [event.data["why"] for event in queue.events(good.id) if event.what == "retried"]
    assert [text.partition(" in ")[0] for text in told] == ["retry 1 of 2", "retry 2 of 2"]


def test_a_failure_whose_agent_is_dead_is_tried_again_by_the_next_member(
    queue: Queue, tmp_path: Path
) -> None:
    """The shim records the end and with it the next try; who starts it does not matter."""
    notes = tmp_path / "notes"
    wait = tmp_path / "notes.wait"
    wait.touch()
    job = queue.submit(fails_until(notes, 2), retries=1)
    wait_until(notes.exists, what="the first try begins")
    agent = running_agent(queue.state, queue.store)
    assert agent is not None
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: running_agent(queue.state, queue.store) is None, what="no agent lives")
    wait.unlink()
    (job,) = queue.wait(job.id, timeout=60)
    assert (job.state, job.attempts) == ("completed", 2)
    assert len(notes.read_text().split()) == 2


OPEN_TRANSCRIPTS = """
import os
def opened():
    for fd in os.listdir('/proc/self/fd'):
        try:
            yield os.readlink(f'/proc/self/fd/{fd}')
        except FileNotFoundError:  # closed since it was listed
            pass
sum('.jsonl' in path for path in opened())
"""


@pytest.mark.kernel
def test_cells_are_tried_again_in_their_kernel(tmp_path: Path) -> None:
    with started(tmp_path, GPUSCHED_RETRY_DELAY_S="0.2") as kernel:
        kernel.run("tries = []")
        body = "tries.append(get_ipython())\nprint('try', len(tries))\nassert len(tries) > 2"
        cell = kernel.run(f"%%gpuqueue --retries 2\n{body}")
        kernel.badge(cell, "✓ done")
        kernel.until(lambda: "try 3" in cell.text(), "no third try")
        assert cell.text() == "try 1\ntry 2\ntry 3\n"
        assert len(cell.errors) == 2, "how each try went stands under the cell"
        assert any("retry 1 of 2 in" in text for text in cell.badges)
        assert "try 3" in kernel.run(f"%gpuq log {cell.job}").text()
        listed = kernel.run(OPEN_TRANSCRIPTS).results
        assert listed in (["0"], ["1"]), "the transcript of an earlier try is closed"
        # In a wait the kernel's own cells run inside the cell that waits, the next try as well.
        kernel.run("tries.clear()")
        cell = kernel.run(f"%%gpuqueue --retries 2 --name w\n{body}")
        waiting = kernel.run("%gpuq wait w")
        assert waiting.displays, (waiting, cell)
        assert "completed" in waiting.displays[0]["data"]["text/plain"]
        # Its user has stopped it: that is no accident.
        cell = kernel.run("%%gpuqueue --retries 5\nprint('on')\nimport time\ntime.sleep(600)")
        kernel.until(lambda: "on" in cell.text(), "it never began")
        kernel.interrupt()
        kernel.badge(cell, "✗ failed")
        # One that holds its place fails where it stands, and says so.
        held = kernel.run("%%gpuqueue --wait --retries 5\n1 / 0")
        assert "is not tried again" in held.text() + held.text("stderr") + str(held.displays)
        assert held.status == "error"
