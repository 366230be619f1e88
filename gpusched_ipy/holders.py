"""Asks idle kernels that keep GPU memory in stock to give it back while jobs wait for it.

The question stands in the record; whether a kernel obeys is its own decision, made when its main
thread is idle. A kernel is asked again only after a while. Nothing is taken from anybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.job import WaitCode, WaitReason
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.store import Store

AGAIN_S = 60.0
# What memory that somebody gives back could help against.
_HELPS = frozenset({WaitCode.MEMORY, WaitCode.GPU_BUSY, WaitCode.GPU_ALLOCATED})


class Holders:
    """The questions of one member.

    Args:
        key: the member that asks: it does not ask itself.
    """

    def __init__(self, store: Store, key: str, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._key = key
        self._asks = settings.release_caches != "never"
        self._clock = clock
        self._asked_at: dict[str, float] = {}  # monotonic s

    def ask(self, snapshot: Snapshot | None, waits: Iterable[WaitReason]) -> None:
        """Ask whoever holds memory on these GPUs and is idle, if a job waits for such memory."""
        if not self._asks or snapshot is None or snapshot.problem is not None:
            return
        if not any(reason.code in _HELPS for reason in waits):
            return
        mono = self._clock.now().mono
        self._asked_at = {key: at for key, at in self._asked_at.items() if mono - at < AGAIN_S}
        holders = set(_members_with_memory(snapshot)) - {self._key} - self._asked_at.keys()
        if holders:
            self._asked_at |= dict.fromkeys(holders, mono)
            self._ask(holders)

    def _ask(self, keys: Collection[str]) -> None:
        members = self._store.members()
        idle = [key for key in keys if key in members and not members[key].busy]
        self._store.ask_to_release(idle, again_s=AGAIN_S)


def _members_with_memory(snapshot: Snapshot) -> Iterator[str]:
    for gpu in snapshot.gpus:
        for process in gpu.processes or ():
            if process.member is not None and process.job is None and process.mem_bytes:
                yield process.member
