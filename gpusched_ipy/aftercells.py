"""What follows when a cell has ended: caches given back, a hint, a warning. It starts nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from gpusched_ipy import framework
from gpusched_ipy.backends import Detail
from gpusched_ipy.config import Settings
from gpusched_ipy.frontend import FrontEnd
from gpusched_ipy.job import JobState
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.pin import gpus_of
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.store import Store

_LISTED = 5


class AfterCells:
    """What one kernel does after its cells.

    Args:
        key: of the kernel as a member.
        labels: what people call the GPUs of these UUIDs.
    """

    def __init__(
        self,
        front: FrontEnd,
        store: Store,
        key: str,
        labels: Callable[[Sequence[str]], Sequence[str]],
    ) -> None:
        self._front = front
        self._store = store
        self._key = key
        self._labels = labels
        self._release = "never"
        self._seen: tuple[str, ...] = ()
        self._warned: set[str] = set()
        self.granted: set[str] = set()  # GPUs that queued cells of this kernel have had

    def configure(self, settings: Settings, monitor: Monitor, outside: Callable[[], bool]) -> None:
        """Take over the settings; ``outside`` says whether a cell runs that has no turn."""
        self._release = settings.release_caches
        if not settings.warn_unqueued:
            return

        def look(snapshot: Snapshot) -> None:
            if outside():
                self._seen = tuple(
                    gpu for gpu in gpus_of(snapshot, os.getpid()) if gpu not in self.granted
                )

        monitor.want("unqueued", None, Detail.PROCESSES)
        monitor.listen(look)

    def queued_cell(self) -> None:
        """A queued cell has ended: others may need the memory that frameworks keep in stock."""
        if self._release == "never" or not framework.has_stock():
            return
        if self._release == "always" or self._others_wait():
            framework.free_caches()

    def ordinary_cell(self, result: Any, waiting: Sequence[int]) -> None:
        """Another cell has ended; ``waiting`` are the deferred jobs of this kernel."""
        error = getattr(result, "error_in_exec", None)
        if isinstance(error, NameError) and waiting:
            listed = ", ".join(f"#{number}" for number in sorted(waiting)[:_LISTED])
            self._front.tell(
                f"gpuqueue: cells of this notebook are still queued ({listed}); "
                "`%gpuq wait` waits for them, `%%gpuqueue --wait` keeps a cell's place"
            )
        self._warn()

    def _others_wait(self) -> bool:
        return any(
            job.state is JobState.PENDING and job.spec.home != self._key
            for job in self._store.jobs()
        )

    def _warn(self) -> None:
        new = [gpu for gpu in self._seen if gpu not in self._warned]
        self._seen = ()
        if new:
            self._warned |= set(new)
            self._front.tell(
                f"gpuqueue: this cell uses {', '.join(self._labels(new))} outside the queue; "
                "%%gpuqueue gives it its turn"
            )
