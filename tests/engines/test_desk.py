"""The desk between the queue and an engine, with an engine that fails as it is told to."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from helpers import FakeScript, wait_until

import gpusched_ipy
from gpusched_ipy import environment, errand
from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.desks import Desks
from gpusched_ipy.enginedesk import EngineDesk
from gpusched_ipy.engines import (
    AmbiguousError,
    Capabilities,
    EngineJob,
    EngineState,
    Health,
    RejectedError,
    Status,
    UnreachableError,
)
from gpusched_ipy.job import (
    ArrayPlace,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Request,
    effective_priority,
)
from gpusched_ipy.locks import Membership
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.scheduler import Scheduler
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

PLAIN = Path(__file__).with_name("plain_engine.py")


@dataclass
class Scripted:
    """An engine that starts nothing by itself; the test does, and says what the engine says."""

    name: str = "scripted"
    up: bool = True
    gpus: int = 1
    orders: bool = True
    raises: Exception | None = None  # at the next submit
    takes: bool = True  # the job, even where it raises
    jobs: dict[str, EngineJob] = field(default_factory=dict)
    says: dict[str, Status] = field(default_factory=dict)
    submits: list[str] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)

    def capabilities(self) -> Capabilities:
        return Capabilities(settle_s=0.0, orders=self.orders)

    def ping(self, timeout: float) -> Health:
        return Health(up=self.up, text="its head does not answer" * (not self.up), gpus=self.gpus)

    def submit(self, job: EngineJob) -> str:
        self.submits.append(job.key)
        if self.takes:
            self.jobs[job.key] = job
            self.says[job.key] = Status(state=EngineState.QUEUED, text="others first", native="7")
        if self.raises is not None:
            raised, self.raises = self.raises, None
            raise raised
        return "7"

    def status(self, keys: Sequence[str]) -> Mapping[str, Status]:
        return {key: self.says.get(key, Status(state=EngineState.UNKNOWN)) for key in keys}

    def rank(self, ranks: Mapping[str, int]) -> None:
        pass

    def cancel(self, keys: Sequence[str]) -> None:
        self.cancels += keys
        for key in keys:
            self.says[key] = Status(state=EngineState.CANCELLED, text="cancelled there")

    def reattach(self) -> Sequence[str]:
        return list(self.jobs)

    def run(self, key: str) -> None:
        """A node runs the job."""
        folder = self.jobs[key].folder
        self.says[key] = Status(state=EngineState.RUNNING, native="7")
        argv = [sys.executable, "-I", str(folder.runner), str(folder.path)]
        subprocess.run(argv, check=False, capture_output=True, timeout=60)
        self.says[key] = Status(state=EngineState.ENDED, native="7")


@dataclass
class WithArrays(Scripted):
    """… and takes several in one call, unless it may have only so many at a time."""

    most: int = 100
    arrays: list[list[str]] = field(default_factory=list)
    refuses: Exception | None = None  # every array

    def capabilities(self) -> Capabilities:
        return Capabilities(settle_s=0.0, array_max=self.most)

    def submit_array(self, jobs: Sequence[EngineJob]) -> Sequence[str]:
        self.arrays.append([job.key for job in jobs])
        if self.refuses is not None:
            raise self.refuses
        if self.takes:
            for job in jobs:
                self.jobs[job.key] = job
                self.says[job.key] = Status(state=EngineState.QUEUED, text="others first")
        if self.raises is not None:
            raised, self.raises = self.raises, None
            raise raised
        return [f"7_{job.place}" for job in jobs]


class Counter:
    """A desk with its queue: rounds are made by hand."""

    def __init__(self, settings: Settings, tmp_path: Path, engine: Scripted) -> None:
        self.state = open_state_dir(settings)
        self.store = Store(self.state)
        self.engine = engine
        self.settings = settings
        self.root = tmp_path / "engines"
        self.member = Membership(self.state)
        self.outcomes: dict[int, JobState] = {}
        self.open()

    def open(self) -> None:
        """A new desk, as of a new agent."""
        clock = SystemClock()
        self.desk = EngineDesk(
            self.engine, self.root, self.store, self.settings, clock, self.member.key
        )

    def submit(self, name: str = "a", line: str = "echo ran", **more: object) -> Job:
        request = more.pop("request", Request())
        return self.store.submit(
            JobSpec(
                uid=f"{name:0>32}",
                kind=JobKind.COMMAND,
                name=name,
                argv=(line,),
                shell=True,
                engine="scripted",
                cwd="/",
                env={"PATH": os.environ["PATH"]},
                request=request,  # type: ignore[arg-type]
                **more,  # type: ignore[arg-type]
            )
        )

    def sweep(self, size: int, line: str = "echo ran", **more: object) -> list[Job]:
        return [
            self.submit(f"m{at}", line, array=ArrayPlace(id="5eed", index=at, size=size), **more)
            for at in range(size)
        ]

    def round(self, times: int = 1) -> None:
        for _ in range(times):
            errands = self.desk._errands
            errands._pinged_mono = errands._asked_mono = float("-inf")
            self.desk.round(self.store.jobs(), self.outcomes)

    def folders(self) -> list[Path]:
        return sorted(self.root.iterdir()) if self.root.exists() else []

    def show(self, job: Job) -> Job:
        return self.store.job(job.id)


@pytest.fixture
def counter(settings: Settings, tmp_path: Path) -> Counter:
    return Counter(settings, tmp_path, Scripted())


@pytest.fixture
def arrays(settings: Settings, tmp_path: Path) -> Counter:
    """With an engine that takes arrays, and has eight GPUs."""
    return Counter(settings, tmp_path, WithArrays(gpus=8))


def test_a_job_goes_out_and_comes_home(counter: Counter) -> None:
    job = counter.submit()
    counter.round(2)
    shown = counter.show(job)
    assert shown.state is JobState.PENDING, "the engine has it, no node runs it"
    assert shown.reason is not None
    assert shown.reason.text == "scripted: others first"
    counter.engine.run(*counter.engine.jobs)
    counter.round()
    shown = counter.show(job)
    assert (shown.state, shown.exit_code) == (JobState.COMPLETED, 0)
    assert shown.attempt is not None
    assert counter.state.log(shown.attempt).read_text() == "ran\n"
    assert counter.folders() == []


def test_only_the_window_is_handed_over_in_our_order(counter: Counter) -> None:
    for number in range(9):
        counter.submit(f"low{number}")
    counter.submit("high", priority=5)
    counter.round()
    assert len(counter.engine.submits) == counter.engine.gpus + 2
    assert "high" in counter.engine.submits[0]
    first = counter.engine.jobs[counter.engine.submits[0]]
    assert first.rank == 0
    last = counter.show(counter.store.jobs()[8])
    assert last.reason is not None
    assert last.reason.text == "waits for scripted: 9 jobs ahead"


def test_an_engine_without_an_order_gets_only_what_fits_its_gpus(counter: Counter) -> None:
    counter.engine.orders, counter.engine.gpus = False, 3
    one, _, last = (
        counter.submit(name, request=Request(gpus=gpus))
        for name, gpus in (("one", 1), ("three", 3), ("last", 1))
    )
    counter.round(2)
    assert [key[29:32] for key in counter.engine.submits] == ["one"], "nobody passes the wide one"
    assert (counter.show(last).reason or pytest.fail("no reason")).text.endswith("2 jobs ahead")
    counter.engine.run(*counter.engine.jobs)
    counter.round(2)
    assert counter.show(one).state is JobState.COMPLETED
    assert [key[27:32] for key in counter.engine.submits[1:]] == ["three"]


def test_a_full_window_makes_room_for_a_higher_priority(counter: Counter) -> None:
    for number in range(3):
        counter.submit(f"low{number}")
    counter.round(2)
    high = counter.submit("high", priority=5)
    counter.round(3)
    assert len(counter.engine.cancels) == 1
    assert any("high" in key for key in counter.engine.submits)
    assert counter.show(high).state is JobState.PENDING
    assert len(counter.folders()) == 3


@pytest.mark.parametrize("taken", [True, False])
def test_nobody_knows_whether_it_was_taken(counter: Counter, taken: bool) -> None:
    counter.engine.raises, counter.engine.takes = AmbiguousError("socket timed out"), taken
    job = counter.submit()
    counter.round()
    assert "socket timed out" in (counter.show(job).reason or pytest.fail("no reason")).text
    counter.engine.takes = True
    counter.round(2)
    assert len(counter.engine.submits) == (1 if taken else 2), "it is looked for first"
    counter.engine.run(*counter.engine.jobs)
    counter.round()
    assert counter.show(job).state is JobState.COMPLETED


def test_a_refusal_fails_the_job_in_the_engines_words(counter: Counter) -> None:
    counter.engine.raises, counter.engine.takes = RejectedError("no such partition"), False
    job = counter.submit()
    counter.round()
    assert counter.show(job).state is JobState.FAILED
    assert "no such partition" in (counter.show(job).error or "")
    assert counter.folders() == []


def test_an_engine_that_is_down_keeps_its_jobs_waiting(counter: Counter) -> None:
    counter.engine.up = False
    job = counter.submit()
    counter.round(2)
    assert counter.engine.submits == []
    assert "does not answer" in (counter.show(job).reason or pytest.fail("no reason")).text
    counter.engine.up = True
    counter.engine.raises, counter.engine.takes = UnreachableError("connection refused"), False
    counter.round()
    counter.engine.takes = True
    counter.round()
    counter.engine.run(*counter.engine.jobs)
    counter.round()
    assert counter.show(job).state is JobState.COMPLETED


@pytest.mark.parametrize("wish", ["hold", "cancel", "drain"])
def test_what_waits_there_is_taken_back(counter: Counter, wish: str) -> None:
    job = counter.submit()
    counter.round(2)
    if wish == "hold":
        counter.store.set_held(job.id, True)
    elif wish == "drain":
        counter.store.set_drained("for lunch")
    else:
        counter.store.request_cancel(job.id)
    counter.round(2)
    assert counter.engine.cancels == counter.engine.submits
    assert counter.folders() == []
    assert not counter.desk.busy
    counter.store.set_drained(None)
    if wish == "hold":
        counter.store.set_held(job.id, False)
    counter.round()
    assert len(set(counter.engine.submits)) == (1 if wish == "cancel" else 2)


def test_one_that_is_started_late_has_nothing_to_run(counter: Counter) -> None:
    job = counter.submit()
    counter.round(2)
    (key,) = counter.engine.jobs
    counter.engine.up = False
    counter.store.request_cancel(job.id)
    counter.round(2)
    assert counter.folders(), "the engine could not be told yet"
    counter.engine.run(key)
    counter.engine.up = True
    counter.round(2)
    assert counter.folders() == []
    assert counter.show(job).started_at is None


@pytest.mark.parametrize(
    ("said", "state", "words"),
    [
        (EngineState.CANCELLED, JobState.CANCELLED, "by hand before it began"),
        (EngineState.FAILED, JobState.FAILED, "engine_dir"),
    ],
)
def test_an_end_before_the_begin(
    counter: Counter, said: EngineState, state: JobState, words: str
) -> None:
    job = counter.submit()
    counter.round(2)
    counter.engine.says[counter.engine.submits[0]] = Status(state=said, text="by hand")
    counter.round()
    assert counter.show(job).state is state
    assert words in (counter.show(job).error or "")


def test_a_forgotten_job_is_handed_over_again(counter: Counter) -> None:
    job = counter.submit()
    counter.round(2)
    counter.engine.says.clear()
    counter.round(3)
    assert len(counter.engine.submits) == 2
    assert counter.show(job).state is JobState.PENDING


@pytest.mark.parametrize("requeue", [True, False])
def test_a_silent_node_is_a_lost_job(
    counter: Counter, monkeypatch: pytest.MonkeyPatch, requeue: bool
) -> None:
    monkeypatch.setattr(errand, "LOST_S", 0.05)
    job = counter.submit(request=Request(requeue=requeue))
    counter.round(2)
    (key,) = counter.engine.jobs
    (counter.engine.jobs[key].folder.path / "claim").write_text("{}")
    counter.round(2)
    assert counter.show(job).state is JobState.RUNNING
    counter.engine.says[key] = Status(state=EngineState.FAILED, text="its node failed")

    def settled() -> bool:
        counter.round()
        return counter.show(job).state is not JobState.RUNNING

    wait_until(settled)
    if requeue:
        assert counter.show(job).state is JobState.PENDING
        assert counter.show(job).requeued == 1
    else:
        assert counter.show(job).state is JobState.LOST
        assert "its node failed" in (counter.show(job).error or "")


@pytest.mark.parametrize("when", ["packed", "intended", "taken", "told", "ended", "recorded"])
def test_whoever_takes_over_finds_the_job_wherever_it_stood(counter: Counter, when: str) -> None:
    ran = counter.root.parent / "ran"
    job = counter.submit(line=f"echo ran >> {ran}")
    if when == "packed":
        counter.root.mkdir()
        one = errand.new_errand(counter.root, job, 0.0)
        errand.pack(one, job, counter.state, 1000)
    elif when in ("intended", "taken"):
        # As after a kill: nobody has heard what came of it.
        counter.engine.raises = AmbiguousError("killed")
        counter.engine.takes = when == "taken"
        counter.round()
    else:
        counter.round(2)
    if when in ("ended", "recorded"):
        counter.engine.run(*counter.engine.jobs)
    if when == "recorded":
        counter.desk._errands.drop = lambda one: None  # type: ignore[method-assign]
        counter.round()
    counter.engine.takes = True
    counter.open()
    counter.round(3)
    if when not in ("ended", "recorded"):
        counter.engine.run(*counter.engine.jobs)
    counter.round(3)
    assert (counter.show(job).state, counter.show(job).attempts) == (JobState.COMPLETED, 1)
    assert counter.folders() == []
    assert ran.read_text() == "ran\n"


class KilledError(BaseException):
    """What a kill does: nothing more of this agent happens."""


def test_a_folder_that_was_being_removed_at_a_kill_speaks_for_nobody(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken back for a higher priority; its claim is gone, and the engine says cancelled."""
    for number in range(3):
        counter.submit(f"low{number}")
    counter.round(2)
    counter.submit("high", priority=5)

    def half(path: Path, **_: object) -> None:
        (path / "claim").unlink()
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("gpusched_ipy.engines.folder.shutil.rmtree", half)
        with pytest.raises(KilledError):
            counter.round(3)
    assert len(counter.engine.cancels) == 1
    counter.open()
    counter.round(4)
    assert {job.state for job in counter.store.jobs(ended=True)} == {JobState.PENDING}
    assert len(counter.folders()) == counter.engine.gpus + 2
    assert any("high" in key for key in counter.engine.submits)


