"""Every option of a submit means the same in a magic, in a terminal and in Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import inf, nan
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import Queue, UserError, here, submit
from gpusched_ipy.arguments import command
from gpusched_ipy.cli import main
from gpusched_ipy.job import Job, JobKind, JobState, effective_priority
from gpusched_ipy.lines import parse_cell, parse_run
from gpusched_ipy.options import JOB_OPTIONS, OptionParser, job_fields, python_fields
from gpusched_ipy.optionvalues import parse_name
from gpusched_ipy.records import iso
from gpusched_ipy.submission import name_of
from gpusched_ipy.text import UNKNOWN, format_duration

# The option on a line, and the same for Python.
SAME: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--priority -3", {"priority": -3}),
    ("--name train", {"name": "train"}),
    ("--gpus 2", {"gpus": 2}),
    ("--mem 8G", {"mem": "8G"}),
    ("--mem 8G", {"mem": 8 * 2**30}),
    ("--on-gpu A100", {"on_gpu": "A100"}),
    ("--gpu-type A100", {"gpu_type": "A100"}),
    ("--on-gpu 1", {"on_gpu": 1}),
    ("--on-gpu 1g.5gb", {"on_gpu": "1g.5gb"}),
    ("--after 12,prep", {"after": [12, "prep"]}),
    ("--after-any 12,14-16", {"after_any": "12,14-16"}),
    ("--begin 2030-01-01T22:00+00:00", {"begin": "2030-01-01T22:00+00:00"}),
    ("--time 2h", {"time": 7200}),
    ("--hold", {"hold": True}),
    ("--retries 2", {"retries": 2}),
    ("--requeue", {"requeue": True}),
    ("--retry-oom", {"retry_oom": True}),
    ("--label a=b --label c=d", {"label": {"a": "b", "c": "d"}}),
    ("--sweep lr=0.1,1e-3 --sweep n=1..3", {"sweep": {"lr": "0.1,1e-3", "n": range(1, 4)}}),
    ("--max-running 2", {"max_running": 2}),
    ("--key mine", {"key": "mine"}),
    ("--dry-run", {"dry_run": True}),
)


def on_a_terminal(words: list[str]) -> dict[str, Any]:
    parser = OptionParser(prog="gpusched submit")
    command(parser)
    return job_fields(parser.parse_args(words))


def as_python(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


@pytest.mark.parametrize(("line", "python"), SAME, ids=[line for line, _ in SAME])
def test_each_option_means_the_same_everywhere(line: str, python: dict[str, Any]) -> None:
    cell, _ = parse_cell(line)
    run = parse_run(f"{line} -- true")
    typed = as_python(on_a_terminal(line.split()))
    assert as_python(cell) == typed
    assert as_python({name: run[name] for name in typed}) == typed
    given = as_python(python_fields(python))
    if "on_gpu" in given:
        given["on_gpu"] = str(given["on_gpu"])
    assert given == typed


def test_no_option_is_left_out_above() -> None:
    told = " ".join(line for line, _ in SAME)
    flags = {flag for option in JOB_OPTIONS for flag in option.flags if flag.startswith("--")}
    assert {flag for flag in flags if flag not in told} <= {"--engine"}


@pytest.fixture
def queue(fake: FakeScript) -> Queue:
    fake.change(0, name="Fake A100")
    return here.current_queue()


@pytest.fixture
def two(tmp_path: Any, state_dir: Any, monkeypatch: pytest.MonkeyPatch) -> FakeScript:
    script = FakeScript(tmp_path / "two.json", 2)
    script.change(1, name="Fake H200")
    monkeypatch.setenv("GPUSCHED_FAKE", str(script.path))
    monkeypatch.setenv("GPUSCHED_SAMPLE_INTERVAL_S", "0.1")
    return script


def from_a_terminal(words: list[str], capsys: pytest.CaptureFixture[str]) -> Job:
    assert main(["submit", *words, "--", "true"]) == 0
    return here.current_queue().show(int(capsys.readouterr().out))


@pytest.mark.parametrize("which", ["1", "H200", "GPU-fake-1"])
def test_a_named_gpu_is_the_one_that_is_given(
    which: str, two: FakeScript, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = here.current_queue()
    for make in (
        lambda: from_a_terminal(["--gpu-type", which], capsys),
        lambda: submit(["true"], gpu_type=which).job,
    ):
        (ended,) = queue.wait(make().id, timeout=60)
        assert (ended.state, ended.gpus) == (JobState.COMPLETED, ("GPU-fake-1",))


def test_two_gpus_and_a_declared_memory_are_what_the_job_gets(two: FakeScript) -> None:
    queue = here.current_queue()
    both = submit(["true"], gpus=2)
    (ended,) = queue.wait(both.id, timeout=60)
    assert set(ended.gpus) == {"GPU-fake-0", "GPU-fake-1"}
    with pytest.raises(UserError, match="this machine has 2"):
        submit(["true"], gpus=3)
    with pytest.raises(UserError, match="the largest GPU here has"):
        submit(["true"], mem="80G")


def test_held_and_dependent_jobs_say_what_they_wait_for(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    first = from_a_terminal(["--hold", "--name", "prep", "--label", "a=b"], capsys)
    after = from_a_terminal(["--after", "prep"], capsys)
    anyhow = submit(["true"], after_any="prep")
    later = submit(["true"], begin="+2h")

    def why(job_id: int) -> Callable[[], str | None]:
        def reason() -> str | None:
            found = queue.show(job_id).reason
            return found.text if found else None

        return reason

    assert wait_until(why(first.id), 60) == "held"
    assert wait_until(why(after.id), 60) == f"after #{first.id}"
    assert wait_until(why(anyhow.id), 60) == f"after #{first.id}"
    assert str(wait_until(why(later.id), 60)).startswith("begins in")
    assert dict(first.spec.labels) == {"a": "b"}
    queue.cancel(first.id)
    ended = queue.wait(after.id, anyhow.id, timeout=60)
    assert [job.state for job in ended] == [JobState.CANCELLED, JobState.COMPLETED]


def test_a_walltime_ends_a_job(queue: Queue) -> None:
    over = submit(["sleep", "600"], time=0.5)
    (ended,) = queue.wait(over.id, timeout=60)
    assert ended.state is JobState.TIMEOUT


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("begin", value) for value in (inf, -inf, nan, 1e15, 1e300, -1, "+9999999d")),
        *(("name", value) for value in ("12", "14-16", "a,b", "array:3", "x*", "a?", "\udcff")),
        *(("mem", value) for value in (0, "0", "0G")),
        ("on_gpu", ""),
        ("gpu_type", " "),
        ("sweep", {}),
        ("key", "\udcff"),
    ],
)
def test_a_value_that_means_nothing_is_refused(option: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        python_fields({option: value})
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()


@pytest.mark.parametrize(("option", "value"), [("hold", "no"), ("begin", True), ("requeue", 1)])
def test_a_value_of_another_kind_is_refused(option: str, value: object) -> None:
    with pytest.raises(UserError, match="is not a value for this option"):
        python_fields({option: value})


def test_a_time_that_no_calendar_has_stops_nobody() -> None:
    """An older version has recorded such begin times."""
    assert {format_duration(span) for span in (inf, -inf, nan, 1e300)} == {UNKNOWN}
    assert {iso(wall) for wall in (inf, nan, 1e300, -1e300)} == {None}


def test_top_passes_those_that_have_gained_by_waiting(
    fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUSCHED_AGING_S", "1")
    fake.busy()
    queue = here.current_queue()
    old = submit(["true"], name="old", priority=2).job
    held = submit(["true"], hold=True, priority=900).job
    aged = partial(effective_priority, old, 1.0)
    wait_until(lambda: aged(time.monotonic()) > 4, what="it has gained some steps")
    new = submit(["true"], name="new").job
    assert queue.top("new").priority > aged(new.queued_mono)
    assert queue.show(held.id).priority == 900
    queue.set_priority(["old"], 1000)
    with pytest.raises(UserError, match="1000 is the highest; hold those that are to wait"):
        queue.top("new")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("12", "job-12"),
        ("14-16", "job-14-16"),
        ("array:3", "job-array:3"),
        ("a,b", "a_b"),
        ("x*", "x_"),
    ],
)
def test_a_job_without_a_name_gets_none_that_stands_for_others(program: str, name: str) -> None:
    assert name_of(JobKind.COMMAND, [program, "x"]) == name
    assert parse_name(name) == name
