"""One way in which the next hours may go: jobs placed on GPUs one after the other. Pure.

Times are seconds from now; ``inf`` is a moment that nobody knows. A wide job that has to wait
leaves gaps on the GPUs that it waits with, and later jobs that fit into a gap take it, as backfill
would.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from math import inf

GAPS = 12  # kept at a time, the latest


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A job as it is placed."""

    job_id: int
    places: tuple[int, ...]  # the GPUs that it may use
    width: int = 1
    ready: float = 0.0
    after: tuple[int, ...] = ()  # jobs that must have ended
    home: str | None = None  # the kernel that can run one cell at a time
    array: str | None = None
    most: int | None = None  # of its array, at once
    mem_bytes: int | None = None  # it shares
    plain: bool = field(init=False)  # the GPUs alone decide when it starts

    def __post_init__(self) -> None:
        bound = self.ready or self.after or self.home or self.array or self.mem_bytes is not None
        object.__setattr__(self, "plain", not bound)


@dataclass(slots=True)
class Timeline:
    """The GPUs in one such course of things.

    Args:
        sizes: the memory of each GPU that may be shared out, bytes.
    """

    sizes: Sequence[float]
    free: list[float] = field(init=False)  # from when on nobody is on each GPU
    ends: dict[int, float] = field(default_factory=dict)  # of every job placed so far
    homes: dict[str, float] = field(default_factory=dict)  # from when on each kernel is idle
    _alone: list[float] = field(init=False)  # until when each GPU is somebody's alone
    _guests: list[list[tuple[float, float]]] = field(init=False)  # (end, bytes) of who shares
    _arrays: dict[str, list[float]] = field(default_factory=dict)
    _gaps: list[tuple[float, float, int]] = field(default_factory=list)  # (from, to, GPU)

    def __post_init__(self) -> None:
        count = len(self.sizes)
        self.free = [0.0] * count
        self._alone = [0.0] * count
        self._guests = [[] for _ in range(count)]

    def occupy(self, piece: Piece, run_s: float) -> None:
        """A job that runs now goes on for ``run_s``."""
        self._book(piece, piece.places, 0.0, run_s)

    def place(self, piece: Piece, run_s: float) -> float:
        """When the job starts, which then has its GPUs for ``run_s``."""
        if piece.plain:
            start, gpus = self._find_alone(piece, 0.0, run_s)
            end = start + run_s
            for gpu in gpus:
                self._alone[gpu] = max(self._alone[gpu], end)
                self.free[gpu] = max(self.free[gpu], end)
            self.ends[piece.job_id] = end
            return start
        ready = self._ready(piece)
        if ready == inf:
            self.ends[piece.job_id] = inf
            return inf
        find = self._find_alone if piece.mem_bytes is None else self._find_shared
        start, gpus = find(piece, ready, run_s)
        self._book(piece, gpus, start, run_s)
        return start

    def _ready(self, piece: Piece) -> float:
        """From when on it may start, whatever the GPUs do."""
        ready = piece.ready
        for other in piece.after:
            ready = max(ready, self.ends[other])
        if piece.home is not None:
            ready = max(ready, self.homes.get(piece.home, 0.0))
        if piece.most is not None and piece.array is not None:
            running = self._arrays.get(piece.array, [])
            if len(running) >= piece.most:
                ready = max(ready, running[0])
        return ready

    def _find_alone(self, piece: Piece, ready: float, run_s: float) -> tuple[float, Sequence[int]]:
        free = self.free
        if self._gaps:
            found = self._find_gap(piece, ready, run_s)
            if found is not None:
                return found
        if piece.width == 1:
            gpu = min(piece.places, key=free.__getitem__)
            start = max(ready, free[gpu])
            if start > free[gpu]:
                self._leave_gap(free[gpu], start, gpu)
            return start, (gpu,)
        gpus = sorted(piece.places, key=free.__getitem__)[: piece.width]
        start = max(ready, free[gpus[-1]])
        for gpu in gpus:
            if free[gpu] < start:
                self._leave_gap(free[gpu], start, gpu)
        return start, gpus

    def _find_gap(
        self, piece: Piece, ready: float, run_s: float
    ) -> tuple[float, Sequence[int]] | None:
        """The earliest gaps that take it, if there are any: the first that are long enough."""
        places, width = piece.places, piece.width
        fitting: dict[int, tuple[float, float, int]] = {}
        for gap in self._gaps:
            since, until, gpu = gap
            if until - (max(ready, since)) >= run_s and gpu in places:
                fitting.setdefault(gpu, gap)
                if len(fitting) == width:
                    break
        else:
            return None
        chosen = list(fitting.values())
        start = max(ready, chosen[-1][0])
        over = start + run_s
        if any(until < over for _, until, _ in chosen):
            return None
        self._fill(chosen, start, over)
        return start, tuple(fitting)

    def _fill(self, gaps: Sequence[tuple[float, float, int]], start: float, over: float) -> None:
        for since, until, gpu in gaps:
            self._gaps.remove((since, until, gpu))
            if start > since:
                self._leave_gap(since, start, gpu)
            if until > over:
                self._leave_gap(over, until, gpu)

    def _leave_gap(self, since: float, until: float, gpu: int) -> None:
        if until == inf:
            return
        insort(self._gaps, (since, until, gpu))
        if len(self._gaps) > GAPS:
            del self._gaps[0]

    def _find_shared(self, piece: Piece, ready: float, _: float) -> tuple[float, Sequence[int]]:
        times = sorted((self._opens(gpu, piece, ready), gpu) for gpu in piece.places)
        chosen = times[: piece.width]
        return chosen[-1][0], [gpu for _, gpu in chosen]

    def _opens(self, gpu: int, piece: Piece, ready: float) -> float:
        """When the memory that it declared is left on that GPU."""
        start = max(ready, self._alone[gpu])
        room = self.sizes[gpu] - (piece.mem_bytes or 0)
        if room < 0:
            return inf
        guests = sorted(guest for guest in self._guests[gpu] if guest[0] > start)
        booked = sum(size for _, size in guests)
        for end, size in guests:
            if booked <= room:
                break
            start = end
            booked -= size
        return start

    def _book(self, piece: Piece, gpus: Sequence[int], start: float, run_s: float) -> None:
        end = start + run_s
        for gpu in gpus:
            self.free[gpu] = max(self.free[gpu], end)
            if piece.mem_bytes is None:
                self._alone[gpu] = max(self._alone[gpu], end)
            else:
                self._guests[gpu].append((end, float(piece.mem_bytes)))
        self.ends[piece.job_id] = end
        if piece.home is not None:
            self.homes[piece.home] = max(self.homes.get(piece.home, 0.0), end)
        if piece.array is not None:
            self._count(piece.array, piece.most, end)

    def _count(self, array: str, most: int | None, end: float) -> None:
        """Of a sweep with a limit only the last so many ends matter."""
        running = self._arrays.setdefault(array, [])
        if most is not None and len(running) >= most:
            heappushpop(running, end)
        else:
            heappush(running, end)
