"""The monitor against real threads, real processes and drivers that hang."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpusched_ipy.backends import Detail, Detected
from gpusched_ipy.backends.fake import FakeBackend
from gpusched_ipy.config import Clock, Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendReadError
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.monitor.changes import Changes
from gpusched_ipy.monitor.readings import SharedReadings, fingerprint
from gpusched_ipy.monitor.recent import WHOLE_S, QuietWindows, Recent
from gpusched_ipy.monitor.wire import Reading
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind, Snapshot

INTERVAL = 0.05
MIB, GIB = 2**20, 2**30


def write_script(path: Path, **gpu: Any) -> None:
    draft = path.with_suffix(".new")
    values = {"uuid": "GPU-a", "memory_total": "40GiB", "memory_used": "1GiB", **gpu}
    draft.write_text(json.dumps({"gpus": [values]}))
    draft.replace(path)


def eventually(condition: Callable[[], Any], limit_s: float = 60.0) -> Any:
    """The first true value of ``condition``; fails when there is none in time."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)
    return value


class Watched(FakeBackend):
    """The fake with a record of what was asked, and a gate that lets a reading hang."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[Detail] = []
        self.gate = threading.Event()
        self.gate.set()
        self.closed = 0
        self.fault: Exception | None = None

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        self.asked.append(detail)
        snapshot = super().read(detail)
        self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return snapshot

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fake.json"
    write_script(path, utilization=0.03)
    return path


@pytest.fixture
def settings(script: Path) -> Settings:
    return Settings(fake=script, sample_interval_s=INTERVAL)


@pytest.fixture
def watched(script: Path) -> Iterator[Watched]:
    backend = Watched(script)
    yield backend
    backend.gate.set()


@pytest.fixture
def monitor(settings: Settings, watched: Watched) -> Iterator[Monitor]:
    def choose(_settings: Settings, _clock: Clock) -> Detected:
        return Detected(watched, (("nvml", "no driver"),))

    monitor = Monitor(settings, choose=choose, patience_s=2.0)
    yield monitor
    watched.gate.set()
    monitor.stop()


_OTHERS: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def others_threads() -> None:
    """A reader of an earlier test may still stay for a while: it is none of this test's."""
    _OTHERS.clear()
    _OTHERS.update(sampler_threads())


def sampler_threads() -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread.name == "gpusched-sampler" and thread not in _OTHERS
    ]


def test_nothing_is_chosen_or_read_before_somebody_wants_it(
    monitor: Monitor, watched: Watched
) -> None:
    assert monitor.latest() is None
    assert monitor.explanation is None
    assert monitor.history(60) == ()
    assert watched.asked == []
    assert sampler_threads() == []


def test_a_want_reads_at_once_and_again_and_its_end_stops_it(
    monitor: Monitor, watched: Watched
) -> None:
    with monitor.wanting("panel"):
        eventually(lambda: len(monitor.history(60)) >= 4)
    assert monitor.explanation == (f"fake (script {watched.path}); not used: nvml: no driver")
    latest = monitor.latest()
    assert latest is not None
    assert latest.gpus[0].utilization == 0.03
    # A reading that was under way when the want ended may still come in; then there is silence.
    before = len(watched.asked)
    assert not threading.Event().wait(5 * INTERVAL)
    assert len(watched.asked) <= before + 1


def test_dear_values_are_read_first_and_then_at_a_lower_rate(
    monitor: Monitor, watched: Watched
) -> None:
    with monitor.wanting("panel"):
        eventually(lambda: len(watched.asked) >= 6)
    assert watched.asked[0] is Detail.FULL
    assert set(watched.asked[1:6]) == {Detail.LOAD}
    with monitor.wanting("scheduler", detail=Detail.PROCESSES):
        seen = len(watched.asked)
        eventually(lambda: len(watched.asked) >= seen + 4)
    assert Detail.PROCESSES in watched.asked[seen:]
    assert watched.asked[seen + 1 : seen + 4] == [Detail.PROCESSES] * 3


def test_latest_of_a_detail_is_the_last_reading_that_held_it(monitor: Monitor) -> None:
    with monitor.wanting("panel"):
        eventually(lambda: len(monitor.history(60)) >= 4)
        full, load = monitor.latest(Detail.FULL), monitor.latest()
    assert full is not None
    assert load is not None
    assert full.taken_mono < load.taken_mono


