"""What is far too large harms nobody: logs and names of any size cost what is shown of them."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import cli
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import JobKind, JobSpec, JobState
from gpusched_ipy.joblog import written

TEN_GB = 10 * 10**9
LITTLE = 16 * 2**20


@pytest.fixture
def queue(fake: FakeScript, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setenv("GPUSCHED_LOG_CAP", "1MiB")
    found = Queue(Settings.load())
    yield found
    found.store.close()


def memory_of(act: Callable[[], object]) -> int:
    """The most memory, in bytes, that it needed at a time."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_log_of_10_gb_is_read_and_kept_for_what_is_in_it(
    queue: Queue, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nearly all of it is a hole, as a job leaves one that writes far beyond the end."""
    go = tmp_path / "go"
    code = (
        "import os, time\nos.write(1, b'the begin\\n')\n"
        f"os.ftruncate(1, {TEN_GB})\nos.write(1, b'the end\\n')\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    )
    job = queue.submit([sys.executable, "-c", code])
    path = wait_until(lambda: queue.log_path(job.id))
    wait_until(lambda: path.stat().st_size > TEN_GB, what="it has written")
    text: list[bytes] = []
    assert memory_of(lambda: text.extend(written(queue, queue.show(job.id)))) < LITTLE
    assert b"".join(text).startswith(b"the begin\n")
    assert b"".join(text).endswith(b"the end\n")
    assert sum(map(len, text)) < LITTLE
    go.touch()
    assert queue.wait(job.id, timeout=60)[0].state is JobState.COMPLETED
    assert path.stat().st_blocks * 512 < LITTLE
    assert memory_of(lambda: cli.main(["log", str(job.id)])) < LITTLE
    shown = capfd.readouterr().out
    assert shown.startswith("the begin\n")
    assert shown.endswith("the end\n")
    assert len(shown) < LITTLE


def test_a_name_far_too_long_that_stands_in_the_record_is_shown_short(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    """A submit refuses it, and the record one of 1 MB; this one something else has written."""
    spec = JobSpec(
        uid="long", kind=JobKind.COMMAND, name="n" * 60_000, argv=("true",), cwd="/", held=True
    )
    with pytest.raises(UserError):
        queue.store.submit(replace(spec, name="n" * 2**20))
    job = queue.store.submit(spec)
    other = queue.submit(["true"], name="short")
    assert queue.wait(other.id, timeout=60)[0].state is JobState.COMPLETED
    cli.main(["list"])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 1000
    cli.main(["list", "--json"])
    assert [found["id"] for found in json.loads(capsys.readouterr().out)] == [job.id]
