"""The record: moves along the table, fencing, idempotence, damage, and replay of the events."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.errors import InvalidTransitionError, JobNotFoundError, StoreError, UserError
from gpusched_ipy.job import (
    FINAL,
    TRANSITIONS,
    ArrayPlace,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Request,
    WaitCode,
    WaitReason,
    effective_priority,
)
from gpusched_ipy.naming import resolve
from gpusched_ipy.rows import parse_spec, spec_text
from gpusched_ipy.statedir import StateDir, open_state_dir
from gpusched_ipy.store import Store


class FakeClock:
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.mono, self.wall = 1000.0, 1.7e9

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=self.wall)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return open_state_dir(Settings.load({"state_dir": str(tmp_path / "state")}, environ={}))


@pytest.fixture
def store(state: StateDir, clock: FakeClock):
    found = Store(state, clock)
    yield found
    found.close()


def spec(uid: str = "u1", **values: object) -> JobSpec:
    fields = {"uid": uid, "kind": JobKind.COMMAND, "name": "job", "argv": ("true",)}
    return JobSpec(**{**fields, **values})


def run(store: Store, job: Job) -> Job:
    claimed = store.claim(job, ("GPU-0",), member="m")
    running = store.take_over(job.id, epoch=claimed.epoch, claimed_by="m", member="shim")
    assert running is not None
    return running


def test_a_spec_comes_back_as_it_went() -> None:
    given = spec(
        request=Request(gpus=2, mem_bytes=5, after=(1, 2), begin_at=3.5),
        env={"PATH": "/bin"}, labels={"a": "b"}, cwd="/", owner="terminal",
    )  # fmt: skip
    assert parse_spec(spec_text(given)) == given


def test_submitting_twice_is_one_job(store: Store) -> None:
    first = store.submit(spec())
    assert store.submit(spec()) == first
    assert len(store.jobs()) == 1


def test_a_whole_life(store: Store, clock: FakeClock) -> None:
    job = store.submit(spec())
    claimed = store.claim(job, ("GPU-0", "GPU-1"), member="m")
    assert (claimed.state, claimed.epoch, claimed.gpus) == ("starting", 1, ("GPU-0", "GPU-1"))
    assert [lease.gpu for lease in store.leases()] == ["GPU-0", "GPU-1"]
    running = store.take_over(job.id, epoch=1, claimed_by="m", member="shim")
    assert running is not None
    clock.mono += 5
    clock.wall -= 86400  # the wall clock is set back a day: run time does not care
    ended = store.finish_if_active(job.id, epoch=1, state=JobState.FAILED, exit_code=3)
    assert ended is not None
    assert (ended.state, ended.exit_code, ended.run_s) == ("failed", 3, 5.0)
    assert store.leases() == []
    assert store.job(job.id) == ended


def test_a_stale_claim_is_fenced(store: Store) -> None:
    job = store.submit(spec())
    first = store.claim(job, ("GPU-0",), member="m")
    store.unclaim(first, "its member died")
    second = store.claim(store.job(job.id), ("GPU-0",), member="n")
    assert store.take_over(job.id, epoch=first.epoch, claimed_by="m", member="late") is None
    assert store.finish_if_active(job.id, epoch=first.epoch, state=JobState.COMPLETED) is None
    assert store.take_over(job.id, epoch=second.epoch, claimed_by="n", member="shim") is not None


def test_a_result_never_changes(store: Store) -> None:
    job = run(store, store.submit(spec()))
    store.finish_if_active(job.id, epoch=job.epoch, state=JobState.COMPLETED, exit_code=0)
    assert store.finish_if_active(job.id, epoch=job.epoch, state=JobState.LOST) is None
    assert store.request_cancel(job.id).state is JobState.COMPLETED


def test_only_the_moves_of_the_table(store: Store) -> None:
    job = run(store, store.submit(spec()))
    with pytest.raises(InvalidTransitionError, match="from running to starting"):
        store.claim(job, ("GPU-1",), member="m")
    assert store.job(job.id).state is JobState.RUNNING


def test_cancel_is_at_once_or_a_wish(store: Store) -> None:
    waiting, running = store.submit(spec("a")), store.submit(spec("b"))
    assert store.request_cancel(waiting.id).state is JobState.CANCELLED
    run(store, running)
    wish = store.request_cancel(running.id)
    assert (wish.state, wish.cancel_requested) == ("running", True)


def test_what_is_to_be_cancelled_does_not_go_back_to_the_line(store: Store) -> None:
    claimed = store.claim(store.submit(spec("a")), ("GPU-0",), member="m")
    running = run(store, store.submit(spec("b")))
    for job in (claimed, running):
        store.request_cancel(job.id)
        assert store.unclaim(job, "its member died").state is JobState.CANCELLED
        assert store.job(job.id).error == "its member died"
    assert store.leases() == []


def test_only_what_has_ended_can_be_requeued(store: Store) -> None:
    """Two users requeue the same job: for the second it is pending, or even running, by then."""
    job = run(store, store.submit(spec()))
    with pytest.raises(UserError, match="is running; only an ended job"):
        store.requeue(job)
    ended = store.finish_if_active(job.id, epoch=job.epoch, state=JobState.FAILED)
    assert ended is not None
    store.claim(store.requeue(ended), ("GPU-0",), member="m")
    with pytest.raises(UserError, match="is starting; only an ended job"):
        store.requeue(ended)


def test_hold_and_priority_know_when_it_is_too_late(store: Store) -> None:
    job = store.submit(spec())
    assert store.set_held(job.id, True).held
    assert store.set_priority(job.id, 7).priority == 7
    running = run(store, store.set_held(job.id, False))
    with pytest.raises(UserError, match="only a pending job can be held"):
        store.set_held(job.id, True)
    store.finish_if_active(job.id, epoch=running.epoch, state=JobState.COMPLETED)
    with pytest.raises(UserError, match="cannot change any more"):
        store.set_priority(job.id, 1)


def test_unknown_job(store: Store) -> None:
    with pytest.raises(JobNotFoundError, match="there is no job 99"):
        store.job(99)
    with pytest.raises(JobNotFoundError, match=f"there is no job {10**20}"):
        store.job(10**20)


def test_a_range_costs_what_there_is_of_it(store: Store) -> None:
    """However far it reaches: a digit too many is soon typed."""
    ids = [store.submit(spec(f"u{number}")).id for number in range(3)]
    assert resolve(store, ["1-3000000000", f"2-{10**20}"]) == tuple(ids)
    for nobody in ("4-3000000000", "3-1", f"{10**20}-{10**21}"):
        with pytest.raises(JobNotFoundError, match=f"there is no job {nobody}"):
            resolve(store, [nobody])


def test_reasons_keep_since_while_the_code_stays(store: Store, clock: FakeClock) -> None:
    job = store.submit(spec())
    for text, code, since in [
        ("97 %", "gpu_busy", 0),
        ("96 %", "gpu_busy", 0),
        ("held", "held", 20),
    ]:
        store.set_reasons({job.id: WaitReason(code=WaitCode(code), text=text)})
        found = store.job(job.id)
        assert found.reason == WaitReason(code=WaitCode(code), text=text)
        assert found.reason_since == 1.7e9 + since
        clock.wall += 10
    assert run(store, job).reason is None
    assert store.job(job.id).reason is None


def test_what_is_new_since(store: Store) -> None:
    one = store.submit(spec("a"))
    rev, found = store.changed_since(None)
    assert found == [one]
    assert store.changed_since(rev) == (rev, [])
    two = store.submit(spec("b"))
    store.set_priority(one.id, 4)
    newer, found = store.changed_since(rev)
    assert newer > rev
    assert [job.id for job in found] == [one.id, two.id]


def test_names_and_patterns(store: Store) -> None:
    ids = [store.submit(spec(f"u{name}", name=name)).id for name in ("prep", "prep[1]", "train")]
    assert [job.id for job in store.named("prep*")] == ids[:2]
    assert [job.id for job in store.named("prep[1]")] == [ids[1]]


def test_the_id_of_a_sweep_may_be_digits_alone(store: Store) -> None:
    places = [ArrayPlace(id=name, index=0, size=1) for name in ("421783e0", "2ab", "ff")]
    jobs = store.submit_all([spec(str(place), array=place) for place in places])
    alone = store.submit(spec("alone"))
    assert resolve(store, ["array:421783"]) == (jobs[0].id,)
    assert resolve(store, ["array:2"]) == (jobs[1].id,), "the number of a member comes first"
    with pytest.raises(UserError, match=f"job {alone.id} is no member of a sweep"):
        resolve(store, [f"array:{alone.id}"])
    with pytest.raises(JobNotFoundError):
        resolve(store, ["array:5"])


def test_times_of_another_boot_are_estimated(
    store: Store, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.submit(spec())
    monkeypatch.setattr("gpusched_ipy.lookup.boot_id", lambda: "the next boot")
    clock.mono, clock.wall = 10.0, clock.wall + 60
    assert store.job(job.id).queued_mono == 10.0 - 60


def test_the_line_is_that_of_the_policy(store: Store, state: StateDir, clock: FakeClock) -> None:
    """By priority and by how long a job waits: since its last requeue, whatever the boot."""
    jobs = []
    for number in range(3):
        clock.mono, clock.wall = clock.mono + 10, clock.wall + 10
        jobs.append(store.submit(spec(f"u{number}")))
    first, second, third = (job.id for job in jobs)
    assert store.line(600.0) == [first, second, third]
    store.request_cancel(first)
    clock.mono, clock.wall = clock.mono + 10, clock.wall + 10
    store.requeue(store.job(first))
    assert store.line(600.0) == [second, third, first]
    assert [job.id for job in store.page(1, 2, 600.0)] == [third, first]
    order = sorted(store.jobs(), key=lambda job: -effective_priority(job, 600.0, clock.mono))
    assert [job.id for job in order] == store.line(600.0)
    with sqlite3.connect(state.database) as db:  # it was requeued before a restart of the machine
        db.execute("UPDATE jobs SET boot = 'another', queued_mono = 9e9 WHERE id = ?", (third,))
    db.close()
    assert store.line(600.0) == [second, third, first]


def test_a_thread_that_reads_never_stops_one_that_writes(store: Store, state: StateDir) -> None:
    """A statement half read would keep an old snapshot: "database is locked", at once."""
    for number in range(50):
        store.submit(spec(f"u{number}"))
    other = Store(state)  # another process, as far as the record can tell
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            store.jobs()

    def write() -> None:
        while not over.is_set():
            other.set_priority(1, 1)

    threads = [threading.Thread(target=read), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            store.set_priority(2, number % 9)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        other.close()


def test_a_failed_write_changes_nothing(store: Store) -> None:
    job = store.submit(spec())

    def half_done() -> None:
        with store.writing():
            store.set_priority(job.id, 5)
            store.submit(spec("other"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_done()
    assert store.job(job.id).priority == 0
    assert len(store.jobs()) == 1


def test_a_bit_that_flipped_is_noticed(store: Store, state: StateDir) -> None:
    job = store.submit(spec(name="good"))
    with sqlite3.connect(state.database) as db:
        db.execute("UPDATE jobs SET name = 'gooe'")
    db.close()
    with pytest.raises(StoreError, match=f"job {job.id} is damaged"):
        store.job(job.id)


def test_a_newer_schema_is_left_alone(store: Store, state: StateDir) -> None:
    with sqlite3.connect(state.database) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    older = Store(state)
    with pytest.raises(StoreError, match="newer gpusched_ipy"):
        older.submit(spec())
    older.close()


def test_a_file_that_is_no_record(state: StateDir) -> None:
    state.database.write_bytes(b"not a database, but long enough to look like one" * 100)
    state.database.chmod(0o600)
    with pytest.raises(StoreError, match="damaged"):
        Store(state)


def test_too_large_a_cell_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="at most 65536 are taken"):
        store.submit(spec(code="x" * 70_000))
    assert store.jobs() == []


def test_threads_and_forks_may_use_it(store: Store) -> None:
    threads = [
        threading.Thread(target=store.submit, args=(spec(f"t{n}", name=f"t{n}"),)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(_submit_in_child(store, 0), 0)[1] == 0
    store.submit(spec("from the parent"))
    assert len(store.jobs()) == 10


def test_forks_in_the_middle_of_writes_may_use_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads of the parent write and read all the time; none of them is in the child."""
    monkeypatch.setattr("gpusched_ipy.forks._WAIT_S", 60.0)  # however slow the disk is
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            store.set_priority(1, 3)

    def read() -> None:
        while not over.is_set():
            store.jobs()

    store.submit(spec())
    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    try:
        statuses = [os.waitpid(_submit_in_child(store, number), 0)[1] for number in range(20)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert statuses == [0] * 20
    assert len(store.jobs()) == 21


def test_the_child_of_a_torn_fork_says_so(
    store: Store, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that hangs must not hang the fork, nor must what it had hang the child."""
    monkeypatch.setattr("gpusched_ipy.forks._WAIT_S", 0.05)
    inside, over = threading.Event(), threading.Event()

    def hang() -> None:
        with store.writing():
            inside.set()
            over.wait()

    thread = threading.Thread(target=hang)
    thread.start()
    assert inside.wait(60)
    try:
        told = [_told_in_child(use) for use in (store.jobs, lambda: Store(state))]
    finally:
        over.set()
        thread.join()
    assert all("forked during a write" in text for text in told), told
    assert _told_in_child(store.jobs) == "", "the next fork is whole again"


def _told_in_child(use: Callable[[], object]) -> str:
    """What a forked child gets to hear where it uses the record."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            use()
        except StoreError as exc:
            os.write(write, str(exc).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8") as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


def _submit_in_child(store: Store, number: int) -> int:
    child = os.fork()
    if child == 0:
        # A child that waits for ever is a failure, not a hang, even if Python does not run again.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            store.submit(spec(f"child {number}"))
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_a_bell_that_is_gone_undoes_nothing(store: Store, state: StateDir) -> None:
    state.bell.unlink()
    assert store.job(store.submit(spec()).id).state is JobState.PENDING


@pytest.mark.parametrize("seed", range(30))
def test_the_events_of_a_job_replay_to_its_state(store: Store, seed: int) -> None:
    dice = random.Random(seed)
    job = store.submit(spec(held=dice.random() < 0.3))
    for _ in range(12):
        _step(store, store.job(job.id), dice)
    state = JobState.PENDING
    for event in store.events(job.id):
        moved = JobState(event.data.get("state", state))
        assert moved == state or moved in TRANSITIONS[state], event
        state = moved
    assert state == store.job(job.id).state


def _step(store: Store, job: Job, dice: random.Random) -> None:
    """One thing that may happen to the job as it stands."""
    if job.state is JobState.PENDING:
        dice.choice(
            [
                lambda: store.claim(job, ("GPU-0",), member="m"),
                lambda: store.set_held(job.id, dice.random() < 0.5),
                lambda: store.set_priority(job.id, dice.randint(-5, 5)),
                lambda: store.request_cancel(job.id),
            ]
        )()
    elif job.state is JobState.STARTING:
        dice.choice(
            [
                lambda: store.unclaim(job, "died"),
                lambda: store.take_over(job.id, epoch=job.epoch, claimed_by="m", member="s"),
            ]
        )()
    elif job.state is JobState.RUNNING:
        state = dice.choice(sorted(FINAL))
        store.finish_if_active(job.id, epoch=job.epoch, state=state)
    else:
        store.requeue(job)


def test_a_replaced_job_is_still_the_same_row(store: Store) -> None:
    job = store.submit(spec())
    assert replace(job, priority=3) != store.job(job.id)


def test_a_checkpoint_moves_what_was_written_into_the_file(store: Store, tmp_path: Path) -> None:
    """Without it every few writes one does so while somebody waits for it."""
    job = store.submit(spec(name="moved"))
    store.checkpoint()
    alone = tmp_path / "without its log.db"
    shutil.copyfile(store.state.database, alone)
    with closing(sqlite3.connect(alone)) as db:
        assert db.execute("SELECT name FROM jobs WHERE id = ?", (job.id,)).fetchone() == ("moved",)


def test_who_writes_quietly_rings_later(store: Store) -> None:
    before = store.state.bell.stat().st_mtime_ns
    with store.writing(rings=False):
        store.submit(spec())
    assert store.state.bell.stat().st_mtime_ns == before
    store.ring()
    assert store.state.bell.stat().st_mtime_ns > before


def test_only_what_must_outlive_a_power_cut_waits_for_the_disk(store: Store) -> None:
    def level() -> int:
        return int(store._db.execute("PRAGMA synchronous").fetchone()[0])

    full, normal = 2, 1
    with store.writing(durable=False):
        assert level() == normal
        with store.writing():  # it joins, and may not ask for more than the outer one
            assert level() == normal
    store.sync()
    with store.writing():
        assert level() == full
