"""One decision in the making: GPUs are given, kept and refused job by job; pure.

The walk along the line is the caller's; :class:`Plan` says of each job in turn whether it starts,
where, and why not. The first that does not fit holds a reservation, and later ones pass only where
they cannot delay it (EASY backfill).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from gpusched_ipy import reasons
from gpusched_ipy.fit import Ask, Room
from gpusched_ipy.job import Allocation, Job, JobKind, WaitCode, WaitReason
from gpusched_ipy.snapshot import Gpu
from gpusched_ipy.standing import Facts, kernel_busy, matching
from gpusched_ipy.text import format_bytes


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
    """One decision in the making."""

    def __init__(self, facts: Facts, limit: int) -> None:
        self.starts: list[Start] = []
        self.reasons: dict[int, WaitReason] = {}
        self.never: dict[int, WaitReason] = {}
        self.reservations: list[tuple[Reservation, Ask]] = []
        self._facts = facts
        self._limit = limit
        self._rooms = [_room(gpu, facts) for gpu in facts.gpus]
        self._open = bool(self._rooms) and facts.blind is None
        self._candidates: dict[tuple[object, ...], tuple[Room, ...]] = {}
        self._kept: dict[str, tuple[Reservation, Ask]] = {}
        self._spoken_for: set[str] = set()  # GPUs that a reservation competes for
        self._waiting = Counter[tuple[Room, ...]]()  # jobs in line so far, by their candidates
        self._refused_s: dict[tuple[object, ...], float] = {}
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
        """Whether going on along the line could neither start a job nor explain one."""
        return not self._open and len(self.reasons) >= self._limit

    def consider(self, job: Job) -> None:
        """Start the next job of the line, or say why it waits."""
        facts = self._facts
        refusal = facts.blind or self._full(job)
        if refusal is not None:
            self._note(job, refusal)
            return
        rooms = self.candidates(job)
        too_big = self._too_big(job, rooms)
        if too_big is not None:
            self._note(job, too_big)
            return
        if not self._start(job, rooms):
            self._waiting[rooms] += 1

    def candidates(self, job: Job) -> tuple[Room, ...]:
        """The GPUs that the job could use if they were free."""
        request, pinned = job.spec.request, self._facts.pinned(job)
        key = (request.on_gpu, pinned, request.gpus > 1)
        found = self._candidates.get(key)
        if found is None:
            found = self._candidates[key] = tuple(self._eligible_rooms(job, pinned))
        return found

    def _eligible_rooms(self, job: Job, pinned: tuple[str, ...] | None) -> Iterator[Room]:
        request = job.spec.request
        named: tuple[Gpu, ...] = self._facts.gpus
        if request.on_gpu is not None:
            named = matching(request.on_gpu, named)
        for room in self._rooms:
            gpu = room.gpu
            # CUDA shows a process one MIG instance at most.
            whole = gpu.parent is None or request.gpus == 1
            if whole and gpu in named and (pinned is None or gpu.uuid in pinned):
                yield room

    def _full(self, job: Job) -> WaitReason | None:
        """What this decision itself has used up."""
        spec = job.spec
        if spec.kind is JobKind.CELL and not spec.in_place and spec.home in self._kernels:
            return kernel_busy()
        most = spec.request.max_running
        if spec.array is not None and most is not None and self._arrays[spec.array.id] >= most:
            text = f"{most} of its sweep run at once, not more"
            return WaitReason(code=WaitCode.MAX_RUNNING, text=text)
        return None

    def _too_big(self, job: Job, rooms: tuple[Room, ...]) -> WaitReason | None:
        request = job.spec.request
        if len(rooms) < request.gpus:
            return self._too_few(job, len(rooms))
        asked = request.mem_bytes
        if asked is None:
            return None
        margin = self._facts.settings.memory_margin
        sizes = [room.gpu.mem_total_bytes for room in rooms]
        enough = [size is None or size >= asked + margin for size in sizes]
        if sum(enough) >= request.gpus:
            return None
        largest = format_bytes(max(size or 0 for size in sizes))
        text = (
            f"asks {format_bytes(asked)}, and {format_bytes(margin)} are kept clear; "
            f"the largest GPU for it has {largest}"
        )
        return WaitReason(code=WaitCode.TOO_BIG, text=text)

    def _too_few(self, job: Job, count: int) -> WaitReason:
        request, pinned = job.spec.request, self._facts.pinned(job)
        if pinned is not None:
            where = ", ".join(
                reasons.gpu_label(gpu) for gpu in self._facts.gpus if gpu.uuid in pinned
            )
            text = f"its kernel is pinned to {where or 'GPUs that are not listed now'}"
            return WaitReason(code=WaitCode.PINNED, text=text)
        which = f" matching {request.on_gpu!r}" if request.on_gpu is not None else ""
        text = f"needs {request.gpus} GPUs{which}; this machine has {count}"
        return WaitReason(code=WaitCode.TOO_BIG, text=text)

    def _start(self, job: Job, rooms: tuple[Room, ...]) -> bool:
        facts, request = self._facts, job.spec.request
        ask, limit_s = facts.ask(job), facts.limit_s(job)
        shape = (rooms, request.gpus, ask)
        refused_s = self._refused_s.get(shape)
        known = refused_s is not None and (limit_s is None or limit_s >= refused_s)
        if known and len(self.reasons) >= self._limit:
            return False
        guest = self._allocation(job, limit_s)
        refusals: list[WaitReason] = []
        fitting, free = [], 0
        for room in rooms:
            refusal = room.refusal(ask)
            if refusal is None:
                free += 1
                refusal = self._reserved(room, guest)
            if refusal is None:
                fitting.append(room)
            else:
                refusals.append(refusal)
        if len(fitting) >= request.gpus:
            self._book(job, guest, self._choose(fitting, ask)[: request.gpus])
            return True
        # Where only a reservation is in the way, a shorter job of this shape might still pass.
        passable = limit_s is not None and free >= request.gpus
        self._refused_s[shape] = limit_s if passable and limit_s is not None else 0.0
        self._reserve(job, ask, rooms)
        if len(self.reasons) < self._limit:
            self._note(job, self._why(job, rooms, refusals, free))
        return False

    def _why(
        self, job: Job, rooms: tuple[Room, ...], refusals: Sequence[WaitReason], free: int
    ) -> WaitReason:
        if free < job.spec.request.gpus:
            ahead = self._ahead(rooms)
            if ahead:
                return reasons.ahead(ahead)
        else:
            refusals = [one for one in refusals if one.code is WaitCode.RESERVATION]
        return reasons.summary(refusals, job.spec.request.gpus, free)

    def _ahead(self, rooms: tuple[Room, ...]) -> int:
        """How many jobs ahead in the line compete for one of these GPUs."""
        wanted = set(rooms)
        return sum(n for others, n in self._waiting.items() if not wanted.isdisjoint(others))

    def _allocation(self, job: Job, limit_s: float | None) -> Allocation:
        request, mono = job.spec.request, self._facts.now.mono
        return Allocation(
            job_id=job.id,
            gpus=(),
            shared=request.shared,
            mem_bytes=request.mem_bytes,
            started_mono=mono,
            expected_end_mono=None if limit_s is None else mono + limit_s,
            label=f"job {job.id} ({job.name})",
        )

    def _reserved(self, room: Room, guest: Allocation) -> WaitReason | None:
        """Whether letting the job in would delay the one that this GPU is kept for."""
        if room.gpu.uuid not in self._kept:
            return None
        reservation, ask = self._kept[room.gpu.uuid]
        at = inf if reservation.at_mono is None else reservation.at_mono
        if room.still_opens(ask, at, self._facts.now.mono, guest):
            return None
        return reasons.kept(room.gpu, reservation.job_id)

    def _choose(self, fitting: list[Room], ask: Ask) -> list[Room]:
        """The best GPUs first: kept ones (it may pass there), then the fullest for a job that
        shares, the emptiest for one that does not."""
        sign = 1 if ask.mem_bytes is not None else -1
        return sorted(
            fitting, key=lambda room: (room.gpu.uuid not in self._kept, sign * room.left_bytes())
        )

    def _book(self, job: Job, guest: Allocation, rooms: Sequence[Room]) -> None:
        for room in rooms:
            room.give(guest)
        self._open = any(not room.closed() for room in self._rooms)
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

    def _reserve(self, job: Job, ask: Ask, rooms: Sequence[Room]) -> None:
        """Keep GPUs for the first job that competes for them and does not fit.

        Nobody is kept waiting for a stranger: a GPU that he has is not counted.
        """
        rooms = [room for room in rooms if room.gpu.uuid not in self._spoken_for]
        count, mono = job.spec.request.gpus, self._facts.now.mono
        if len(rooms) < count:
            return
        times = [(room.opens(ask, mono), room) for room in rooms]
        soonest = sorted(
            ((at, room) for at, room in times if at is not None), key=lambda pair: pair[0]
        )
        if len(soonest) < count:
            return
        at = soonest[count - 1][0]
        # Of those open by then the latest are kept, so that idle ones are left to others meanwhile.
        chosen = soonest[:count] if at == inf else [pair for pair in soonest if pair[0] <= at]
        kept = tuple(room.gpu.uuid for _, room in chosen[-count:])
        reservation = Reservation(job_id=job.id, gpus=kept, at_mono=None if at == inf else at)
        self.reservations.append((reservation, ask))
        self._kept.update(dict.fromkeys(kept, (reservation, ask)))
        self._spoken_for.update(room.gpu.uuid for room in rooms)

    def _note(self, job: Job, reason: WaitReason) -> None:
        if len(self.reasons) < self._limit:
            self.reasons[job.id] = reason


def _room(gpu: Gpu, facts: Facts) -> Room:
    snapshot, settings, now = facts.snapshot, facts.settings, facts.now
    here = [one for one in facts.allocations if gpu.uuid in one.gpus]
    taken = now.mono if snapshot is None else snapshot.taken_mono
    window_s = max(settings.quiet_s, (settings.quiet_samples + 1) * settings.sample_interval_s)
    ends = [one.ended_mono for one in here if one.ended_mono is not None]
    recent = [end for end in ends if now.mono - end <= window_s]
    return Room(
        gpu,
        [one for one in here if one.ended_mono is None],
        settings,
        facts.members,
        gone=frozenset(
            one.job_id for one in here if one.ended_mono is not None and one.ended_mono >= taken
        ),
        eased_s=taken - max(recent) if recent else None,
    )
