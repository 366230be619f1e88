"""Bad disks: full, damaged, read-only, of another host. Nothing passes as an empty queue."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy import dbfile, statedir
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StateDirError, StoreError, UserError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.repair import faults, repair
from gpusched_ipy.statedir import StateDir, network_file_system, open_state_dir
from gpusched_ipy.store import Store


def spec(uid: str, **values: object) -> JobSpec:
    fields = {"uid": uid, "kind": JobKind.COMMAND, "name": uid, "argv": ("true",)}
    return JobSpec(**{**fields, **values})


def opened() -> StateDir:
    return open_state_dir(Settings.load())


def gpusched(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 2 MiB that holds the queue."""
    root = tmp_path / "disk"
    root.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(root)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(root / "state"))
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError:
                continue
    assert os.statvfs(disk).f_bavail == 0
    return filler


def claimed(store: Store, job: Job) -> Job:
    """Running, as its shim has it."""
    starting = store.claim(job, (f"GPU-{job.id}",), member="m")
    running = store.take_over(job.id, epoch=starting.epoch, claimed_by="m", member="shim")
    assert running is not None
    return running


def test_on_a_full_disk_jobs_end_and_none_is_taken(small_disk: Path) -> None:
    store = Store(opened())
    jobs = [store.submit(spec(f"u{number}")) for number in range(120)]
    running = [claimed(store, job) for job in jobs[:60]]
    filler = fill(small_disk)
    with pytest.raises(StoreError, match=r"was not queued: the disk .* is full"):
        store.submit(spec("one more"))
    for job in running[:30]:
        ended = store.finish_if_active(job.id, epoch=job.epoch, state=JobState.COMPLETED)
        assert ended is not None
    for job in running[30:]:
        assert store.request_cancel(job.id).cancel_requested
        store.finish_if_active(job.id, epoch=job.epoch, state=JobState.CANCELLED)
    for job in jobs[60:]:
        assert store.request_cancel(job.id).state is JobState.CANCELLED
    assert store.jobs() == []
    store.close()
    again = Store(opened())
    assert len(again.jobs(ended=True)) == 120
    filler.unlink()
    again.submit(spec("one more"))
    again.close()


def test_an_end_that_cannot_be_recorded_gives_its_gpu_on_and_is_recorded_later(
    small_disk: Path, fake: FakeScript
) -> None:
    """Nothing at all can be written: the end of a cell is owed, not forgotten."""
    from test_scheduler import Bench

    settings = Settings.load()
    bench = Bench(open_state_dir(settings), settings)
    job, back = bench.submit(), bench.submit()
    FakeScript(fake.path, gpus=2)
    wait_until(lambda: bench.started() == [job.id, back.id])
    ends, returns = bench.runner.started
    bench.scheduler.begin(ends)
    filler = fill(small_disk)
    with pytest.raises(StoreError):  # noqa: PT012 - until the reserve is used up
        for _ in range(100):
            bench.store.set_drained("z" * 100_000)
    with pytest.raises(StoreError):
        bench.scheduler.finish(ends, state=JobState.FAILED, error="its own " + "x" * 700_000)
    with pytest.raises(StoreError):
        bench.scheduler.give_back(returns, "y" * 700_000)
    assert [bench.store.job(one.id).state for one in (job, back)] == ["running", "starting"]
    for gpu in (*ends.job.gpus, *returns.job.gpus):
        assert not bench.scheduler._gpu_locks.occupied(gpu)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    bench.runner.is_ready = False
    wait_until(lambda: bench.started() and bench.store.job(back.id).state == "pending")
    ended = bench.store.job(job.id)
    assert (ended.state, (ended.error or "")[:7]) == ("failed", "its own")
    assert bench.store.leases() == []
    bench.close()


def test_the_log_of_writes_stays_within_its_reserve(tmp_path: Path) -> None:
    store = Store(opened())
    job = store.submit(spec("u"))
    for number in range(300):
        store.set_priority(job.id, number)
    size = store.state.database.with_name("queue.db-wal").stat().st_size
    assert dbfile.RESERVE_BYTES <= size < 2 * dbfile.RESERVE_BYTES
    store.close()


