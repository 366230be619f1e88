"""What past runs say of the next one: a robust spread of durations and a peak of memory. Pure.

Recent runs weigh more, outliers move a quantile by one run's weight only, and few runs widen the
spread: of one run nobody knows how far the next is from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import NormalDist

# After so many newer runs a run weighs half.
HALF_LIFE = 10.0
# The spread is kept as the middles of so many equally likely shares.
SHARES = 16
# How uncertain a single run leaves the next: 80 % within a factor of 3. Falls with the runs.
LONE_SIGMA = log(3.0) / 1.2816
# What waits together under one name is alike, as the members of a sweep are: this much of the
# spread is common to all of them.
ALIKE = 0.7
# With fewer runs the peak of memory is not relied upon, and beyond them this much is added: a peak
# between two readings is not seen.
MEMORY_RUNS = 3
MEMORY_HEADROOM = 1.1
# No run is taken for shorter: the logarithm of nothing is not a number.
LEAST_S = 0.01

NORMAL = tuple(NormalDist().inv_cdf((share + 0.5) / SHARES) for share in range(SHARES))


@dataclass(frozen=True, slots=True)
class Run:
    """One past run."""

    run_s: float | None  # None: it did not complete, so how long it would have run is unknown
    mem_bytes: int | None  # the peak on each of its GPUs


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is expected of the next run."""

    runs: int  # completed ones that it rests on; 0 where only its walltime is known
    shares: tuple[float, ...]  # s, ascending: the middles of equally likely shares
    doubt: float = 0.0  # common to all jobs of the estimate: the sigma of a factor
    mem_bytes: int | None = None  # needed on each GPU, where enough runs tell

    @property
    def mid_s(self) -> float:
        """The median, s."""
        return (self.shares[SHARES // 2 - 1] + self.shares[SHARES // 2]) / 2

    @property
    def high_s(self) -> float:
        """Nine of ten runs are over by then, s."""
        return self.shares[-2]


def estimate(runs: Sequence[Run]) -> Estimate | None:
    """What past runs say of the next; None where none of them completed.

    Args:
        runs: the newest first.
    """
    weights = [0.5 ** (place / HALF_LIFE) for place in range(len(runs))]
    known = [
        (log(max(run.run_s, LEAST_S)), weight)
        for run, weight in zip(runs, weights, strict=True)
        if run.run_s is not None
    ]
    if not known:
        return None
    count = len(known)
    lone = LONE_SIGMA / count
    middles = _quantiles(sorted(known))
    shares = tuple(exp(at + lone * z) for at, z in zip(middles, NORMAL, strict=True))
    spread = (middles[13] - middles[2]) / 2  # of 10 shares in 16: about one sigma each way
    return Estimate(
        runs=count,
        shares=shares,
        doubt=ALIKE * spread + lone / 2,
        mem_bytes=_memory(runs),
    )


def by_walltime(limit_s: float, known: Estimate | None = None) -> Estimate:
    """An estimate that ends at a walltime; without history anything up to it is as likely."""
    if known is None:
        return Estimate(0, tuple(limit_s * (share + 0.5) / SHARES for share in range(SHARES)))
    shares = tuple(min(share, limit_s) for share in known.shares)
    return Estimate(known.runs, shares, known.doubt, known.mem_bytes)


def remaining_s(known: Estimate, ran_s: float, share: float) -> float:
    """How long a job goes on that has run ``ran_s``, where ``share`` (0-1) of such are shorter.

    One that has outlived every run known is taken to go on for up to as long again.
    """
    longer = [total for total in known.shares if total > ran_s]
    if not longer:
        return ran_s * share
    return longer[int(share * len(longer))] - ran_s


def _quantiles(points: Sequence[tuple[float, float]]) -> list[float]:
    """The middles of the equal shares of a weighted, sorted sample, straight lines between."""
    total = sum(weight for _, weight in points)
    places, reached = [], 0.0
    for value, weight in points:
        places.append(((reached + weight / 2) / total, value))
        reached += weight
    found, at = [], 0
    for share in range(SHARES):
        wanted = (share + 0.5) / SHARES
        while at < len(places) and places[at][0] < wanted:
            at += 1
        if at == 0 or at == len(places):
            found.append(places[min(at, len(places) - 1)][1])
            continue
        (low, before), (high, after) = places[at - 1], places[at]
        found.append(before + (after - before) * (wanted - low) / (high - low))
    return found


def _memory(runs: Sequence[Run]) -> int | None:
    """The largest peak of all runs, also of those that failed: it is a bound, not a mean."""
    peaks = [run.mem_bytes for run in runs if run.mem_bytes is not None]
    return int(max(peaks) * MEMORY_HEADROOM) if len(peaks) >= MEMORY_RUNS else None
