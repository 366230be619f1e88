"""The loop by hand: real record, real locks, real monitor on scripted GPUs, a runner that notes."""

from __future__ import annotations

import itertools
import os
import random
import select
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import environment
from gpusched_ipy.backends import Detail, Detected
from gpusched_ipy.backends.fake import FakeBackend
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import StoreError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState, Request
from gpusched_ipy.locks import GpuLocks, Membership
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.outcome import End, Outcome
from gpusched_ipy.output import create_log
from gpusched_ipy.process import ExitWatch
from gpusched_ipy.scheduler import MOST_IN_A_ROW, Claim, Scheduler
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.statedir import StateDir, open_state_dir
from gpusched_ipy.store import Store


@dataclass
class NotingRunner:
    """Begins nothing: notes what it was told to begin and to cancel."""

    is_ready: bool = True
    fault: Exception | None = None
    started: list[Claim] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def ready(self, job: Job) -> bool:
        return self.is_ready

    def start(self, claim: Claim) -> None:
        if self.fault is not None:
            raise self.fault
        self.started.append(claim)

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job.id)


class Bench:
    """One member with its loop in the test's hands."""

    def __init__(self, state: StateDir, settings: Settings, **monitor: Any) -> None:
        self.settings = settings
        self.store = Store(state)
        self.monitor = Monitor(settings, **monitor)
        self.membership = Membership(state)
        self.runner = NotingRunner()
        self.scheduler = Scheduler(
            self.store, self.monitor, self.membership, {JobKind.COMMAND: self.runner}, settings
        )
        self._count = 0

    def submit(self, **values: Any) -> Job:
        self._count += 1
        fields = {"kind": JobKind.COMMAND, "name": f"job{self._count}", "argv": ("true",)}
        return self.store.submit(JobSpec(uid=f"{id(self)}-{self._count}", **{**fields, **values}))

    def started(self) -> list[int]:
        """The jobs begun so far, after one more round."""
        self.scheduler.tick()
        return [claim.job.id for claim in self.runner.started]

    def why(self, job: Job) -> str:
        reason = self.store.job(job.id).reason
        return "" if reason is None else reason.text

    def reading(self) -> Snapshot | None:
        return self.monitor.latest(Detail.PROCESSES)

    def close(self) -> None:
        self.scheduler.stop()
        self.monitor.stop()
        self.membership.leave()
        self.store.close()


@pytest.fixture
def state(settings: Settings) -> StateDir:
    return open_state_dir(settings)


@pytest.fixture
def bench(state: StateDir, settings: Settings) -> Iterator[Bench]:
    found = Bench(state, settings)
    yield found
    found.close()


def test_a_free_gpu_is_given_once(bench: Bench) -> None:
    first, second = bench.submit(), bench.submit()
    wait_until(lambda: bench.started() == [first.id])
    assert bench.started() == [first.id]
    assert f"job {first.id}" in bench.why(second)
    (claim,) = bench.runner.started
    assert bench.scheduler.begin(claim) is not None
    bench.scheduler.finish(claim, state=JobState.COMPLETED)
    # Given on at once: nobody waits out a quiet window after a job of ours.
    assert bench.started() == [first.id, second.id]


def told_end(bench: Bench, claim: Claim, answers: list[bool], **values: Any) -> End:
    """The job of that claim was begun by a shim, has ended, and its shim says so."""
    job = claim.job
    assert bench.store.begin(
        job.id, epoch=job.epoch, claimed_by=bench.membership.key, member=f"shim {job.id}"
    )
    bench.scheduler.hand_over(claim)
    outcome = Outcome(**{"state": JobState.COMPLETED, "exit_code": 0, **values})
    return End(job=job, member=f"shim {job.id}", outcome=outcome, answer=answers.append)