def test_sampling_switched_off_reads_only_when_asked(settings: Settings, watched: Watched) -> None:
    def choose(_settings: Settings, _clock: Clock) -> Detected:
        return Detected(watched, ())

    monitor = Monitor(replace(settings, sampling=False), choose=choose)
    monitor.want("panel")
    assert sampler_threads() == []
    assert watched.asked == []
    assert monitor.read_now(60.0).gpus != ()
    assert len(watched.asked) == 1
    monitor.stop()


def test_many_wants_and_asks_share_one_thread(monitor: Monitor) -> None:
    for number in range(20):
        monitor.want(f"panel {number}")
        monitor.read_now(60.0)
    assert len(sampler_threads()) == 1
    monitor.stop()
    monitor.stop()
    eventually(lambda: sampler_threads() == [])


def test_the_monitor_can_be_used_again_after_stop(monitor: Monitor, watched: Watched) -> None:
    assert monitor.read_now(60.0).problem is None
    monitor.stop()
    assert watched.closed == 1
    assert monitor.read_now(60.0).problem is None
    assert len(sampler_threads()) == 1


def test_read_now_began_after_the_call(monitor: Monitor, watched: Watched, script: Path) -> None:
    watched.gate.clear()
    monitor.want("panel")
    eventually(lambda: watched.asked)  # a reading of the old script is under way
    write_script(script, utilization=0.97)
    answers: list[Snapshot] = []
    caller = threading.Thread(target=lambda: answers.append(monitor.read_now(60.0)))
    caller.start()
    watched.gate.set()
    caller.join()
    assert answers[0].gpus[0].utilization == 0.97


def test_a_hung_driver_hangs_no_caller_and_shows_no_old_data(
    monitor: Monitor, watched: Watched
) -> None:
    monitor.want("panel")
    eventually(monitor.latest)
    watched.gate.clear()

    def shown() -> Snapshot | None:
        began = time.monotonic()
        latest = monitor.latest()
        monitor.history(60)
        assert time.monotonic() - began < 30.0  # it would hang for ever
        return latest if latest and latest.problem else None

    hung = eventually(shown)
    assert hung.problem.startswith("the driver has not answered for ")
    assert hung.gpus == ()
    assert hung.backend == "fake"
    began = time.monotonic()
    now = monitor.read_now(0.2)
    assert time.monotonic() - began < 30.0
    assert now.problem is not None
    assert now.gpus == ()
    watched.gate.set()
    recovered = eventually(lambda: (s := monitor.latest()) and s.problem is None and s)
    assert recovered.gpus[0].utilization == 0.03


def test_a_thread_that_hangs_is_left_behind(monitor: Monitor, watched: Watched) -> None:
    watched.gate.clear()
    monitor.want("panel")
    eventually(lambda: watched.asked)
    began = time.monotonic()
    monitor.stop()
    assert time.monotonic() - began < 30.0
    assert len(sampler_threads()) == 1
    monitor.want("panel")  # the new thread has a backend of its own and hangs like the first
    eventually(lambda: len(watched.asked) == 2)
    assert len(sampler_threads()) == 2
    watched.gate.set()
    eventually(lambda: len(sampler_threads()) == 1)
    eventually(monitor.latest)


def test_a_faulty_backend_is_a_problem_and_reading_goes_on(
    monitor: Monitor, watched: Watched
) -> None:
    monitor.want("panel")
    eventually(monitor.latest)
    watched.fault = RuntimeError("bus error")
    failed = eventually(lambda: (s := monitor.latest()) and s.problem and s)
    assert failed.problem == "the reading failed: RuntimeError: bus error"
    assert failed.gpus == ()
    assert monitor.latest(Detail.FULL) == monitor.latest()
    watched.fault = BackendReadError("the card is gone")
    assert monitor.read_now(60.0).problem == "the reading failed: the card is gone"
    watched.fault = None
    assert monitor.read_now(60.0).problem is None


def test_no_backend_is_a_problem_with_the_reasons(settings: Settings) -> None:
    def choose(_settings: Settings, _clock: Clock) -> Detected:
        return Detected(None, (("nvml", "no driver"), ("amd", "no card")))

    monitor = Monitor(settings, choose=choose)
    assert monitor.read_now(60.0).problem == "no GPU can be read (nvml: no driver; amd: no card)"
    assert monitor.explanation == "no GPU can be read (nvml: no driver; amd: no card)"
    monitor.stop()


