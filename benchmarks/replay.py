"""Real traces through the real ``policy.decide`` under a simulated clock, beside the classics.

Run it with ``GPUSCHED_TRACES=<folder> python benchmarks/replay.py``; ``--jobs 1000`` is a short
look. Each trace is replayed on 1, 4 and 8 GPUs at loads 0.7, 0.9 and 1.1: jobs wider than the box
are dropped, durations capped at 8 h, arrivals rescaled. Waits are quoted in mean job durations.
The references (FIFO, EASY and shortest first with perfect walltimes, first fit) are a few lines
each and run in the same harness on the same jobs.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import Allocation, Job, JobKind, JobSpec, JobState, Request
from gpusched_ipy.policy import Line, backlog_s, decide
from gpusched_ipy.snapshot import Gpu, Snapshot

CAP_S = 8 * 3600.0
SIGMA = 1.1 / 1.96  # a lognormal error: within a factor of 3 in 95 % of the jobs
SLOWDOWN_FLOOR_S = 10.0  # a shorter job counts as so long in the bounded slowdown
EPOCH = 1e6  # of the simulated clock
AGING_BACKLOG = 0.4


@dataclass(frozen=True, slots=True)
class Work:
    """One job of a trace."""

    id: int
    submit_s: float
    run_s: float
    gpus: int
    priority: int
    group: str
    guess_s: float  # what history would say


@dataclass(slots=True)
class Running:
    """A job that runs, for the reference policies."""

    end_s: float
    gpus: int


Reference = Callable[[list[Work], int, list[Running], float], Iterator[Work]]


def load(path: Path, gpus: int, load_factor: float, limit: int, seed: int = 7) -> list[Work]:
    """The jobs of a trace, fitted to a box of ``gpus``."""
    dice = random.Random(seed)
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if int(row["gpus"]) <= gpus][:limit]
    runs = [min(CAP_S, max(1.0, float(row["duration_s"]))) for row in rows]
    submits = [float(row["submit_s"]) for row in rows]
    area = sum(run * int(row["gpus"]) for run, row in zip(runs, rows, strict=True))
    first, span = submits[0], submits[-1] - submits[0]
    scale = area / (gpus * load_factor * span)
    return [
        Work(
            id=number,
            submit_s=(submit - first) * scale,
            run_s=run,
            gpus=int(row["gpus"]),
            priority=dice.choices((0, 1, 2), (20, 60, 20))[0],
            group=row["group"],
            guess_s=run * dice.lognormvariate(0, SIGMA),
        )
        for number, (row, run, submit) in enumerate(zip(rows, runs, submits, strict=True), 1)
    ]


def fifo(queue: list[Work], free: int, _: list[Running], __: float) -> Iterator[Work]:
    """Strict order: the first that does not fit stops all."""
    for job in queue:
        if job.gpus > free:
            return
        free -= job.gpus
        yield job


def first_fit(queue: list[Work], free: int, _: list[Running], __: float) -> Iterator[Work]:
    """Whoever fits, in order of submission."""
    for job in queue:
        if job.gpus <= free:
            free -= job.gpus
            yield job


def shortest(queue: list[Work], free: int, _: list[Running], __: float) -> Iterator[Work]:
    """Whoever fits, the shortest first, with perfect knowledge."""
    for job in sorted(queue, key=lambda job: job.run_s):
        if job.gpus <= free:
            free -= job.gpus
            yield job


def easy(queue: list[Work], free: int, running: list[Running], now: float) -> Iterator[Work]:
    """FIFO with one reservation, and backfill that keeps it, by perfect walltimes."""
    ends = sorted((one.end_s, one.gpus) for one in running)
    position = 0
    while position < len(queue) and queue[position].gpus <= free:
        job = queue[position]
        free -= job.gpus
        ends.append((now + job.run_s, job.gpus))
        yield job
        position += 1
    if position == len(queue) or not free:
        return
    ends.sort()
    due, extra = now, free
    for end, gpus in ends:
        due, extra = end, extra + gpus
        if extra >= queue[position].gpus:
            break
    extra -= queue[position].gpus
    for job in queue[position + 1 :]:
        if job.gpus > free:
            continue
        if now + job.run_s > due:
            if job.gpus > extra:
                continue
            extra -= job.gpus
        free -= job.gpus
        yield job


def run_reference(jobs: Sequence[Work], gpus: int, policy: Reference) -> dict[int, float]:
    """When each job starts under a reference policy."""
    queue: list[Work] = []
    running: dict[int, Running] = {}
    starts: dict[int, float] = {}
    free = gpus
    for now, ended, arrived in _events(jobs, starts):
        for number in ended:
            free += running.pop(number).gpus
        queue.extend(arrived)
        begun = list(policy(queue, free, list(running.values()), now)) if free else []
        for job in begun:
            starts[job.id] = now
            running[job.id] = Running(now + job.run_s, job.gpus)
            free -= job.gpus
        if begun:
            queue = [job for job in queue if job.id not in starts]
    return starts


@dataclass(frozen=True, slots=True)
class Ours:
    """One way to run the real policy."""

    settings: Settings
    priorities: bool = False
    walltimes: bool = True  # given, and perfect
    guesses: bool = False  # learned, within a factor of 3
    owners: bool = False  # each group of the trace is a notebook of its own


def run_ours(jobs: Sequence[Work], gpus: int, way: Ours) -> dict[int, float]:
    """When each job starts under ``policy.decide``."""
    line = Line()
    taken: dict[int, Allocation] = {}
    starts: dict[int, float] = {}
    by_id = {job.id: job for job in jobs}
    cards = tuple(_card(number) for number in range(gpus))
    expected = {job.id: job.guess_s for job in jobs} if way.guesses else {}
    worst_s = 0.0
    for now, ended, arrived in _events(jobs, starts):
        given_back = [_ended(taken.pop(number), EPOCH + now) for number in ended]
        for job in arrived:
            line.put(_pending(job, way))
        moment = Instant(mono=EPOCH + now, wall=EPOCH + now)
        snapshot = Snapshot(
            backend="fake", source="replay", taken_at=0, taken_mono=moment.mono, gpus=cards
        )
        held = [*taken.values(), *given_back]
        scene = (snapshot, held, way.settings, moment)
        work_s = backlog_s(line, *scene) if way.settings.aging_backlog else 0.0
        decision = decide(
            line, *scene, limit=0, expected=expected, worst_backlog_s=worst_s, backlog_s=work_s
        )
        worst_s = max(worst_s, decision.backlog_s)
        for start in decision.starts:
            starts[start.job_id] = now
            line.drop(start.job_id)
            taken[start.job_id] = Allocation(
                job_id=start.job_id,
                gpus=start.gpus,
                expected_end_mono=start.expected_end_mono,
                owner=by_id[start.job_id].group if way.owners else "",
            )
    return starts


def _card(number: int) -> Gpu:
    return Gpu(
        uuid=f"GPU-{number}",
        index=number,
        utilization=0.0,
        mem_used_bytes=0,
        mem_total_bytes=80 << 30,
        processes=(),
    )


def _ended(allocation: Allocation, mono: float) -> Allocation:
    return Allocation(
        job_id=allocation.job_id,
        gpus=allocation.gpus,
        ended_mono=mono,
        owner=allocation.owner,
    )


def _pending(work: Work, way: Ours) -> Job:
    request = Request(gpus=work.gpus, time_s=work.run_s if way.walltimes else None)
    owner = work.group if way.owners else ""
    return Job(
        id=work.id,
        spec=JobSpec(
            uid=str(work.id), kind=JobKind.COMMAND, name="job", request=request, owner=owner
        ),
        state=JobState.PENDING,
        priority=work.priority if way.priorities else 0,
        queued_mono=EPOCH + work.submit_s,
    )


def _events(
    jobs: Sequence[Work], starts: dict[int, float]
) -> Iterator[tuple[float, list[int], list[Work]]]:
    """Each moment at which something ends or arrives; ``starts`` is filled by the caller."""
    ends: list[tuple[float, int]] = []
    seen: set[int] = set()
    position = 0
    while position < len(jobs) or ends:
        arrival = jobs[position].submit_s if position < len(jobs) else math.inf
        now = min(arrival, ends[0][0] if ends else math.inf)
        ended, arrived = [], []
        while ends and ends[0][0] <= now:
            ended.append(heappop(ends)[1])
        while position < len(jobs) and jobs[position].submit_s <= now:
            arrived.append(jobs[position])
            position += 1
        before = len(starts)
        yield now, ended, arrived
        if len(starts) > before:
            for number in list(starts)[before:]:
                if number not in seen:
                    seen.add(number)
                    heappush(ends, (now + jobs[number - 1].run_s, number))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run came to; waits in mean job durations."""

    mean: float
    median: float
    p95: float
    longest: float
    slowdown: float
    utilization: float
    makespan: float  # over its lower bound
    later: float  # share of jobs that start more than a mean duration later than under FIFO
    high: float  # mean wait of the highest priority
    low: float  # and of the lowest