def test_the_end_that_a_shim_tells_and_the_next_start_are_one_write(bench: Bench) -> None:
    first, second, third = bench.submit(), bench.submit(), bench.submit()
    wait_until(lambda: bench.started() == [first.id])
    answers: list[bool] = []
    bench.scheduler.ended(told_end(bench, bench.runner.started[0], answers, exit_code=0))
    rang = bench.store.state.bell.stat().st_mtime_ns
    written: list[str] = []
    bench.store._db.set_trace_callback(written.append)
    assert bench.started() == [first.id, second.id]
    bench.store._db.set_trace_callback(None)
    assert answers == [True]
    assert written.count("COMMIT") == 1
    assert bench.store.state.bell.stat().st_mtime_ns > rang, "others hear of it too"
    ended = bench.store.job(first.id)
    assert (ended.state, ended.exit_code) == (JobState.COMPLETED, 0)
    # The rest of the round is made up for: why the third one still waits.
    assert bench.started() == [first.id, second.id]
    assert f"job {second.id}" in bench.why(third)


def test_where_one_end_follows_the_other_the_rest_of_a_round_has_its_turn(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(2 * MOST_IN_A_ROW)]
    wait_until(lambda: bench.started() == [jobs[0].id])
    reasons = 0
    for _ in jobs[:-2]:
        told = bench.why(jobs[-1])
        bench.scheduler.ended(told_end(bench, bench.runner.started[-1], []))
        bench.scheduler.tick()
        reasons += bench.why(jobs[-1]) != told
    assert len(bench.runner.started) == len(jobs) - 1
    assert 1 <= reasons < len(jobs) // 2, "now and then, and not every time"


def test_an_end_that_is_told_late_changes_nothing(bench: Bench) -> None:
    first = bench.submit()
    wait_until(lambda: bench.started() == [first.id])
    answers: list[bool] = []
    late = told_end(bench, bench.runner.started[0], answers, state=JobState.FAILED, exit_code=1)
    bench.store.finish_if_active(first.id, epoch=1, state=JobState.COMPLETED, exit_code=0)
    bench.scheduler.ended(late)
    assert bench.started() == [first.id]
    assert bench.store.job(first.id).state is JobState.COMPLETED
    assert answers == [True], "its shim need not record it any more"


