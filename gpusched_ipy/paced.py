"""Expected starts for screens that look again and again: worked out now and then, never for long.

It reads no GPU: a forecast without a good reading is none.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.expected import ExpectedStarts
from gpusched_ipy.job import ExpectedStart
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.records import expected_text

_SHARE = 100  # forecasts take at most one part in so many of the time
_FIRST = 50  # jobs in line; further ones start too late for a forecast that is worth its time
_MOST = 10_000  # open jobs: reading more of them would hold up the screen for seconds


class PacedStarts:
    """The forecasts of the first jobs in line, at most every ``every_s`` seconds.

    Args:
        queue: whose pending jobs are looked at.
        monitor: of this process; no reading is taken for a forecast.
    """

    def __init__(self, queue: Queue, monitor: Monitor, every_s: float = 5.0) -> None:
        self._queue = queue
        self._clock = queue.clock
        self._monitor = monitor
        self._source = ExpectedStarts(queue, monitor)
        self._every_s = every_s
        self._due = float("-inf")
        self._found: Mapping[int, ExpectedStart] = {}

    def renew(self) -> Mapping[int, ExpectedStart]:
        """The forecasts, worked out anew where it is time.

        Raises:
            StoreError: the record cannot be read.
        """
        begun = self._clock.now().mono
        if begun < self._due:
            return self._found
        snapshot = self._monitor.latest(Detail.PROCESSES)
        good = snapshot is not None and snapshot.problem is None
        good = good and sum(self._queue.counts().values()) <= _MOST
        self._found = self._source.now(snapshot, limit=_FIRST) if good else {}
        done = self._clock.now().mono
        self._due = done + max(self._every_s, _SHARE * (done - begun))
        return self._found

    def text(self, job_id: int) -> str | None:
        """What is said of a job, by the last forecast; None where nothing is known."""
        found = self._found.get(job_id)
        return None if found is None else expected_text(found, self._clock.now())