def test_listeners_hear_each_reading_until_they_leave(
    monitor: Monitor, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Snapshot] = []
    inner: list[Snapshot] = []

    def faulty(_snapshot: Snapshot) -> None:
        raise ValueError("listener fault")

    def asking(_snapshot: Snapshot) -> None:
        if not inner:  # a listener may ask, too: it is in the sampler thread itself
            inner.append(_snapshot)
            inner.append(monitor.read_now(60.0))

    monitor.listen(faulty)
    monitor.listen(asking)
    leave = monitor.listen(heard.append)
    with caplog.at_level(logging.ERROR), monitor.wanting("panel"):
        eventually(lambda: len(heard) >= 3)
    assert "a listener of the monitor failed" in caplog.text
    assert inner[1].problem is None
    assert inner[1].taken_mono >= inner[0].taken_mono
    monitor.stop()
    leave()
    leave()
    count = len(heard)
    monitor.read_now(60.0)
    assert len(heard) == count


def test_who_listens_to_changes_does_not_hear_what_changes_nothing(
    monitor: Monitor, script: Path
) -> None:
    monitor._changes = Changes(0.1, steady_s=5 * INTERVAL)
    heard: list[Snapshot] = []
    every: list[Snapshot] = []
    leave = monitor.listen(heard.append, to_changes=True)
    monitor.listen(every.append)
    with monitor.wanting("panel"):
        eventually(lambda: len(every) >= len(heard) + 5)
        before = len(heard)
        assert before, "the first readings count"
        write_script(script, utilization=0.97)
        eventually(lambda: len(heard) > before)
        assert heard[-1].gpus[0].utilization == 0.97
        leave()


BUSY = Gpu(
    uuid="GPU-a",
    utilization=0.97,
    mem_used_bytes=GIB,
    processes=(GpuProcess(pid=7, started_at=1.0, mem_bytes=GIB),),
)


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"utilization": 0.6, "temperature_c": 80.0, "mem_used_bytes": GIB + 10 * MIB}, False),
        ({"utilization": 0.05}, True),
        ({"utilization": None}, True),
        ({"mem_used_bytes": GIB - 100 * MIB}, True),
        ({"mem_used_bytes": None}, True),
        ({"processes": None}, False),  # a light reading says nothing about them
        ({"processes": ()}, True),
        ({"processes": (GpuProcess(pid=8, started_at=1.0, mem_bytes=GIB),)}, True),
        ({"processes": (GpuProcess(pid=7, started_at=2.0, mem_bytes=GIB),)}, True),
        ({"processes": (GpuProcess(pid=7, started_at=1.0, mem_bytes=0),)}, True),
        ({"health": Health.LOST}, True),
        ({"compute_mode": "prohibited"}, True),
        ({"uuid": "GPU-b"}, True),
    ],
)
def test_what_counts_as_a_change(change: dict[str, Any], counts: bool) -> None:
    def at(mono: float, gpu: Gpu, problem: str | None = None) -> Snapshot:
        return replace(snapshot(mono, None), gpus=(gpu,), problem=problem)

    changes = Changes(0.10, steady_s=3.0)
    told = [changes.count(at(float(mono), BUSY)) for mono in range(8)]
    assert told == [True] * 4 + [False] * 4, "a while after the first, then no more"
    told = [changes.count(at(8.0 + mono, replace(BUSY, **change))) for mono in range(8)]
    assert told == [counts] * 4 + [False] * 4
    assert changes.count(at(16.0, BUSY, "the driver does not answer"))
    assert changes.count(at(30.0, BUSY, "the driver does not answer")), "nobody looked meanwhile"


def test_what_creeps_counts_in_the_end() -> None:
    changes = Changes(0.10, steady_s=1.0)
    creeping = [replace(BUSY, mem_used_bytes=GIB + 20 * MIB * step) for step in range(30)]
    told = [
        changes.count(replace(snapshot(float(step), None), gpus=(gpu,)))
        for step, gpu in enumerate(creeping)
    ]
    assert 5 <= sum(told) <= 20


