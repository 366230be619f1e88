"""The Python API as its users import it: real agent, real shims, real processes, a scripted GPU."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import (
    GpuAllocation,
    GpuExecutor,
    JobFailedError,
    JobHandle,
    JobState,
    Queue,
    RemoteError,
    UserError,
    calls,
    gpuqueue,
    gpus,
    here,
    options,
    plot_timeline,
    plot_usage,
    submit,
)
from gpusched_ipy.process import python_argv

ROOT = Path(__file__).parents[1]
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "GPUSCHED_JOB_ID", "GPUSCHED_JOB_NAME")


@pytest.fixture(autouse=True)
def gpu(fake: FakeScript) -> FakeScript:
    """Every test here has one scripted GPU, and leaves the queue at its end."""
    return fake


@pytest.fixture(autouse=True)
def leaves_the_queue(gpu: FakeScript) -> Any:
    yield
    here._at_exit()


@pytest.fixture
def queue() -> Queue:
    return here.current_queue()


def script(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A plain script of a user's."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _VARIABLES}


def why(queue: Queue, job_id: int) -> str:
    reason = queue.show(job_id).reason
    return reason.text if reason else ""


def only_job(queue: Queue) -> int:
    (job,) = wait_until(lambda: queue.list(all=True), what="a job")
    return job.id


# Blocks that have GPUs


def test_a_block_has_its_gpu_and_gives_it_back(queue: Queue) -> None:
    before = variables()
    with gpuqueue(priority=3, name="fit", mem="8G", label={"run": "a"}) as gpu:
        assert (gpu.uuid, gpu.index, gpu.name) == ("GPU-fake-0", 0, "Fake A100")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu.env["CUDA_VISIBLE_DEVICES"] == gpu.uuid
        assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        job = queue.show(gpu.job_id)
        assert (job.state, job.kind, job.priority, job.name) == ("running", "allocation", 3, "fit")
        assert (job.request.mem_bytes, job.spec.labels) == (8 * 2**30, {"run": "a"})
        assert str(gpu) == "GPU 0 (Fake A100)"
        assert "Fake A100" in gpu._repr_html_()
    assert queue.show(gpu.job_id).state is JobState.COMPLETED
    assert variables() == before


def test_variables_of_the_user_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with gpuqueue():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-fake-0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert "GPUSCHED_JOB_ID" not in os.environ


def test_an_exception_inside_fails_the_job(queue: Queue) -> None:
    with pytest.raises(ValueError, match="my own"), gpuqueue() as gpu:
        raise ValueError("my own")
    job = queue.show(gpu.job_id)
    assert (job.state, job.error) == ("failed", "ValueError: my own")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
    with gpuqueue():
        pass  # the GPU was given back


@pytest.mark.parametrize(("code", "state"), [(0, "completed"), (None, "completed"), (3, "failed")])
def test_leaving_the_process_ends_the_job(queue: Queue, code: int | None, state: str) -> None:
    with pytest.raises(SystemExit), gpuqueue() as gpu:
        sys.exit(code)
    assert queue.show(gpu.job_id).state == state


def test_as_a_decorator_each_call_has_its_own_turn(queue: Queue) -> None:
    @gpuqueue(name="step")
    def step(x: int) -> int:
        return x + len(os.environ["CUDA_VISIBLE_DEVICES"])

    assert [step(1), step(2)] == [11, 12]
    assert [job.name for job in queue.list(all=True)] == ["step", "step"]


def test_a_block_inside_another_uses_its_gpu(queue: Queue) -> None:
    with gpuqueue() as outer:
        with gpuqueue(priority=5) as inner:
            assert inner is outer
        with pytest.raises(UserError, match="has 1 GPU"), gpuqueue(gpus=2):
            pass
        child = script("from gpusched_ipy import gpuqueue\nwith gpuqueue() as g: print(g.job_id)")
        assert child.communicate(timeout=60)[0].strip() == str(outer.job_id)
    assert len(queue.list(all=True)) == 1


def test_a_script_that_was_submitted_uses_the_gpu_of_its_job(queue: Queue) -> None:
    code = "from gpusched_ipy import gpuqueue\nwith gpuqueue() as g: print(g.job_id, g.uuid)"
    handle = submit([sys.executable, "-c", code])
    assert handle.result(timeout=60) == 0
    assert handle.log() == f"{handle.id} GPU-fake-0\n"


def test_a_stale_job_in_the_environment_counts_for_nothing(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpuqueue() as old:
        env = dict(old.env)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with gpuqueue() as new:
        assert new.job_id != old.job_id


def test_two_threads_never_have_it_at_once(queue: Queue) -> None:
    spans: list[tuple[float, float]] = []

    def work() -> None:
        for _ in range(3):
            with gpuqueue():
                start = time.monotonic()
                time.sleep(0.02)
                spans.append((start, time.monotonic()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans.sort()
    assert len(spans) == 6
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_threads_on_two_gpus_show_the_process_both(queue: Queue, tmp_path: Path) -> None:
    FakeScript(tmp_path / "fake.json", gpus=2)
    other: list[GpuAllocation] = []
    came, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gpuqueue() as second:
            other.append(second)
            came.set()
            leave.wait()

    with gpuqueue() as first:
        thread = threading.Thread(target=work)
        thread.start()
        assert came.wait(60)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == f"{first.uuid},{other[0].uuid}"
        assert {first.uuid, other[0].uuid} == {"GPU-fake-0", "GPU-fake-1"}
        assert first.env["CUDA_VISIBLE_DEVICES"] == first.uuid
        assert "GPUSCHED_JOB_ID" not in os.environ
        leave.set()
        thread.join()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == first.uuid


def test_two_scripts_never_have_it_at_once(queue: Queue) -> None:
    code = (
        "import time\nfrom gpusched_ipy import gpuqueue\n"
        "for _ in range(3):\n"
        "    with gpuqueue():\n"
        "        a = time.monotonic(); time.sleep(0.02); print(a, time.monotonic())\n"
    )
    both = [script(code), script(code)]
    spans = sorted(
        tuple(float(word) for word in line.split())
        for child in both
        for line in child.communicate(timeout=60)[0].splitlines()
    )
    assert len(spans) == 6
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


HOLD = (
    "import sys, time\nfrom gpusched_ipy import gpuqueue\n"
    # One long sleep would miss a signal that comes right before it: Python does not look again.
    "with gpuqueue() as gpu:\n    print(gpu.job_id, flush=True)\n    while True: time.sleep(0.1)"
)


def test_a_killed_script_frees_its_gpu_at_once(queue: Queue) -> None:
    holder = script(HOLD)
    assert holder.stdout is not None
    held = int(holder.stdout.readline())
    waits = submit(["true"])
    wait_until(lambda: "script" in why(queue, waits.id) or f"job {held}" in why(queue, waits.id))
    holder.kill()
    at = time.monotonic()
    waits.wait(timeout=60)
    took = time.monotonic() - at
    at = time.monotonic()
    submit(["true"]).wait(timeout=60)
    usual = time.monotonic() - at
    assert took < 5.0 + 5 * usual, "it must not wait out any time-out"
    lost = queue.show(held)
    assert (lost.state, lost.error) == ("lost", "its process died")
    holder.communicate()


def test_who_waits_for_a_killed_script_learns_it_alone(queue: Queue) -> None:
    holder = script(HOLD)
    assert holder.stdout is not None
    held = int(holder.stdout.readline())
    holder.kill()
    holder.communicate()
    (job,) = queue.wait(held, timeout=60)
    assert job.state is JobState.LOST


def test_ctrl_c_while_waiting_gives_up_the_place(queue: Queue, gpu: FakeScript) -> None:
    gpu.busy()
    waits = script("from gpusched_ipy import gpuqueue\nwith gpuqueue(): print('never')")
    job = only_job(queue)
    wait_until(lambda: "97 %" in why(queue, job))
    waits.send_signal(signal.SIGINT)
    out, err = waits.communicate(timeout=60)
    assert (out, "KeyboardInterrupt" in err) == ("", True)
    assert queue.show(job).state is JobState.CANCELLED


def test_ctrl_c_while_it_is_queued_gives_up_the_place(
    queue: Queue, gpu: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.busy()
    real = Queue.submit

    def submit(self: Queue, *given: Any, **fields: Any) -> Any:
        job = real(self, *given, **fields)
        signal.raise_signal(signal.SIGINT)
        return job

    monkeypatch.setattr(Queue, "submit", submit)
    with pytest.raises(KeyboardInterrupt), gpuqueue():
        pass
    assert [job.state for job in queue.list(all=True)] == ["cancelled"]


def test_ctrl_c_inside_ends_the_job(queue: Queue) -> None:
    holder = script(HOLD)
    assert holder.stdout is not None
    held = int(holder.stdout.readline())
    holder.send_signal(signal.SIGINT)
    holder.communicate(timeout=60)
    job = queue.show(held)
    assert (job.state, job.error) == ("failed", "KeyboardInterrupt")


def test_a_timeout_gives_up_the_place_and_says_why(queue: Queue, gpu: FakeScript) -> None:
    gpu.busy()
    for limit_s in (1.0, 4.0, 16.0, 64.0):
        with pytest.raises(TimeoutError) as caught, gpuqueue(timeout=limit_s):
            pass
        if "97 % used" in str(caught.value):  # else it has not even been looked at in that time
            break
    assert "97 % used" in str(caught.value)
    assert {job.state for job in queue.list(all=True)} == {"cancelled"}
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None


def test_cancelled_while_it_waits(queue: Queue, gpu: FakeScript) -> None:
    gpu.busy()
    canceller = threading.Thread(target=lambda: queue.cancel(only_job(queue)))
    canceller.start()
    with pytest.raises(JobFailedError, match="was cancelled") as caught, gpuqueue():
        pass
    canceller.join()
    assert caught.value.state == "cancelled"


@pytest.mark.parametrize("how", ["cancel", "walltime"])
def test_ended_while_it_runs_on_the_main_thread(queue: Queue, how: str) -> None:
    inside = threading.Event()

    def cancel() -> None:
        inside.wait()
        queue.cancel(only_job(queue))

    def stay() -> None:
        inside.set()
        time.sleep(600)

    canceller = threading.Thread(target=cancel)
    if how == "cancel":
        canceller.start()
    with (
        pytest.raises(JobFailedError) as caught,
        gpuqueue(time=None if how == "cancel" else 2.0) as gpu,
    ):
        stay()
    state = "cancelled" if how == "cancel" else "timeout"
    assert (caught.value.state, queue.show(gpu.job_id).state) == (state, state)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    if how == "cancel":
        canceller.join()


def test_a_thread_is_told_of_a_cancel(queue: Queue) -> None:
    seen: list[bool] = []

    def work() -> None:
        with gpuqueue() as gpu:
            queue.cancel(gpu.job_id)
            wait_until(lambda: gpu.cancelled)
            seen.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
    assert queue.show(only_job(queue)).state is JobState.COMPLETED


def test_a_forked_child_gives_nothing_back(queue: Queue) -> None:
    with gpuqueue() as gpu:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with gpuqueue() as same:
                    status = 0 if same is gpu else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert queue.show(gpu.job_id).state is JobState.RUNNING
    assert queue.show(gpu.job_id).state is JobState.COMPLETED


def test_bad_options_of_a_block_queue_nothing(queue: Queue) -> None:
    for options_, message in [
        ({"mem": "much"}, "is not a size"),
        ({"gpus": 0}, "1 or more"),
        ({"gpus": 3}, "this machine has 1"),
        ({"priority": 5000}, "priority 5000"),
        ({"colour": "red"}, "colour"),
        ({"label": 3}, "label=3"),
        ({"after": "nothing"}, "no job nothing"),
    ]:
        given: dict[str, Any] = options_
        with pytest.raises(UserError, match=message), gpuqueue(**given):
            pass
    assert queue.list(all=True) == []


# Handles


def square(x: int) -> int:
    print("square of", x)
    return x * x


def grumble(text: str) -> None:
    raise LookupError(text)


class OddError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def odd() -> None:
    raise OddError(1, 2)


def test_a_function_gives_its_result_and_its_log(queue: Queue) -> None:
    handle = submit(square, 7, priority=2, time="1h")
    assert handle.result(timeout=60) == 49
    assert (handle.state, handle.exception(), handle.log()) == ("completed", None, "square of 7\n")
    job = handle.job
    assert (job.name, job.kind, job.priority, job.gpus) == (
        "square",
        "callable",
        2,
        ("GPU-fake-0",),
    )
    assert repr(handle) == f"<job {handle.id} square: completed>"
    assert "<table" in handle._repr_html_()
    again = JobHandle[int](Queue(), handle.id)  # from anywhere else, by its id
    assert again.result() == 49
    again.queue.store.close()


def test_a_lambda_with_what_it_closes_over_and_named_arguments() -> None:
    bonus = 10
    handle = submit(lambda x, *, y: x + y + bonus, 1, kwargs={"y": 2})
    assert handle.result(timeout=60) == 13


def test_an_exception_comes_back_with_its_traceback(queue: Queue) -> None:
    handle = submit(grumble, "not there")
    with pytest.raises(LookupError, match="not there") as caught:
        handle.result(timeout=60)
    assert "in grumble" in str(caught.value.__cause__)
    assert "callmain" not in str(caught.value.__cause__)
    assert (handle.state, handle.job.exit_code) == ("failed", 1)
    assert "LookupError: not there" in handle.log()
    with pytest.raises(RemoteError, match="OddError: 1 and 2") as remote:
        submit(odd).result(timeout=60)
    assert "in odd" in str(remote.value.__cause__)


def test_what_cannot_come_back_says_so() -> None:
    with pytest.raises(RemoteError, match=r"result cannot be pickled .*lock"):
        submit(threading.Lock).result(timeout=60)
    with pytest.raises(RemoteError, match="more than 256 MiB"):
        submit(bytearray, calls.MAX_CALL_BYTES + 1).result(timeout=60)


def test_what_cannot_be_sent_queues_nothing(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"call of square cannot be pickled .*lock"):
        submit(square, threading.Lock())
    monkeypatch.setattr(calls, "MAX_CALL_BYTES", 2**20)
    with pytest.raises(UserError, match="call of len has more than 1 MiB"):
        submit(len, b"x" * 2**20)
    with pytest.raises(UserError, match="colour"):
        submit(square, 1, colour="red")  # type: ignore[call-overload]
    with pytest.raises(UserError, match="takes its arguments in its list"):
        submit(["echo"], "hello")  # type: ignore[call-overload]
    assert queue.list(all=True) == []
    assert list((queue.state.root / "calls").iterdir()) == []


def test_calls_are_private_files(queue: Queue) -> None:
    handle = submit(square, 3)
    handle.result(timeout=60)
    kept = sorted((queue.state.root / "calls").iterdir())
    assert [path.suffix for path in kept] == [".in", ".out"]
    assert {path.stat().st_mode & 0o777 for path in [*kept, kept[0].parent]} == {0o600, 0o700}


def test_a_call_of_another_python_is_refused(queue: Queue, gpu: FakeScript) -> None:
    handle = submit(square, 3, hold=True)
    path = queue.state.call(handle.job.spec.uid)
    head, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(head.replace(calls._PYTHON.encode(), b"2.7") + b"\n" + rest)
    queue.release(handle.id)
    with pytest.raises(UserError, match=r"was written by Python 2\.7"):
        handle.result(timeout=60)


def test_modules_beside_the_script_are_found(tmp_path: Path, queue: Queue) -> None:
    (tmp_path / "beside.py").write_text("def triple(x): return 3 * x\n")
    (tmp_path / "main.py").write_text(
        "import beside\nfrom gpusched_ipy import submit\n"
        "print(submit(beside.triple, 4).result(60))\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout == "12\n"


def test_a_call_survives_who_queued_it(queue: Queue) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from gpusched_ipy import submit; print(submit(pow, 2, 5).id)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert JobHandle[int](queue, int(done.stdout)).result(timeout=60) == 32


def test_a_command_gives_its_status(queue: Queue) -> None:
    assert submit(["true"]).result(timeout=60) == 0
    bad = submit(["exit 3"], shell=True)
    with pytest.raises(JobFailedError, match="has no result: failed, exit status 3"):
        bad.result(timeout=60)


def test_the_history_is_what_has_ended(queue: Queue) -> None:
    ended = [submit(["true"], name=name).wait() for name in ("one", "two")]
    submit(["true"], hold=True)
    assert [job.id for job in queue.history()] == [job.id for job in ended]
    assert [job.name for job in queue.history(limit=1)] == ["two"]
    assert queue.history(since=3600) == queue.history()
    assert queue.history(since=-3600) == []


def test_cancel_ends_a_call(queue: Queue, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def forever() -> None:
        begun.touch()
        time.sleep(1000)

    handle = submit(forever)
    wait_until(begun.exists)
    handle.cancel()
    with pytest.raises(JobFailedError) as caught:
        handle.result(timeout=60)
    assert caught.value.state == "cancelled"
    assert handle.cancel() is JobState.CANCELLED


def test_waiting_has_a_limit(gpu: FakeScript) -> None:
    gpu.busy()
    handle = submit(square, 1)
    assert (handle.log(), handle.state) == ("", "pending")
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.2)
    wait_until(lambda: "97 % used" in repr(handle))
    assert handle.cancel() is JobState.CANCELLED


def test_await() -> None:
    async def main() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        beside = asyncio.create_task(tick())
        found = await asyncio.gather(submit(square, 3), submit(square, 4))
        beside.cancel()
        with pytest.raises(LookupError):
            await submit(grumble, "x")
        return found, ticks

    found, ticks = asyncio.run(main())
    assert found == [9, 16]
    assert ticks > 10, "the event loop must go on meanwhile"


def test_after_takes_handles(queue: Queue) -> None:
    first = submit(square, 2)
    second = submit(square, 3, after=first)
    third = submit(square, 4, after=[first, second.id], after_any=f"{second.id}")
    assert third.result(timeout=60) == 16
    assert third.job.request.after == (first.id, second.id)
    assert [job.state for job in queue.wait(first, second)] == ["completed", "completed"]  # type: ignore[arg-type]


def test_requeue_makes_the_call_again(queue: Queue, tmp_path: Path) -> None:
    count = tmp_path / "count"

    def once_more() -> int:
        count.write_text(count.read_text() + "x" if count.exists() else "x")
        return len(count.read_text())

    handle = submit(once_more)
    assert handle.result(timeout=60) == 1
    queue.requeue(handle.id)
    assert handle.result(timeout=60) == 2


# The executor


def test_executor_gives_results_in_order_and_as_they_come(queue: Queue) -> None:
    with GpuExecutor(mem="1G", priority=4, name="sweep") as executor:
        futures = [executor.submit(square, x) for x in range(3)]
        assert sorted(future.result() for future in as_completed(futures)) == [0, 1, 4]
        assert list(executor.map(pow, range(7), [2] * 7, chunksize=3)) == [x * x for x in range(7)]
    jobs = queue.list(all=True)
    assert {(job.name, job.priority, job.request.mem_bytes) for job in jobs} == {
        ("sweep", 4, 2**30)
    }
    assert len(jobs) == 3 + 3
    assert list((queue.state.root / "calls").iterdir()) == [], "nothing is left of its calls"


def test_executor_brings_back_exceptions_with_their_traceback() -> None:
    with GpuExecutor() as executor:
        future = executor.submit(grumble, "gone")
        with pytest.raises(LookupError, match="gone") as caught:
            future.result(timeout=60)
    assert "in grumble" in str(caught.value.__cause__)


def test_executor_cancels_what_has_not_begun(queue: Queue, gpu: FakeScript) -> None:
    gpu.busy()
    executor = GpuExecutor(max_workers=1)
    first, second = executor.submit(square, 1), executor.submit(square, 2)
    assert first.job is not None
    assert (second.job, len(queue.list())) == (None, 1)
    assert second.cancel()
    assert first.cancel()
    assert (first.cancelled(), second.cancelled()) == (True, True)
    assert first.job.state is JobState.CANCELLED
    executor.shutdown()
    with pytest.raises(UserError, match="colour"):
        GpuExecutor(colour="red")  # type: ignore[call-arg]


def test_executor_does_not_cancel_what_runs(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def forever() -> None:
        begun.touch()
        time.sleep(1000)

    with GpuExecutor() as executor:
        future = executor.submit(forever)
        wait_until(begun.exists)
        wait_until(future.running)
        assert not future.cancel()
        assert future.job is not None
        future.job.cancel()
        with pytest.raises(JobFailedError, match="cancelled"):
            future.result(timeout=60)


def test_executor_learns_of_a_cancel_from_elsewhere(queue: Queue, gpu: FakeScript) -> None:
    gpu.busy()
    with GpuExecutor() as executor:
        future = executor.submit(square, 1)
        queue.cancel(only_job(queue))
        wait_until(future.cancelled)


def test_executor_takes_many_calls_and_drops_them_quickly(queue: Queue, gpu: FakeScript) -> None:
    gpu.busy()
    executor = GpuExecutor()
    futures = [executor.submit(square, number) for number in range(300)]
    assert len(queue.list()) == 300
    executor.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    assert queue.list() == []


def test_a_script_waits_for_its_executor_at_its_end(queue: Queue) -> None:
    code = (
        "from gpusched_ipy import GpuExecutor\n"
        "future = GpuExecutor().submit(pow, 2, 5)\n"
        "future.add_done_callback(lambda done: print(done.result()))"
    )
    done = script(code)
    out, err = done.communicate(timeout=60)
    assert (out, err, done.returncode) == ("32\n", "", 0)


def test_no_call_is_taken_after_the_interpreter_has_ended() -> None:
    code = (
        "import atexit\nfrom gpusched_ipy import GpuExecutor\n"
        "executor = GpuExecutor(); executor.submit(pow, 2, 5).result()\n"
        "atexit.register(lambda: executor.submit(pow, 2, 5))"
    )
    _, err = script(code).communicate(timeout=60)
    assert "cannot schedule new futures after interpreter shutdown" in err


# The rest


def test_gpus_and_pictures(queue: Queue) -> None:
    with gpuqueue(name="fit"):
        assert [gpu.name for gpu in gpus().gpus] == ["Fake A100"]
    assert plot_usage("1h").axes
    assert plot_timeline().axes


def test_the_options_of_python_are_those_of_the_command_line() -> None:
    flags = {option.dest for option in options.JOB_OPTIONS}
    synonyms = {"gpu_type"}  # --gpu-type and --on-gpu are two names of one option
    changing = {"dry_run", "sweep"}  # what is returned; so they stand in the signatures
    named = options.SubmitOptions.__optional_keys__ | changing
    assert named - synonyms == flags
    assert options.python_fields({"gpu_type": "A100"}) == options.python_fields({"on_gpu": "A100"})


def test_a_call_runs_in_the_python_of_the_user_and_not_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    argv = python_argv("callmain", "x", "y", isolated=False)
    assert argv[:2] == [sys.executable, "-P"]
    assert submit(square, 2, cwd=tmp_path).result(timeout=60) == 4


def test_usage_is_typed() -> None:
    """A user's program that a strict type checker accepts, with the types it should see."""
    pytest.importorskip("mypy")
    argv = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "tests/typing_api.py"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def examples() -> list[tuple[str, str]]:
    """The programs of the documentation, and what they print."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_examples_of_the_documentation_print_what_they_say(number: int) -> None:
    code, printed = examples()[number]
    out, err = script(code).communicate(timeout=60)
    assert (out, err) == (printed, "")


def test_every_example_is_run() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert len(examples()) == text.count("```python") >= 5


def test_a_handle_of_a_purged_job_shows_itself(queue: Queue) -> None:
    handle = submit(["true"], hold=True)
    handle.cancel()
    assert queue.store.forget([handle.job]) == 1
    assert repr([handle]) == f"[<job {handle.id}: no longer kept>]"
    assert handle._repr_html_() is None


def test_the_shim_of_a_job_that_runs_stands_in_the_record(queue: Queue) -> None:
    job = queue.submit(["sleep", "600"])
    wait_until(lambda: "shim" in queue.store.member_kinds().values(), what="its shim is known")
    queue.cancel(job.id)
    queue.wait(job.id, timeout=60)
    wait_until(lambda: "shim" not in queue.store.member_kinds().values(), what="it has left")


def test_a_shim_that_leaves_has_moved_the_end_of_its_job_into_the_file(
    queue: Queue, tmp_path: Path
) -> None:
    """No later write, for which somebody waits, has to do that instead."""
    job = queue.submit(["true"])
    queue.wait(job.id, timeout=60)

    def in_the_file_alone() -> bool:
        alone = tmp_path / "without its log.db"
        shutil.copyfile(queue.state.database, alone)
        with closing(sqlite3.connect(alone)) as db:
            try:
                found = db.execute("SELECT state FROM jobs WHERE id = ?", (job.id,)).fetchall()
            except sqlite3.DatabaseError:
                return False  # copied while it was written
        return found == [("completed",)]

    wait_until(in_the_file_alone, what="the end is in the file")
