"""Which GPUs a job could use if they were free, worked out once for all jobs that ask the same.

Pure. It knows who competes for a GPU, but gives none away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpusched_ipy.job import BOUND_KINDS, Job, Request, WaitCode, WaitReason
from gpusched_ipy.policy import reasons
from gpusched_ipy.policy.fit import Ask, Room
from gpusched_ipy.policy.standing import Facts, matching
from gpusched_ipy.snapshot import Gpu
from gpusched_ipy.text import format_bytes


class Pool:
    """GPUs that some jobs compete for, and how many of these jobs have been passed so far."""

    __slots__ = ("rivals", "rooms", "waiting")

    def __init__(self, rooms: tuple[Room, ...]) -> None:
        self.rooms = rooms
        self.waiting = 0
        self.rivals: list[Pool] = []  # pools with a GPU in common, itself included

    def ahead(self) -> int:
        """How many jobs ahead in the line compete for one of these GPUs."""
        return sum(rival.waiting for rival in self.rivals)


@dataclass(slots=True)
class Shape:
    """What jobs that ask the same have in common."""

    gpus: int
    ask: Ask
    pool: Pool
    too_big: WaitReason | None  # the machine cannot fit them even when it is empty
    refused_s: float | None = None  # once a job of this length was refused, no longer one fits


class Shapes:
    """The shapes met in one decision."""

    def __init__(self, facts: Facts) -> None:
        self.rooms = tuple(_room(gpu, facts) for gpu in facts.gpus)
        self._facts = facts
        self._memory = facts.memory
        self._pools: dict[tuple[object, ...], Pool] = {}
        self._shapes: dict[tuple[object, ...], Shape] = {}

    def of(self, job: Job) -> Shape:
        """The shape of ``job``."""
        spec = job.spec
        request = spec.request
        home = spec.home if spec.kind in BOUND_KINDS else None
        expected = self._memory.get(job.id)
        key = (request.gpus, request.mem_bytes, request.on_gpu, home, expected, job.oom)
        shape = self._shapes.get(key)
        if shape is None:
            ask = Ask(request.mem_bytes, expected, home, job.oom)
            shape = self._shapes[key] = self._new(request, ask)
        return shape

    def _new(self, request: Request, ask: Ask) -> Shape:
        member = self._facts.members.get(ask.home or "")
        pinned = None if member is None else member.pinned_gpus
        key = (request.on_gpu, pinned, request.gpus > 1)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(tuple(self._usable(request, pinned)))
            for other in self._pools.values():
                if not set(other.rooms).isdisjoint(pool.rooms):
                    pool.rivals.append(other)
                    if other is not pool:
                        other.rivals.append(pool)
        return Shape(request.gpus, ask, pool, self._too_big(request, pool.rooms, pinned))

    def _usable(self, request: Request, pinned: tuple[str, ...] | None) -> Iterator[Room]:
        named: tuple[Gpu, ...] = self._facts.gpus
        if request.on_gpu is not None:
            named = matching(request.on_gpu, named)
        for room in self.rooms:
            # CUDA shows a process one MIG instance at most.
            whole = room.gpu.parent is None or request.gpus == 1
            if whole and room.gpu in named and (pinned is None or room.gpu.uuid in pinned):
                yield room

    def _too_big(
        self, request: Request, rooms: tuple[Room, ...], pinned: tuple[str, ...] | None
    ) -> WaitReason | None:
        if len(rooms) < request.gpus:
            return self._too_many(request, len(rooms), pinned)
        asked, margin = request.mem_bytes, self._facts.settings.memory_margin
        sizes = [room.gpu.mem_total_bytes for room in rooms]
        if asked is None or None in sizes:
            return None
        if sum((size or 0) >= asked + margin for size in sizes) >= request.gpus:
            return None
        largest = format_bytes(max(size or 0 for size in sizes))
        text = (
            f"asks {format_bytes(asked)}, and {format_bytes(margin)} are kept clear; "
            f"the largest GPU for it has {largest}"
        )
        return WaitReason(code=WaitCode.TOO_BIG, text=text)

    def _too_many(self, request: Request, count: int, pinned: tuple[str, ...] | None) -> WaitReason:
        if pinned is not None:
            listed = [gpu for gpu in self._facts.gpus if gpu.uuid in pinned]
            where = ", ".join(map(reasons.gpu_label, listed)) or "GPUs that are not listed now"
            text = f"its kernel is pinned to {where}"
            return WaitReason(code=WaitCode.PINNED, text=text)
        which = f" matching {request.on_gpu!r}" if request.on_gpu is not None else ""
        plural = "s" if request.gpus > 1 else ""
        text = f"needs {request.gpus} GPU{plural}{which}; this machine has {count}"
        return WaitReason(code=WaitCode.TOO_BIG, text=text)


def _room(gpu: Gpu, facts: Facts) -> Room:
    snapshot, settings, now = facts.snapshot, facts.settings, facts.now
    here = [one for one in facts.allocations if gpu.uuid in one.gpus]
    taken = now.mono if snapshot is None else snapshot.taken_mono
    window_s = max(settings.quiet_s, (settings.quiet_samples + 1) * settings.sample_interval_s)
    ends = {one.job_id: one.ended_mono for one in here if one.ended_mono is not None}
    recent = [end for end in ends.values() if now.mono - end <= window_s]
    return Room(
        gpu,
        [one for one in here if one.ended_mono is None],
        settings,
        facts.members,
        gone=frozenset(number for number, end in ends.items() if end >= taken),
        eased_s=taken - max(recent) if recent else None,
    )