def test_jobs_add_their_load_to_a_scripted_gpu(
    monitor: Monitor, script: Path, watched: Watched
) -> None:
    write_script(
        script,
        utilization=0.05,
        processes=[],
        job_load={"utilization": 0.3, "memory": "8GiB"},
    )
    assert monitor.read_now(60.0).gpus[0].processes == ()
    monitor.set_allocated({"GPU-a": ((3, 4711), (4, None)), "GPU-b": ((5, 1),)})
    gpu = monitor.read_now(60.0).gpus[0]
    assert gpu.utilization == pytest.approx(0.65)
    assert gpu.mem_used_bytes == 17 * GIB
    assert gpu.processes == (
        GpuProcess(pid=4711, name="job 3", mem_bytes=8 * GIB, kind="compute", job=3),
        GpuProcess(pid=0, name="job 4", mem_bytes=8 * GIB, kind="compute", job=4, visible=False),
    )
    monitor.set_allocated({})
    assert monitor.read_now(60.0).gpus[0].mem_used_bytes == GIB
    write_script(script, utilization=None, memory_used=None, job_load={"utilization": 0.3})
    monitor.set_allocated({"GPU-a": ((3, 4711),)})
    unknown = monitor.read_now(60.0).gpus[0]
    assert (unknown.utilization, unknown.processes) == (None, None)


def snapshot(mono: float, utilization: float | None, uuid: str = "GPU-a") -> Snapshot:
    gpu = Gpu(uuid=uuid, utilization=utilization, processes=())
    return Snapshot(backend="fake", source="t", taken_at=mono, taken_mono=mono, gpus=(gpu,))


@pytest.mark.parametrize(
    ("readings", "quiet"),
    [
        ([(0, 0.0)], (0.0, 1)),
        ([(0, 0.1), (1, 0.1), (2, 0.05)], (2.0, 3)),
        ([(0, 0.0), (1, 0.11)], (None, 0)),
        ([(0, 0.0), (1, None)], (None, 0)),
        ([(0, 0.0), (1, 0.5), (2, 0.0), (3, 0.0)], (1.0, 2)),
        ([(0, 0.0), (1, None), (2, 0.0)], (0.0, 1)),
        ([(0, 0.0), (1, 0.0), (4.5, 0.0)], (0.0, 1)),  # a gap of more than three intervals
        ([(0, 0.0), (2.9, 0.0)], (2.9, 2)),
        ([(0, 0.0), (0.1, 0.0), (0.2, 0.0), (0.3, 0.0)], (0.3, 1)),  # one window of the driver
        ([(0, 0.0), (0.3, 0.0), (0.6, 0.0), (1.2, 0.0)], (1.2, 3)),
    ],
)
def test_the_quiet_window(
    readings: list[tuple[float, float | None]], quiet: tuple[float | None, int]
) -> None:
    windows = QuietWindows(0.10, 1.0)
    marked = [windows.mark(snapshot(mono, value)) for mono, value in readings][-1]
    gpu = marked.gpus[0]
    assert (gpu.quiet_s, gpu.quiet_samples) == pytest.approx(quiet)


def test_a_gpu_that_comes_back_begins_its_quiet_window_anew() -> None:
    windows = QuietWindows(0.10, 1.0)
    windows.mark(snapshot(0, 0.0))
    windows.mark(snapshot(1, 0.0, uuid="GPU-b"))
    assert windows.mark(snapshot(2, 0.0)).gpus[0].quiet_samples == 1


def test_the_history_keeps_an_hour_and_forgets_old_process_lists() -> None:
    recent = Recent()
    for second in range(0, 4000, 10):
        known = None if second % 20 else 0.5
        recent.add(snapshot(float(second), known))
    recent.add(snapshot(100.0, 0.9))  # late, and older than what is there: left out
    kept = recent.since(-1)
    assert kept[0].taken_mono == 3990 - 3600
    assert [item.taken_mono for item in kept] == [float(s) for s in range(390, 4000, 10)]
    assert [item.gpus[0].utilization for item in kept[:3]] == [None, 0.5, None]
    assert kept[0].gpus[0].processes is None
    assert kept[-1].gpus[0].processes == ()
    assert all(item.backend == "fake" for item in kept)
    assert recent.since(3990 - WHOLE_S - 15)[0].taken_mono == 3680


