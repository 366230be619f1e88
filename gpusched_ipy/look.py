"""The queue and the GPUs together, ready to be shown: whose the processes on a GPU are, and jobs
as JSON with all that the queue knows. It changes nothing in the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpusched_ipy.api import Queue
from gpusched_ipy.attribution import attribute
from gpusched_ipy.backends import Detail
from gpusched_ipy.expected import ExpectedStarts
from gpusched_ipy.folding import entry_rows, folded_rows
from gpusched_ipy.job import ExpectedStart, Job, JobState
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.openjobs import OpenJobs
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.view import JobRow, job_json


class Look:
    """The GPUs as somebody who looks sees them, our own jobs and notebooks by name.

    Args:
        queue: whose jobs and members are recognised.
        monitor: takes the readings.
    """

    def __init__(self, queue: Queue, monitor: Monitor) -> None:
        self._queue = queue
        self._monitor = monitor
        self._open = OpenJobs(queue.store, queue.clock, keep_s=0.0)

    def now(self, timeout_s: float = 5.0, detail: Detail = Detail.FULL) -> Snapshot:
        """A reading that begins now; what cannot be had in time is its ``problem``."""
        self._prepare()
        return self.mark(self._monitor.read_now(timeout_s, detail))

    def latest(self, detail: Detail = Detail.FULL) -> Snapshot | None:
        """The newest reading there is, marked; None before the first."""
        self._prepare()
        snapshot = self._monitor.latest(detail)
        return None if snapshot is None else self.mark(snapshot)

    def mark(self, snapshot: Snapshot) -> Snapshot:
        """``snapshot`` with the job and the member of each process filled in."""
        return attribute(
            snapshot,
            self._open.jobs.values(),
            leaders=self._open.leaders(),
            members=self._queue.store.member_pids(),
        )

    @property
    def jobs(self) -> dict[int, str]:
        """What each open job is called."""
        return {job.id: job.name for job in self._open.jobs.values()}

    @property
    def members(self) -> dict[str, str]:
        """What each member is called."""
        return {key: member.label for key, member in self._queue.store.members().items()}

    def _prepare(self) -> None:
        self._open.refresh()
        # The scripted GPUs show what our running jobs add to them.
        self._monitor.set_allocated(self._open.pids_by_gpu())


def job_record(queue: Queue, job: Job, monitor: Monitor | None = None) -> dict[str, Any]:
    """The JSON of a job."""
    (record,) = job_records(queue, [job], monitor)
    return record


def job_records(
    queue: Queue, jobs: Iterable[Job], monitor: Monitor | None = None
) -> list[dict[str, Any]]:
    """The JSON of jobs."""
    shown = list(jobs)
    starts = expected_starts(queue, shown, monitor)
    logs = {job.id: queue.log_path(job.id) for job in shown}
    return [
        job_json(
            job,
            queue.clock.now(),
            aging_s=queue.settings.aging_s,
            expected=starts.get(job.id),
            log=None if logs[job.id] is None else str(logs[job.id]),
        )
        for job in shown
    ]


def expected_starts(
    queue: Queue, jobs: Sequence[Job], monitor: Monitor | None = None
) -> Mapping[int, ExpectedStart]:
    """When those of the jobs that wait are expected to start, where that can be said."""
    if not any(job.state is JobState.PENDING and not job.held for job in jobs):
        return {}
    monitor = monitor or Monitor(queue.settings, queue.clock, queue.state.root)
    return ExpectedStarts(queue, monitor).now()


def damage(jobs: tuple[int, ...]) -> str:
    """What is said of jobs that cannot be read in the record."""
    ids = ", ".join(str(number) for number in jobs[:10])
    more = f" and {len(jobs) - 10} more" if len(jobs) > 10 else ""
    left_out = "is left out" if len(jobs) == 1 else "are left out"
    return (
        f"job {ids}{more} of the record {left_out}: damaged; the others go on, and "
        "`gpusched doctor --fix` sets it aside"
    )


def job_table(
    queue: Queue, jobs: Iterable[Job], monitor: Monitor | None = None, *, fold: bool = False
) -> list[JobRow]:
    """The rows of jobs, their GPUs by index where a quick reading tells it.

    Args:
        fold: one row for each sweep.
    """
    shown = list(jobs)
    monitor = monitor or Monitor(queue.settings, queue.clock, queue.state.root)
    starts = expected_starts(queue, shown, monitor)
    numbers = _numbers(shown, monitor)
    arrays = queue.arrays(shown) if fold else {}
    return folded_rows(shown, arrays, queue.clock.now(), numbers=numbers, starts=starts)


def first_rows(queue: Queue, limit: int, monitor: Monitor) -> tuple[list[JobRow], int]:
    """The first rows of a long queue in the order of the line, and how many rows there are.

    What is behind them is not read, so nothing is said of when they are expected to start.
    """
    entries, total = queue.folded_page(0, limit)
    numbers = _numbers([entry.job for entry in entries], monitor)
    return entry_rows(entries, queue.clock.now(), numbers=numbers), total


def _numbers(jobs: Iterable[Job], monitor: Monitor) -> Mapping[str, str | None]:
    """The number of each GPU's UUID, where one of these jobs has one and a quick reading tells."""
    if not any(job.gpus for job in jobs):
        return {}
    snapshot = monitor.latest() or monitor.read_now(1.0, Detail.LOAD)
    return {gpu.uuid: gpu.number for gpu in snapshot.gpus}
