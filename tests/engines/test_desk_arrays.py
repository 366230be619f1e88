"""Sweeps at the desk: members that are due together go in one call, and stay jobs of their own."""

from __future__ import annotations

from contextlib import suppress

import pytest

from gpusched_ipy.engines import (
    AmbiguousError,
    RejectedError,
    UnreachableError,
    parted,
)
from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.job import JobState, Request
from tests.engines.test_desk import Counter, WithArrays, arrays

__all__ = ["arrays"]


def engine(counter: Counter) -> WithArrays:
    assert isinstance(counter.engine, WithArrays)
    return counter.engine


def test_members_that_are_due_together_go_in_one_call(arrays: Counter) -> None:
    before, *_ = arrays.submit("before"), arrays.sweep(4), arrays.submit("after")
    arrays.round(2)
    (array,) = engine(arrays).arrays
    assert [key.split("-")[0] for key in array] == ["5eed"] * 4
    assert [parted(key)[1] for key in array] == [0, 1, 2, 3]
    assert len(arrays.engine.submits) == 2, "every other job goes alone"
    arrays.engine.run(array[2])
    arrays.engine.run(next(key for key in arrays.engine.submits if "before" in key))
    arrays.round()
    states = [arrays.show(job).state for job in arrays.store.jobs()]
    assert states == [JobState.PENDING] * 4, "the others wait on"
    assert arrays.show(before).state is JobState.COMPLETED
    for key in (array[0], array[1], array[3]):
        arrays.engine.run(key)
    arrays.round()
    assert [job.name for job in arrays.store.jobs()] == ["after"]


def test_what_they_ask_for_parts_them(arrays: Counter) -> None:
    arrays.sweep(2)
    two = Request(gpus=2)
    arrays.submit("x", request=two, array=arrays.store.jobs()[0].spec.array)
    arrays.submit("y", request=two, array=arrays.store.jobs()[0].spec.array)
    arrays.submit("z", request=two, priority=-1, array=arrays.store.jobs()[0].spec.array)
    arrays.round()
    assert [len(some) for some in engine(arrays).arrays] == [2, 2]
    assert len(arrays.engine.submits) == 1, "its priority is another one"


def test_an_array_is_no_longer_than_the_engine_takes(arrays: Counter) -> None:
    engine(arrays).most = 3
    arrays.sweep(7)
    arrays.round()
    assert [len(some) for some in engine(arrays).arrays] == [3, 3]
    assert len(arrays.engine.submits) == 1


def test_the_window_and_max_running_bound_an_array(arrays: Counter) -> None:
    arrays.sweep(30, request=Request(max_running=4))
    arrays.round()
    assert [len(some) for some in engine(arrays).arrays] == [4]
    arrays.engine.run(engine(arrays).arrays[0][0])
    arrays.round(2)
    assert len(arrays.engine.submits) == 1, "the next one, alone"


@pytest.mark.parametrize(
    "why", [RejectedError("no arrays here"), UnreachableError("MaxSubmitJobs reached")]
)
def test_a_site_that_takes_no_array_gets_them_one_by_one(arrays: Counter, why: Exception) -> None:
    engine(arrays).refuses = why
    jobs = arrays.sweep(3)
    arrays.round(3)
    assert len(engine(arrays).arrays) == 1
    assert len(arrays.engine.submits) == 3
    assert {parted(key)[1] for key in arrays.engine.submits} == {None}
    for key in arrays.engine.submits:
        arrays.engine.run(key)
    arrays.round()
    assert {arrays.show(job).state for job in jobs} == {JobState.COMPLETED}


@pytest.mark.parametrize("wish", ["hold", "cancel"])
def test_one_member_is_taken_back_and_the_others_stay(arrays: Counter, wish: str) -> None:
    jobs = arrays.sweep(3)
    arrays.round(2)
    (array,) = engine(arrays).arrays
    if wish == "hold":
        arrays.store.set_held(jobs[1].id, True)
    else:
        arrays.store.request_cancel(jobs[1].id)
    arrays.round(2)
    assert arrays.engine.cancels == [array[1]]
    for key in (array[0], array[2]):
        arrays.engine.run(key)
    arrays.round()
    ended = [arrays.show(job).state for job in jobs]
    assert ended[0::2] == [JobState.COMPLETED] * 2
    assert ended[1] is (JobState.PENDING if wish == "hold" else JobState.CANCELLED)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_nobody_knows_whether_an_array_was_taken(
    arrays: Counter, taken: bool, restart: bool
) -> None:
    ran = arrays.root.parent / "ran"
    arrays.engine.raises, arrays.engine.takes = AmbiguousError("socket timed out"), taken
    jobs = arrays.sweep(3, f"echo $GPUSCHED_JOB_ID >> {ran}")
    arrays.round()
    if restart:
        arrays.open()
    arrays.engine.takes = True
    arrays.round(2)
    (array,) = engine(arrays).arrays
    again = [] if taken else array
    assert arrays.engine.submits == again, "under the names that they had"
    for key in array:
        arrays.engine.run(key)
    arrays.round(2)
    assert {arrays.show(job).state for job in jobs} == {JobState.COMPLETED}
    assert sorted(ran.read_text().split()) == sorted(str(job.id) for job in jobs)
    assert arrays.folders() == []


@pytest.mark.parametrize("marked", [1, 2, 3])
def test_a_death_between_the_marks_of_an_array_costs_nothing(
    arrays: Counter, monkeypatch: pytest.MonkeyPatch, marked: int
) -> None:
    """Killed after so many of its three members were marked, before the engine was called."""
    jobs = arrays.sweep(3)
    real, left = JobFolder.intend, [marked]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def dies(folder: JobFolder, called: str) -> None:
        if not left[0]:
            killed()
        left[0] -= 1
        real(folder, called)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(JobFolder, "intend", dies)
        patch.setattr(WithArrays, "submit_array", killed)
        arrays.round()
    assert arrays.engine.jobs == {}
    arrays.open()
    arrays.round(2)
    assert len(arrays.engine.jobs) == 3
    for key in list(arrays.engine.jobs):
        arrays.engine.run(key)
    arrays.round()
    assert [(arrays.show(job).state, arrays.show(job).attempts) for job in jobs] == [
        (JobState.COMPLETED, 1)
    ] * 3
