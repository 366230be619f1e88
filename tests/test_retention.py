"""What is kept, what goes, and that nothing of an open job is ever touched; the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import FakeScript

from gpusched_ipy import environment, retention
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState, Request
from gpusched_ipy.output import create_log

DAY = 86400.0


@pytest.fixture
def queue(fake: FakeScript) -> Iterator[Queue]:
    found = Queue(Settings.load())
    yield found
    found.store.close()


def waiting(queue: Queue, **fields: object) -> Job:
    """A job in the record that no agent has heard of."""
    spec = JobSpec(uid=uuid.uuid4().hex, kind=JobKind.COMMAND, name="j", argv=("true",), held=True)
    return queue.store.submit(replace(spec, **fields))


def running(queue: Queue, size: int) -> tuple[Job, int]:
    """A job that runs and has a log of that size, and the descriptor of the log."""
    starting = queue.store.claim(waiting(queue), (), member="m")
    job = queue.store.take_over(
        starting.id, epoch=starting.epoch, claimed_by="m", member=starting.member or ""
    )
    assert job is not None
    fd = create_log(queue.state.log(job.attempt or ""))
    os.write(fd, b"x" * size)
    return job, fd


def end(queue: Queue, job: Job) -> None:
    queue.store.finish_if_active(job.id, epoch=job.epoch, state=JobState.COMPLETED)


def ended(queue: Queue, size: int = 1000) -> int:
    """A job that has ended and left a log of that size."""
    job, fd = running(queue, size)
    os.close(fd)
    end(queue, job)
    return job.id


def purge(queue: Queue, *, days: float, size: int = 10**9, dry: bool = False) -> retention.Purged:
    return retention.purge(
        queue.store, wall=queue.clock.now().wall, keep_days=days, keep_size=size, dry=dry
    )


def logs(queue: Queue) -> int:
    return len(list((queue.state.root / "logs").iterdir()))


def test_old_jobs_go_with_everything(queue: Queue) -> None:
    for _ in range(3):
        ended(queue)
    other = waiting(queue)
    assert purge(queue, days=1).jobs == 0
    assert purge(queue, days=0, dry=True) == retention.Purged(jobs=3, files=3, bytes=3 * 4096)
    assert logs(queue) == 3
    assert purge(queue, days=0).jobs == 3
    assert [job.id for job in queue.list(all=True)] == [other.id]
    assert logs(queue) == 0
    assert queue.store.events(1) == []
    assert waiting(queue).id == other.id + 1


def test_a_job_that_another_comes_after_is_kept(queue: Queue) -> None:
    first = ended(queue)
    waiting(queue, request=Request(after=(first,)))
    assert purge(queue, days=0).jobs == 0
    assert queue.show(first).state is JobState.COMPLETED


def test_the_oldest_logs_go_beyond_a_size(queue: Queue) -> None:
    ids = [ended(queue, 100_000) for _ in range(5)]
    for age, job_id in enumerate(reversed(ids)):
        path = queue.log_path(job_id)
        assert path is not None
        os.utime(path, (time.time() - age * 60,) * 2)
    assert purge(queue, days=30, size=250_000).files == 3
    assert [queue.log_path(job_id) is not None for job_id in ids] == [False] * 3 + [True] * 2
    assert len(queue.list(all=True)) == 5


def test_what_somebody_still_writes_stays(queue: Queue) -> None:
    job, fd = running(queue, 100_000)
    end(queue, job)
    purge(queue, days=30, size=0)
    assert logs(queue) == 1
    os.close(fd)
    purge(queue, days=30, size=0)
    assert logs(queue) == 0


def test_open_jobs_keep_their_logs_whatever_the_size(queue: Queue) -> None:
    _, fd = running(queue, 100_000)
    os.close(fd)
    assert purge(queue, days=0, size=0).files == 0


def test_leftovers_go(queue: Queue) -> None:
    environment.keep(queue.state, waiting(queue).spec.uid, {"A": "1"})
    for folder, name in (("env", "gone.json"), ("alive", "gone"), ("logs", "gone.log")):
        path = queue.state.root / folder / name
        path.touch(mode=0o600)
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    purge(queue, days=1)
    assert not list(queue.state.root.rglob("gone*"))
    assert len(list((queue.state.root / "env").iterdir())) == 1


def test_once_a_day(queue: Queue) -> None:
    wall = queue.clock.now().wall
    settings = Settings.load({"keep_days": 0})
    ended(queue)
    assert retention.now_and_then(queue.store, settings, wall) is not None
    ended(queue)
    assert retention.now_and_then(queue.store, settings, wall + 3600) is None
    assert retention.now_and_then(queue.store, settings, wall + 1.1 * DAY) is not None
    assert queue.list(all=True) == []


def gpusched(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_terminal(queue: Queue, tmp_path: Path) -> None:
    for _ in range(3):
        ended(queue)
    waiting(queue)
    records = [json.loads(line) for line in gpusched("export").stdout.splitlines()]
    assert [record["id"] for record in records] == [1, 2, 3]
    assert [event["what"] for event in records[0]["events"]] == [
        "submitted",
        "claimed",
        "started",
        "ended",
    ]
    target = tmp_path / "history.jsonl"
    assert gpusched("export", str(target)).returncode == 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert len(target.read_text().splitlines()) == 3
    assert gpusched("export", str(target)).returncode == 1
    assert gpusched("purge").stdout.startswith("removed: 0 ended jobs")
    assert gpusched("purge", "--all", "--dry-run").stdout.startswith("would go: 3 ended jobs")
    assert gpusched("purge", "--all").stdout.startswith("removed: 3 ended jobs")
    assert len(queue.list(all=True)) == 1
