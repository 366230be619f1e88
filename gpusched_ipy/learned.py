"""What the jobs of the past teach: how long a job will run, and how much memory it will need.

Runs of the same command or cell under the same name count where there are two or more, else all
runs of its name. Nothing is read before a job of that name is asked about, and then once; from
there on the memory follows the record as jobs end. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

from gpusched_ipy.chronicle import Chronicle
from gpusched_ipy.job import Allocation, Job, JobKind, JobState
from gpusched_ipy.policy.estimate import Estimate, Run, by_walltime, estimate, remaining_s
from gpusched_ipy.policy.standing import Known

Value = TypeVar("Value")
_Key = tuple[Any, ...]

RUNS = 50  # of one name, the newest
NAMES = 10_000  # kept in memory
ENOUGH = 2  # runs of the very same command or cell, to count alone
# Names that a submit gives where the user gives none: jobs that share them have nothing in common.
_NAMELESS = frozenset(str(kind) for kind in JobKind)
_AGE = attrgetter("ended_at", "id")


class Learned:
    """The runs of every name that was asked about. Not safe from several threads at once."""

    def __init__(self, store: Chronicle) -> None:
        self._store = store
        self._past: dict[str, dict[int, Job]] = {}
        self._by_name: dict[str, _Runs] = {}
        self._by_key: dict[_Key, Estimate | None] = {}
        self._by_job: dict[int, Estimate | None] = {}

    def saw(self, job: Job) -> None:
        """A job has ended, or more is known of one that has."""
        past = self._past.get(job.name)
        if past is None or job.run_s is None:
            return
        past[job.id] = job
        if len(past) > 2 * RUNS:
            newest = sorted(past.values(), key=_AGE)[-RUNS:]
            self._past[job.name] = {one.id: one for one in newest}
        self._by_name.pop(job.name, None)
        self._by_key.clear()
        self._by_job.clear()

    def of(self, job: Job) -> Estimate | None:
        """What is expected of ``job``, its walltime not counted; None where nothing is known."""
        try:
            return self._by_job[job.id]
        except KeyError:
            found = self._by_job[job.id] = self._look_up(job)
            return found

    def within_walltime(self, job: Job) -> Estimate | None:
        """What is expected of ``job``, which its walltime ends; None where nothing is known."""
        known, limit_s = self.of(job), job.request.time_s
        return known if limit_s is None else by_walltime(limit_s, known)

    def durations(self, jobs: Mapping[int, Job]) -> Mapping[int, float]:
        """The median of the seconds that each of ``jobs`` is expected to run."""
        return _Seen(jobs, self.of, lambda known: known.mid_s)

    def known(self, jobs: Mapping[int, Job]) -> Known:
        """What a decision over ``jobs`` takes of all this."""
        return {
            "expected": self.durations(jobs),
            "longest": _Seen(jobs, self.of, lambda known: known.high_s),
            "memory": _Seen(jobs, self.of, lambda known: known.mem_bytes),
        }

    def with_ends(
        self, allocations: Iterable[Allocation], jobs: Mapping[int, Job], mono: float
    ) -> list[Allocation]:
        """``allocations``, with an end expected where there is no walltime but a history."""
        return [self._with_end(one, jobs.get(one.job_id), mono) for one in allocations]

    def _with_end(self, one: Allocation, job: Job | None, mono: float) -> Allocation:
        if one.ended_mono is not None or one.expected_end_mono is not None or job is None:
            return one
        known = self.of(job)
        if known is None:
            return one
        left_s = remaining_s(known, max(0.0, mono - one.started_mono), 0.5)
        return replace(one, expected_end_mono=mono + left_s)

    def _look_up(self, job: Job) -> Estimate | None:
        key = _key(job)
        if job.name in _NAMELESS and job.spec.argv is None and job.spec.code is None:
            return None
        if key not in self._by_key:
            self._by_key[key] = self._estimate(job, key)
        return self._by_key[key]

    def _estimate(self, job: Job, key: _Key) -> Estimate | None:
        runs = self._runs_of(job.name)
        same = estimate(runs.same.get(key, ()))
        if same is not None and same.runs >= ENOUGH:
            return same
        return runs.alike or same

    def _runs_of(self, name: str) -> _Runs:
        found = self._by_name.get(name)
        if found is None:
            newest = sorted(self._runs(name).values(), key=_AGE, reverse=True)[:RUNS]
            same: dict[_Key, list[Run]] = {}
            for one in newest:
                same.setdefault(_key(one), []).append(_run(one))
            alike = None if name in _NAMELESS else estimate([_run(one) for one in newest])
            found = self._by_name[name] = _Runs(same, alike)
        return found

    def _runs(self, name: str) -> dict[int, Job]:
        if name not in self._past:
            if len(self._past) >= NAMES:
                self._past.clear()
                self._by_name.clear()
            self._past[name] = {job.id: job for job in self._store.past(name, RUNS)}
        return self._past[name]


@dataclass(frozen=True, slots=True)
class _Runs:
    """The newest runs of a name. A long sweep asks for them once for each of its members."""

    same: Mapping[_Key, Sequence[Run]]  # by what ran
    alike: Estimate | None  # of all: one object, as what is uncertain of it is common to its jobs


class _Seen(Mapping[int, Value]):
    """One figure of the estimates of some jobs, worked out when it is asked for."""

    __slots__ = ("_figure", "_jobs", "_of")

    def __init__(
        self,
        jobs: Mapping[int, Job],
        of: Callable[[Job], Estimate | None],
        figure: Callable[[Estimate], Value | None],
    ) -> None:
        self._jobs = jobs
        self._of = of
        self._figure = figure

    def get(self, key: int, default: Any = None) -> Any:
        job = self._jobs.get(key)
        known = None if job is None else self._of(job)
        found = None if known is None else self._figure(known)
        return default if found is None else found

    def __getitem__(self, key: int) -> Value:
        found: Value | None = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def __iter__(self) -> Iterator[int]:
        return (job_id for job_id in self._jobs if self.get(job_id) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _key(job: Job) -> _Key:
    spec = job.spec
    return job.name, spec.kind, spec.argv, spec.code, spec.request.gpus


def _run(job: Job) -> Run:
    gpus = max(1, len(job.gpus))
    return Run(
        run_s=job.run_s if job.state is JobState.COMPLETED else None,
        mem_bytes=None if job.peak_mem_bytes is None else job.peak_mem_bytes // gpus,
    )
