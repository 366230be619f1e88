"""The GPUs that this kernel is bound to: CUDA reads CUDA_VISIBLE_DEVICES once in a process.

The first grant shows the process its GPUs and no other; from then on its cells can use these only.
A kernel that has opened a GPU by itself is bound to the card where the backend shows its pid.
"""

from __future__ import annotations

import os

from gpusched_ipy import framework
from gpusched_ipy.backends import Detail
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.scheduler import Claim
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.store import Store

_READING_S = 1.0


class Pin:
    """The binding of one kernel.

    Args:
        key: of the kernel as a member; the record tells the others.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self.gpus: tuple[str, ...] | None = None

    def look(self, monitor: Monitor) -> None:
        """Before a submit: a kernel that has opened a GPU already is bound to it."""
        if self.gpus is None and framework.has_context():
            found = gpus_of(monitor.read_now(_READING_S, Detail.PROCESSES), os.getpid())
            if found:
                self._set(found)

    def grant(self, claim: Claim) -> None:
        """Before the first queued body: show the process its GPUs, and no other."""
        if self.gpus is not None:
            return
        if not framework.has_context():
            os.environ.update(claim.env)
        self._set(claim.job.gpus)

    def _set(self, gpus: tuple[str, ...]) -> None:
        self.gpus = gpus
        self._store.set_pinned(self._key, gpus)


def gpus_of(snapshot: Snapshot, pid: int) -> tuple[str, ...]:
    """The GPUs on which a reading shows that process."""
    return tuple(
        gpu.uuid
        for gpu in snapshot.gpus
        if any(process.pid == pid and process.visible for process in gpu.processes or ())
    )
