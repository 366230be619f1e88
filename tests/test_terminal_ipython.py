"""The magics in IPython in a real terminal: cells hold their place, tables are text."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until
from tmux import PATIENCE_S, Terminal, terminal

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobState

IPYTHON = f"{sys.executable} -m IPython --no-banner --no-confirm-exit --colors=NoColor"


def cell(screen: Terminal, *lines: str) -> None:
    """Type a cell; IPython takes a cell magic as ended after an empty line."""
    for line in (*lines, "", ""):
        screen.type(line)


@pytest.mark.timeout(900)
def test_a_session(settings: Settings, fake: FakeScript, tmp_path: Path) -> None:
    fake.busy()
    queue = Queue(settings)
    with terminal(tmp_path, {}, (140, 50)) as screen:
        screen.type(f"clear; {IPYTHON}")
        screen.wait("In [1]:")
        screen.type("%load_ext gpusched_ipy")
        screen.wait("In [2]:")
        cell(screen, "%%gpuqueue -p 3 -n train", "x = 6 * 7", "print('answer', x)", "x")
        screen.wait("job 1 waits: GPU 0: 97 % used by python")
        (job,) = queue.list()
        assert (job.name, job.priority, job.state) == ("train", 3, JobState.PENDING)
        assert "answer 42" not in screen.text
        wait_until(lambda: time.time() > job.submitted_at + 1.5, what="a wait worth a line")
        fake.free()
        shown = screen.wait("answer 42", "Out[2]: 42", "In [3]:")
        assert "job 1 waited" in shown, "the time spent waiting is said"
        assert queue.show(job.id).state is JobState.COMPLETED

        # Ctrl-C while it waits gives up the place.
        fake.busy()
        cell(screen, "%%gpuqueue", "print('never')")
        screen.wait("job 2 waits")
        (second,) = queue.list()
        screen.keys("C-c")
        screen.wait("KeyboardInterrupt", "In [4]:")
        wait_until(
            lambda: queue.show(second.id).state is JobState.CANCELLED, PATIENCE_S, "given up"
        )

        screen.type("%gpurun -n later -- echo hello")
        screen.wait("queued #3 later", "In [5]:")
        screen.type("%gpuq list --all")
        shown = screen.wait("In [6]:")
        assert {"id", "name", "state", "priority", "train", "later"} <= set(shown.split())
        assert "<table" not in shown
        screen.type("%gpus")
        screen.wait("97 %", "Fake A100", "In [7]:")
        screen.type("clear")
        screen.type("%gpupanel")
        shown = screen.wait("Queue: 0 running", "#3 later", "In [9]:")
        assert "<svg" not in shown
        fake.free()
        screen.type("%gpuq wait later")
        screen.wait("completed", "In [10]:")
        screen.type("clear")
        screen.type("%gpuq log later")
        screen.wait("hello", "In [12]:")
        cell(screen, "%%gpuqueue --wait --sweep lr=1,2", "print(lr)")
        screen.wait("UserError: a sweep or a key of cells needs a notebook; use --isolate or")
        screen.type("exit")
        screen.wait("exit\n$")
    queue.store.close()
