"""Rows and series of the queue and of the GPUs, for any screen. Pure: state in, text out.

It reads no clock: ``now`` comes in. Strings in rows are cleaned for a terminal; only
:func:`html_table` escapes them for a page. The JSON forms are in :mod:`gpusched_ipy.records`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from gpusched_ipy.config import Instant
from gpusched_ipy.job import ACTIVE, ExpectedStart, Job, JobState
from gpusched_ipy.records import (
    expected_text,
    gpus_json,
    iso,
    job_json,
    over_memory,
    signal_name,
    why_it_waits,
)
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, Snapshot
from gpusched_ipy.sweep import label
from gpusched_ipy.text import (
    UNKNOWN,
    clean,
    escape,
    format_bytes,
    format_duration,
    format_memory,
    format_number,
    format_percent,
)

__all__ = [
    "GPU_COLUMNS",
    "JOB_COLUMNS",
    "GpuRow",
    "JobRow",
    "clean",
    "escape",
    "format_bytes",
    "format_duration",
    "format_percent",
    "gpu_rows",
    "gpus_json",
    "gpus_note",
    "html_table",
    "iso",
    "job_json",
    "job_rows",
    "process_line",
]

NAME_LIMIT = 60
REASON_LIMIT = 160
LINE_LIMIT = 200
OLD_S = 10.0  # an older reading is shown with its age


class JobRow(NamedTuple):
    """One job in a table; every field is cleaned text."""

    id: str
    name: str
    state: str
    priority: str
    gpus: str
    since: str  # for how long it has been so
    why: str  # why it waits, or how it ended
    owner: str


JOB_COLUMNS = ("id", "name", "state", "priority", "GPU", "since", "why", "owner")


def job_rows(
    jobs: Iterable[Job],
    now: Instant,
    *,
    numbers: Mapping[str, str | None] | None = None,
    starts: Mapping[int, ExpectedStart] | None = None,
) -> list[JobRow]:
    """The queue as a table, in the order of ``jobs``.

    Args:
        jobs: what is shown.
        now: for how long each has been so.
        numbers: the number of each GPU's UUID, where known; a UUID is shown otherwise.
        starts: when pending jobs are expected to start, where known.
    """
    expected = starts or {}
    return [_job_row(job, now, numbers or {}, expected.get(job.id)) for job in jobs]


def _job_row(
    job: Job, now: Instant, numbers: Mapping[str, str | None], start: ExpectedStart | None
) -> JobRow:
    state = "held" if job.held and job.state is JobState.PENDING else str(job.state)
    if job.cancel_requested and not job.ended:
        state += " (cancelling)"
    shown = job.gpus if job.ended or job.state in ACTIVE else ()
    return JobRow(
        id=str(job.id),
        name=clean(titled(job), NAME_LIMIT),
        state=state,
        priority=str(job.priority),
        gpus=", ".join(gpu_label(uuid, numbers) for uuid in shown) or UNKNOWN,
        since=format_duration(now.wall - _since(job)),
        why=_why(job, now, start),
        owner=clean(job.spec.owner, NAME_LIMIT),
    )


def _why(job: Job, now: Instant, start: ExpectedStart | None) -> str:
    """Why it waits and when it is expected to start, or how it ended; and what is odd about it."""
    parts = [why_it_waits(job) or _how_it_ended(job), over_memory(job)]
    shown = [clean("; ".join(part for part in parts if part), REASON_LIMIT)]
    if start is not None and job.state is JobState.PENDING:
        shown.append(expected_text(start, now))
    return "; ".join(part for part in shown if part)


def titled(job: Job) -> str:
    """The name of a job; of a member of a sweep with its values."""
    return f"{job.name} {label(job.spec.sweep)}".rstrip()


def gpu_label(uuid: str, numbers: Mapping[str, str | None]) -> str:
    """What people call a GPU: its number, where known."""
    number = numbers.get(uuid)
    return clean(uuid, NAME_LIMIT) if number is None else number


def _since(job: Job) -> float:
    if job.ended and job.ended_at is not None:
        return job.ended_at
    if job.state in ACTIVE and job.started_at is not None:
        return job.started_at
    return job.submitted_at


def _how_it_ended(job: Job) -> str | None:
    if not job.ended or job.state is JobState.COMPLETED:
        return None
    if job.error:
        return job.error
    if job.signal is not None:
        return f"ended by {signal_name(job.signal)}"
    return f"exit status {job.exit_code}" if job.exit_code is not None else None


class GpuRow(NamedTuple):
    """One GPU in a table; every field is cleaned text, ``processes`` one line for each."""

    number: str  # its index in PCI order
    name: str
    utilization: str
    memory: str
    temperature: str
    power: str
    processes: tuple[str, ...]


GPU_COLUMNS = ("index", "name", "utilization", "memory used", "temperature", "power", "processes")


def gpu_rows(
    snapshot: Snapshot,
    now: Instant,
    *,
    jobs: Mapping[int, str] | None = None,
    members: Mapping[str, str] | None = None,
) -> list[GpuRow]:
    """The GPUs as a table.

    Args:
        snapshot: a reading, its processes marked with jobs and members where they are ours.
        now: a reading that is not of this moment says how old it is.
        jobs: the name of each job of ours.
        members: what each member is called (``notebook train.ipynb``).
    """
    age_s = snapshot.age_s(now.mono)
    old = f" ({format_duration(age_s)} ago)" if age_s > OLD_S else ""
    return [_gpu_row(gpu, old, jobs or {}, members or {}) for gpu in snapshot.gpus]


def _gpu_row(gpu: Gpu, old: str, jobs: Mapping[int, str], members: Mapping[str, str]) -> GpuRow:
    name = clean(gpu.name, NAME_LIMIT)
    if gpu.health is not Health.OK:
        name += f" ({clean(gpu.health_text or _HEALTH[gpu.health], NAME_LIMIT)})"
    if gpu.processes is None:
        lines: tuple[str, ...] = ("unknown",)
    else:
        lines = tuple(process_line(item, jobs, members) for item in gpu.processes)
    return GpuRow(
        number=gpu.number or UNKNOWN,
        name=name,
        utilization=format_percent(gpu.utilization) + old,
        memory=format_memory(gpu.mem_used_bytes, gpu.mem_total_bytes),
        temperature=format_number(gpu.temperature_c, "°C"),
        power=format_number(gpu.power_w, "W"),
        processes=lines,
    )


_HEALTH = {
    Health.OK: "well",
    Health.LOST: "lost: it has fallen off the bus",
    Health.RESET_REQUIRED: "must be reset",
    Health.DRIVER_MISMATCH: "driver and library differ",
    Health.ASLEEP: "asleep",
    Health.UNKNOWN: "health unknown",
}


def process_line(
    process: GpuProcess,
    jobs: Mapping[int, str] | None = None,
    members: Mapping[str, str] | None = None,
) -> str:
    """A process on a GPU in one line: whose it is, what it is, the memory it holds."""
    who = _who(process, jobs or {}, members or {})
    known = [f"pid {process.pid}"] if process.visible else [f"pid {process.pid} elsewhere"]
    if process.user:
        known.append(f"user {process.user}")
    held = format_bytes(process.mem_bytes)
    if process.idle_s is not None:
        state = f"idle {format_duration(process.idle_s)}, holds {held}"
    else:
        state = held if process.mem_bytes is not None else "memory unknown"
    return clean(f"{who} ({', '.join(known)}): {state}", LINE_LIMIT)


def _who(process: GpuProcess, jobs: Mapping[int, str], members: Mapping[str, str]) -> str:
    name = process.name or "unknown program"
    if process.job is not None:
        title = jobs.get(process.job)
        return f"job {process.job} {title}" if title else f"job {process.job}"
    if process.member is not None:
        return members.get(process.member, f"a notebook's {name}")
    return name


def gpus_note(snapshot: Snapshot, now: Instant, explanation: str | None = None) -> str:
    """One line under a table of GPUs: what was read, how old it is, and what is wrong with it."""
    age = format_duration(snapshot.age_s(now.mono))
    read = explanation or f"{snapshot.backend} ({snapshot.source})"
    driver = f", driver {snapshot.driver}" if snapshot.driver else ""
    if snapshot.problem and snapshot.problem in read:
        return clean(snapshot.problem)  # there is no backend, and that is all there is to say
    problem = f"; {snapshot.problem}" if snapshot.problem else ""
    return clean(f"read {age} ago by {read}{driver}{problem}")


_CELL = "padding:2px 10px 2px 0;vertical-align:top;border:0;"
_HEAD = f"{_CELL}font-weight:600;border-bottom:1px solid currentColor;"


def html_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Sequence[str]]],
    *,
    caption: str | None = None,
    numeric: Collection[str] = (),
) -> str:
    """A small table in HTML that takes its colours from the page around it.

    Args:
        columns: the headings.
        rows: their cells; a cell that is a sequence of strings has one line for each.
        caption: what the table shows, for people and for screen readers.
        numeric: the columns that are set flush right.
    """
    sides = ["right" if column in numeric else "left" for column in columns]
    # The classes keep a page's formula renderer away from names that hold dollar signs.
    out = ['<table class="mathjax_ignore tex2jax_ignore" style="border-collapse:collapse">']
    if caption:
        style = "text-align:left;caption-side:bottom;opacity:.75;padding-top:4px"
        out.append(f'<caption style="{style}">{escape(caption)}</caption>')
    heads = (
        f'<th scope="col" style="{_HEAD}text-align:{side}">{escape(column)}</th>'
        for column, side in zip(columns, sides, strict=True)
    )
    out.append(f"<thead><tr>{''.join(heads)}</tr></thead><tbody>")
    for row in rows:
        cells = (
            f'<td style="{_CELL}text-align:{side}">{_lines(cell)}</td>'
            for cell, side in zip(row, sides, strict=True)
        )
        out.append(f"<tr>{''.join(cells)}</tr>")
    out.append("</tbody></table>")
    return "".join(out)


def _lines(cell: str | Sequence[str]) -> str:
    return escape(cell) if isinstance(cell, str) else "<br>".join(escape(line) for line in cell)
