"""What is measured of each program: a line of jobs, rest, a killed daemon, a stranger's card."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

from _peers.machine import Machine, Run, Stranger, Trace, has_ended, until
from _peers.peer import Cost, NotThereError, Peer

SAMPLE_S = 22.0  # so long is looked before a line is given up that will not end in time
STUCK_S = 15.0  # a program that accepts nothing for so long has stopped to
_numbers = count()


@dataclass(slots=True)
class Scene:
    """One program at work on one measurement."""

    peer: Peer
    trace: Trace
    ids: dict[str, str] = field(default_factory=dict)

    def job(self, name: str, ms: int = 0, gate: Path | None = None) -> list[str]:
        """The argv of a job that holds so long, behind a gate if one is given."""
        argv = [str(self.peer.machine.probe), str(self.trace.path), name, str(ms)]
        return [*argv, *([] if gate is None else [str(gate)])]

    def submit(self, name: str, ms: int = 0, gate: Path | None = None) -> float:
        """Queue one; how many seconds that took."""
        argv = self.job(name, ms, gate)
        began = time.monotonic()
        self.ids[name] = self.peer.submit(argv)
        return time.monotonic() - began

    def blocker(self) -> Gate:
        """A job that runs until its gate is opened, so that others queue up behind it."""
        gate = Gate(self.trace.path.with_name("gate"))
        self.submit("gate", gate=gate.path)
        if not until(lambda: self.trace.began("gate") is not None, 60):
            raise NotThereError("its first job does not start")
        return gate


class Gate:
    """A FIFO at which a job waits without using the processor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def open(self) -> None:
        """Let the job go on."""
        os.close(os.open(self.path, os.O_WRONLY))


@contextmanager
def scene(kind: type[Peer], programs: Path, folder: Path) -> Iterator[Scene]:
    """A fresh queue of that program on a fresh machine; nothing of it is left."""
    machine = Machine(folder / str(next(_numbers)), programs)
    peer = kind(programs, machine)
    try:
        peer.start()
        yield Scene(peer, Trace(machine.folder / "trace"))
    finally:
        peer.stop()
        machine.remove()


@dataclass(frozen=True, slots=True)
class Line:
    """What became of a line of jobs: times in ms, rates in jobs a second."""

    submits: list[float]
    accepted: int
    accept_rate: float
    stuck: bool  # it took no more while the first job ran
    gaps: list[float]
    drained: int
    drain_rate: float


def line(
    kind: type[Peer],
    programs: Path,
    folder: Path,
    *,
    jobs: int,
    ms: int,
    singly: int,
    limit_s: float,
) -> Line:
    """Queue that many jobs behind one that waits, ``singly`` of them one by one; let them run.

    Args:
        limit_s: at most so long for queueing, and twice so long for running.
    """
    with scene(kind, programs, folder) as at:
        gate = at.blocker()
        submits = [1000 * at.submit(f"single{n}", ms) for n in range(min(singly, jobs))]
        rest = [at.job(f"job{n}", ms) for n in range(jobs - len(submits))]
        rate, stuck, feeder = _feed(at.peer, rest, limit_s)
        opened = time.monotonic()
        gate.open()

        def accepted() -> int:
            return len(submits) + at.peer.accepted

        _drain(at, opened, accepted, 2 * limit_s, feeder)
        runs = [run for run in at.trace.ended() if run.name != "gate"]
        gone_on = max((run.ended or 0.0 for run in runs), default=opened) - opened
        drain_rate = len(runs) / gone_on if gone_on > 0 else 0.0
        return Line(submits, accepted(), rate, stuck, gaps(at.trace.ended()), len(runs), drain_rate)


def _feed(
    peer: Peer, rest: Sequence[Sequence[str]], limit_s: float
) -> tuple[float, bool, threading.Thread]:
    """Queue the rest in a thread; jobs a second, whether it got stuck, and the thread."""
    over: list[float] = []

    def fill() -> None:
        peer.fill(rest)
        over.append(time.monotonic())

    began = moved = time.monotonic()
    feeder = threading.Thread(target=fill, daemon=True)
    feeder.start()
    seen, stuck = 0, False
    while feeder.is_alive() and time.monotonic() - began < limit_s and not stuck:
        feeder.join(0.02)
        if peer.accepted > seen:
            seen, moved = peer.accepted, time.monotonic()
        stuck = time.monotonic() - moved > STUCK_S
    peer.enough = feeder.is_alive() and not stuck
    seen, moved = (seen, moved) if stuck else (peer.accepted, over[0] if over else time.monotonic())
    return seen / max(moved - began, 1e-6), stuck, feeder


def _drain(
    at: Scene, opened: float, accepted: Callable[[], int], limit_s: float, feeder: threading.Thread
) -> None:
    """Wait until all have run, or until it shows that they will not in time."""
    while True:
        time.sleep(0.05)
        gone, done = time.monotonic() - opened, at.trace.done() - 1
        wanted = accepted()
        if not feeder.is_alive() and done >= wanted:
            return
        hopeless = gone > SAMPLE_S and done * limit_s < wanted * gone
        if gone > limit_s or hopeless:
            at.peer.enough = True
            return


def gaps(runs: Sequence[Run]) -> list[float]:
    """Milliseconds from the end of each job to the first instruction of the next."""
    return [1000 * (after.began - before.ended) for before, after in pairwise(runs) if before.ended]


