"""When each pending job of the queue is expected to start: for whoever looks, never for a decision.

It is worked out when it is asked for, from the record, one reading and what past runs teach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpusched_ipy import backlog
from gpusched_ipy.attribution import attribute
from gpusched_ipy.backends import Detail
from gpusched_ipy.job import ExpectedStart
from gpusched_ipy.learned import Learned
from gpusched_ipy.openjobs import OpenJobs
from gpusched_ipy.policy.forecast import forecast

if TYPE_CHECKING:
    from gpusched_ipy.api import Queue
    from gpusched_ipy.monitor import Monitor
    from gpusched_ipy.snapshot import Snapshot

# A forecast is no reason to wait longer for a reading, nor to take one where one is so young.
READING_S = 2.0


class ExpectedStarts:
    """The forecasts of one queue; what it has read of the record it keeps up to date.

    Args:
        queue: whose pending jobs are looked at.
        monitor: takes the reading; asked for a new one only where it has none.
    """

    def __init__(self, queue: Queue, monitor: Monitor) -> None:
        self._queue = queue
        self._monitor = monitor
        self._learned = Learned(queue.store)
        settings = queue.settings
        self._open = OpenJobs(
            queue.store,
            queue.clock,
            keep_s=settings.quiet_s + settings.sample_interval_s,
            ended=self._learned.saw,
        )

    def now(
        self, snapshot: Snapshot | None = None, *, limit: int | None = None
    ) -> Mapping[int, ExpectedStart]:
        """The forecasts by id; a job of which nothing can be said is left out.

        Args:
            snapshot: a reading, where the caller has one.
            limit: only for the first so many in line: a long line costs a second.
        """
        queue, learned = self._queue, self._learned
        self._open.refresh()
        if not self._open.any_waits:
            return {}
        now, jobs, store = queue.clock.now(), self._open.jobs, queue.store
        known = learned.known(jobs)
        known["members"] = store.members()
        known["ended"] = self._open.states_of_dependencies()
        known["drained"] = store.drained is not None
        known["worst_backlog_s"] = backlog.worst_s(store, now.wall)
        return forecast(
            self._open.line,
            {job.id: job for job in self._open.active},
            self._reading(snapshot),
            learned.with_ends(self._open.allocations(), jobs, now.mono),
            queue.settings,
            now,
            learned.within_walltime,
            limit=limit,
            **known,
        )

    def _reading(self, snapshot: Snapshot | None) -> Snapshot:
        self._monitor.set_allocated(self._open.pids_by_gpu())
        found = snapshot or self._monitor.latest(Detail.PROCESSES)
        if found is None or found.age_s(self._queue.clock.now().mono) > READING_S:
            found = self._monitor.read_now(READING_S, Detail.PROCESSES)
        return attribute(
            found,
            self._open.active,
            leaders=self._open.leaders(),
            members=self._queue.store.member_pids(),
        )