def test_a_submit_with_variables_on_a_full_disk_leaves_nothing(
    small_disk: Path, fake: FakeScript
) -> None:
    queue = Queue(Settings.load())
    queue.submit(["true"], hold=True)
    filler = fill(small_disk)
    with pytest.raises(UserError) as caught:
        queue.submit(["true"], hold=True, env=[f"A={'x' * 100_000}"])
    assert "\n" not in str(caught.value)
    assert not list((queue.state.root / "env").iterdir())
    done = gpusched("submit", "--", "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "full" in done.stderr
    filler.unlink()
    queue.cancel("*")
    queue.store.close()


def test_a_job_that_fills_the_disk_is_recorded_all_the_same(
    small_disk: Path, fake: FakeScript
) -> None:
    """The real agent and shim, on the disk that their job fills."""
    queue = Queue(Settings.load())
    code = (
        f"import sys\nf = open({str(small_disk / 'data')!r}, 'wb', buffering=0)\n"
        "try:\n  while True: f.write(b'x' * 4096)\n"
        "except OSError: sys.exit(5)"
    )
    job = queue.submit([sys.executable, "-c", code])
    (end,) = queue.wait(job.id, timeout=60)
    assert (end.state, end.exit_code) == (JobState.FAILED, 5)
    wait_until(lambda: not queue.store.leases())
    (small_disk / "data").unlink()
    (after,) = queue.wait(queue.submit(["true"]).id, timeout=60)
    assert after.state is JobState.COMPLETED
    _end(queue)


def _end(queue: Queue) -> None:
    from gpusched_ipy.agent import ask_to_leave, running_agent

    pid = running_agent(queue.state, queue.store)
    if pid is not None:
        ask_to_leave(pid, queue.state)
    queue.store.close()


# Damage


@pytest.fixture
def record() -> StateDir:
    """A record with 60 jobs: ended, running, waiting."""
    state = opened()
    store = Store(state)
    jobs = [store.submit(spec(f"job{number}")) for number in range(60)]
    for job in jobs[:40]:
        running = claimed(store, job)
        if job.id <= 30:
            store.finish_if_active(job.id, epoch=running.epoch, state=JobState.COMPLETED)
    store.close()
    return state


def readable(state: StateDir) -> dict[int, tuple[str, str]]:
    """Every job as a member of the next boot finds it: it checks the file first."""
    return looked_at(state)[0]


def looked_at(state: StateDir) -> tuple[dict[int, tuple[str, str]], tuple[int, ...]]:
    """:func:`readable`, and the jobs that it names as damaged."""
    store = Store(state)
    try:
        jobs = {job.id: (job.name, str(job.state)) for job in store.jobs(ended=True)}
        return jobs, store.damaged
    finally:
        store.close()


def another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbfile, "boot_id", lambda: "the next boot")


def damage(path: Path, how: str, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[dice.randrange(1, len(data)) :]
    elif how == "emptied":
        data.clear()
    elif how == "zeroed page":
        at = dice.randrange(len(data) // 4096) * 4096
        data[at : at + 4096] = bytes(4096)
    elif how == "garbled page":
        at = dice.randrange(len(data) // 4096) * 4096
        data[at : at + 4096] = dice.randbytes(4096)
    else:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "emptied", "zeroed page", "garbled page", "bit"])
@pytest.mark.parametrize("seed", range(12))
def test_damage_is_noticed_and_sound_jobs_are_saved(
    record: StateDir, monkeypatch: pytest.MonkeyPatch, how: str, seed: int
) -> None:
    """Each job is found as it was, or the damage is said; a repair saves what is sound."""
    dice = random.Random(f"{how} {seed}")
    before = readable(record)
    damage(record.database, how, dice)
    damaged = record.database.read_bytes()
    another_boot(monkeypatch)
    try:
        found, named = looked_at(record)
    except StoreError as exc:
        said = str(exc)
    else:
        said = ""
        sound = {number: job for number, job in before.items() if number not in named}
        assert found == sound, "what is read without a word must be what was written"
    if said:
        assert "damaged" in said
        assert "doctor --fix" in said
        assert "\n" not in said
        assert record.database.read_bytes() == damaged, "looking must not change it"
    done = repair(record)
    after = readable(record)
    assert {number: after[number] for number in after} == {
        number: before[number] for number in after
    }
    assert len(after) == (done.saved if done.wrong else len(before))
    if done.wrong:
        assert done.kept is not None
        assert done.kept.exists()
        assert ".corrupt-" in done.kept.name
        store = Store(record)
        assert "repaired" in (store.drained or "")
        assert store.submit(spec("new")).id > max(before if done.saved else [0])
        store.close()
    assert faults(record) == []


def test_a_bit_flipped_in_a_job_costs_that_job_alone(record: StateDir) -> None:
    import sqlite3

    with sqlite3.connect(record.database) as db:
        db.execute("UPDATE jobs SET name = 'jobX' WHERE id = 7")
    db.close()
    done = repair(record)
    assert (done.saved, done.damaged) == (59, (7,))
    store = Store(record)
    assert [lease.job_id for lease in store.leases()] == list(range(31, 41))
    assert [event.what for event in store.events(1)] == ["submitted", "claimed", "started", "ended"]
    store.close()


def test_a_repair_waits_for_members(record: StateDir) -> None:
    from gpusched_ipy.locks import Membership

    damage(record.database, "emptied", random.Random(1))
    membership = Membership(record)
    with pytest.raises(UserError, match=f"pids {os.getpid()}"):
        repair(record)
    membership.leave()
    assert repair(record).wrong


def test_doctor_fix_in_the_terminal(record: StateDir) -> None:
    sound = gpusched("doctor", "--fix")
    assert sound.stdout == "the record is sound; nothing was changed\n"
    damage(record.database, "emptied", random.Random(1))
    refused = gpusched("list")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    fixed = gpusched("doctor", "--fix")
    assert fixed.returncode == 0, fixed.stderr
    assert "queue.db.corrupt-" in fixed.stdout
    assert "drained" in gpusched("list").stderr


def test_a_damaged_log_of_writes_is_no_empty_queue(record: StateDir) -> None:
    store = Store(record)
    store.submit(spec("newest"))
    copy = record.root.parent / "copy"
    shutil.copytree(record.root, copy)  # as a power cut leaves it: nobody has closed it
    store.close()
    (copy / "queue.db-shm").unlink()
    log = copy / "queue.db-wal"
    log.write_bytes(bytes(len(log.read_bytes())))
    assert len(readable(StateDir(copy))) >= 59


# Read-only, and of another host


def test_a_read_only_disk_is_one_clear_line(small_disk: Path) -> None:
    store = Store(opened())
    store.submit(spec("u"))
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StateDirError, match="read-only file system"):
        opened()
    done = gpusched("list")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


