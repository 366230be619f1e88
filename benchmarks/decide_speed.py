"""How long one decision takes: pending jobs from 100 to 100,000 on 8 GPUs.

Run it with ``python benchmarks/decide_speed.py``. Beside each figure stands the same work done in
the plainest way (sort every pending job by effective priority), in the same run and interleaved.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from time import perf_counter

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import (
    Allocation,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Request,
    effective_priority,
)
from gpusched_ipy.policy import Line, decide
from gpusched_ipy.snapshot import Gpu, Snapshot

GPUS = 8
NOW = Instant(mono=1e6, wall=1.7e9)


def pending(count: int, seed: int) -> list[Job]:
    """Jobs of 12 notebooks: mostly one GPU, some wider, a tenth held, shared or with a walltime."""
    dice = random.Random(seed)
    return [_job(number, dice) for number in range(1, count + 1)]


def _job(number: int, dice: random.Random) -> Job:
    request = Request(
        gpus=dice.choice((1, 1, 1, 1, 1, 2, 4)),
        mem_bytes=8 << 30 if dice.random() < 0.1 else None,
        time_s=dice.uniform(60, 7200) if dice.random() < 0.1 else None,
    )
    owner = f"notebook {dice.randrange(12)}"
    spec = JobSpec(uid=str(number), kind=JobKind.COMMAND, name="job", request=request, owner=owner)
    return Job(
        id=number,
        spec=spec,
        state=JobState.PENDING,
        priority=dice.choice((0, 0, 0, 1, 3)),
        held=dice.random() < 0.1,
        queued_mono=NOW.mono - dice.uniform(0, 5e4),
    )


def machine(free: int) -> tuple[Snapshot, list[Allocation]]:
    """Eight cards, of which ``free`` are idle and the others have jobs of ours."""
    gpus = tuple(
        Gpu(
            uuid=f"GPU-{n}",
            index=n,
            utilization=0.0,
            mem_used_bytes=0,
            mem_total_bytes=80 << 30,
            processes=(),
        )
        for n in range(GPUS)
    )
    snapshot = Snapshot(
        backend="fake", source="benchmark", taken_at=NOW.wall, taken_mono=NOW.mono, gpus=gpus
    )
    taken = [
        Allocation(job_id=-n, gpus=(f"GPU-{n}",), expected_end_mono=NOW.mono + 60.0 * n)
        for n in range(free, GPUS)
    ]
    return snapshot, taken


def medians(cases: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each case, median; the cases take turns."""
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name, case in cases.items():
            begun = perf_counter()
            case(turn)
            spent[name].append(1000 * (perf_counter() - begun))
    return {name: statistics.median(values) for name, values in spent.items()}


def measure(count: int, rounds: int) -> dict[str, float]:
    """All cases for one length of the line."""
    jobs, settings = pending(count, seed=count), Settings()
    line = Line(jobs)
    busy, one_free = machine(0), machine(1)

    def event(turn: int) -> object:
        job = jobs[turn * 7919 % count]
        line.put(job)
        return decide(line, *one_free, settings, NOW)

    return medians(
        {
            "sort": lambda _: sorted(
                jobs, key=lambda job: (-effective_priority(job, 600, NOW.mono), job.id)
            ),
            "scratch, one idle": lambda _: decide(jobs, *one_free, settings, NOW),
            "scratch, none idle": lambda _: decide(jobs, *busy, settings, NOW),
            "one event, one idle": event,
            "one event, none idle": lambda _: decide(line, *busy, settings, NOW),
        },
        rounds,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    for position, count in enumerate(options.counts):
        found = measure(count, options.rounds)
        if not position:
            print("| pending | " + " | ".join(f"{name}, ms" for name in found) + " |")
            print("| --- " * (len(found) + 1) + "|")
        print(f"| {count:,} | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |")


if __name__ == "__main__":
    main()
