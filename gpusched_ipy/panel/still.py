"""The panel where no page can run it: text for terminals, and a still picture as HTML with SVG.

For nbconvert, for front ends without widgets and for whoever reads the saved notebook. Everything
that a job or a process controls is escaped; there is no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from gpusched_ipy.config import Instant
from gpusched_ipy.folding import entry_rows
from gpusched_ipy.job import Job
from gpusched_ipy.panel.feed import WINDOW_S, JobPage, in_window, thin
from gpusched_ipy.panel.looks import JOBS, MEMORY, UTILIZATION, gap_s
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.text import clean, escape
from gpusched_ipy.view import JOB_COLUMNS, GpuRow, gpu_rows, html_table

_WIDTH, _HEIGHT, _LANE = 560, 84, 14
_LEFT = 34  # of the picture, for the scale
_TEXT_ROWS, _HTML_ROWS = 10, 50


def still_text(snapshot: Snapshot | None, page: JobPage, now: Instant) -> str:
    """The GPUs and the first jobs of the queue, for a terminal."""
    problem = _problem(snapshot)
    lines = [f"GPUs: {problem}"] if problem else []
    if snapshot:
        for gpu, row in zip(snapshot.gpus, gpu_rows(snapshot, now), strict=True):
            lines.append(f"{_title(gpu)}: {_numbers(row)}")
    lines.append(f"Queue: {_counts(page)}")
    lines += [
        f"  #{job.id} {job.name} · {job.state} · priority {job.priority} · {job.why}"
        for job in entry_rows(page.rows[:_TEXT_ROWS], now, numbers=_gpu_numbers(snapshot))
    ]
    if page.total > _TEXT_ROWS:
        lines.append(f"  and {page.total - _TEXT_ROWS} more")
    return "\n".join(clean(line) for line in lines)


def still_html(
    snapshot: Snapshot | None, history: Sequence[Snapshot], page: JobPage, now: Instant
) -> str:
    """The last minutes of each GPU as SVG, and the queue as a table.

    Args:
        snapshot: the newest reading.
        history: the readings of the last minutes, oldest first.
        page: the queue.
        now: the right edge of the pictures.
    """
    taken = datetime.fromtimestamp(now.wall).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    parts = [f"<p><b>GPU panel</b>, as it was at {escape(taken)}</p>"]
    if problem := _problem(snapshot):
        parts.append(f"<p>{escape(problem)}</p>")
    readings = thin(history)
    if snapshot:
        for gpu, row in zip(snapshot.gpus, gpu_rows(snapshot, now), strict=True):
            parts.append(f"<p><b>{escape(_title(gpu))}</b><br>{escape(_numbers(row))}</p>")
            parts.append(_picture(gpu, readings, page.spans, now.wall))
    parts.append(_queue_table(page, snapshot, now))
    return f'<div style="font-family:sans-serif;font-size:13px">{"".join(parts)}</div>'


def _problem(snapshot: Snapshot | None) -> str | None:
    if snapshot is None:
        return "no reading yet"
    return f"the GPUs cannot be read: {snapshot.problem}" if snapshot.problem else None


def _picture(gpu: Gpu, history: Sequence[Snapshot], jobs: Sequence[Job], now: float) -> str:
    spans = [job for job in jobs if gpu.uuid in job.gpus and in_window(job, now)]
    height = _HEIGHT + 16 + _LANE * len(spans[:8])
    total = gpu.mem_total_bytes
    used: list[tuple[float, float | None]] = []
    util: list[tuple[float, float | None]] = []
    for snapshot in history:
        found = snapshot.gpu(gpu.uuid)
        bytes_used = found.mem_used_bytes if found else None
        known = bytes_used is not None and total
        used.append((snapshot.taken_at, (bytes_used or 0) / total if known and total else None))
        util.append((snapshot.taken_at, found.utilization if found else None))
    label = f"{_title(gpu)}: utilization (solid line) and memory (dashed line), last 10 minutes"
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {height}"'
        f' width="{_WIDTH}" height="{height}" style="max-width:100%;height:auto;color:inherit">'
        f'<g stroke="currentColor" stroke-opacity=".2">{_grid()}</g>'
        f'<g font-size="10" fill="currentColor">{_labels()}</g>'
        f"{_line(used, now, MEMORY, dash=True)}{_line(util, now, UTILIZATION, dash=False)}"
        f"{''.join(_span(job, lane, now) for lane, job in enumerate(spans[:8]))}</svg>"
    )


def _grid() -> str:
    return "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{_y(ratio):.1f}" y2="{_y(ratio):.1f}"/>'
        for ratio in (0, 0.5, 1)
    )


def _labels() -> str:
    y = _HEIGHT + 11
    scale = "".join(
        f'<text x="{_LEFT - 4}" y="{_y(ratio) + 5:.1f}" text-anchor="end">{ratio:.0%}</text>'
        for ratio in (0, 0.5, 1)
    )
    return (
        f'{scale}<text x="{_LEFT}" y="{y}">10 min ago</text>'
        f'<text x="{_WIDTH}" y="{y}" text-anchor="end">now</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{y}" text-anchor="middle">'
        "solid: utilization, dashed: memory</text>"
    )


def _line(
    points: Sequence[tuple[float, float | None]], now: float, colour: str, *, dash: bool
) -> str:
    """One path; a reading that is missing or unknown interrupts it."""
    steps: list[str] = []
    gap = gap_s([at for at, _ in points])
    before: float | None = None
    for at, ratio in points:
        if ratio is None:
            before = None
            continue
        joined = before is not None and at - before <= gap
        steps.append(f"{'L' if joined else 'M'}{_x(at, now):.1f} {_y(ratio):.1f}")
        before = at
    style = ' stroke-dasharray="4 3"' if dash else ""
    return (
        f'<path d="{"".join(steps)}" fill="none" stroke="{colour}" stroke-width="1.6"'
        f' stroke-linecap="round"{style}/>'
    )


def _span(job: Job, lane: int, now: float) -> str:
    start = max(float(_LEFT), _x(job.started_at or now, now))
    end = _x(job.ended_at or now, now)
    top = _HEIGHT + 16 + lane * _LANE
    colour = JOBS[job.id % len(JOBS)]
    text = f"#{job.id} {job.name} ({job.state})"
    anchor = ' text-anchor="end"' if start > _WIDTH * 0.6 else ""
    x = end - 4 if anchor else start + 4
    return (
        f'<rect x="{start:.1f}" y="{top}" width="{max(2.0, end - start):.1f}" height="{_LANE - 2}"'
        f' fill="{colour}" fill-opacity=".3"/><text x="{x:.1f}" y="{top + 9}" font-size="10"'
        f' fill="currentColor"{anchor}>{escape(text)}</text>'
    )


def _queue_table(page: JobPage, snapshot: Snapshot | None, now: Instant) -> str:
    more = page.total - min(len(page.rows), _HTML_ROWS)
    told = _counts(page) + (f" · {more} more are not shown" if more > 0 else "")
    rows = entry_rows(page.rows[:_HTML_ROWS], now, numbers=_gpu_numbers(snapshot))
    table = html_table(JOB_COLUMNS, rows, numeric=("id", "priority")) if rows else ""
    return f"<p><b>Queue</b>: {escape(told)}</p>{table}"


def _counts(page: JobPage) -> str:
    if page.trouble:
        return f"it cannot be read: {page.trouble}"
    told = f"{page.running} running · {page.waiting} waiting · {page.held} held"
    return f"{told} · drained, nothing new starts" if page.drained else told


def _gpu_numbers(snapshot: Snapshot | None) -> dict[str, str | None]:
    return {gpu.uuid: gpu.number for gpu in snapshot.gpus} if snapshot else {}


def _title(gpu: Gpu) -> str:
    return f"GPU {gpu.name}" if gpu.number is None else f"GPU {gpu.number} {gpu.name}"


def _numbers(row: GpuRow) -> str:
    parts = [f"utilization {row.utilization}", f"memory {row.memory}", row.temperature, row.power]
    return " · ".join(parts)


def _x(at: float, now: float) -> float:
    return _LEFT + ((at - now) / WINDOW_S + 1) * (_WIDTH - _LEFT)


def _y(ratio: float) -> float:
    return 3 + (1 - min(1.0, max(0.0, ratio))) * (_HEIGHT - 6)
