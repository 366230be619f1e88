"""How good the expected starts are: real traces, the real policy, what it learns on the way.

Run it with ``GPUSCHED_TRACES=<folder> python benchmarks/forecasts.py``. Each trace is replayed as
in ``replay.py``, without walltimes; now and then the pending jobs are forecast, and later their
real starts are held against the ranges. What is learned are the jobs of the same name that have
ended within the trace. The traces have no names, so two kinds are made: ``group``: the group and
the width in GPUs alone; ``within 3``: also which of the ranges c/3 ... 3c the duration falls into,
as if a name told the duration to within a factor of 3.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from replay import EPOCH, Ours, Work, _card, _ended, _events, _pending, load

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import Allocation, ExpectedStart, Job
from gpusched_ipy.policy import Line, decide
from gpusched_ipy.policy.estimate import Estimate, Run, estimate, remaining_s
from gpusched_ipy.policy.forecast import forecast
from gpusched_ipy.snapshot import Snapshot

KEPT = 50  # past runs of a name, as learned.py keeps them
LINE = 300  # so many in line are forecast


@dataclass(frozen=True, slots=True)
class Said:
    """One forecast, and what came of it."""

    wait_s: float  # until the real start
    error_s: float  # the forecast later than the real start: positive
    where: int  # the real start: -1 before the range, 0 in it, 1 after it


class History:
    """What is known of each job at a moment."""

    def __init__(self, jobs: Sequence[Work], kind: str) -> None:
        self._past: defaultdict[object, deque[Run]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._known: dict[object, Estimate | None] = {}
        self._work = {job.id: job for job in jobs}
        self._name = {job.id: _name(job, kind) for job in jobs}

    def of(self, job: Job) -> Estimate | None:
        """The estimate for a job."""
        name = self._name[job.id]
        if name not in self._known:
            self._known[name] = estimate(list(self._past[name]))
        return self._known[name]

    def ended(self, number: int) -> None:
        """A job is over."""
        name = self._name[number]
        self._past[name].appendleft(Run(self._work[number].run_s, None))
        self._known.pop(name, None)


def _name(job: Work, kind: str) -> tuple[object, ...]:
    alike = () if kind == "group" else (math.floor(math.log(job.run_s, 9)),)
    return (job.group, job.gpus, *alike)


def replayed(
    jobs: Sequence[Work], gpus: int, settings: Settings, kind: str, every: int
) -> list[Said]:
    """All forecasts of one replay, and what came of them."""
    line, history, dice = Line(), History(jobs, kind), random.Random(3)
    way = Ours(settings, walltimes=False)
    taken: dict[int, Allocation] = {}
    active: dict[int, Job] = {}
    pending: dict[int, Job] = {}
    starts: dict[int, float] = {}
    told: list[tuple[int, float, ExpectedStart]] = []
    cards, worst_s = tuple(_card(number) for number in range(gpus)), 0.0

    def with_ends(moment: Instant) -> list[Allocation]:
        return [_with_end(one, history.of(active[one.job_id]), moment) for one in taken.values()]

    for step, (now, ended, arrived) in enumerate(_events(jobs, starts)):
        for number in ended:
            history.ended(number)
            active.pop(number)
        given_back = [_ended(taken.pop(number), EPOCH + now) for number in ended]
        for work in arrived:
            pending[work.id] = _pending(work, way)
            line.put(pending[work.id])
        moment = Instant(mono=EPOCH + now, wall=EPOCH + now)
        snapshot = Snapshot(
            backend="fake", source="replay", taken_at=0, taken_mono=moment.mono, gpus=cards
        )
        held = with_ends(moment)
        known = {number: found for number, job in pending.items() if (found := history.of(job))}
        expected = {number: one.mid_s for number, one in known.items()}
        longest = {number: one.high_s for number, one in known.items()}
        decision = decide(
            line, snapshot, [*held, *given_back], settings, moment, limit=0,
            expected=expected, longest=longest, worst_backlog_s=worst_s,
        )  # fmt: skip
        worst_s = max(worst_s, decision.backlog_s)
        for start in decision.starts:
            number = start.job_id
            starts[number] = now
            line.drop(number)
            active[number] = pending.pop(number)
            taken[number] = Allocation(job_id=number, gpus=start.gpus, started_mono=moment.mono)
        if step % every == 0 and pending:
            held = with_ends(moment)
            found = forecast(
                line, active, snapshot, held, settings, moment, history.of, limit=LINE,
                expected=expected, longest=longest, worst_backlog_s=worst_s,
            )  # fmt: skip
            chosen = dice.sample(sorted(found), min(6, len(found)))
            told += [(number, now, found[number]) for number in chosen]
    return [_said(starts[number], now, one) for number, now, one in told]


def _with_end(one: Allocation, known: Estimate | None, moment: Instant) -> Allocation:
    if known is None:
        return one
    left_s = remaining_s(known, moment.mono - one.started_mono, 0.5)
    return replace(one, expected_end_mono=moment.mono + left_s)


def _said(start_s: float, now: float, one: ExpectedStart) -> Said:
    real = EPOCH + start_s
    where = -1 if real < one.low - 1e-6 else 1 if real > one.high + 1e-6 else 0
    return Said(wait_s=start_s - now, error_s=one.at - real, where=where)


def row(found: Sequence[Said], mean_s: float) -> Iterator[str]:
    """The figures of one replay."""
    errors = [abs(one.error_s) for one in found]
    shares = [abs(one.error_s) / one.wait_s for one in found if one.wait_s > 0]
    yield f"{len(found)}"
    for where in (0, -1, 1):
        yield f"{100 * sum(one.where == where for one in found) / len(found):.0f}"
    yield f"{statistics.median(errors) / mean_s:.2f}"
    yield f"{100 * statistics.median(shares):.0f}" if shares else "-"
    yield f"{statistics.median(one.error_s for one in found) / mean_s:+.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1500)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.9])
    parser.add_argument("--orders", nargs="+", default=["fair", "shortest"])
    parser.add_argument("--traces", nargs="+", default=None, help="names without .csv")
    parser.add_argument("--every", type=int, default=10, help="forecast at one event in so many")
    options = parser.parse_args()
    folder = os.environ.get("GPUSCHED_TRACES")
    if not folder:
        sys.exit("GPUSCHED_TRACES names the folder of the traces; it is not set")
    print(
        "| trace | GPUs | load | order | names | forecasts | in the range % | earlier % | later % "
        "| median error, mean durations | median error, % of the wait | bias |"
    )
    print("| --- " * 12 + "|")
    for name in options.traces or sorted(path.stem for path in Path(folder).glob("*.csv")):
        for gpus in options.gpus:
            for factor in options.loads:
                jobs = load(Path(folder) / f"{name}.csv", gpus, factor, options.jobs)
                mean_s = statistics.fmean(job.run_s for job in jobs)
                for order in options.orders:
                    for kind in ("group", "within 3"):
                        found = replayed(jobs, gpus, Settings(order=order), kind, options.every)
                        cells = [name, str(gpus), f"{factor:g}", order, kind, *row(found, mean_s)]
                        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
