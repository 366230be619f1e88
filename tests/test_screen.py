"""``gpusched watch``: the panel as a live screen of a real terminal, one picture in a pipe."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import GIB, FakeScript, wait_until
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from rich.console import Console
from tmux import PATIENCE_S, terminal

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.entries import Entry
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState, WaitCode, WaitReason
from gpusched_ipy.keyboard import Keyboard
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.retention import purge
from gpusched_ipy.screendraw import Scene, draw, queue_lines
from gpusched_ipy.screenstate import ScreenState
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot

EVIL = "\x1b]0;owned\x07[red]\u202eevil"
WATCH = f"{sys.executable} -m gpusched_ipy watch"
NOW = Instant(mono=5000.0, wall=1_790_000_000.0)


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    queue = Queue(settings)
    yield queue
    queue.store.close()


def submit(queue: Queue, name: str, **fields: Any) -> Job:
    """A cell's job that nobody can start: its kernel does not exist."""
    return queue.submit(kind=JobKind.CELL, code="pass", name=name, home="nobody", **fields)


@pytest.mark.timeout(900)
def test_the_whole_panel_in_a_terminal(queue: Queue, fake: FakeScript, tmp_path: Path) -> None:
    first, second = submit(queue, "first"), submit(queue, "second")
    fake.busy(utilization=0.97)
    with terminal(tmp_path, {"GPUSCHED_PANEL_HZ": "4"}, (150, 30)) as screen:
        screen.type(f"clear; echo before; {WATCH}; echo status $?")
        shown = screen.wait("97 %", "30.0 GiB / 40.0 GiB", "pid 4242", "first", "second", "q quit")
        assert "2 waiting" in shown
        assert "before" not in shown
        marked = next(line for line in screen.lines if "▶" in line)
        assert "first" in marked

        # What happens elsewhere appears by itself.
        fake.busy(utilization=0.35, memory="8GiB")
        submit(queue, EVIL)
        shown = screen.wait("35 %", "8.0 GiB", "3 waiting")
        assert "\\x1b]0;owned" in shown

        # Keys steer the job that is marked.
        screen.keys("Down")
        wait_until(
            lambda: any("▶" in x and "second" in x for x in screen.lines), PATIENCE_S, "marked"
        )
        screen.keys("+", "+")
        wait_until(lambda: queue.show(second.id).priority == 2, PATIENCE_S, "raised")
        screen.keys("-")
        wait_until(lambda: queue.show(second.id).priority == 1, PATIENCE_S, "lowered")
        screen.keys("h")
        wait_until(lambda: queue.show(second.id).held, PATIENCE_S, "held")
        screen.wait("1 held", f"Job {second.id} is held")
        screen.keys("r")
        wait_until(lambda: not queue.show(second.id).held, PATIENCE_S, "released")
        screen.keys("d")
        screen.wait("DRAINED")
        assert queue.drained
        screen.keys("u")
        screen.wait_gone("DRAINED")
        screen.keys("c")
        wait_until(
            lambda: queue.show(second.id).state is JobState.CANCELLED, PATIENCE_S, "cancelled"
        )
        screen.wait("2 waiting")
        assert queue.show(first.id).state is JobState.PENDING

        # Another size, and a backend that fails.
        screen.resize(60, 14)
        screen.wait_gone("pid 4242")
        screen.wait("first", "move")
        fake.problem("driver lost")
        screen.wait("NOT READABLE", "?????")
        fake.problem(None)
        screen.wait_gone("NOT READABLE")

        # Stopped like any program, it gives the terminal back, and goes on.
        screen.keys("C-z")
        screen.wait("before")
        screen.type("stty -a | grep -o '[-]*icanon' | sed s/^/mode-/; fg")
        screen.wait("move")
        screen.keys("q")
        shown = screen.wait("before", "mode-icanon")
        assert "move" not in shown

        # Ended by Ctrl-C or by a signal, too.
        screen.type(f"clear; {WATCH}; echo status $?")
        screen.wait("2 waiting")
        screen.keys("C-c")
        screen.wait("status 0")
        screen.type(f"clear; sh -c 'echo $$ > pid; exec {WATCH}'; echo status $?")
        pid = tmp_path / "pid"
        screen.wait("2 waiting")
        os.kill(int(pid.read_text()), signal.SIGTERM)
        screen.wait("status 143")
        screen.type("stty -a | grep -o '[-]*icanon' | sed s/^/mode-/")
        screen.wait("mode-icanon")


