"""One damaged job of the record: it is set aside, and everything else goes on."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobState
from gpusched_ipy.repair import repair
from gpusched_ipy.statedir import StateDir


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def gpusched(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def flip(record: StateDir, job: int) -> None:
    """The name of a job as a flipped bit leaves it."""
    with sqlite3.connect(record.database) as db:
        db.execute("UPDATE jobs SET name = name || 'X' WHERE id = ?", (job,))
    db.close()


def test_one_damaged_job_stops_neither_lists_nor_queue(queue: Queue, fake: FakeScript) -> None:
    fake.busy()
    done = [queue.submit(["true"], name=f"job{place}") for place in range(4)]
    pending, ended, after = done[0].id, done[1].id, done[3].id
    queue.cancel(ended)
    flip(queue.state, pending)
    flip(queue.state, ended)

    assert [job.id for job in queue.list()] == [done[2].id, after]
    assert [job.id for job in queue.list(all=True)] == [done[2].id, after]
    assert [job.id for job in queue.store.ended()] == []
    listed = gpusched("list", "--json")
    assert [job["id"] for job in json.loads(listed.stdout)] == [done[2].id, after]
    assert f"job {pending} of the record is left out: damaged" in listed.stderr
    shown = gpusched("show", str(pending))
    assert (shown.returncode, shown.stderr.count("\n")) == (1, 1)
    assert f"job {pending} is damaged in the record" in shown.stderr
    assert f"job {pending} is damaged" in gpusched("doctor").stdout

    fake.free()
    ends = queue.wait(done[2].id, after, timeout=60)
    assert [end.state for end in ends] == ["completed", "completed"]
    new = queue.submit(["true"])
    assert queue.wait(new.id, timeout=60)[0].state is JobState.COMPLETED
    # The agent has nothing left that it could start, so it leaves, and a repair can be made.
    wait_until(lambda: not any((queue.state.root / "alive").iterdir()), what="the agent leaves")
    mended = repair(queue.state)
    assert (mended.saved, mended.damaged) == (3, (pending, ended))


def test_the_end_of_a_damaged_job_gives_its_gpu_on(queue: Queue, tmp_path: Path) -> None:
    """Nothing can be recorded of it: its shim leaves, its GPU is the next one's."""
    go, begun = tmp_path / "go", tmp_path / "begun"
    line = f"touch {begun}; while [ ! -e {go} ]; do sleep 0.02; done"
    runs = queue.submit([line], shell=True)
    wait_until(begun.exists)
    flip(queue.state, runs.id)
    behind = queue.submit(["true"])
    wait_until(lambda: queue.show(behind.id).reason, what="the next one waits")
    assert queue.show(behind.id).state is JobState.PENDING
    go.touch()
    assert queue.wait(behind.id, timeout=60)[0].state is JobState.COMPLETED
    wait_until(lambda: not any((queue.state.root / "alive").iterdir()), what="all have left")