def bare(programs: Path, folder: Path, jobs: int, ms: int) -> list[float]:
    """The same jobs by pidfd and Popen alone: the gaps that Python cannot go below."""
    machine = Machine(folder / "bare", programs)
    trace = Trace(machine.folder / "trace")
    for number in range(jobs):
        argv = [str(machine.probe), str(trace.path), str(number), str(ms)]
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        has_ended(child, 60)
        child.wait()
    found = gaps(trace.ended())
    machine.remove()
    return found


@dataclass(frozen=True, slots=True)
class Rest:
    """What a program uses: CPU as a share of one core, memory in MiB, processes."""

    cpu: float
    mem_mib: float
    processes: int


def rest(kind: type[Peer], programs: Path, folder: Path, seconds: float) -> tuple[Rest, Rest]:
    """With nothing to do, one job having run; and with one running and 50 waiting."""
    with scene(kind, programs, folder) as at:
        at.submit("first")
        if not until(lambda: bool(at.trace.ended()), 60):
            raise NotThereError("its first job does not run")
        time.sleep(8)  # ours leaves after 5 s
        idle = _watched(at.peer, seconds)
        gate = at.blocker()
        at.peer.fill([at.job(f"job{n}") for n in range(50)])
        time.sleep(2)
        waiting = _watched(at.peer, seconds)
        gate.open()
        return idle, waiting


def _watched(peer: Peer, seconds: float) -> Rest:
    before: Cost = peer.cost()
    began = time.monotonic()
    time.sleep(seconds)
    after = peer.cost()
    # A helper that ends in between takes its time with it.
    cpu = max(0.0, after.cpu_s - before.cpu_s) / (time.monotonic() - began)
    return Rest(cpu, after.mem_mib, after.processes)


@dataclass(frozen=True, slots=True)
class Crash:
    """What a kill -9 of the daemon left, one job running and three waiting."""

    lives: bool  # the running job
    kept: int  # of three
    fate: str  # what the program says became of the running job, which ended well
    shared: bool  # two jobs at once on the one card
    logged: bool
    alone: bool  # all of them ran without anybody's doing


def crash(kind: type[Peer], programs: Path, folder: Path) -> Crash:
    """Kill the process that dispatches; then its user brings it up again and queues one more."""
    with scene(kind, programs, folder) as at:
        gate = _kill_with_three_waiting(at)
        at.peer.restart()
        at.submit("E", 300)
        time.sleep(at.peer.patience_s / 2)  # long enough to start what it takes for startable
        gate.open()
        until(lambda: {"gate", *"BCDE"} <= _done(at), at.peer.patience_s, 0.05)
        a = at.ids["gate"]
        # After a loss the number may be another job's.
        fate = "" if a == at.ids["E"] else at.peer.fate(a)
        logged = a != at.ids["E"] and "gate" in at.peer.log(a).split()
        lives, shared = "gate" in _done(at), _overlap(at.trace)
        kept = len(set("BCD") & _done(at))
    with scene(kind, programs, folder) as at:
        _kill_with_three_waiting(at).open()
        alone = until(lambda: {"gate", *"BCD"} <= _done(at), at.peer.patience_s, 0.05)
    return Crash(lives, kept, fate, shared, logged, alone)


def _kill_with_three_waiting(at: Scene) -> Gate:
    gate = at.blocker()
    for name in "BCD":
        at.submit(name, 300)
    time.sleep(1)
    os.kill(at.peer.daemon(), signal.SIGKILL)
    time.sleep(1)
    return gate


def _done(at: Scene) -> set[str]:
    return {run.name for run in at.trace.ended()}


def _overlap(trace: Trace) -> bool:
    runs = trace.runs()
    return any(
        before.ended is None or after.began < before.ended for before, after in pairwise(runs)
    )


@dataclass(frozen=True, slots=True)
class Strangers:
    """Jobs submitted a second after somebody else took the card."""

    trials: int
    on_busy: int  # started although he was there
    after_s: list[float]  # from his leaving to the start of those that waited
    never: int


def strangers(kind: type[Peer], programs: Path, folder: Path, trials: int) -> Strangers:
    """He comes, a second later a job is submitted, and some seconds later he leaves."""
    dice, on_busy, never, after = random.Random(1), 0, 0, []
    with scene(kind, programs, folder) as at:
        at.submit("first")
        if not until(lambda: bool(at.trace.ended()), 60):
            raise NotThereError("its first job does not run")
        time.sleep(1)
        for number in range(trials):
            name = f"job{number}"
            he = Stranger(at.peer.machine)
            time.sleep(1)
            at.submit(name, 100)
            started = until(lambda name=name: at.trace.began(name) is not None, 3)
            time.sleep(dice.random() * 2)  # at any moment between two looks
            left = he.leave()
            if started:
                on_busy += 1
            elif until(lambda name=name: at.trace.began(name) is not None, at.peer.patience_s):
                after.append((at.trace.began(name) or 0.0) - left)
            else:
                never += 1
            until(lambda number=number: len(at.trace.ended()) == number + 2, 20)
            time.sleep(1)
    return Strangers(trials, on_busy, after, never)


def median(values: Sequence[float]) -> float | None:
    """The middle one, or None of none."""
    return statistics.median(values) if values else None
