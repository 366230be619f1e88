"""Jobs that use far more GPU memory than they declared: told once, ended only where that is set.

What a job declares decides who may share its GPU, so one that takes more puts others at risk. It
watches nothing: it is told what has been measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job
from gpusched_ipy.records import far_over
from gpusched_ipy.store import Store


class Excess:
    """What one member has said of its jobs."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._told: set[tuple[int, int]] = set()

    def look(self, measured: Iterable[tuple[Job, int | None]]) -> None:
        """Look at jobs that run, each with the most memory that it has had so far, in bytes."""
        running = list(measured)
        self._told &= {(job.id, job.epoch) for job, _ in running}
        for job, peak in running:
            declared = job.request.mem_bytes
            if declared is None or peak is None or (job.id, job.epoch) in self._told:
                continue
            if far_over(peak, declared * len(job.gpus)):
                self._told.add((job.id, job.epoch))
                self._tell(job, peak)

    def _tell(self, job: Job, peak: int) -> None:
        ends = self._settings.end_over_memory
        with self._store.writing():
            told = self._store.tell_excess(replace(job, peak_mem_bytes=peak), ends=ends)
            if told and ends:
                self._store.request_cancel(job.id)