def test_a_dependency_holds_at_an_engine(counter: Counter) -> None:
    first = counter.submit("first", held=True)
    then = counter.submit("then", request=Request(after=(first.id,)))
    counter.outcomes = {first.id: JobState.PENDING}
    counter.round()
    assert counter.engine.submits == []
    assert "after" in (counter.show(then).reason or pytest.fail("no reason")).text
    counter.outcomes = {first.id: JobState.FAILED}
    counter.round()
    assert counter.show(then).state is JobState.CANCELLED


def test_an_engine_of_another_package(fake: FakeScript, tmp_path: Path) -> None:
    """Installed by its entry point alone, and used from the terminal."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    own = str(Path(gpusched_ipy.__file__).parents[1])
    (site / "base.pth").write_text("\n".join([own, *(p for p in sys.path if "-packages" in p)]))
    (site / "plain_engine.py").write_text(PLAIN.read_text())
    about = site / "plain_engine-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-engine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[gpusched.engines]\nplain = plain_engine:make\n")
    environ = {**os.environ, "GPUSCHED_ENGINE_DIR": str(tmp_path / "engines")}

    def gpusched(*argv: str, status: int = 0) -> str:
        done = subprocess.run(
            [python, "-m", "gpusched_ipy", *argv],
            env=environ, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout

    assert "plain " in gpusched("engines")
    job = gpusched("submit", "--engine", "plain", "--shell", "echo $CUDA_VISIBLE_DEVICES; exit 4")
    gpusched("wait", job.strip(), status=4)
    assert gpusched("log", job.strip()) == "0\n"


def test_what_has_aged_past_a_newcomer_is_not_taken_back_for_it(
    settings: Settings, tmp_path: Path
) -> None:
    """It would be the first in line again, and so on without end."""
    counter = Counter(replace(settings, aging_s=1.0), tmp_path, Scripted(gpus=1))
    old = [counter.submit(name) for name in "abc"]
    counter.round(2)
    aged = partial(effective_priority, old[-1], 1.0)
    wait_until(lambda: aged(time.monotonic()) > 2.5, what="they have gained two steps")
    newcomer = counter.submit("newcomer", priority=2)
    before = len(counter.engine.submits)
    counter.round(4)
    assert counter.engine.cancels == []
    assert len(counter.engine.submits) == before
    assert counter.show(newcomer).state is JobState.PENDING


def test_the_folder_of_an_engine_is_ours_alone(settings: Settings, tmp_path: Path) -> None:
    counter = Counter(settings, tmp_path, Scripted())
    counter.root = tmp_path / "shared" / "hash" / "scripted"
    counter.open()
    before = os.umask(0o002)
    try:
        counter.submit()
        counter.round(2)
    finally:
        os.umask(before)
    for folder in (counter.root, counter.root.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(counter.engine.submits) == 1


def test_a_damaged_file_of_variables_fails_its_job_and_no_other(
    settings: Settings, tmp_path: Path
) -> None:
    counter = Counter(settings, tmp_path, Scripted())
    bad = counter.submit("bad", env_names=("TOKEN",))
    environment.keep(counter.state, bad.spec.uid, {"TOKEN": "s3cret"})
    counter.state.environment(bad.spec.uid).write_text('{"TOKEN": "s3c')
    good = counter.submit("good")
    counter.round(2)
    assert counter.show(bad).state is JobState.FAILED
    assert "is damaged; submit the job again" in str(counter.show(bad).error)
    assert [key for key in counter.engine.submits if good.spec.uid in key]


def test_what_a_full_disk_has_cut_is_copied_anew_and_once(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(300_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                errand._append(source, target, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert errand._append(source, target, 0) == 300_000
    assert target.read_bytes() == source.read_bytes()


def test_an_engine_that_cannot_be_made_stops_no_other(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third party's factory may raise anything; its jobs wait with that word."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("its own fault")

    monkeypatch.setattr("gpusched_ipy.engines.registry.make_engine", broken)
    counter = Counter(replace(settings, engine_dir=tmp_path / "engines"), tmp_path, Scripted())
    job = counter.submit()
    monitor = Monitor(counter.settings)
    scheduler = Scheduler(counter.store, monitor, counter.member, {}, counter.settings)
    desks = Desks(counter.store, scheduler, counter.settings, counter.member.key)
    desks.start()
    try:
        wait_until(lambda: "its own fault" in str(counter.show(job).reason), what="why it waits")
        assert not desks.busy
    finally:
        desks.stop()
        scheduler.stop()
        monitor.stop()
