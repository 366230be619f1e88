"""What the panel needs of the monitor, of the queue and of the process it lives in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpusched_ipy.backends import Detail
from gpusched_ipy.entries import Entry
from gpusched_ipy.job import Job
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.steer import Steered


class Readings(Protocol):
    """What the panel needs of the monitor."""

    def want(self, who: str, interval_s: float | None = None, detail: Detail = ...) -> None: ...
    def unwant(self, who: str) -> None: ...
    def latest(self, detail: Detail = ...) -> Snapshot | None: ...
    def history(self, seconds: float) -> tuple[Snapshot, ...]: ...
    @property
    def explanation(self) -> str | None: ...


class PanelQueue(Steered, Protocol):
    """What the panel needs of the queue."""

    def folded_page(
        self, offset: int, limit: int, unfolded: Collection[str] = ()
    ) -> tuple[Sequence[Entry], int]:
        """Rows of the jobs not yet ended in the order of the queue (who runs, who waits, who is
        held), one for each sweep that is not unfolded; and how many rows there are."""
        ...

    def counts(self) -> Mapping[str, int]:
        """How many jobs are ``running`` (or starting), ``waiting`` and ``held``."""
        ...

    def ran_since(self, wall: float) -> Sequence[Job]:
        """Jobs that had a GPU at ``wall`` (s since the epoch) or later."""
        ...

    def mark(self, snapshot: Snapshot, jobs: Iterable[Job]) -> Snapshot:
        """``snapshot`` with the job and the member of each process filled in."""
        ...

    def members(self) -> Mapping[str, str]:
        """What each member is called, by its key."""
        ...

    @property
    def drained(self) -> str | None: ...
    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]: ...


class Host(Protocol):
    """What the panel must know of the process it lives in."""

    @property
    def busy(self) -> bool:
        """Whether messages of pages may be waiting for the main thread."""
        ...

    @property
    def free_since(self) -> float:
        """Since when (monotonic, s) they have not."""
        ...


@dataclass(frozen=True, slots=True)
class AlwaysFree:
    """A host whose messages never wait."""

    busy: bool = False
    free_since: float = 0.0