def figures(
    jobs: Sequence[Work], gpus: int, starts: dict[int, float], under_fifo: dict[int, float]
) -> Figures:
    """The figures of one run."""
    mean_s = statistics.fmean(job.run_s for job in jobs)
    waits = sorted((starts[job.id] - job.submit_s) / mean_s for job in jobs)
    end = max(starts[job.id] + job.run_s for job in jobs)
    last = jobs[-1].submit_s
    used = sum(
        job.gpus * max(0.0, min(last, starts[job.id] + job.run_s) - min(last, starts[job.id]))
        for job in jobs
    )
    area = sum(job.gpus * job.run_s for job in jobs)
    bound = max(area / gpus, max(job.submit_s + job.run_s for job in jobs))
    slow = [
        max(1.0, (starts[job.id] - job.submit_s + job.run_s) / max(job.run_s, SLOWDOWN_FLOOR_S))
        for job in jobs
    ]

    def of_priority(priority: int) -> float:
        chosen = [starts[job.id] - job.submit_s for job in jobs if job.priority == priority]
        return statistics.fmean(chosen) / mean_s if chosen else math.nan

    return Figures(
        mean=statistics.fmean(waits),
        median=statistics.median(waits),
        p95=waits[int(0.95 * len(waits))],
        longest=waits[-1],
        slowdown=statistics.fmean(slow),
        utilization=used / (gpus * last),
        makespan=end / bound,
        later=sum(starts[job.id] - under_fifo[job.id] > mean_s for job in jobs) / len(jobs),
        high=of_priority(2),
        low=of_priority(0),
    )


