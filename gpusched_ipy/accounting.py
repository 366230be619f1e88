"""What jobs have cost: sums by name and by day, and how much of the box was used. Pure.

What no reading told stays unknown: a sum counts only what is known, and is None where nothing is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any, NamedTuple

from gpusched_ipy.job import FINAL, JobState, Place
from gpusched_ipy.records import iso
from gpusched_ipy.text import (
    clean,
    format_bytes,
    format_duration,
    format_energy,
    format_percent,
)

NAME_LIMIT = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one job; times are wall clock (s)."""

    id: int
    name: str
    state: JobState
    submitted_at: float
    started_at: float | None
    ended_at: float | None  # None: it runs
    run_s: float | None
    gpus: tuple[str, ...]
    peak_mem_bytes: int | None
    mean_utilization: float | None  # 0-1
    energy_j: float | None
    place: Place | None = None  # of a job of an engine: its GPUs are none of this machine's

    @property
    def wait_s(self) -> float | None:
        """From submit to start, or to its end without a start."""
        until = self.started_at if self.started_at is not None else self.ended_at
        return None if until is None else max(0.0, until - self.submitted_at)

    @property
    def gpu_s(self) -> float | None:
        """Run time times GPUs, those of an engine as they were asked for; None for a job that never
        ran."""
        count = len(self.gpus) if self.place is None else self.place.count
        return None if self.run_s is None else self.run_s * count


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The sums of the jobs of one name, or of one day."""

    key: str
    jobs: int
    outcomes: Mapping[str, int]  # state → jobs
    median_wait_s: float | None
    median_run_s: float | None
    gpu_s: float  # of GPUs of this machine …
    engine_gpu_s: float  # … and of those of engines
    peak_mem_bytes: int | None  # the largest of a job
    mean_utilization: float | None  # of the GPU seconds for which it is known
    energy_j: float | None


def by_name(outcome: Outcome) -> str:
    """The name of a job."""
    return outcome.name


def by_day(outcome: Outcome) -> str:
    """The day on which a job ended, by this machine's clock: ``2026-11-22``."""
    ended = datetime.fromtimestamp(outcome.ended_at or outcome.submitted_at, UTC)
    return ended.astimezone().date().isoformat()