READS = "this process reads the GPUs"
MEMBER = """
import json, os, sys, threading
from pathlib import Path
from gpusched_ipy.backends import Detail, Detected
from gpusched_ipy.backends.fake import FakeBackend
from gpusched_ipy.config import Settings
from gpusched_ipy.monitor import Monitor

def say(**words):  # in one piece: a fork copies what print() still has in its buffer
    os.write(1, (json.dumps(words) + "\\n").encode())

state, script = Path(sys.argv[1]), Path(sys.argv[2])
interval, pace = float(sys.argv[3]), sys.argv[4]

class Counting(FakeBackend):
    reads = 0
    def read(self, detail=Detail.FULL):
        Counting.reads += 1
        if pace == "hang":
            say(hangs=True)
            threading.Event().wait()
        return super().read(detail)

settings = Settings(fake=script, sample_interval_s=interval)
monitor = Monitor(settings, None, state, choose=lambda s, c: Detected(Counting(script, c), ()))
seen = 0
def show(snapshot):
    global seen
    seen += 1
    say(seen=seen, reads=Counting.reads, owner=monitor.sharing, problem=snapshot.problem,
        utilization=[gpu.utilization for gpu in snapshot.gpus], why=monitor.explanation,
        quiet_s=[gpu.quiet_s for gpu in snapshot.gpus], vouched=snapshot.unsure_s(
            snapshot.taken_mono + 3) == 0)
monitor.listen(show)
monitor.want("test", patient=pace == "patient")
if pace == "fork":
    while monitor.sharing != "this process reads the GPUs":
        threading.Event().wait(0.01)
    if os.fork() == 0:
        assert monitor.latest() is None and monitor.history(60) == ()
        say(child=monitor.read_now(60.0).problem, pid=os.getpid())
        sys.stdin.read()
        os._exit(0)
sys.stdin.readline()
monitor.unwant("test")
sys.stdin.read()
monitor.stop()
"""