def test_an_end_that_cannot_be_recorded_here_is_left_to_its_shim(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.submit(), bench.submit()
    wait_until(lambda: bench.started() == [first.id])
    answers: list[bool] = []
    bench.scheduler.ended(told_end(bench, bench.runner.started[0], answers))

    def full(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(bench.store, "claim", full)
        with pytest.raises(StoreError, match="full"):
            bench.scheduler.tick()
    assert answers == [False]
    assert bench.store.job(first.id).state is JobState.RUNNING
    locks = GpuLocks(bench.store.state.root / "gpu")
    assert not locks.occupied("GPU-fake-0"), "nobody has got the GPU"
    bench.store.finish_if_active(first.id, epoch=1, state=JobState.COMPLETED)
    wait_until(lambda: bench.started() == [first.id, second.id])


def test_a_loop_tells_its_own_writes_from_those_of_others(bench: Bench) -> None:
    job, store = bench.submit(), bench.store
    store.changed_by_others()
    store.set_held(job.id, True)
    assert not store.changed_by_others()
    thread = threading.Thread(target=store.set_held, args=(job.id, False))
    thread.start()
    thread.join()
    assert store.changed_by_others()
    assert not store.changed_by_others()
    other = Store(store.state)
    other.set_held(job.id, True)
    other.close()
    assert store.changed_by_others()


def test_a_busy_gpu_is_waited_for(bench: Bench, fake: FakeScript) -> None:
    fake.busy()
    job = bench.submit()
    wait_until(lambda: bench.started() == [] and "pid 4242, user user1" in bench.why(job))
    assert "97 % used by python (pid 4242, user user1)" in bench.why(job)
    fake.free()
    wait_until(lambda: bench.started() == [job.id])


def test_higher_priority_first_then_the_older(bench: Bench, fake: FakeScript) -> None:
    fake.busy()
    low, high, also_high = (bench.submit(priority=n) for n in (0, 3, 3))
    wait_until(lambda: bench.started() == [] and bench.reading())
    fake.free()
    order = []
    for _ in range(3):
        wait_until(lambda: len(bench.started()) > len(order))
        claim = bench.runner.started[-1]
        order.append(claim.job.id)
        bench.scheduler.begin(claim)
        bench.scheduler.finish(claim, state=JobState.COMPLETED)
    assert order == [high.id, also_high.id, low.id]


def test_no_reading_starts_nothing(bench: Bench, fake: FakeScript) -> None:
    fake.problem("the driver is gone")
    job = bench.submit()
    wait_until(lambda: bench.started() == [] and "the driver is gone" in bench.why(job))
    fake.problem(None)
    wait_until(lambda: bench.started() == [job.id])


def test_held_drained_and_released(bench: Bench) -> None:
    job = bench.submit(held=True)
    bench.scheduler.tick()
    assert bench.started() == []
    bench.store.set_drained("by a test")
    bench.store.set_held(job.id, False)
    wait_until(lambda: bench.started() == [] and bench.why(job))
    bench.store.set_drained(None)
    wait_until(lambda: bench.started() == [job.id])


def test_one_bad_job_does_not_stop_the_others(bench: Bench) -> None:
    bench.runner.fault = RuntimeError("no shim today")
    bad = bench.submit()
    wait_until(lambda: bench.started() == [] and bench.store.job(bad.id).ended)
    assert bench.store.job(bad.id).error == "could not be started: no shim today"
    bench.runner.fault = None
    good = bench.submit()
    wait_until(lambda: bench.started() == [good.id])


def test_a_write_that_fails_gives_the_gpus_back(
    bench: Bench, fake: FakeScript, monkeypatch: pytest.MonkeyPatch, state: StateDir
) -> None:
    """The claims of a round that cannot be written are undone: their locks too."""

    def full(*_: object) -> None:
        raise StoreError("disk full")

    fake.busy()
    job = bench.submit()
    wait_until(lambda: bench.started() == [] and bench.why(job))
    with monkeypatch.context() as broken:
        broken.setattr(bench.store, "set_reasons", full)
        fake.free()
        with pytest.raises(StoreError, match="disk full"):
            wait_until(bench.started)
    assert bench.store.job(job.id).state is JobState.PENDING
    assert not GpuLocks(state.root / "gpu").occupied("GPU-fake-0")
    wait_until(lambda: bench.started() == [job.id])


def test_one_claim_that_cannot_be_ended_does_not_stop_the_others(
    tmp_path: Path, bench: Bench, fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_shim(_: Claim) -> None:
        monkeypatch.setattr(bench.runner, "start", bench.runner.started.append)
        raise RuntimeError("no shim today")

    def full(*_: object, **__: object) -> None:
        raise StoreError("disk full")

    FakeScript(fake.path, gpus=2)
    jobs = [bench.submit(), bench.submit()]
    monkeypatch.setattr(bench.runner, "start", no_shim)
    monkeypatch.setattr(bench.store, "finish_if_active", full)
    wait_until(lambda: bench.started() == [jobs[1].id])


def test_the_loop_outlives_a_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()

    def fault() -> None:
        if not broken.is_set():
            broken.set()
            raise ZeroDivisionError
        Scheduler.tick(bench.scheduler)

    monkeypatch.setattr(bench.scheduler, "tick", fault)
    bench.scheduler.start()
    wait_until(broken.is_set)
    job = bench.submit()
    wait_until(lambda: [claim.job.id for claim in bench.runner.started] == [job.id])


def test_a_gpu_that_a_leftover_holds_is_not_given(bench: Bench, state: StateDir) -> None:
    locks = GpuLocks(state.root / "gpu")
    fd = locks.try_lock("GPU-fake-0", shared=False)
    assert fd is not None
    job = bench.submit()
    wait_until(lambda: bench.started() == [] and bench.why(job))
    assert bench.store.job(job.id).state is JobState.PENDING
    locks.close([fd])
    wait_until(lambda: bench.started() == [job.id])


def test_another_free_gpu_is_given_where_a_leftover_holds_the_first(
    state: StateDir, settings: Settings, fake: FakeScript
) -> None:
    """A process of an earlier job holds a lock of which neither record nor reading tells."""
    FakeScript(fake.path, gpus=3)
    locks = GpuLocks(state.root / "gpu")
    held = [locks.try_lock(f"GPU-fake-{place}", shared=False) for place in (0, 1)]
    bench = Bench(state, settings)
    first, both = bench.submit(), bench.submit(request=Request(gpus=2))
    wait_until(lambda: bench.started() == [first.id])
    assert bench.runner.started[0].job.gpus == ("GPU-fake-2",)
    wait_until(lambda: bench.started() and bench.why(both))
    assert "3 GPUs taken" in bench.why(both)
    for fd in held:
        assert fd is not None
        locks.close([fd])
    wait_until(lambda: bench.started() == [first.id, both.id])
    assert bench.runner.started[1].job.gpus == ("GPU-fake-0", "GPU-fake-1")
    bench.close()


def test_only_the_owner_is_told_of_a_cancel_and_once(bench: Bench) -> None:
    job = bench.submit()
    wait_until(lambda: bench.started() == [job.id])
    bench.scheduler.begin(bench.runner.started[0])
    bench.store.request_cancel(job.id)
    bench.started()
    bench.started()
    assert bench.runner.cancelled == [job.id]


def test_what_a_dead_shim_leaves_is_ended_though_the_cancel_came_before_it_began(
    bench: Bench, state: StateDir
) -> None:
    job = bench.submit()
    wait_until(lambda: bench.started() == [job.id])
    claim = bench.runner.started[0]
    bench.store.request_cancel(job.id)
    bench.started()
    assert bench.runner.cancelled == [job.id], "its shim may not have heard of it yet"
    assert claim.job.attempt is not None
    log = create_log(state.log(claim.job.attempt))  # held: a process of the job lives on
    shim = Membership(state)
    key = bench.membership.key
    bench.store.take_over(job.id, epoch=claim.job.epoch, claimed_by=key, member=shim.key)
    bench.started()
    assert bench.runner.cancelled == [job.id], "a shim that lives ends it by itself"
    shim.leave()
    bench.started()
    bench.started()
    assert bench.runner.cancelled == [job.id, job.id]
    os.close(log)


def test_two_starts_in_a_row_never_share_a_card_by_accident(
    state: StateDir, fake: FakeScript, settings: Settings
) -> None:
    """Before the first job shows any memory, its booking keeps the second one off."""
    bench = Bench(state, settings)
    shared = Request(mem_bytes=25 * 2**30)
    one, two = bench.submit(request=shared), bench.submit(request=shared)
    wait_until(lambda: bench.started() == [one.id])
    assert bench.started() == [one.id]
    bench.store.request_cancel(two.id)
    small = bench.submit(request=Request(mem_bytes=8 * 2**30))
    wait_until(lambda: bench.started() == [one.id, small.id])
    bench.close()


def test_a_desktop_does_not_count(bench: Bench, fake: FakeScript) -> None:
    viewer = {"pid": 77, "user": "user1", "name": "Xorg", "memory": "150MiB", "kind": "graphics"}
    fake.change(processes=[viewer], memory_used="150MiB", utilization=0.04)
    job = bench.submit()
    wait_until(lambda: bench.started() == [job.id])


def test_with_sampling_off_leases_alone_decide(
    state: StateDir, fake: FakeScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUSCHED_SAMPLING", "false")
    fake.busy()
    bench = Bench(state, Settings.load())
    first, second = bench.submit(), bench.submit()
    wait_until(lambda: bench.started() == [first.id])
    assert bench.store.job(second.id).state is JobState.PENDING
    bench.close()


def test_a_kernel_that_takes_no_offer_keeps_the_gpu_from_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Membership(bench.store.state)  # alive, idle, and never claims its cell
    bench.store.join(stopped.key, "kernel", "notebook stopped.ipynb")
    bench.submit(kind=JobKind.CELL, argv=None, home=stopped.key, priority=9, code="1")
    job = bench.submit()
    wait_until(lambda: bench.started() == [] and bench.why(job))
    monkeypatch.setattr("gpusched_ipy.offers.PATIENCE_S", 0.2)
    wait_until(lambda: bench.started() == [job.id])
    stopped.leave()


class Stranger(FakeBackend):
    """A GPU that somebody takes at a moment of his own; it notes when each reading was busy."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(None, clock)
        self.taken = False
        self.readings: list[tuple[float, bool]] = []

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        busy = self.taken
        self.script({"gpus": [BUSY if busy else IDLE]})
        snapshot = super().read(detail)
        self.readings.append((snapshot.taken_mono, busy))
        return snapshot


IDLE = {
    "uuid": "GPU-0",
    "memory_total": "40GiB",
    "memory_used": 0,
    "utilization": 0,
    "processes": [],
}
BUSY = {
    **IDLE,
    "memory_used": "30GiB",
    "utilization": 0.99,
    "processes": [{"pid": 4242, "user": "user1", "name": "python", "memory": "30GiB"}],
}


def test_a_stranger_around_our_dispatch(state: StateDir, settings: Settings) -> None:
    """1,000 trials or more: a job is never started on a reading that showed the stranger."""
    backend = Stranger(SystemClock())
    bench = Bench(state, settings, choose=lambda _settings, _clock: Detected(backend, ()))
    starts = refusals = 0
    for seed in itertools.count():
        if seed >= 1000 and min(starts, refusals) > 50:
            break
        assert seed < 10_000, f"{starts} starts, {refusals} refusals: both must happen often"
        dice = random.Random(seed)
        backend.taken = False
        bench.monitor.read_now()
        bench.submit()
        comes = threading.Timer(dice.uniform(0, 0.004), setattr, (backend, "taken", True))
        backend.readings.clear()
        comes.start()
        for _ in range(dice.randint(1, 3)):
            bench.scheduler.tick()
        comes.join()
        for claim in bench.runner.started:
            # The last reading before the start is the one that was taken under the lock.
            assert claim.gpus[0].utilization == 0, f"seed {seed}: started on a busy card"
            starts += 1
        refusals += not bench.runner.started
        _clear(bench)
    bench.close()


class Tenant(FakeBackend):
    """A GPU that shows a real process for as long as that lives, as a driver does."""

    def __init__(self, clock: Clock, tenant: subprocess.Popen[bytes]) -> None:
        super().__init__(None, clock)
        self.tenant = tenant

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        lives = self.tenant.poll() is None
        process = {"pid": self.tenant.pid, "memory": "30GiB"}
        self.script({"gpus": [{**BUSY, "processes": [process]} if lives else IDLE]})
        return replace(super().read(detail), backend="driver")  # pids of the fake need not exist


class Lingering(Tenant):
    """The driver shows the tenant for some more readings after his end."""

    left = 4

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        if self.tenant.poll() is not None and self.left:
            self.left -= 1
            process = {"pid": self.tenant.pid, "memory": "30GiB"}
            self.script({"gpus": [{**BUSY, "processes": [process]}]})
            return replace(super(Tenant, self).read(detail), backend="driver")
        return super().read(detail)


@pytest.mark.parametrize("kind", [Tenant, Lingering])
def test_the_end_of_a_stranger_is_not_left_to_the_next_reading(
    kind: type[Tenant], state: StateDir, settings: Settings
) -> None:
    tenant = subprocess.Popen(["sleep", "600"])
    backend = kind(SystemClock(), tenant)
    seldom = replace(settings, sample_interval_s=3600.0)
    bench = Bench(state, seldom, choose=lambda _settings, _clock: Detected(backend, ()))
    try:
        job = bench.submit()
        bench.scheduler.start()
        wait_until(lambda: f"pid {tenant.pid}" in bench.why(job))
        tenant.kill()
        wait_until(lambda: [claim.job.id for claim in bench.runner.started] == [job.id])
    finally:
        tenant.kill()
        tenant.wait()
        bench.close()


def test_what_never_starts_leaves_no_variables_behind(bench: Bench) -> None:
    first = bench.submit()
    after = bench.submit(request=Request(after=(first.id,)), env_names=("TOKEN",))
    environment.keep(bench.store.state, after.spec.uid, {"TOKEN": "s3cret"})
    assert bench.store.state.environment(after.spec.uid).exists()
    bench.store.request_cancel(first.id)
    bench.scheduler.tick()
    assert bench.store.job(after.id).state is JobState.CANCELLED
    assert not bench.store.state.environment(after.spec.uid).exists()


def _clear(bench: Bench) -> None:
    for claim in bench.runner.started:
        bench.scheduler.begin(claim)
        bench.scheduler.finish(claim, state=JobState.COMPLETED)
    bench.runner.started.clear()
    for job in bench.store.jobs():
        bench.store.request_cancel(job.id)
    bench.scheduler.tick()


MEMBER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_scheduler import Bench
from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobState
from gpusched_ipy.statedir import open_state_dir
import fcntl, os
settings = Settings.load()
bench = Bench(open_state_dir(settings), settings)
sys.stdin.readline()
for _ in range(10):
    bench.submit()
done = 0
while any(not job.ended for job in bench.store.jobs()):
    bench.scheduler.tick()
    for claim in bench.runner.started:
        witness = os.open(sys.argv[1] + claim.job.gpus[0], os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(witness, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("GIVEN TWICE", claim.job.gpus, flush=True)
        assert bench.scheduler.begin(claim) is not None
        done += 1
        os.close(witness)
        bench.scheduler.finish(claim, state=JobState.COMPLETED)
    bench.runner.started.clear()
print("done", done, flush=True)
bench.close()
"""


def test_members_that_start_in_the_same_second(
    tmp_path: Path, fake: FakeScript, state_dir: Path
) -> None:
    """Three processes open one state directory at once; an outside witness sees who has the GPU."""
    import subprocess
    import sys

    here = str(Path(__file__).parent)
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(tmp_path / "witness-"), here],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for member in members:
        assert member.stdin is not None
        member.stdin.write("go\n")
        member.stdin.flush()
    outputs = [member.communicate(timeout=250) for member in members]
    assert [member.returncode for member in members] == [0, 0, 0], outputs
    assert not any("GIVEN TWICE" in out for out, _ in outputs)
    assert sum(int(out.split()[-1]) for out, _ in outputs) == 30


def test_the_loop_runs_by_itself_and_ends(bench: Bench, fake: FakeScript) -> None:
    before = set(threading.enumerate())
    bench.scheduler.start()
    bench.scheduler.start()
    job = bench.submit()
    wait_until(lambda: [claim.job.id for claim in bench.runner.started] == [job.id])
    new = set(threading.enumerate()) - before
    loops = [thread for thread in new if thread.name == "gpusched-loop"]
    assert len(loops) == 1
    bench.scheduler.stop()
    assert not loops[0].is_alive()


def test_the_end_of_a_process_is_told_once() -> None:
    watch = ExitWatch()
    child = subprocess.Popen(["sleep", "0.05"])
    try:
        watch.watch([child.pid, os.getpid()])
        waiting = select.poll()
        for fd in watch.fds:
            waiting.register(fd, select.POLLIN)
        (ready,) = waiting.poll(30_000)
        assert watch.told([ready[0]]) == {child.pid}
        watch.watch([child.pid, os.getpid()])  # the record may still name it
        assert ready[0] not in watch.fds
        assert len(watch.fds) == 1
    finally:
        child.wait()
        watch.close()
    assert watch.fds == ()
