"""When each pending job is expected to start, and how sure that is. Pure: no dice, no clock.

The line is played through several times, in its present order, with durations drawn evenly from
what history says; the median of the starts is the forecast, its range what eight of ten further
courses would keep to. Jobs that will be submitted later, strangers that come and leave, and
failures are not foreseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite
from statistics import median
from typing import Unpack

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.job import (
    FINAL,
    Allocation,
    ExpectedStart,
    Job,
    JobKind,
    WaitCode,
)
from gpusched_ipy.policy.estimate import NORMAL, SHARES, Estimate, remaining_s
from gpusched_ipy.policy.fit import Ask, Room
from gpusched_ipy.policy.order import Line, Patience
from gpusched_ipy.policy.shapes import Shape, Shapes
from gpusched_ipy.policy.standing import Facts, Known
from gpusched_ipy.policy.timeline import Piece, Timeline
from gpusched_ipy.snapshot import Snapshot

# The line is played through so often; a long one less often, so that it takes no longer than …
COURSES = (8, 40)
# … so many jobs altogether.
BUDGET = 60_000
# What may happen before and after a range.
LOW, HIGH = 0.1, 0.9
# A job with one of these reasons stands in the line of a forecast all the same.
_WILL_STAND = frozenset({WaitCode.BEGIN_TIME, WaitCode.DEPENDENCY, WaitCode.KERNEL_BUSY})
_WORD = 2**32


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A job to be placed, and what is known of its duration."""

    piece: Piece
    known: Estimate | None
    ran_s: float = 0.0