class Member:
    """Another process of the same user, with the lines that it prints."""

    def __init__(self, state: Path, script: Path, pace: str = "run", interval: float = 0.1) -> None:
        arguments = [str(state), str(script), str(interval), pace]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", MEMBER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    @property
    def last(self) -> dict[str, Any]:
        return self.lines[-1] if self.lines else {"seen": 0, "reads": 0, "owner": ""}

    def rest(self) -> None:
        """Want nothing more, and live on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(60)
        self._reader.join(60)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def member(tmp_path: Path, script: Path) -> Iterator[Callable[..., Member]]:
    started: list[Member] = []

    def start(pace: str = "run", interval: float = 0.1) -> Member:
        started.append(Member(tmp_path / "state", script, pace, interval))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None and each.last.get("hangs"):
            each.kill()
        each.close()


def test_processes_share_one_readers_readings(
    member: Callable[..., Member], script: Path, tmp_path: Path
) -> None:
    members = [member() for _ in range(3)]
    eventually(lambda: all(each.last["seen"] >= 5 for each in members))
    before = [dict(each.last) for each in members]
    eventually(lambda: all(each.last["seen"] >= 35 for each in members))
    after = [dict(each.last) for each in members]
    seen = [late["seen"] - early["seen"] for early, late in zip(before, after, strict=True)]
    reads = sum(late["reads"] - early["reads"] for early, late in zip(before, after, strict=True))
    # Three that read for themselves would have read as often as they have seen.
    assert reads < 0.6 * sum(seen)
    eventually(lambda: sum(each.last["owner"] == READS for each in members) == 1)
    assert all("fake" in line["why"] for line in after)
    write_script(script, utilization=0.97)
    eventually(lambda: all(each.last["utilization"] == [0.97] for each in members))
    mode = (tmp_path / "state" / "readings" / "readings.json").stat().st_mode
    assert mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.chaos
def test_when_the_one_that_samples_is_killed_another_goes_on(
    member: Callable[..., Member],
) -> None:
    members = [member(), member()]
    eventually(lambda: all(each.last["seen"] >= 5 for each in members))
    owner = eventually(lambda: next((m for m in members if m.last["owner"] == READS), None))
    (other,) = (each for each in members if each is not owner)
    owner.kill()
    reads, seen = other.last["reads"], other.last["seen"]
    eventually(lambda: other.last["reads"] >= reads + 5)
    assert other.last["owner"] == READS
    assert other.last["seen"] >= seen + 5
    assert not any(line["problem"] for line in other.lines)


def asleep(members: list[Member]) -> tuple[Member, Member]:
    """Of two that only wait: who reads, and the other, once that sleeps on its word."""
    for one, two in (members, members[::-1]):
        if one.last["owner"] == READS and two.last.get("vouched"):
            return one, two
    return None  # type: ignore[return-value]


@pytest.mark.chaos
def test_who_only_waits_sleeps_until_something_changes(
    member: Callable[..., Member], script: Path
) -> None:
    members = [member("patient"), member("patient")]
    owner, other = eventually(lambda: asleep(members))
    seen, reads, owner_reads = other.last["seen"], other.last["reads"], owner.last["reads"]
    eventually(lambda: owner.last["reads"] >= owner_reads + 20)
    assert other.last["seen"] <= seen + 1
    assert other.last["reads"] == reads
    quiet_s = other.last["quiet_s"]
    assert quiet_s[0] > 5  # by readings of another, and most of them not looked at
    write_script(script, utilization=0.97)
    eventually(lambda: other.last["utilization"] == [0.97], limit_s=4.0)
    assert other.last["owner"] != READS


@pytest.mark.chaos
@pytest.mark.parametrize("way", ["kill", "close", "rest"])
def test_who_sleeps_goes_on_when_its_reader_does_not(
    member: Callable[..., Member], way: str
) -> None:
    members = [member("patient"), member("patient")]
    owner, other = eventually(lambda: asleep(members))
    reads = other.last["reads"]
    getattr(owner, way)()
    eventually(lambda: other.last["reads"] >= reads + 3, limit_s=4.0)
    assert other.last["owner"] == READS
    assert not any(line["problem"] for line in other.lines)


@pytest.mark.chaos
def test_a_reader_that_hangs_with_the_lock_stops_nobody(member: Callable[..., Member]) -> None:
    stuck = member("hang")
    eventually(lambda: stuck.last.get("hangs"))
    other = member()
    eventually(lambda: other.last["reads"] >= 5)
    assert other.last["owner"] == READS
    assert other.last["problem"] is None


@pytest.mark.chaos
def test_the_child_of_a_fork_neither_keeps_the_lock_nor_loses_it(
    member: Callable[..., Member], tmp_path: Path, settings: Settings
) -> None:
    parent = member("fork")
    child = eventually(lambda: next((li for li in parent.lines if "child" in li), None))
    assert child["child"] is None
    shared = SharedReadings(tmp_path / "state", settings, SystemClock())
    assert not shared.take_lock()
    parent.kill()
    os.kill(child["pid"], 0)  # the child is alive
    eventually(shared.take_lock)
    shared.drop_lock()
    os.kill(child["pid"], signal.SIGKILL)


@pytest.fixture
def shared(tmp_path: Path, settings: Settings) -> SharedReadings:
    return SharedReadings(tmp_path / "state", settings, SystemClock())


def reading(at: Instant | None = None, **changes: Any) -> Reading:
    at = at or SystemClock().now()
    taken = snapshot(at.mono, 0.5)
    return Reading(
        snapshot=replace(taken, taken_at=at.wall),
        detail=Detail.FULL,
        explanation="fake",
        promises=(at.mono + 1,) * 3,
        **changes,
    )


def test_a_published_reading_is_read_back_without_loss(
    shared: SharedReadings, tmp_path: Path, settings: Settings
) -> None:
    assert shared.newest() is None
    written = reading(loads={"GPU-a": (0.5, None)}, by=shared.me)
    shared.publish(written)
    assert shared.newest() == written
    other = SharedReadings(tmp_path / "state", settings, SystemClock())
    assert other.newest() == written
    now = SystemClock().now()
    older = Instant(now.mono - 5, now.wall - 5)
    other.publish(reading(older))
    assert shared.newest() == written


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"promises": 3}', '{"promises": [], "snapshot": {"gpus": 1}}'],
)
def test_a_damaged_file_is_no_reading_and_is_replaced(shared: SharedReadings, text: str) -> None:
    shared.path.parent.mkdir(parents=True)
    shared.path.write_text(text)
    assert shared.newest() is None
    written = reading()
    shared.publish(written)
    assert shared.newest() == written


def test_a_reading_of_another_boot_is_none_of_ours(shared: SharedReadings) -> None:
    now = SystemClock().now()
    shared.publish(reading(Instant(now.mono, now.wall - 3600)))
    assert shared.newest() is None


def test_another_configuration_is_neither_read_nor_disturbed(
    shared: SharedReadings, tmp_path: Path
) -> None:
    ours = reading()
    shared.publish(ours)
    foreign = SharedReadings(tmp_path / "state", Settings(), SystemClock())
    assert foreign.newest() is None
    foreign.publish(reading())
    assert shared.newest() == ours
    now = SystemClock().now()
    gone = reading(Instant(now.mono - 60, now.wall - 60))
    shared.path.unlink()
    assert shared.newest() is None  # who publishes has looked
    shared.publish(gone)
    theirs = reading()
    assert foreign.newest() is None
    foreign.publish(theirs)  # its publisher has not kept its promise: the file is free
    assert foreign.newest() == theirs


def test_a_script_that_nobody_plays_parts_no_two_processes(tmp_path: Path) -> None:
    real = Settings(backend="nvml", fake=tmp_path / "a")
    assert fingerprint(real) == fingerprint(replace(real, fake=tmp_path / "b"))
    played = replace(real, backend="auto")
    assert fingerprint(played) != fingerprint(replace(played, fake=tmp_path / "b"))


def test_a_folder_that_cannot_be_used_is_said_and_each_reads_for_itself(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = tmp_path / "obstacle"
    obstacle.write_text("a file stands where the folder should be")
    monitor = Monitor(settings, state_dir=obstacle / "state")
    with caplog.at_level(logging.WARNING), monitor.wanting("panel"):
        eventually(lambda: len(monitor.history(60)) >= 3)
        assert monitor.sharing.startswith("readings are not shared: ")
    assert caplog.text.count("readings are not shared") == 1
    monitor.stop()


def test_the_holder_of_the_lock_writes_only_for_others(
    settings: Settings, tmp_path: Path, shared: SharedReadings
) -> None:
    monitor = Monitor(settings, state_dir=tmp_path / "state")
    with monitor.wanting("panel"):
        eventually(lambda: len(monitor.history(60)) >= 3)
        assert not shared.path.exists()
        # Whoever watches the bell there is not woken by readings.
        assert os.listdir(tmp_path / "state") == ["readings"]
        assert monitor.sharing == READS
        shared.ask()
        eventually(shared.newest)
    assert monitor.sharing == "idle: nothing is read"
    monitor.stop()


def test_a_published_reading_comes_back_whole_while_it_changes(
    shared: SharedReadings, settings: Settings, tmp_path: Path
) -> None:
    other = SharedReadings(tmp_path / "state", settings, SystemClock())
    shared.ask()
    process = GpuProcess(pid=7, user="u\n", name="ä", mem_bytes=5, started_at=1.5)
    steps: list[dict[str, Any]] = [
        {"utilization": 0.25, "processes": None},
        {"utilization": 0.5, "processes": (process,)},
        {"utilization": 0.5, "processes": (replace(process, mem_bytes=6), process)},
        {"utilization": None, "processes": ()},
        {"health": Health.LOST, "mem_kind": MemoryKind.UNIFIED, "throttled": True, "uuid": "GPU-b"},
    ]
    inodes = set()
    for step in steps:
        gpus = (Gpu(uuid="GPU-0", mem_used_bytes=3), Gpu(**{"uuid": "GPU-a", **step}))
        taken = reading().snapshot
        sent = replace(reading(by="me"), snapshot=replace(taken, gpus=gpus, driver="1"))
        shared.publish(sent)
        assert other.newest() == sent
        inodes.add(shared.path.stat().st_ino)
    assert len(inodes) == 2 or sys.platform != "linux"  # two files take turns, none is made anew


def test_half_a_text_is_no_reading(shared: SharedReadings) -> None:
    now = SystemClock().now()
    texts = []
    for later in (0.0, 0.25):
        shared.publish(reading(Instant(now.mono + later, now.wall + later)))
        texts.append(shared.path.read_text())
    assert len(texts[0]) == len(texts[1])
    half = len(texts[0]) // 2
    old, new = texts
    for torn in (new[:half] + old[half:], old[:half] + new[half:], old[:-1], old[:half]):
        shared.path.write_text(torn)
        assert shared.newest() is None
    shared.path.write_text(texts[1])
    assert shared.newest() is not None


def test_drafts_of_killed_publishers_are_swept(shared: SharedReadings) -> None:
    shared.path.parent.mkdir(parents=True)
    old = shared.path.with_name("readings.json.1.tmp")
    new = shared.path.with_name("readings.json.2.tmp")
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    assert shared.take_lock()
    assert not old.exists()
    assert new.exists()
    shared.drop_lock()