@pytest.mark.timeout(900)
def test_into_a_pipe_it_is_one_picture(queue: Queue, fake: FakeScript) -> None:
    submit(queue, EVIL)
    argv = [sys.executable, "-m", "gpusched_ipy", "watch"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Fake A100" in done.stdout
    assert "\\x1b]0;owned\\x07[red]\\u202eevil" in done.stdout
    assert "\x1b" not in done.stdout
    fake.problem("driver lost")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1
    assert "driver lost" in done.stdout


def job(number: int, name: str = "train", **changes: Any) -> Job:
    spec = JobSpec(uid=f"u{number}", kind=JobKind.COMMAND, name=name, owner="notebook a.ipynb")
    reason = WaitReason(code=WaitCode.GPU_BUSY, text="GPU 0: 97 % used by python")
    values: dict[str, Any] = {"state": JobState.PENDING, "priority": 0, "reason": reason}
    return Job(id=number, spec=spec, submitted_at=NOW.wall - 60, **(values | changes))


def scene(width: int, height: int, gpus: int, jobs: int, **changes: Any) -> Scene:
    cards = tuple(
        Gpu(
            uuid=f"GPU-{place}",
            index=place,
            name=EVIL,
            utilization=0.5,
            mem_used_bytes=10 * GIB,
            mem_total_bytes=40 * GIB,
            processes=(GpuProcess(pid=1, name=EVIL, mem_bytes=GIB),),
        )
        for place in range(gpus)
    )
    reading = Snapshot(
        backend="fake", source=EVIL, taken_at=NOW.wall, taken_mono=NOW.mono, gpus=cards
    )
    shown = Scene(
        now=NOW,
        width=width,
        height=height,
        snapshot=reading,
        gpus=cards,
        history=(reading,),
        counts={"running": 0, "waiting": jobs, "held": 0},
        total=jobs,
        selected="1",
    )
    listed = [job(number + 1, EVIL) for number in range(min(jobs, queue_lines(shown)))]
    return replace(shown, entries=[Entry(job=one) for one in listed], **changes)


def reading_of(shown: Scene) -> Snapshot:
    assert shown.snapshot is not None
    return shown.snapshot


def drawn(shown: Scene) -> list[str]:
    """The lines that a terminal of the scene's size is sent, without their colours."""
    console = Console(
        file=io.StringIO(), width=shown.width, height=shown.height, force_terminal=False
    )
    with console.capture() as capture:
        console.print(draw(shown))
    return capture.get().removesuffix("\n").split("\n")


@settings_of(deadline=None, max_examples=40)
@given(
    st.integers(20, 200),
    st.integers(10, 60),
    st.integers(0, 20),
    st.integers(0, 300),
    st.booleans(),
)
def test_it_fits_every_terminal_and_sends_nothing_that_acts(
    width: int, height: int, gpus: int, jobs: int, unicode: bool
) -> None:
    lines = drawn(scene(width, height, gpus, jobs, unicode=unicode))
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    if not unicode:
        assert not set("█░▁▂▃▄▅▆▇▶↑↓·") & set(text)


def test_unknown_is_no_empty_bar_and_the_marked_job_needs_no_colour() -> None:
    shown = scene(120, 30, 1, 3)
    blind = Gpu(uuid="GPU-0", index=0)
    reading = replace(reading_of(shown), gpus=(blind,))
    text = "\n".join(drawn(replace(shown, snapshot=reading, gpus=(blind,), history=())))
    assert "use ??????" in text
    assert "░" not in text
    assert [line[0] for line in drawn(shown) if "GPU 0: 97" in line] == ["▶", " ", " "]


def test_many_gpus_leave_room_for_the_queue() -> None:
    lines = drawn(scene(120, 24, 16, 300))
    assert "and 7 more GPUs: a taller screen shows them" in "\n".join(lines)
    assert sum("97 %" in line for line in lines) >= 6


def test_a_running_job_is_cancelled_by_the_second_key_only(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = submit(queue, "running")
    asked: list[int] = []
    monkeypatch.setattr(queue, "cancel", asked.append)
    runs = Entry(job=replace(running, state=JobState.RUNNING))
    monkeypatch.setattr(queue, "folded_page", lambda *_: ([runs], 1))
    state = ScreenState(queue, Monitor(queue.settings), lambda: (100, 30))
    state.read()
    state.press("c")
    assert (asked, "press c once more" in state.scene().message) == ([], True)
    state.press("h")  # anything else disarms it
    state.press("c")
    assert asked == []
    state.press("c")
    assert asked == [running.id]


def test_a_key_for_a_job_that_is_gone_is_answered(queue: Queue) -> None:
    gone = submit(queue, "gone")
    state = ScreenState(queue, Monitor(queue.settings), lambda: (100, 30))
    state.read()
    queue.cancel(gone.id)
    purge(queue.store, wall=time.time() + 10, keep_days=0, keep_size=0)
    state.press("+")
    assert f"there is no job {gone.id}" in state.scene().message


def test_a_key_is_for_the_job_that_was_chosen_and_for_no_other(queue: Queue) -> None:
    jobs = [submit(queue, name) for name in "abcd"]
    monitor = Monitor(Settings.load())
    state = ScreenState(queue, monitor, lambda: (120, 30))
    state.read()
    state.press("down")
    state.press("down")
    assert state.scene().selected == str(jobs[2].id)
    queue.cancel(jobs[2].id)  # elsewhere
    state.read()
    state.press("c")
    assert "the chosen job has gone" in state.scene().message
    assert state.scene().selected == str(jobs[3].id), "the one that stands there now"
    assert [queue.show(job.id).state for job in jobs].count(JobState.CANCELLED) == 1
    state.press("c")
    assert queue.show(jobs[3].id).state is JobState.CANCELLED
    state.press("c")  # what has gone by one's own key was seen going
    assert queue.show(jobs[1].id).state is JobState.CANCELLED
    assert queue.show(jobs[0].id).state is JobState.PENDING


def test_the_key_is_not_for_a_job_that_came_after_the_chosen_one_had_gone(queue: Queue) -> None:
    chosen = submit(queue, "chosen")
    state = ScreenState(queue, Monitor(queue.settings), lambda: (120, 30))
    state.read()
    queue.cancel(chosen.id)  # elsewhere
    state.read()
    assert state.scene().selected is None
    new = submit(queue, "new")
    state.read()
    state.press("c")
    assert "the chosen job has gone" in state.scene().message
    assert queue.show(new.id).state is JobState.PENDING


def test_after_a_member_is_cancelled_the_next_key_is_for_the_next_one(queue: Queue) -> None:
    members = queue.submit_all(["true"], name="swept", sweep={"n": [1, 2, 3]}, hold=True).jobs
    state = ScreenState(queue, Monitor(queue.settings), lambda: (120, 30))
    state.read()
    for key in ("f", "down", "down", "c", "r"):
        state.press(key)
    first, second, third = (queue.show(job.id) for job in members)
    assert second.state is JobState.CANCELLED
    assert (first.held, third.held) == (True, False)


def test_long_queues_are_turned_over_by_the_page(queue: Queue) -> None:
    with queue.store.writing():
        jobs = [submit(queue, f"job {number}") for number in range(60)]
    state = ScreenState(queue, Monitor(queue.settings), lambda: (100, 20))
    state.read()
    seen = [entry.job.id for entry in state.scene().entries]
    assert seen == [item.id for item in jobs[: state.fits]]
    state.press("page down")
    assert state.scene().entries[0].job.id == jobs[state.fits].id
    state.press("up")  # from the first line to the page before
    assert state.scene().selected == str(jobs[state.fits - 1].id)
    state.press("G")
    last = str(jobs[-1].id)
    assert (state.scene().selected, state.scene().offset) == (last, 60 - state.fits)
    state.press("down")
    assert state.scene().selected == last
    state.press("g")
    assert state.scene().selected == str(jobs[0].id)


def test_a_sweep_is_one_row_that_unfolds_and_obeys_as_a_whole(queue: Queue) -> None:
    grid = queue.submit_all(["true"], name="grid", sweep={"lr": [0.1, 0.2]}, hold=True).jobs
    state = ScreenState(queue, Monitor(queue.settings), lambda: (120, 30))
    state.read()
    (row,) = state.scene().entries
    assert row.sweep is not None
    assert row.key == f"sweep {row.sweep.id}"
    assert any("grid \u00d72" in line for line in drawn(state.scene()))
    state.press("+")
    assert {queue.show(job.id).priority for job in grid} == {1}
    state.press("f")
    assert [entry.job.id for entry in state.scene().entries] == [grid[0].id, *(j.id for j in grid)]
    assert any("  grid lr=0.2" in line for line in drawn(state.scene()))
    state.press("down")
    state.press("-")
    assert [queue.show(job.id).priority for job in grid] == [0, 1]
    state.press("f")  # a member folds its sweep
    assert [entry.sweep is not None for entry in state.scene().entries] == [True]
    state.press("c")
    assert queue.show(grid[0].id).state is JobState.PENDING
    state.press("c")
    assert {queue.show(job.id).state for job in grid} == {JobState.CANCELLED}
    state.press("f")
    assert "no sweep is chosen" in state.scene().message


def test_keys_that_come_in_pieces() -> None:
    inside, outside = os.openpty()
    wake, ring = os.pipe()
    keyboard = Keyboard(outside, wake)
    with keyboard.opened():
        os.write(inside, b"a\x1b[A\x1bOB\x1b[5~\x1b[1;5Qz\x1b[")
        got: list[str] = []
        wait_until(lambda: got.extend(keyboard.wait(5)) or got[-1:] == ["z"], what="keys")
        assert got == ["a", "up", "down", "page up", "z"]
        os.write(inside, b"6~")
        assert wait_until(lambda: keyboard.wait(5), what="the rest") == ["page down"]
        os.write(ring, b"!")
        assert keyboard.wait(30) == []
        os.close(inside)
        assert keyboard.wait(30) == []
        assert keyboard.closed
    for end in (outside, wake, ring):
        os.close(end)
