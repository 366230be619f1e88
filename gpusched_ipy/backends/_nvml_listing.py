"""The processes of one NVIDIA card or MIG instance: three lists of the driver made one.

A list that cannot be had is None; only one that is known to be empty is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpusched_ipy.backends._nvidia_processes import Identities
from gpusched_ipy.backends._nvml_calls import Calls, ProcessRow
from gpusched_ipy.backends._nvml_library import NOT_FOUND
from gpusched_ipy.snapshot import GpuProcess

_KINDS = ("compute", "graphics", "compute")  # the third list is that of MPS
_UTILIZATION_SPAN_US = 2_000_000


class Listing:
    """Who is on a card or an instance.

    Args:
        handle: NVML's.
        calls: the functions of the initialised library.
        identities: who the listed pids are.
        note: told of each code that is not 0.
        shares: whether the driver knows the share of each process here.
    """

    __slots__ = ("_calls", "_handle", "_identities", "_listed", "_note", "_with_shares")

    def __init__(
        self,
        handle: Any,
        calls: Calls,
        identities: Identities,
        *,
        note: Callable[[int], None],
        shares: bool,
    ) -> None:
        self._handle = handle
        self._calls = calls
        self._identities = identities
        self._note = note
        self._with_shares = shares
        self._listed: dict[int, tuple[object, GpuProcess]] = {}

    def read(self, wall: float | None) -> tuple[GpuProcess, ...] | None:
        """The merged lists; with ``wall`` the share of the multiprocessors of each, where known."""
        merged: dict[int, tuple[str, int | None]] = {}
        lists = self._calls.processes(self._handle)
        for kind, (code, rows) in zip(_KINDS, lists, strict=True):
            if code:
                self._note(code)
            _merge(merged, kind, rows)
        if lists[0][0]:
            # Without the compute list nothing is known; graphics and MPS lists may be missing.
            return None
        if not merged and not self._identities.host_pids:
            # In a container some drivers leave out everybody else: empty is not known to be empty.
            return None
        shares = self._shares(wall) if wall is not None and merged else None
        found = {
            pid: self._process(pid, kinds, memory, shares)
            for pid, (kinds, memory) in merged.items()
        }
        self._listed = found
        return tuple([process for _, process in found.values()])

    def _process(
        self, pid: int, kinds: str, memory: int | None, shares: dict[int, float] | None
    ) -> tuple[object, GpuProcess]:
        """A process with what it was made of; the same object as long as that does not change."""
        who = self._identities.find(pid)
        share = None
        if shares is not None:
            # No sample means no work, where both lists are known to count pids alike.
            share = shares.get(pid, 0.0 if self._identities.host_pids else None)
        made_of = (kinds, memory, share, who)
        known = self._listed.get(pid)
        if known is not None and known[0] == made_of:
            return known
        process = GpuProcess(
            pid=pid,
            user=who.user,
            name=who.name,
            mem_bytes=memory,
            kind=kinds,
            utilization=share,
            started_at=who.started_at,
            visible=who.visible,
        )
        return made_of, process

    def _shares(self, wall: float) -> dict[int, float] | None:
        if not self._with_shares:
            return None
        since = int(wall * 1e6) - _UTILIZATION_SPAN_US
        code, rows = self._calls.process_utilization(self._handle, since)
        if code == NOT_FOUND:
            return {}
        if code:
            self._note(code)
            return None
        newest: dict[int, tuple[int, int]] = {}
        for pid, stamp, percent in rows:
            # The driver also hands out stale rows and impossible values.
            if stamp > since and percent <= 100 and (stamp, percent) > newest.get(pid, (0, 0)):
                newest[pid] = (stamp, percent)
        return {pid: percent / 100 for pid, (_, percent) in newest.items()}


def _merge(merged: dict[int, tuple[str, int | None]], kind: str, rows: list[ProcessRow]) -> None:
    for pid, memory in rows:
        known = merged.get(pid)
        if known is not None:
            kind_now = kind if known[0] == kind else "both"
            most = max(memory or 0, known[1] or 0) or None
            merged[pid] = (kind_now, most)
        else:
            merged[pid] = (kind, memory)
