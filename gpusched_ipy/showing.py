"""Snapshots, jobs and lists of jobs as tables, where a cell ends in one. It reads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from gpusched_ipy.config import Instant, SystemClock
from gpusched_ipy.job import Job
from gpusched_ipy.pretty import Drawn, Shown, drawn
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.terminal import plain_table
from gpusched_ipy.view import (
    GPU_COLUMNS,
    JOB_COLUMNS,
    clean,
    gpu_rows,
    gpus_note,
    html_table,
    job_rows,
)

_MOST = 50  # jobs of a list that are shown


class JobList(Shown, list[Job]):
    """A list of jobs that a notebook shows as a table."""

    __slots__ = ()


def jobs_drawn(jobs: Sequence[Job], caption: str) -> Drawn:
    """The first jobs of a list as a table, and what the rest are."""
    rows = job_rows(jobs[:_MOST], SystemClock().now())
    if len(jobs) > _MOST:
        caption = f"{caption}; {len(jobs) - _MOST} more are not shown"
    lines = [*plain_table(JOB_COLUMNS, rows), clean(caption)]
    html = html_table(JOB_COLUMNS, rows, caption=caption, numeric=("id", "priority"))
    return Drawn("\n".join(lines), html)


@drawn.register
def _(value: Job) -> Drawn:
    (row,) = job_rows([value], SystemClock().now())
    why = f", {row.why}" if row.why else ""
    text = f"<job {row.id} {row.name}: {row.state}, priority {row.priority}{why}>"
    return Drawn(text, html_table(JOB_COLUMNS, [row], numeric=("id", "priority")))


@drawn.register
def _(value: JobList) -> Drawn:
    return jobs_drawn(value, "1 job" if len(value) == 1 else f"{len(value)} jobs")


@drawn.register
def _(value: Snapshot) -> Drawn:
    rows = gpu_rows(value, Instant(mono=value.taken_mono, wall=value.taken_at))
    note = _taken(value)
    lines = [*(plain_table(GPU_COLUMNS, rows) if rows else []), note]
    return Drawn("\n".join(lines), html_table(GPU_COLUMNS, rows, caption=note, numeric=("index",)))


def _taken(value: Snapshot) -> str:
    """When and how it was read; a snapshot that is shown again has not become newer."""
    at = datetime.fromtimestamp(value.taken_at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    now = Instant(mono=value.taken_mono, wall=value.taken_at)
    return clean(f"as it was at {at}; {gpus_note(value, now).replace('read 0 s ago by ', '')}")
