"""One decision in the making: GPUs are given, kept and refused job by job; pure.

The walk along the line is the caller's; :class:`Plan` says of each job in turn whether it starts,
where, and why not. The first that does not fit holds a reservation, and later ones pass only where
they cannot delay it (EASY backfill).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from gpusched_ipy.job import Allocation, Job, JobKind, WaitCode, WaitReason
from gpusched_ipy.policy import reasons
from gpusched_ipy.policy.fit import Ask, Room
from gpusched_ipy.policy.shapes import Shape, Shapes
from gpusched_ipy.policy.standing import Facts, kernel_busy

DEPTH = 500  # so far along the line a job is looked for that may pass a reservation


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A job to start now, and where."""

    job_id: int
    gpus: tuple[str, ...]  # UUIDs
    shared: bool = False
    expected_end_mono: float | None = None  # by walltime or learned duration


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """GPUs kept for a job that does not fit yet."""

    job_id: int
    gpus: tuple[str, ...]
    at_mono: float | None = None  # when it is expected to start; None where no end is known


class Plan:
    """One decision in the making.

    Args:
        facts: what the decision looks at.
        limit: for how many jobs a reason is noted.
    """

    def __init__(self, facts: Facts, limit: int) -> None:
        self.starts: list[Start] = []
        self.reasons: dict[int, WaitReason] = {}
        self.never: dict[int, WaitReason] = {}
        self.reservations: list[Reservation] = []
        self.patience_s = 0.0  # only a job that has waited longer may hold a reservation
        self._facts = facts
        self._blind = facts.blind
        self._limit = limit
        self._shapes = Shapes(facts)
        self._open = self._any_open()
        self._considered = 0
        self._kept: dict[str, tuple[Reservation, Ask]] = {}
        self._spoken_for: set[Room] = set()  # all that a reservation competes for
        self._kernels: set[str] = set()  # that got a cell in this decision
        self._arrays = Counter(
            holder.array
            for holder in facts.allocations
            if holder.array is not None and holder.ended_mono is None
        )

    def stands(self, job: Job) -> bool:
        """Whether the job stands in the line; if not, the reason is noted."""
        reason = self._facts.standing(job)
        if reason is None:
            return True
        if reason.code is WaitCode.DEPENDENCY:
            never = self._facts.never(job)
            if never is not None:
                self.never[job.id] = never
        self._note(job, reason)
        return False

    def done(self) -> bool:
        """Whether going on along the line would neither start a job nor explain one."""
        if len(self.reasons) < self._limit:
            return False
        return not self._open or self._considered >= DEPTH

    def consider(self, job: Job) -> None:
        """Start the next job of the line, or note why it waits."""
        self._considered += 1
        refusal = self._blind or self._used_up(job)
        if refusal is not None:
            self._note(job, refusal)
            return
        shape = self._shapes.of(job)
        if shape.too_big is not None:
            self._note(job, shape.too_big)
        elif self._hopeless(job, shape):
            if len(self.reasons) < self._limit:
                self._note(job, reasons.ahead(shape.pool.ahead()))
            shape.pool.waiting += 1
        elif not self._start(job, shape):
            shape.pool.waiting += 1

    def _used_up(self, job: Job) -> WaitReason | None:
        """What this decision itself leaves no more of."""
        spec = job.spec
        if spec.home in self._kernels and spec.kind is JobKind.CELL and not spec.in_place:
            return kernel_busy()
        most = spec.request.max_running
        if most is not None and spec.array is not None and self._arrays[spec.array.id] >= most:
            text = f"{most} of its sweep run at once, not more"
            return WaitReason(code=WaitCode.MAX_RUNNING, text=text)
        return None

    def _hopeless(self, job: Job, shape: Shape) -> bool:
        """Whether one like it, and no longer, has been refused: rooms only get fuller."""
        if not shape.refused_s:
            return shape.refused_s is not None
        limit_s = self._facts.limit_s(job)
        return (inf if limit_s is None else limit_s) >= shape.refused_s

    def _start(self, job: Job, shape: Shape) -> bool:
        guest = self._allocation(job)
        refusals: list[WaitReason] = []
        fitting, free = [], 0
        for room in shape.pool.rooms:
            refusal = room.refusal(shape.ask)
            if refusal is None:
                free += 1
                refusal = self._kept_from(room, guest)
            if refusal is None:
                fitting.append(room)
            else:
                refusals.append(refusal)
        if len(fitting) >= shape.gpus:
            self._book(job, guest, self._best(fitting, shape))
            return True
        if free < shape.gpus:
            shape.refused_s = 0.0
        else:  # only a reservation is in the way: a shorter one might still pass
            limit_s = self._facts.limit_s(job)
            shape.refused_s = inf if limit_s is None else limit_s
            refusals = [one for one in refusals if one.code is WaitCode.RESERVATION]
        ahead = shape.pool.ahead() if free < shape.gpus else 0
        self._reserve(job, shape)
        self._note(
            job, reasons.ahead(ahead) if ahead else reasons.summary(refusals, shape.gpus, free)
        )
        return False

    def _allocation(self, job: Job) -> Allocation:
        request, mono = job.spec.request, self._facts.now.mono
        limit_s = self._facts.limit_s(job)
        return Allocation(
            job_id=job.id,
            gpus=(),
            shared=request.shared,
            mem_bytes=request.mem_bytes,
            started_mono=mono,
            expected_end_mono=None if limit_s is None else mono + limit_s,
            label=f"job {job.id} ({job.name})",
        )

    def _kept_from(self, room: Room, guest: Allocation) -> WaitReason | None:
        """Whether letting the job in would delay the one that this GPU is kept for."""
        kept = self._kept.get(room.gpu.uuid)
        if kept is None:
            return None
        reservation, ask = kept
        at = inf if reservation.at_mono is None else reservation.at_mono
        if room.still_opens(ask, at, self._facts.now.mono, guest):
            return None
        return reasons.kept(room.gpu, reservation.job_id)

    def _best(self, fitting: list[Room], shape: Shape) -> list[Room]:
        """Kept GPUs first, where it may pass; then the fullest for a job that shares, the emptiest
        for one that does not."""
        sign = -1 if shape.ask.mem_bytes is None else 1
        fitting.sort(key=lambda room: (room.gpu.uuid not in self._kept, sign * room.left_bytes()))
        return fitting[: shape.gpus]

    def _book(self, job: Job, guest: Allocation, rooms: Sequence[Room]) -> None:
        for room in rooms:
            room.give(guest)
        self._open = self._any_open()
        if job.spec.kind is JobKind.CELL and job.spec.home is not None:
            self._kernels.add(job.spec.home)
        if job.spec.array is not None:
            self._arrays[job.spec.array.id] += 1
        self.starts.append(
            Start(
                job_id=job.id,
                gpus=tuple(room.gpu.uuid for room in rooms),
                shared=guest.shared,
                expected_end_mono=guest.expected_end_mono,
            )
        )

    def _reserve(self, job: Job, shape: Shape) -> None:
        """Keep GPUs for the first job that competes for them and does not fit.

        Nobody is kept waiting for a stranger: a GPU that he has is not counted.
        """
        mono = self._facts.now.mono
        if mono - job.queued_mono < self.patience_s:
            return
        rooms = [room for room in shape.pool.rooms if room not in self._spoken_for]
        times = [(room.opens(shape.ask, mono), room) for room in rooms]
        soonest = [(at, room) for at, room in times if at is not None]
        if len(soonest) < shape.gpus:
            return
        soonest.sort(key=lambda pair: pair[0])
        at = soonest[shape.gpus - 1][0]
        # Of those open by then the latest are kept, so that idle ones are left to others meanwhile.
        by_then = soonest[: shape.gpus] if at == inf else [one for one in soonest if one[0] <= at]
        kept = tuple(room.gpu.uuid for _, room in by_then[-shape.gpus :])
        reservation = Reservation(job_id=job.id, gpus=kept, at_mono=None if at == inf else at)
        self.reservations.append(reservation)
        self._kept.update(dict.fromkeys(kept, (reservation, shape.ask)))
        self._spoken_for.update(rooms)

    def _any_open(self) -> bool:
        return self._blind is None and any(not room.closed() for room in self._shapes.rooms)

    def _note(self, job: Job, reason: WaitReason) -> None:
        if len(self.reasons) < self._limit:
            self.reasons[job.id] = reason
