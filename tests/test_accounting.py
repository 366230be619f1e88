"""What jobs have cost: sums, the use of the box, and how the terminal shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers import FakeScript

from gpusched_ipy import cli
from gpusched_ipy.accounting import (
    Outcome,
    account_row,
    accounts,
    box_use,
    by_day,
    by_name,
    outcome_row,
    use_row,
)
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobKind, JobSpec, JobState, Place

GIB = 2**30
DAY = 86400.0
NOON = 1_700_049_600.0  # 2023-11-15 12:00 UTC: the same day wherever a test runs
SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"


def outcome(number: int = 1, **values: Any) -> Outcome:
    fields: dict[str, Any] = {
        "id": number,
        "name": "train",
        "state": JobState.COMPLETED,
        "submitted_at": NOON - 100.0,
        "started_at": NOON - 60.0,
        "ended_at": NOON,
        "run_s": 60.0,
        "gpus": ("GPU-0",),
        "peak_mem_bytes": GIB,
        "mean_utilization": 0.5,
        "energy_j": 1000.0,
    }
    return Outcome(**fields | values)


def test_the_sums_of_a_name() -> None:
    nothing = {"peak_mem_bytes": None, "mean_utilization": None, "energy_j": None}
    never = outcome(
        3, name="b", state=JobState.CANCELLED, started_at=None, run_s=None, gpus=(), **nothing
    )
    wide = outcome(2, gpus=("GPU-0", "GPU-1"), mean_utilization=0.8, peak_mem_bytes=3 * GIB)
    second, first = accounts([outcome(), wide, never], by_name)
    assert (first.key, first.jobs, dict(first.outcomes)) == ("train", 2, {"completed": 2})
    assert (first.gpu_s, first.peak_mem_bytes, first.energy_j) == (180.0, 3 * GIB, 2000.0)
    assert first.mean_utilization == pytest.approx((0.5 * 60 + 0.8 * 120) / 180)
    assert (second.median_run_s, second.gpu_s) == (None, 0.0)
    assert (second.peak_mem_bytes, second.mean_utilization, second.energy_j) == (None, None, None)
    assert account_row(second)[-3:] == ("\u2013",) * 3, "unknown is never 0"


def test_what_an_engine_gave_is_told_apart() -> None:
    place = Place(engine="slurm", count=4, host="n1", gpus="0,1,2,3")
    away = outcome(2, gpus=(), place=place, mean_utilization=None, energy_j=None)
    assert away.gpu_s == 240.0
    assert outcome_row(away)[6] == "4 min (slurm)"
    (account,) = accounts([outcome(), away], by_name)
    assert (account.gpu_s, account.engine_gpu_s) == (60.0, 240.0)
    assert account.mean_utilization == 0.5
    assert "1 min + 4 min at engines" in account_row(account)
    use = box_use([outcome(), away], 2, NOON - 100.0, NOON)
    assert (use.jobs, use.gpu_s, use.engine_gpu_s) == (2, 60.0, 240.0)
    assert (use.held, use.utilization) == (60 / 200, 30 / 200), "of this machine's own GPUs"
    assert "1 min + 4 min at engines" in use_row(use)


def test_the_sums_of_a_day() -> None:
    found = accounts([outcome(), outcome(2, ended_at=NOON + DAY)], by_day)
    assert [account.jobs for account in found] == [1, 1]
    assert found[0].key < found[1].key


def test_a_gpu_that_is_shared_is_held_once() -> None:
    since, until = NOON - 100.0, NOON
    shared = [outcome(1), outcome(2, started_at=NOON - 80.0, run_s=80.0)]
    use = box_use(shared, 2, since, until)
    assert use.held == pytest.approx(80.0 / 200.0)
    assert use.utilization == pytest.approx((0.5 * 60 + 0.5 * 80) / 200.0)
    assert (use.jobs, use.gpu_s, dict(use.ended)) == (2, 140.0, {"completed": 2})


def test_only_the_time_within_counts() -> None:
    before = outcome(1, started_at=NOON - 1000.0, run_s=1000.0)
    runs = outcome(2, state=JobState.RUNNING, started_at=NOON - 10.0, ended_at=None, run_s=None,
                   gpus=("GPU-1",), mean_utilization=None, energy_j=None)  # fmt: skip
    use = box_use([before, runs], 2, NOON - 100.0, NOON)
    assert use.held == pytest.approx(110.0 / 200.0)
    assert dict(use.ended) == {"completed": 1}
    unknown = box_use([runs], 0, NOON - 100.0, NOON)
    assert (unknown.held, unknown.utilization, unknown.energy_j) == (None, None, None)


@pytest.fixture
def queue(settings: Settings, fake: FakeScript) -> Iterator[Queue]:
    """Three jobs that have ended: two named train, one cancelled before it began."""
    found = Queue(settings)
    for number, name in enumerate(("train", "train", "eval")):
        spec = JobSpec(uid=str(number), kind=JobKind.COMMAND, name=name, argv=("true",))
        job = found.store.submit(spec)
        if name == "eval":
            found.store.request_cancel(job.id)
            continue
        claimed = found.store.claim(job, ("GPU-fake-0",), member="m")
        found.store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="m")
        found.store.finish_if_active(job.id, epoch=claimed.epoch, state=JobState.COMPLETED)
    yield found
    found.store.close()


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert cli.main(argv) == 0
    return json.loads(capsys.readouterr().out)


def test_the_terminal_tells_it(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    schemas = {
        name: json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("job", "history", "stats")
    }
    jobs = told(capsys, "history", "--json")
    assert [(job["id"], job["state"]) for job in jobs] == [
        (1, "completed"), (2, "completed"), (3, "cancelled")
    ]  # fmt: skip
    assert jobs[0]["gpu_s"] == jobs[0]["run_s"]
    assert jobs[2]["gpu_s"] is None
    for job in jobs:
        jsonschema.validate(job, schemas["job"])
    for by, keys in (("name", ["eval", "train"]), ("day", None)):
        sums = told(capsys, "history", "--by", by, "--json")
        for account in sums:
            jsonschema.validate(account, schemas["history"])
        if keys is not None:
            assert [(account[by], account["jobs"]) for account in sums] == [
                ("eval", 1),
                ("train", 2),
            ]
    use = told(capsys, "stats", "--since", "1h", "--json")
    jsonschema.validate(use, schemas["stats"])
    assert (use["gpus"], use["ended"]) == (1, {"cancelled": 1, "completed": 2})

    assert cli.main(["history", "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["3", "eval", "cancelled"]
    assert cli.main(["stats"]) == 0
    assert "held by jobs" in capsys.readouterr().out