REFERENCES: dict[str, Reference] = {
    "FIFO": fifo,
    "EASY": easy,
    "first fit": first_fit,
    "SJF": shortest,
}


def ways(wait_s: float, steps: Sequence[float]) -> dict[str, Ours]:
    """The ways in which the real policy is run; ``steps``: aging, in mean waits under EASY."""
    found = {
        "fair": Ours(Settings()),
        "fair, by notebook": Ours(Settings(), owners=True),
        "shortest, learned": Ours(Settings(order="shortest"), walltimes=False, guesses=True),
    }
    by_work = Settings(aging_s=1.0, aging_backlog=AGING_BACKLOG)
    found["priorities, by backlog"] = Ours(by_work, priorities=True)
    for step in steps:
        name = f"priorities, aging {step:g}"
        found[name] = Ours(Settings(aging_s=max(1.0, step * wait_s)), priorities=True)
    return found


def table(
    jobs: Sequence[Work], gpus: int, steps: Sequence[float], only: Sequence[str]
) -> Iterator[str]:
    """The rows of one trace, box and load."""
    runs = {name: run_reference(jobs, gpus, policy) for name, policy in REFERENCES.items()}
    wait_s = statistics.fmean(runs["EASY"][job.id] - job.submit_s for job in jobs)
    for name, way in ways(wait_s, steps).items():
        if not only or any(name.startswith(one) for one in only):
            runs[name] = run_ours(jobs, gpus, way)
    results = {name: figures(jobs, gpus, run, runs["FIFO"]) for name, run in runs.items()}
    base, in_order = results["EASY"], results["FIFO"]
    for name, found in results.items():
        yield (
            f"| {name} | {found.mean:.2f} | {_over(found.mean, base.mean)} | {found.median:.2f} "
            f"| {found.p95:.1f} | {found.longest:.1f} | {_over(found.longest, in_order.longest)} "
            f"| {100 * found.later:.1f} | {found.slowdown:.1f} | {found.utilization:.2f} "
            f"| {found.makespan:.2f} | {_over(found.high, base.mean)} "
            f"| {_over(found.low, base.mean)} |"
        )


def _over(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else "-"


HEAD = (
    "| policy | mean wait | / EASY | median | p95 | max | max / FIFO | later than FIFO % "
    "| slowdown | utilization | makespan | high / EASY | low / EASY |"
)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=10**9, help="only the first so many")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.9, 1.1])
    parser.add_argument("--traces", nargs="+", default=None, help="names without .csv")
    parser.add_argument("--aging", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, default=7, help="who gets which priority, and guesses")
    parser.add_argument("--only", nargs="+", default=[], help="ways that start so")
    options = parser.parse_args()
    folder = os.environ.get("GPUSCHED_TRACES")
    if not folder:
        sys.exit("GPUSCHED_TRACES names the folder of the traces; it is not set")
    names = options.traces or sorted(path.stem for path in Path(folder).glob("*.csv"))
    for name in names:
        for gpus in options.gpus:
            for factor in options.loads:
                path = Path(folder) / f"{name}.csv"
                jobs = load(path, gpus, factor, options.jobs, options.seed)
                print(f"\n### {name}, {gpus} GPUs, load {factor:g}, {len(jobs)} jobs\n")
                print(HEAD)
                print("| --- " * HEAD.count(" | ") + "| --- |")
                for row in table(jobs, gpus, options.aging, options.only):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
