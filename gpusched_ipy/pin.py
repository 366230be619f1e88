"""The GPUs that this kernel is bound to: CUDA reads CUDA_VISIBLE_DEVICES once in a process.

The first grant shows the process its GPUs and no other; from then on its cells can use these only.
A process that has opened a GPU by itself is bound to what CUDA shows it, or where CUDA cannot be
asked to the card where the backend shows its pid.
"""

from __future__ import annotations

import os

from gpusched_ipy import cuda, framework
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

    def look(self, monitor: Monitor, count: int = 1) -> None:
        """Before a submit for ``count`` GPUs: a process that has opened some is bound to them."""
        if self.gpus is not None:
            return
        bound = cuda.opened(count)
        if bound is None and not framework.has_context():
            return
        snapshot = monitor.read_now(_READING_S, Detail.PROCESSES)
        known = tuple(gpu.uuid for gpu in snapshot.gpus)
        found = cuda.match(bound or (), known) or gpus_of(snapshot, os.getpid())
        if found:
            self.bind(found)

    def grant(self, claim: Claim) -> None:
        """Before the first queued body: show the process its GPUs, and no other."""
        if self.gpus is not None:
            return
        if cuda.opened() is None and not framework.has_context():
            os.environ.update(claim.env)
        self.bind(claim.job.gpus)

    def bind(self, gpus: tuple[str, ...]) -> None:
        """From now on the process can use these GPUs only."""
        self.gpus = gpus
        self._store.set_pinned(self._key, gpus)


def gpus_of(snapshot: Snapshot, pid: int) -> tuple[str, ...]:
    """The GPUs on which a reading shows that process."""
    return tuple(
        gpu.uuid
        for gpu in snapshot.gpus
        if any(process.pid == pid and process.visible for process in gpu.processes or ())
    )