def forecast(
    line: Line,
    active: Mapping[int, Job],
    snapshot: Snapshot | None,
    allocations: Sequence[Allocation],
    settings: Settings,
    now: Instant,
    estimates: Callable[[Job], Estimate | None],
    *,
    limit: int | None = None,
    **known: Unpack[Known],
) -> dict[int, ExpectedStart]:
    """When the pending jobs are expected to start; one of which nothing is known is left out.

    Args:
        line: the pending jobs.
        active: the jobs that start or run, by id.
        snapshot, allocations, settings, now, known: as for :func:`gpusched_ipy.policy.decide`.
        estimates: what history and walltime say of a job; None: nothing.
        limit: only for the first so many in line.
    """
    facts = Facts(snapshot=snapshot, allocations=allocations, settings=settings, now=now, **known)
    if facts.blind is not None:
        return {}
    scene = _Scene(facts, active, estimates)
    pieces = scene.in_order(_ordered(line, facts, scene.stands), limit)
    courses = max(COURSES[0], min(COURSES[1], BUDGET // max(1, len(pieces))))
    starts = scene.starts(pieces, range(courses))
    passed: dict[int, float] = {}
    if settings.order == "shortest":
        in_turn = scene.in_order(line.fair(facts, scene.stands), limit)
        found = scene.starts(in_turn, range(COURSES[0]))
        passed = {one.piece.job_id: median(at) for one, at in zip(in_turn, found, strict=True)}
    return dict(_forecasts(pieces, starts, now.wall, scene, passed))


def _ordered(line: Line, facts: Facts, stands: Callable[[Job], bool]) -> Iterator[Job]:
    if facts.settings.order == "fair":
        return line.fair(facts, stands)
    return Patience([job for job in line if stands(job)], facts).ordered()


class _Scene:
    """The machine and the line, ready to be played through."""

    def __init__(
        self, facts: Facts, active: Mapping[int, Job], estimates: Callable[[Job], Estimate | None]
    ) -> None:
        self._facts = facts
        self._estimates = estimates
        self._shapes = Shapes(facts)
        margin = facts.settings.memory_margin
        rooms = self._shapes.rooms
        self._sizes = [
            inf if room.gpu.mem_total_bytes is None else room.gpu.mem_total_bytes - margin
            for room in rooms
        ]
        self._index = {room.gpu.uuid: place for place, room in enumerate(rooms)}
        self._places: dict[int, tuple[int, ...]] = {}
        self.running = [
            self._runs(one, active.get(one.job_id))
            for one in facts.allocations
            if one.ended_mono is None
        ]
        self._at_home = {drawn.piece.home for drawn in self.running}

    def stands(self, job: Job) -> bool:
        """Whether the job will stand in the line some day, of itself."""
        reason = self._facts.standing(job)
        if reason is None:
            return True
        if reason.code not in _WILL_STAND or self._facts.never(job) is not None:
            return False
        return reason.code is not WaitCode.KERNEL_BUSY or job.spec.home in self._at_home

    def in_order(self, jobs: Iterable[Job], limit: int | None) -> list[_Drawn]:
        """The jobs that can be placed, each after those that it depends on."""
        found: list[_Drawn] = []
        placed = {drawn.piece.job_id for drawn in self.running}
        waiting: dict[int, list[_Drawn]] = {}
        for job in jobs:
            drawn = self._waits(job)
            if drawn is None:
                continue
            ready = [drawn]
            while ready:
                one = ready.pop()
                missing = next((other for other in one.piece.after if other not in placed), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(one)
                    continue
                found.append(one)
                placed.add(one.piece.job_id)
                ready += waiting.pop(one.piece.job_id, [])
            if limit is not None and len(found) >= limit:
                break
        return found

    def starts(self, pieces: Sequence[_Drawn], courses: Iterable[int]) -> list[list[float]]:
        """The starts of each job in several courses of things, s from now."""
        found: list[list[float]] = [[] for _ in pieces]
        for course in courses:
            for starts, at in zip(found, self.play(pieces, course), strict=True):
                starts.append(at)
        return found

    def play(self, pieces: Sequence[_Drawn], course: int) -> Iterator[float]:
        """The starts of the jobs in one course of things, s from now."""
        timeline = Timeline(self._sizes)
        factors: dict[int, float] = {}
        for drawn in self.running:
            share = (_draw(drawn.piece.job_id, course) + 0.5) / SHARES
            known = drawn.known
            left_s = inf if known is None else remaining_s(known, drawn.ran_s, share)
            timeline.occupy(drawn.piece, left_s)
        for drawn in pieces:
            known, piece = drawn.known, drawn.piece
            if known is None:
                yield timeline.place(piece, inf)
                continue
            factor = factors.get(id(known))
            if factor is None:
                doubt = known.doubt * NORMAL[_draw(-1 - len(factors), course)]
                factor = factors[id(known)] = exp(doubt)
            yield timeline.place(piece, factor * known.shares[_draw(piece.job_id, course)])

    def _runs(self, one: Allocation, job: Job | None) -> _Drawn:
        places = tuple(self._index[uuid] for uuid in one.gpus if uuid in self._index)
        piece = Piece(
            job_id=one.job_id,
            places=places,
            width=len(places),
            home=None if job is None or job.kind is not JobKind.CELL else job.spec.home,
            array=one.array,
            most=None if job is None else job.request.max_running,
            mem_bytes=one.mem_bytes,
        )
        known = None if job is None else self._estimates(job)
        return _Drawn(piece, known, max(0.0, self._facts.now.mono - one.started_mono))

    def _waits(self, job: Job) -> _Drawn | None:
        """A pending job; None where it cannot be said to start at all."""
        shape = self._shapes.of(job)
        places = self._open_to(shape)
        if shape.too_big is not None or len(places) < shape.gpus:
            return None
        request, now = job.request, self._facts.now
        ready = 0.0 if request.begin_at is None else max(0.0, request.begin_at - now.wall)
        if job.not_before_mono is not None:
            ready = max(ready, job.not_before_mono - now.mono)
        ended = self._facts.ended
        after = (*request.after, *request.after_any)
        piece = Piece(
            job_id=job.id,
            places=places,
            width=shape.gpus,
            ready=ready,
            after=tuple(other for other in after if ended.get(other) not in FINAL),
            home=job.spec.home if job.kind is JobKind.CELL else None,
            array=None if job.spec.array is None else job.spec.array.id,
            most=request.max_running,
            mem_bytes=request.mem_bytes,
        )
        return _Drawn(piece, self._estimates(job))

    def _open_to(self, shape: Shape) -> tuple[int, ...]:
        """The GPUs that jobs of that shape can have once ours are off them: no stranger's."""
        found = self._places.get(id(shape))
        if found is None:
            mono = self._facts.now.mono
            found = self._places[id(shape)] = tuple(
                self._index[room.gpu.uuid]
                for room in shape.pool.rooms
                if _will_open(room, shape.ask, mono)
            )
        return found


def _will_open(room: Room, ask: Ask, mono: float) -> bool:
    """Whether the GPU will be had once jobs of ours are off it, as far as anyone can say."""
    refusal = room.refusal(ask)
    if refusal is None or refusal.code is WaitCode.QUIET or room.opens(ask, mono) is not None:
        return True
    # Where no process list tells, what is seen there now is the job of ours.
    return refusal.code is WaitCode.GPU_ALLOCATED and room.gpu.processes is None


def _mixed(number: int) -> int:
    """A number as good as drawn by chance, and always the same for the same number."""
    mixed = number * 0x9E3779B1 % _WORD
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D % _WORD
    mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39 % _WORD
    return mixed ^ (mixed >> 15)


# Shares drawn in advance; a prime, so that every job goes through them in an order of its own.
_DRAWS = tuple(_mixed(number) * SHARES // _WORD for number in range(1, 2040))


def _draw(number: int, course: int) -> int:
    return _DRAWS[(number * 769 + course * 389) % 2039]


def _place(share: float, courses: int) -> int:
    """Which of so many courses, in order, has that share of all that may happen before it.

    What will really happen is one more: so many ends leave one gap more between them.
    """
    return min(courses - 1, max(0, int(share * (courses + 1) + 0.5) - 1))


def _forecasts(
    pieces: Sequence[_Drawn],
    starts: Sequence[list[float]],
    wall: float,
    scene: _Scene,
    passed: Mapping[int, float],
) -> Iterator[tuple[int, ExpectedStart]]:
    """Each start; ``runs`` is the fewest behind any job that runs or is ahead.

    Args:
        passed: when a job would start if all were served in turn: shorter ones that come later
            may pass it until about then.
    """
    rests_on = [drawn.known.runs for drawn in scene.running if drawn.known is not None]
    fewest = min(rests_on) if rests_on else None
    for drawn, found in zip(pieces, starts, strict=True):
        found.sort()
        low, at, high = (found[_place(share, len(found))] for share in (LOW, 0.5, HIGH))
        high = max(high, passed.get(drawn.piece.job_id, 0.0))
        if isfinite(high):
            runs = None if high == 0.0 else fewest
            expected = ExpectedStart(at=wall + at, low=wall + low, high=wall + high, runs=runs)
            yield drawn.piece.job_id, expected
        if drawn.known is not None:
            fewest = drawn.known.runs if fewest is None else min(fewest, drawn.known.runs)
