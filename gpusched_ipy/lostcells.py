"""Queued cells whose kernel has ended: offered to the next kernel of their notebook, and queued
again there on request. It starts nothing.
"""

from __future__ import annotations

from gpusched_ipy import cellsyntax
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import FrontEnd
from gpusched_ipy.job import Job, JobKind
from gpusched_ipy.runners.cell import Cell, CellRunner
from gpusched_ipy.store import Store

# So long after their end lost cells are still offered.
_OFFERED_S = 86400.0


class LostCells:
    """The lost cells of one notebook, as its present kernel sees them.

    Args:
        key: this kernel as a member.
    """

    def __init__(self, front: FrontEnd, store: Store, runner: CellRunner, key: str) -> None:
        self._front = front
        self._store = store
        self._runner = runner
        self._key = key

    def offer(self, wall: float) -> None:
        """Say in one line which cells of this notebook never ran because their kernel ended."""
        lost = [
            job
            for job in self._store.lost_before_start(JobKind.CELL, since=wall - _OFFERED_S)
            if job.spec.owner == self._front.owner and not job.spec.in_place
        ]
        if lost:
            ids = ",".join(str(job.id) for job in lost)
            cells = f"{len(lost)} queued cell{'s' if len(lost) > 1 else ''}"
            self._front.tell(
                f"gpuqueue: {cells} of this notebook never ran, because the kernel ended: "
                f"%gpuq requeue {ids} queues them again, here"
            )

    def requeue(self, job: Job) -> tuple[Cell, Job]:
        """Make an ended cell a cell of this kernel; it appears under the one that runs now.

        Raises:
            UserError: it has not ended, or cannot run here later.
        """
        if not self._front.can_defer or job.spec.code is None:
            raise UserError(f"job {job.id} is a cell: run the cell again; here none can run later")
        cell = Cell(
            uid=job.spec.uid,
            parent=self._front.parent,
            code=f"{cellsyntax.NAME}\n{job.spec.code}",
            job_id=job.id,
        )
        known = self._runner.cells.get(cell.uid)
        self._runner.cells[cell.uid] = cell
        try:
            return cell, self._store.requeue(job, home=self._key)
        except BaseException:
            del self._runner.cells[cell.uid]
            if known is not None:
                self._runner.cells[cell.uid] = known
            raise
