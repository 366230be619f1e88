"""What one GPU can take at one moment: the free rule, pure. It orders nothing and starts nothing.

A :class:`Room` is a GPU as a decision sees it: its reading, the jobs of ours on it, and who else
uses it. :meth:`Room.refusal` is the whole rule; unknown readings never count as idle ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from gpusched_ipy.config import Settings
from gpusched_ipy.job import Allocation, Member, WaitReason
from gpusched_ipy.policy import reasons
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind

TOLERATED_SHARE = 0.05  # of a card, in strangers' hands: not worth waiting for
FREE_SHARE = 0.80  # of a card: enough for a job whose need nobody knows, beside an idle kernel
UTILIZATION_WINDOW_S = 1.0  # the longest mean that NVML reports (nvmlUtilization_t)


class Ask(NamedTuple):
    """What a job asks of each of its GPUs."""

    mem_bytes: int | None = None  # declared: the job shares
    expected_bytes: int | None = None  # the peak that its history shows
    home: str | None = None  # the kernel it runs in, whose memory is no stranger's
    alone: bool = False  # it has run out of memory once: not beside an idle kernel that holds some


@dataclass(frozen=True, slots=True)
class _Others:
    """Who besides our jobs and the asking kernel is on a GPU."""

    strangers: tuple[GpuProcess, ...]
    sleepers: tuple[GpuProcess, ...]  # idle kernels of members
    strangers_bytes: int | None
    sleepers_bytes: int
    own_bytes: int  # of the asking kernel

    @property
    def bytes(self) -> int:
        return (self.strangers_bytes or 0) + self.sleepers_bytes


_NOBODY = _Others((), (), 0, 0, 0)


class Room:
    """One GPU as one decision sees it.

    Args:
        gpu: its reading, with processes attributed to jobs and members.
        allocations: jobs of ours on it now.
        gone: jobs of ours that have ended since the reading, which still shows their processes.
        eased_s: how long before the reading (negative: after it) the last job of ours ended here;
            None when none ended within the quiet window.
    """

    __slots__ = (
        "_allocations",
        "_gone",
        "_members",
        "_others_of",
        "_refusals",
        "_settings",
        "eased_s",
        "gpu",
    )

    def __init__(
        self,
        gpu: Gpu,
        allocations: Iterable[Allocation],
        settings: Settings,
        members: Mapping[str, Member],
        *,
        gone: frozenset[int] = frozenset(),
        eased_s: float | None = None,
    ) -> None:
        self.gpu = gpu
        self._gone = gone
        self.eased_s = eased_s
        self._allocations = tuple(allocations)
        self._settings = settings
        self._members = members
        self._refusals: dict[Ask, WaitReason | None] = {}
        self._others_of: dict[str | None, _Others] = {}

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """The jobs of ours on it, those of this decision included."""
        return self._allocations

    def give(self, allocation: Allocation) -> None:
        """Book a job on it."""
        self._allocations = (*self._allocations, allocation)
        self._refusals.clear()

    def refusal(self, ask: Ask) -> WaitReason | None:
        """Why the GPU cannot take that job now; None when it can."""
        try:
            return self._refusals[ask]
        except KeyError:
            found = self._refusals[ask] = self._refuse(ask, self._allocations)
            return found

    def closed(self) -> bool:
        """Whether no further job can start here, whatever it asks."""
        if any(not holder.shared for holder in self._allocations):
            return True
        kernels = any(process.member for process in self.gpu.processes or ())
        return not kernels and self.refusal(Ask(mem_bytes=0)) is not None

    def opens(self, ask: Ask, mono: float) -> float | None:
        """When jobs of ours will have made room for ``ask`` (monotonic s; inf: at a time unknown).

        None when their ends would not help: it is a stranger who is in the way.
        """
        if self.refusal(ask) is None:
            return mono
        if self._refuse(ask, ()) is not None:
            return None
        for end in sorted({_end(holder, mono) for holder in self._allocations}):
            if self._refuse(ask, self._after(end, mono)) is None:
                return end
        return inf

    def still_opens(self, ask: Ask, at: float, mono: float, guest: Allocation) -> bool:
        """Whether ``ask`` could still start at ``at`` if ``guest`` were let in now."""
        if at == inf:
            return False
        rest = self._after(at, mono)
        late = (guest,) if _end(guest, mono) > at else ()
        return self._refuse(ask, (*rest, *late)) is None

    def left_bytes(self) -> float:
        """Memory that nobody holds or has been promised, for choosing among GPUs."""
        capacity = _capacity(self.gpu)
        if capacity is None:
            return inf
        others = self._others(None, self._allocations)
        return capacity - others.bytes - self._booked(self._allocations)

    def _after(self, at: float, mono: float) -> tuple[Allocation, ...]:
        return tuple(holder for holder in self._allocations if _end(holder, mono) > at)

    def _refuse(self, ask: Ask, ours: Sequence[Allocation]) -> WaitReason | None:
        gpu = self.gpu
        if gpu.health not in (Health.OK, Health.ASLEEP) or gpu.compute_mode == "prohibited":
            return reasons.broken(gpu)
        holder = next((one for one in ours if ask.mem_bytes is None or not one.shared), None)
        if holder is not None:
            return reasons.allocated(gpu, holder)
        if gpu.compute_mode == "exclusive_process" and self._crowded(ask, ours):
            others = self._others(ask.home, ours)
            return self._used(others.strangers or others.sleepers, None)
        if gpu.mem_kind is MemoryKind.UNIFIED and gpu.mem_pressure not in (None, "normal"):
            return reasons.pressure(gpu)
        if ask.mem_bytes is not None:
            return self._refuse_shared(ask, ask.mem_bytes, ours)
        return self._refuse_exclusive(ask)

    def _crowded(self, ask: Ask, ours: Sequence[Allocation]) -> bool:
        others = self._others(ask.home, ours)
        return bool(ours or others.strangers or others.sleepers)

    def _refuse_exclusive(self, ask: Ask) -> WaitReason | None:
        others = self._others(ask.home, ())
        return self._in_the_way(ask, others) or self._active(others)

    def _refuse_shared(self, ask: Ask, asked: int, ours: Sequence[Allocation]) -> WaitReason | None:
        gpu, capacity = self.gpu, _capacity(self.gpu)
        others = self._others(ask.home, ours)
        if capacity is None or others.strangers_bytes is None:
            return reasons.memory_unknown(gpu) if ours else self._refuse_exclusive(ask)
        wanted = max(asked, others.own_bytes)
        left = capacity - self._booked(ours) - others.bytes - self._settings.memory_margin
        if wanted > left:
            return reasons.memory_short(gpu, wanted, left)
        # Among our own shared jobs utilization says nothing of strangers.
        return None if ours else self._active(others)

    def _in_the_way(self, ask: Ask, others: _Others) -> WaitReason | None:
        """Memory that others hold and an exclusive job cannot do without."""
        gpu, held = self.gpu, others.strangers_bytes
        if gpu.mem_kind is MemoryKind.UNIFIED:
            return None
        if held is not None and held > self._tolerance():
            busy = _above(gpu.utilization, self._settings.max_utilization)
            share = gpu.utilization if busy else None
            return reasons.used(gpu, others.strangers, self._members, share, held)
        if others.sleepers and others.bytes > self._tolerance() and not self._beside(ask, others):
            return reasons.idle_holder(gpu, others.sleepers, self._members)
        return None

    def _beside(self, ask: Ask, others: _Others) -> bool:
        """Whether idle kernels leave enough: a known holder is in the way by its memory only."""
        capacity = _capacity(self.gpu)
        if capacity is None or ask.alone:
            return False
        free = capacity - others.bytes
        if ask.expected_bytes is not None:
            return free >= ask.expected_bytes
        return free >= FREE_SHARE * capacity

    def _active(self, others: _Others) -> WaitReason | None:
        """The utilization rule, for strangers that stay or cannot be seen."""
        gpu, settings = self.gpu, self._settings
        known = others.strangers_bytes is not None
        if known and gpu.processes is not None and not (others.strangers or others.sleepers):
            return None
        if gpu.utilization is None:
            unknown = not known and others.strangers
            return self._used(others.strangers, None) if unknown else None
        # A reading soon after the end of a job of ours still shows that job.
        window_s = gpu.utilization_window_s or UTILIZATION_WINDOW_S
        if self.eased_s is not None and self.eased_s < window_s:
            return None
        if gpu.utilization > settings.max_utilization:
            return self._used(others.strangers or others.sleepers, gpu.utilization)
        quiet = gpu.quiet_samples >= settings.quiet_samples
        if self.eased_s is not None or (quiet and (gpu.quiet_s or 0.0) >= settings.quiet_s):
            return None
        return reasons.quiet(gpu, settings.quiet_s)

    def _used(self, by: Sequence[GpuProcess], share: float | None) -> WaitReason:
        return reasons.used(self.gpu, by, self._members, share, None)

    def _tolerance(self) -> float:
        share = TOLERATED_SHARE * (self.gpu.mem_total_bytes or 0)
        return max(self._settings.max_foreign_memory, share)

    def _booked(self, ours: Sequence[Allocation]) -> int:
        """What our jobs count for: declared or measured, whichever is more."""
        return sum(self._booking(holder) for holder in ours)

    def _booking(self, holder: Allocation) -> int:
        measured = _measured(self.gpu, holder.job_id)
        if holder.mem_bytes is not None:
            return max(holder.mem_bytes, measured or 0)
        if measured is not None:
            return measured
        default = self._settings.default_memory
        share = default * (self.gpu.mem_total_bytes or 0) if isinstance(default, float) else default
        return int(share)

    def _others(self, home: str | None, ours: Sequence[Allocation]) -> _Others:
        """Sort the processes; memory that no list explains is strangers'."""
        found = self._others_of.get(home)
        if found is None:
            found = self._others_of[home] = self._sort_processes(home)
        if not ours or found.strangers_bytes is None:
            return found
        # Where the driver does not say who holds how much, our jobs hold what they booked.
        unexplained = sum(
            self._booking(holder) for holder in ours if self._unattributed(holder.job_id)
        )
        rest = max(0, found.strangers_bytes - unexplained)
        return _Others(found.strangers, found.sleepers, rest, found.sleepers_bytes, found.own_bytes)

    def _unattributed(self, job_id: int) -> bool:
        listed = self.gpu.processes
        if listed is None:
            return True
        return any(process.job == job_id and process.mem_bytes is None for process in listed)

    def _sort_processes(self, home: str | None) -> _Others:
        gpu = self.gpu
        if not self._settings.sampling or gpu.health is Health.ASLEEP:
            return _NOBODY
        jobs = self._gone.union(holder.job_id for holder in self._allocations)
        strangers, sleepers = [], []
        explained = own = 0
        for process in gpu.processes or ():
            held = process.mem_bytes or 0
            if home is not None and process.member == home:
                own += held
            elif process.job in jobs or _ignored(process, self._settings.ignore_processes):
                pass
            elif self._asleep(process):
                sleepers.append(process)
            else:
                strangers.append(process)
                continue
            explained += held
        listed = sum(process.mem_bytes or 0 for process in strangers)
        if gpu.mem_used_bytes is not None:
            total: int | None = max(gpu.mem_used_bytes - explained, listed)
        else:
            total = listed or None
        return _Others(
            tuple(strangers),
            tuple(sleepers),
            total,
            sum(process.mem_bytes or 0 for process in sleepers),
            own,
        )

    def _asleep(self, process: GpuProcess) -> bool:
        member = self._members.get(process.member or "")
        return member is not None and not member.busy and process.mem_bytes is not None


def _ignored(process: GpuProcess, ignored: Sequence[str]) -> bool:
    name = process.name or ""
    if name and (name in ignored or name.rsplit("/", 1)[-1] in ignored):
        return True
    return process.kind == "graphics" and not process.mem_bytes


def _measured(gpu: Gpu, job_id: int) -> int | None:
    found = [process.mem_bytes for process in gpu.processes or () if process.job == job_id]
    known = [held for held in found if held is not None]
    return sum(known) if known else None


def _capacity(gpu: Gpu) -> int | None:
    if gpu.mem_total_bytes is None:
        return None
    return gpu.mem_total_bytes - (gpu.mem_reserved_bytes or 0)


def _end(holder: Allocation, mono: float) -> float:
    """When it is expected to end; a job past that may end at any moment."""
    return inf if holder.expected_end_mono is None else max(mono, holder.expected_end_mono)


def _above(utilization: float | None, limit: float) -> bool:
    return utilization is not None and utilization > limit
