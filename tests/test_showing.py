"""What a notebook shows where a cell ends in a job, a list of jobs, a reading or the queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helpers import GIB, FakeScript
from IPython.core.formatters import DisplayFormatter

from gpusched_ipy import gpus
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobKind, JobState
from gpusched_ipy.snapshot import GpuProcess

EVIL = "<img src=x onerror=alert(1)>\x1b]0;owned\x07"


def shown(value: object) -> tuple[str, str]:
    """The text and the HTML that a front end gets."""
    data, _ = DisplayFormatter().format(value)
    for text in data.values():
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "<img" not in data["text/html"]
    return data["text/plain"], data["text/html"]


def test_jobs_lists_and_the_queue(settings: Settings, fake: FakeScript) -> None:
    queue = Queue(settings)
    bound: dict[str, Any] = {"kind": JobKind.CELL, "code": "pass", "home": "nobody"}
    first = queue.submit(name=EVIL, priority=3, **bound)
    with queue.store.writing():
        for number in range(59):
            queue.submit(name=f"job {number}", **bound)
    text, html = shown(queue.show(first.id))
    assert text.startswith(f"<job {first.id} <img src=x")
    assert "pending, priority 3" in text
    assert "\n" not in text
    assert "&lt;img src=x" in html
    failed = replace(first, state=JobState.FAILED, error="out of\nmemory", ended_at=0.0)
    assert "failed, priority 3, out of\\x0amemory" in shown(failed)[0]

    text, html = shown(queue.list())
    assert "60 jobs; 10 more are not shown" in text
    assert html.count("<tr>") == 51
    assert "1 job" in shown(queue.list(limit=1))[0]

    text, html = shown(queue)
    assert "the queue: 0 running, 60 waiting, 0 held; higher priority runs first" in text
    assert text.splitlines()[1].split()[0] == str(first.id), "in the order of the queue"
    queue.drain()
    assert "drained" in shown(queue)[1]
    queue.store.close()


def test_a_reading(settings: Settings, fake: FakeScript) -> None:
    fake.busy(utilization=0.97, memory="30GiB")
    queue = Queue(settings)
    reading = gpus(queue=queue, timeout=60)
    text, html = shown(reading)
    assert "97 %" in text
    assert "30.0 GiB / 40.0 GiB" in html
    assert "as it was at 20" in text
    evil = GpuProcess(pid=1, name=EVIL, mem_bytes=GIB)
    cards = tuple(replace(card, name=EVIL, processes=(evil,)) for card in reading.gpus)
    assert "&lt;img src=x" in shown(reading.with_gpus(cards))[1]
    fake.problem("driver lost")
    assert "driver lost" in shown(gpus(queue=queue, timeout=60))[0]
    queue.store.close()
