"""The time: the only way in which decisions and loops learn it, and what tests replace."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol


# No dataclass: whatever a shim needs before its job begins does without, for they import slowly.
class Instant(NamedTuple):
    """One moment on both clocks: ``mono`` decides, ``wall`` is for people and begin times."""

    mono: float  # s, the monotonic clock of this boot, the same in all processes
    wall: float  # s since the epoch


class Clock(Protocol):
    """The only way in which decisions and loops learn the time."""

    def now(self) -> Instant:
        """This moment."""
        ...


class SystemClock:
    """The clocks of the operating system."""

    def now(self) -> Instant:
        """This moment."""
        return Instant(mono=time.monotonic(), wall=time.time())