def accounts(outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> list[Account]:
    """The sums by ``key``, in its order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    return [_account(name, groups[name]) for name in sorted(groups)]


def _account(key: str, jobs: Sequence[Outcome]) -> Account:
    waits = [job.wait_s for job in jobs if job.wait_s is not None]
    ran = [job.run_s for job in jobs if job.run_s is not None]
    peaks = [job.peak_mem_bytes for job in jobs if job.peak_mem_bytes is not None]
    energy = [job.energy_j for job in jobs if job.energy_j is not None]
    return Account(
        key=key,
        jobs=len(jobs),
        outcomes=dict(sorted(Counter(str(job.state) for job in jobs).items())),
        median_wait_s=median(waits) if waits else None,
        median_run_s=median(ran) if ran else None,
        gpu_s=sum(job.gpu_s or 0.0 for job in jobs if job.place is None),
        engine_gpu_s=sum(job.gpu_s or 0.0 for job in jobs if job.place is not None),
        peak_mem_bytes=max(peaks) if peaks else None,
        mean_utilization=_mean_utilization(jobs),
        energy_j=sum(energy) if energy else None,
    )


def _mean_utilization(jobs: Iterable[Outcome]) -> float | None:
    known = [
        (job.mean_utilization, job.gpu_s)
        for job in jobs
        if job.mean_utilization is not None and job.gpu_s
    ]
    total = sum(seconds for _, seconds in known)
    return sum(share * seconds for share, seconds in known) / total if total else None


def account_json(account: Account, by: str) -> dict[str, Any]:
    """The sums as other programs get them; ``by`` names the key: ``name`` or ``day``."""
    return {
        by: account.key,
        "jobs": account.jobs,
        "outcomes": dict(account.outcomes),
        "median_wait_s": _rounded(account.median_wait_s),
        "median_run_s": _rounded(account.median_run_s),
        "gpu_s": _rounded(account.gpu_s),
        "engine_gpu_s": _rounded(account.engine_gpu_s),
        "peak_mem_bytes": account.peak_mem_bytes,
        "mean_utilization": _rounded(account.mean_utilization, 4),
        "energy_j": _rounded(account.energy_j),
    }


def account_columns(by: str) -> tuple[str, ...]:
    """The headings of :func:`account_row`."""
    return (by, "jobs", "outcomes", "wait", "run", "GPU time", "peak memory", "utilization",
            "energy")  # fmt: skip


def account_row(account: Account) -> tuple[str, ...]:
    """The sums as a row of a table; waits and runs are medians."""
    outcomes = ", ".join(f"{count} {state}" for state, count in account.outcomes.items())
    return (
        clean(account.key, NAME_LIMIT),
        str(account.jobs),
        outcomes,
        format_duration(account.median_wait_s),
        format_duration(account.median_run_s),
        _gpu_time(account.gpu_s, account.engine_gpu_s),
        format_bytes(account.peak_mem_bytes),
        format_percent(account.mean_utilization),
        format_energy(account.energy_j),
    )


OUTCOME_COLUMNS = ("id", "name", "outcome", "ended", "wait", "run", "GPU time", "peak memory",
                   "utilization", "energy")  # fmt: skip


def outcome_row(outcome: Outcome) -> tuple[str, ...]:
    """One job as a row of a table."""
    ended = datetime.fromtimestamp(outcome.ended_at or outcome.submitted_at, UTC).astimezone()
    return (
        str(outcome.id),
        clean(outcome.name, NAME_LIMIT),
        str(outcome.state),
        ended.strftime("%Y-%m-%d %H:%M"),
        format_duration(outcome.wait_s),
        format_duration(outcome.run_s),
        format_duration(outcome.gpu_s) + (f" ({outcome.place.engine})" if outcome.place else ""),
        format_bytes(outcome.peak_mem_bytes),
        format_percent(outcome.mean_utilization),
        format_energy(outcome.energy_j),
    )


class BoxUse(NamedTuple):
    """How much of the machine's GPUs the jobs of the queue have used over a time."""

    since: float  # wall clock, s
    until: float
    gpus: int
    jobs: int  # that had a GPU within it, here or at an engine
    ended: Mapping[str, int]  # state → jobs that ended within it
    held: float | None  # 0-1: the time for which a job had a GPU, of all GPUs
    utilization: float | None  # 0-1: of all GPU time, counting time without a job as 0
    gpu_s: float
    engine_gpu_s: float  # of GPUs of engines; in none of the other figures of GPUs
    energy_j: float | None


def box_use(outcomes: Sequence[Outcome], gpus: int, since: float, until: float) -> BoxUse:
    """The use of ``gpus`` GPUs between two moments.

    A GPU that several jobs share counts once. The utilization counts a job's mean for the time in
    which it ran, so that jobs whose utilization nobody read count as 0: it is a lower bound.
    """
    ran = [one for one in outcomes if one.started_at is not None]
    spans: dict[str, list[tuple[float, float]]] = {}
    busy_s, known, gpu_s, engine_gpu_s = 0.0, False, 0.0, 0.0
    for one in ran:
        start, end = max(since, one.started_at or since), min(until, one.ended_at or until)
        if end <= start:
            continue
        if one.place is not None:
            engine_gpu_s += (end - start) * one.place.count
            continue
        gpu_s += (end - start) * len(one.gpus)
        for gpu in one.gpus:
            spans.setdefault(gpu, []).append((start, end))
        if one.mean_utilization is not None:
            known = True
            busy_s += one.mean_utilization * (end - start) * len(one.gpus)
    held_s = sum(_union_s(found) for found in spans.values())
    whole_s = gpus * (until - since)
    energy = [one.energy_j for one in ran if one.energy_j is not None]
    over = [one for one in outcomes if one.state in FINAL and (one.ended_at or 0.0) >= since]
    return BoxUse(
        since=since,
        until=until,
        gpus=gpus,
        jobs=len(ran),
        ended=dict(sorted(Counter(str(one.state) for one in over).items())),
        held=min(1.0, held_s / whole_s) if whole_s else None,
        utilization=min(1.0, busy_s / whole_s) if whole_s and known else None,
        gpu_s=gpu_s,
        engine_gpu_s=engine_gpu_s,
        energy_j=sum(energy) if energy else None,
    )


def use_json(use: BoxUse) -> dict[str, Any]:
    """The use as other programs get it."""
    return {
        "since": iso(use.since),
        "until": iso(use.until),
        "gpus": use.gpus,
        "jobs": use.jobs,
        "ended": dict(use.ended),
        "held": _rounded(use.held, 4),
        "utilization": _rounded(use.utilization, 4),
        "gpu_s": _rounded(use.gpu_s),
        "engine_gpu_s": _rounded(use.engine_gpu_s),
        "energy_j": _rounded(use.energy_j),
    }


USE_COLUMNS = ("GPUs", "jobs", "ended", "held by jobs", "utilization", "GPU time", "energy")


def use_row(use: BoxUse) -> tuple[str, ...]:
    """The use as a row of a table."""
    return (
        str(use.gpus),
        str(use.jobs),
        ", ".join(f"{count} {state}" for state, count in use.ended.items()),
        format_percent(use.held),
        format_percent(use.utilization),
        _gpu_time(use.gpu_s, use.engine_gpu_s),
        format_energy(use.energy_j),
    )


def _gpu_time(here_s: float, engines_s: float) -> str:
    """GPU time for people; what engines gave is told apart."""
    if not engines_s:
        return format_duration(here_s)
    return f"{format_duration(here_s)} + {format_duration(engines_s)} at engines"


def _union_s(spans: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
