"""The queued cells of this kernel that may be several, or queued already: sweeps and keys.

Each member is a queued cell like any other, with its values in the namespace before its body. It
starts nothing: the runner does.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gpusched_ipy import sweep
from gpusched_ipy.api import Queue
from gpusched_ipy.badge import heading
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import FrontEnd
from gpusched_ipy.interrupts import shielded
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.records import how_it_stands
from gpusched_ipy.runners.cell import Cell, CellRunner, Phase
from gpusched_ipy.submission import Submission

_LISTED = 3


class CellSweep:
    """Queues the members of this kernel's sweeps, and follows them.

    Args:
        home: the key of this kernel as a member.
    """

    def __init__(self, front: FrontEnd, runner: CellRunner, home: str) -> None:
        self._front = front
        self._runner = runner
        self._home = home

    def submit(self, queue: Queue, code: str, body: str, fields: Mapping[str, Any]) -> Submission:
        """Queue the running cell, once for each combination of values.

        Args:
            code: the cell as it stands in the notebook; ``body`` is what stands below the magic.
            fields: the options of the submit.

        Raises:
            UserError: it cannot be; nothing is queued.
        """
        parent, cells = self._front.parent, self._runner.cells

        def expect(spec: JobSpec, _values: Mapping[str, Any]) -> None:
            cells[spec.uid] = Cell(
                uid=spec.uid,
                parent=parent,
                code=code,
                cell_id=spec.cell_id,
                array=None if spec.array is None else spec.array.id,
            )

        def forget(uid: str) -> None:
            cells.pop(uid, None)

        submit = partial(
            queue.submit_all,
            prepare=expect,
            undo=forget,
            kind=JobKind.CELL,
            code=body,
            uid=uuid.uuid4().hex,
            home=self._home,
            cell_id=self._front.cell_id,
            **fields,
        )
        done = shielded(submit)
        for job in done.jobs:
            cell = cells.get(job.spec.uid)
            if cell is None:
                continue
            cell.job_id = job.id
            cell.array = None if job.spec.array is None else job.spec.array.id
            if cell.phase is Phase.WAITING:
                cell.parent = parent  # one that stood already shows itself where it is asked for
        return done

    def begins(self, job: Job) -> None:
        """On the main thread, before the body of a member: its values, and a heading for them."""
        values = job.spec.sweep
        cell = self._runner.cells.get(job.spec.uid)
        if not values or cell is None:
            return
        self._front.shell.user_ns.update(sweep.values_of(values))
        content = {"data": heading(job), "metadata": {}, "transient": {}}
        if self._front.kernel is not None:
            self._front.publish("display_data", content, cell.parent)

    def follow(self, queue: Queue, done: Submission, lend: Callable[[], None]) -> None:
        """Wait until all of it is over, the main thread being lent to its members.

        Raises:
            UserError: some have not completed, or the rest is held because they fail.
        """
        ids = [job.id for job in done.jobs]

        def tick() -> None:
            lend()
            self._check_held(queue, ids)

        try:
            jobs = queue.wait(*ids, tick=tick)
        except KeyboardInterrupt:
            mine = [job.id for job in done.queued]
            shielded(lambda: queue.cancel(*mine))
            raise
        bad = [job for job in jobs if job.state is not JobState.COMPLETED]
        if bad:
            listed = "; ".join(_brief(job) for job in bad[:_LISTED])
            more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
            raise UserError(f"{len(bad)} of {len(jobs)} jobs did not complete: {listed}{more}")

    def _check_held(self, queue: Queue, ids: list[int]) -> None:
        states = queue.store.states(ids)
        waiting = [number for number, state in states.items() if state is JobState.PENDING]
        job = queue.store.job(max(waiting)) if waiting else None
        if job is not None and job.hold_reason is not None:
            array = job.spec.array
            name = f"array:{array.id}" if array else str(job.id)
            raise UserError(
                f"the other {len(waiting)} jobs are held: {job.hold_reason}; "
                f"`%gpuq release {name}` goes on with them"
            )


def _brief(job: Job) -> str:
    values = sweep.label(job.spec.sweep)
    return f"job {job.id}{f' ({values})' if values else ''}: {how_it_stands(job)}"
