"""Sweeps, keys and previews: real agent, shims and processes, a scripted GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until
from hypothesis import given
from hypothesis import strategies as st

from gpusched_ipy import JobHandle, Queue, UserError, here, submit, sweep
from gpusched_ipy.cli import main
from gpusched_ipy.handle import SweepHandle
from gpusched_ipy.job import JobState
from gpusched_ipy.preview import Preview


@pytest.fixture(autouse=True)
def gpu(fake: FakeScript) -> FakeScript:
    return fake


@pytest.fixture
def queue() -> Queue:
    return here.current_queue()


# What a sweep is


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr=0.1,1e-3", [0.1, 1e-3]),
        ("seed=1..5", [1, 2, 3, 4, 5]),
        ("n=0..9..4", [0, 4, 8]),
        ("n=3..1", [3, 2, 1]),
        ("n=-1..1,7", [-1, 0, 1, 7]),
        ("net=resnet18,../mine", ["resnet18", "../mine"]),
        ("amp=True,False,None", [True, False, None]),
        ("id=007,nan", ["007", "nan"]),
    ],
)
def test_values_are_numbers_where_they_look_so(text: str, values: list[object]) -> None:
    found = [value.value for value in sweep.parse_axis(text).values]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["lr"], "NAME=VALUE"),
        (["lr=1,,2"], "a value is missing"),
        (["x=0.1..0.5"], "whole numbers"),
        (["x=1..9..0"], "must not be 0"),
        (["x=1,2,1"], "twice"),
        (["x=1", "X=2"], "twice"),
        (["class=1"], "not the name of a variable"),
        (["a=1..200", "b=1..200"], "40000 members; at most 10000"),
        (["a=1..99999"], "more than 10000"),
    ],
)
def test_what_is_no_sweep_says_why(texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        sweep.members_of(sweep.axes_of(texts))


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_python_come_back_from_their_text(whole: int, real: float) -> None:
    (axis,) = sweep.axes_of({"x": [whole, real + 0.5]})
    assert [sweep.value_of(value.text) for value in axis.values] == [whole, real + 0.5]


def test_places_in_a_command_are_filled_and_other_braces_stay() -> None:
    values = {"lr": "0.1", "path": "a b"}
    words = ["--lr={lr}", '{"lr": {lr}}', "{{lr}}", "${lr}", "{}", "{ lr }", "{0}", "{path}"]
    filled = ["--lr=0.1", '{"lr": 0.1}', "{lr}", "${lr}", "{}", "{ lr }", "{0}", "a b"]
    assert sweep.filled(words, values) == filled
    assert sweep.filled(["ls {path}"], values, shell=True) == ["ls 'a b'"]
    with pytest.raises(UserError, match=r"\{seed\} in the command is no variable of the sweep"):
        sweep.filled(["{seed}"], values)


# Commands


_TELL = (
    "import os; e = os.environ; print(e['GPUSCHED_SWEEP_LR'], '{lr}', '{seed}',"
    " e['GPUSCHED_ARRAY_INDEX'], e['GPUSCHED_ARRAY_SIZE'], e['GPUSCHED_ARRAY_ID'])"
)


def test_a_sweep_of_commands_from_a_terminal(
    capsys: pytest.CaptureFixture[str], queue: Queue
) -> None:
    options = ["--name", "grid", "--sweep", "lr=0.1,1e-3", "--sweep", "seed=1..2"]
    assert main(["submit", *options, "--hold", "--", sys.executable, "-c", _TELL]) == 0
    ids = [int(line) for line in capsys.readouterr().out.split()]
    assert len(ids) == 4
    jobs = [queue.show(number) for number in ids]
    array = jobs[0].spec.array
    assert array is not None
    assert [job.spec.array.index for job in jobs if job.spec.array] == [0, 1, 2, 3]
    assert {job.spec.array.id for job in jobs if job.spec.array} == {array.id}

    assert main(["list"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2
    assert f"{ids[0]}-{ids[-1]}" in table[1]
    assert "grid \u00d74" in table[1]
    assert "4 pending (4 held)" in table[1]
    assert main(["list", "--members"]) == 0
    assert "grid lr=1e-3 seed=2" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    assert [job["id"] for job in json.loads(capsys.readouterr().out)] == ids

    # All of it by name, by array and by range.
    assert main(["priority", "grid", "7"]) == 0
    assert main(["release", f"array:{array.id[:6]}"]) == 0
    assert capsys.readouterr().out == (
        f"jobs {ids[0]}-{ids[-1]} have priority 7\njobs {ids[0]}-{ids[-1]} released\n"
    )
    assert main(["wait", "grid"]) == 0
    logs = [queue.log_path(number) for number in ids]
    told = [path.read_text().split() for path in logs if path is not None]
    assert told == [
        [lr, lr, seed, str(at), "4", array.id]
        for at, (lr, seed) in enumerate([("0.1", "1"), ("0.1", "2"), ("1e-3", "1"), ("1e-3", "2")])
    ]
    assert {queue.show(number).priority for number in ids} == {7}


def test_so_many_run_at_once_and_the_rest_can_be_cancelled(tmp_path: Path, queue: Queue) -> None:
    stop = tmp_path / "stop"
    code = f"import os, time\nwhile not os.path.exists({str(stop)!r}): time.sleep(0.05)"
    jobs = submit(
        [sys.executable, "-c", code], mem="1G", sweep={"n": range(4)}, max_running=2, name="few"
    )
    wait_until(lambda: [job.job.state for job in jobs].count(JobState.RUNNING) == 2, 60, "two run")

    def reasons() -> list[str]:
        return [str(reason.text) for job in jobs[2:] if (reason := queue.show(job.id).reason)]

    wait_until(lambda: reasons() == ["2 of its sweep run at once, not more"] * 2, what="why")
    queue.hold("few")  # of a sweep those are meant to which it applies
    assert [job.job.held for job in jobs] == [False, False, True, True]
    with pytest.raises(UserError, match="only a pending job can be held"):
        queue.hold(jobs[0].id)
    queue.cancel("few")
    stop.touch()
    states = [job.state for job in jobs.wait(60)]
    assert states[2:] == [JobState.CANCELLED] * 2
    assert all(state is not JobState.FAILED for state in states)


def area(width: int, height: float, *, name: str) -> str:
    return f"{name}: {width * height} {type(width).__name__}"


def test_functions_get_their_values_as_keyword_arguments() -> None:
    found = submit(area, sweep={"width": [1, 2], "height": [0.5]}, kwargs={"name": "a"})
    assert isinstance(found, SweepHandle)
    assert found.result(120) == ["a: 0.5 int", "a: 1.0 int"]
    assert isinstance(found[0], JobHandle)
    assert found[1].result() == "a: 1.0 int"


def test_a_refused_sweep_queues_nothing(queue: Queue) -> None:
    with pytest.raises(UserError, match=r"\{nothing\}"):
        submit([sys.executable, "{nothing}"], sweep={"n": [1, 2]})
    with pytest.raises(UserError, match="cannot be pickled"):
        submit(area, sweep={"width": [1, (x for x in ())]})
    with pytest.raises(UserError, match="give --sweep as well"):
        submit(["true"], max_running=2)
    assert queue.list(all=True) == []
    assert list(queue.state.root.glob("calls/*")) == []


# Keys


def test_the_same_key_is_the_same_job_unless_that_failed(
    queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit(["true"], key="prep")
    again = submit(["false"], key="prep")
    assert again.id == first.id
    assert f"key prep: job {first.id} stands already" in capsys.readouterr().err
    first.wait(60)
    assert submit(["false"], key="prep").id == first.id

    failed = submit(["false"], key="other")
    failed.wait(60)
    new = submit(["true"], key="other")
    assert new.id != failed.id
    with pytest.raises(UserError, match=f"as job {new.id}"):
        queue.requeue(failed.id)
    assert new.wait(60).state is JobState.COMPLETED


def test_a_sweep_run_again_under_its_key_repeats_what_failed_and_what_is_new(
    tmp_path: Path, queue: Queue
) -> None:
    mark = tmp_path / "mended"
    code = f"import os, sys; sys.exit('{{n}}' == '2' and not os.path.exists({str(mark)!r}))"
    argv = [sys.executable, "-c", code]
    first = submit(argv, sweep={"n": [1, 2]}, key="grid")
    assert [job.state for job in first.wait(60)] == [JobState.COMPLETED, JobState.FAILED]
    mark.touch()
    second = submit(argv, sweep={"n": [1, 2]}, key="grid")
    assert second.ids[0] == first.ids[0]
    assert second.ids[1] not in first.ids
    assert second.array == first.array  # it goes on in the same sweep
    assert [job.state for job in second.wait(60)] == [JobState.COMPLETED] * 2
    state = queue.store.array_states([first.array])[first.array]
    assert (state.size, dict(state.states)) == (2, {JobState.COMPLETED: 2})
    wider = submit(argv, sweep={"n": [1, 2, 3]}, key="grid")
    assert wider.ids[:2] == second.ids
    assert wider.wait(60)[2].state is JobState.COMPLETED


_RACER = """
import os, sys, time
from gpusched_ipy import Queue
queue = Queue()
open(sys.argv[1], "w").close()
while not os.path.exists(sys.argv[2]): time.sleep(0.001)
done = queue.submit_all(["true"], hold=True, key="race", sweep={"n": range(20)})
print(*(job.id for job in done.jobs))
"""


def test_two_processes_that_submit_the_same_key_at_once_get_the_same_jobs(
    tmp_path: Path, queue: Queue
) -> None:
    go = tmp_path / "go"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, str(tmp_path / f"ready{at}"), str(go)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for at in range(3)
    ]
    wait_until(lambda: len(list(tmp_path.glob("ready*"))) == 3, 90, "all stand ready")
    go.touch()
    told = {racer.communicate(timeout=90)[0] for racer in racers}
    assert len(told) == 1
    assert len(told.pop().split()) == 20
    assert len(queue.list()) == 20


# A sweep that fails


def test_a_sweep_whose_jobs_fail_fast_is_held_and_goes_on_when_released(queue: Queue) -> None:
    jobs = submit(
        [sys.executable, "-c", "raise SystemExit(3)"],
        sweep={"n": range(8)},
        max_running=1,
        name="night",
    )

    def held(failed: int) -> bool:
        states = [handle.job for handle in jobs]
        waiting = [job for job in states if job.state is JobState.PENDING]
        ended = sum(job.state is JobState.FAILED for job in states)
        return ended == failed and bool(waiting) and all(job.held for job in waiting)

    wait_until(lambda: held(3), 120, "held after three failures")
    why = queue.show(jobs[7].id).reason
    assert why is not None
    assert why.text.startswith("held: 3 of its sweep failed one after the other")
    assert f"jobs {jobs.ids[0]}, {jobs.ids[1]}, {jobs.ids[2]}" in why.text
    queue.release("night")
    wait_until(lambda: held(6), 120, "held again after three more")
    # Submitted again under a key, what was held is replaced; here it is only given up.
    jobs.cancel()
    assert [job.state for job in jobs.wait(60)][6:] == [JobState.CANCELLED] * 2


# What would happen


def test_a_dry_run_asks_the_policy_and_queues_nothing(
    gpu: FakeScript, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    found = submit(["true"], dry_run=True)
    assert isinstance(found, Preview)
    assert str(found) == "true would start now on GPU 0 (Fake A100); nothing is queued"
    gpu.busy()
    assert main(["submit", "--dry-run", "--", "true"]) == 0
    text = capsys.readouterr().out
    assert "true would wait: GPU 0: 97 % used by python (pid 4242, user user1)" in text
    assert "starts at a time that is not known" in text
    assert main(["submit", "--dry-run", "--json", "--sweep", "n=1,2", "--", "true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(job["sweep"], job["starts_now"], job["reason_code"]) for job in told] == [
        ({"n": "1"}, False, "gpu_busy"),
        ({"n": "2"}, False, "priority"),
    ]
    (later,) = submit(["true"], dry_run=True, begin="+2h").jobs
    assert later.start is not None
    assert later.start.at - found.now.wall == pytest.approx(7200, abs=120)
    assert queue.list(all=True) == []


def test_a_dry_run_tells_when_a_running_job_will_have_ended(queue: Queue) -> None:
    running = submit([sys.executable, "-c", "import time; time.sleep(600)"], time="10m")
    wait_until(lambda: running.state is JobState.RUNNING, 60, "it runs")
    (next_one,) = submit(["true"], dry_run=True, key="k").jobs
    assert not next_one.starts
    assert next_one.start is not None
    started = running.job.started_at
    assert started is not None
    assert started < next_one.start.low <= next_one.start.at <= next_one.start.high
    assert next_one.start.high <= started + 660  # its walltime and the time it takes to end it
    (same,) = submit(["true"], dry_run=True, key="k", hold=True).jobs
    assert same.reason is not None
    assert same.reason.text == "held"
    running.cancel()