MOUNTS = """\
22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:30 / /home rw - nfs4 server:/home rw
31 30 0:31 / /home/my\\040self/local rw - ext4 /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "found"),
    [("/var/tmp/x", None), ("/home", "nfs4"), ("/home/u/.local", "nfs4"), ("/homes", None),
     ("/home/my self/local/x", None)],
)  # fmt: skip
def test_the_file_system_of_a_path(
    monkeypatch: pytest.MonkeyPatch, path: str, found: str | None
) -> None:
    monkeypatch.setattr(statedir, "_mounts", lambda: MOUNTS.splitlines())
    assert network_file_system(Path(path)) == found


def test_a_home_of_another_host_is_left_for_a_local_folder_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeScript
) -> None:
    home = tmp_path / "home"
    monkeypatch.delenv("GPUSCHED_STATE_DIR")
    monkeypatch.setattr(statedir, "LOCAL", tmp_path / "var" / "tmp")
    monkeypatch.setattr(statedir, "_mounts", lambda: [f"1 0 0:1 / {home} rw - nfs4 server:/ rw"])
    with pytest.warns(UserWarning, match="network file system") as told:
        queue = Queue(Settings.load())
    assert len(told) == 1
    assert queue.state.root.is_relative_to(tmp_path / "var" / "tmp")
    assert queue.state.root.parent.stat().st_mode & 0o777 == 0o700
    queue.store.close()
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(home / "state"))
    with pytest.raises(StateDirError, match="network file system"):
        Queue(Settings.load())


def test_the_local_folder_is_not_one_that_a_stranger_has_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("must give a folder away: needs root")
    monkeypatch.delenv("GPUSCHED_STATE_DIR")
    local = tmp_path / "tmp"
    monkeypatch.setattr(statedir, "LOCAL", local)
    monkeypatch.setattr(statedir, "_mounts", lambda: ["1 0 0:1 / / rw - nfs4 server:/ rw"])
    planted = local / f"gpusched-{os.geteuid()}"
    planted.mkdir(parents=True)
    os.chown(planted, 4001, 4001)
    with pytest.raises(StateDirError, match="not a folder of yours"):
        open_state_dir(Settings.load())


def test_sqlite_is_never_asked_to_map_the_file(record: StateDir) -> None:
    store = Store(record)
    assert store._query("PRAGMA mmap_size")[0][0] == 0
    store.close()


def test_many_writers_never_exceed_the_reserve(record: StateDir) -> None:
    stores = [Store(record) for _ in range(4)]
    threads = [
        threading.Thread(
            target=lambda store=store, at=at: [
                store.set_priority(50 + at, step) for step in range(60)
            ]
        )
        for at, store in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    size = record.database.with_name("queue.db-wal").stat().st_size
    assert size < 2 * dbfile.RESERVE_BYTES
    for store in stores:
        store.close()
