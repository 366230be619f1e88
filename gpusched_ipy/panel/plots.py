"""Still pictures of the GPUs and of who ran when, for papers and saved notebooks.

Figures of matplotlib, drawn by its Agg canvas; pyplot and its global state are never touched. This
module decides nothing and reads nothing: readings and jobs are handed in.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.panel.looks import JOBS, MEMORY, UTILIZATION, gap_s
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.text import clean

_GIB = 2**30
_WIDTH_IN = 7.2  # two columns of a paper
_BAD = frozenset({JobState.FAILED, JobState.TIMEOUT, JobState.LOST})
_HATCHES = {**dict.fromkeys(_BAD, "////"), JobState.CANCELLED: "...."}
_NAME_LIMIT = 40
_CHARACTER = 0.0105  # the width of a character, as a share of the axes


class StillFigure(Figure):
    """A figure that a notebook shows as it is, without pyplot and at twice the screen's density."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=2 * self.dpi, facecolor="white")
        width, height = self.get_size_inches() * self.dpi
        return stream.getvalue(), {"width": round(width), "height": round(height)}


def plot_usage(
    snapshots: Sequence[Snapshot],
    jobs: Sequence[Job] = (),
    *,
    gpus: Collection[str] | None = None,
    now: float | None = None,
) -> Figure:
    """Utilization (%) and memory used (GiB) of each GPU over time, with the jobs below.

    Args:
        snapshots: readings, oldest first, for example ``Monitor.history(600)``.
        jobs: whose spans are drawn, for example ``Queue.ran_since(…)``.
        gpus: UUIDs of the GPUs that are drawn; all when None.
        now: where the spans of running jobs end, wall clock in s; the last reading when None.

    Raises:
        UserError: there is no reading to draw.
    """
    good = [snapshot for snapshot in snapshots if snapshot.gpus]
    shown = _gpus_of(good, gpus)
    if not shown:
        raise UserError("there is no reading to plot; let `%gpupanel` or a job run for a moment")
    start, end = good[0].taken_at, good[-1].taken_at
    now = max(end, now or end)
    figure = _figure(1.75 * len(shown) + 0.75)
    grid = figure.add_gridspec(2 * len(shown), 1, height_ratios=[5, 1] * len(shown))
    first: Axes | None = None
    for place, gpu in enumerate(shown):
        axes = figure.add_subplot(grid[2 * place], sharex=first)
        first = first or axes
        _draw_usage(axes, snapshots, gpu)
        strip = figure.add_subplot(grid[2 * place + 1], sharex=first)
        _draw_spans(strip, [job for job in jobs if gpu.uuid in job.gpus], start, now)
        last = place == len(shown) - 1
        axes.tick_params(labelbottom=False)
        strip.tick_params(labelbottom=last, left=False, labelleft=False)
        if last:
            _time_axis(strip, start)
    if first is not None:
        first.set_xlim(_num(start), _num(max(now, start + 1)))
    handles: list[Any] = [
        Line2D([], [], color=UTILIZATION, label="utilization (%)"),
        Line2D([], [], color=MEMORY, linestyle="--", label="memory used (GiB)"),
    ]
    _legend(figure, handles, jobs)
    return figure


def plot_timeline(
    jobs: Sequence[Job],
    *,
    numbers: Mapping[str, str | None] | None = None,
    now: float | None = None,
) -> Figure:
    """Who ran when: one line for each GPU, one bar for each job.

    Args:
        jobs: those that have started are drawn.
        numbers: the number of each GPU's UUID, where known.
        now: where the bars of running jobs end, wall clock in s; the present when None.

    Raises:
        UserError: no job has started.
    """
    started = [job for job in jobs if job.started_at is not None and job.gpus]
    if not started:
        raise UserError("no job has run on a GPU yet, so there is nothing to plot")
    now = datetime.now().timestamp() if now is None else now  # noqa: DTZ005 - only its timestamp
    uuids = sorted(
        {uuid for job in started for uuid in job.gpus},
        key=lambda uuid: (_place((numbers or {}).get(uuid)), uuid),
    )
    figure = _figure(0.55 * len(uuids) + 1.15)
    axes = figure.add_subplot()
    start = min(job.started_at or now for job in started)
    for line, uuid in enumerate(uuids):
        _bars(axes, [job for job in started if uuid in job.gpus], line, start, now)
    axes.set_yticks(range(len(uuids)), [_gpu_label(uuid, numbers or {}) for uuid in uuids])
    axes.set_ylim(len(uuids) - 0.5, -0.5)
    axes.set_xlim(_num(start), _num(max(now, start + 1)))
    axes.grid(axis="x", alpha=0.25)
    axes.set_ylabel("GPU")
    _time_axis(axes, start)
    _legend(figure, [], started)
    return figure


def _place(number: str | None) -> tuple[float, ...]:
    """Where a GPU of that number stands: 2 before 10, an instance after those before it."""
    return (math.inf,) if number is None else tuple(float(part) for part in number.split(":"))


def _figure(height: float) -> Figure:
    figure = StillFigure(figsize=(_WIDTH_IN, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _gpus_of(snapshots: Sequence[Snapshot], wanted: Collection[str] | None) -> list[Gpu]:
    """Each GPU as it was read last, in order of its index."""
    found = {gpu.uuid: gpu for snapshot in snapshots for gpu in snapshot.gpus}
    kept = [gpu for uuid, gpu in found.items() if wanted is None or uuid in wanted]
    return sorted(kept, key=lambda gpu: (_place(gpu.number), gpu.uuid))


def _draw_usage(axes: Axes, snapshots: Sequence[Snapshot], gpu: Gpu) -> None:
    times, util, used = _series(snapshots, gpu.uuid)
    axes.plot(times, util, color=UTILIZATION, linewidth=1.3)
    axes.fill_between(times, util, color=UTILIZATION, alpha=0.12, linewidth=0)
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylabel("utilization (%)", color=UTILIZATION)
    axes.set_yticks([0, 50, 100])
    axes.grid(alpha=0.25)
    number = "" if gpu.number is None else f" {gpu.number}"
    axes.set_title(f"GPU{number} · {clean(gpu.name, _NAME_LIMIT)}", fontsize="medium", loc="left")
    memory = axes.twinx()
    memory.plot(times, used, color=MEMORY, linewidth=1.3, linestyle="--")
    memory.set_ylabel("memory used (GiB)", color=MEMORY)
    memory.set_ylim(0, gpu.mem_total_bytes / _GIB * 1.04 if gpu.mem_total_bytes else None)
    memory.tick_params(labelbottom=False)


def _series(
    snapshots: Sequence[Snapshot], uuid: str
) -> tuple[list[float], list[float], list[float]]:
    """Times, utilization in %, GiB used; NaN is unknown and where nobody has read for a while."""
    times: list[float] = []
    util: list[float] = []
    used: list[float] = []
    gap = gap_s([snapshot.taken_at for snapshot in snapshots])
    before: float | None = None
    for snapshot in snapshots:
        at, gpu = snapshot.taken_at, snapshot.gpu(uuid)
        if before is not None and at - before > gap:
            times.append(_num((at + before) / 2))
            util.append(math.nan)
            used.append(math.nan)
        before = at
        times.append(_num(at))
        ratio, size = (gpu.utilization, gpu.mem_used_bytes) if gpu else (None, None)
        util.append(math.nan if ratio is None else 100 * ratio)
        used.append(math.nan if size is None else size / _GIB)
    return times, util, used


def _draw_spans(axes: Axes, jobs: Sequence[Job], start: float, now: float) -> None:
    _bars(axes, jobs, 0, start, now)
    axes.set_ylim(0.5, -0.5)
    axes.set_yticks([])
    axes.set_ylabel("jobs", rotation=0, ha="right", va="center", fontsize="small")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _bars(axes: Axes, jobs: Sequence[Job], line: float, start: float, now: float) -> None:
    """The bars of one GPU; jobs that share it lie above each other."""
    ordered = sorted(jobs, key=lambda job: (job.started_at or now, job.id))
    lanes: list[float] = []
    placed: list[tuple[Job, float, float, int]] = []
    for job in ordered:
        begin, end = max(start, job.started_at or now), job.ended_at or now
        if end <= start:
            continue
        lane = next((i for i, until in enumerate(lanes) if until <= begin + 0.05), len(lanes))
        lanes[lane : lane + 1] = [end]
        placed.append((job, begin, end, lane))
    height = 0.8 / max(1, len(lanes))
    # What follows in the same lane limits how far a label may reach.
    ends = {lane: max(now, start + 1) for lane in range(len(lanes))}
    for job, begin, end, lane in reversed(placed):
        top = line - 0.4 + lane * height
        axes.broken_barh(
            [(_num(begin), max(_num(end) - _num(begin), 1e-9))],
            (top, height * 0.94),
            facecolor=JOBS[job.id % len(JOBS)] + "55",
            edgecolor=JOBS[job.id % len(JOBS)],
            hatch=_HATCHES.get(job.state),
        )
        room = (ends[lane] - begin) / max(now - start, 1.0)
        ends[lane] = begin
        axes.text(
            _num(begin),
            top + height * 0.47,
            _label(job, room),
            fontsize="x-small",
            va="center",
            clip_on=True,
            parse_math=False,
            path_effects=[withStroke(linewidth=2, foreground="#fffc")],
        )


def _label(job: Job, room: float) -> str:
    """The longest label that fits into ``room``, a share of the width of the axes."""
    for text in (f" #{job.id} {clean(job.name, _NAME_LIMIT)}", f" #{job.id}"):
        if len(text) * _CHARACTER <= room:
            return text
    return ""


def _legend(figure: Figure, handles: list[Any], jobs: Sequence[Job]) -> None:
    states = {job.state for job in jobs}
    if states - set(_HATCHES):
        handles.append(_key("job", None))
    if states & _BAD:
        handles.append(_key("job that failed", "////"))
    if JobState.CANCELLED in states:
        handles.append(_key("cancelled job", "...."))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper right",
            ncols=len(handles),
            frameon=False,
            fontsize="small",
        )


def _key(label: str, hatch: str | None) -> Patch:
    return Patch(label=label, hatch=hatch, facecolor="#8882", edgecolor="#555")


def _time_axis(axes: Axes, start: float) -> None:
    zone = datetime.fromtimestamp(start).astimezone()
    locator = AutoDateLocator(tz=zone.tzinfo, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(locator, tz=zone.tzinfo, show_offset=False)
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlabel(f"time ({zone:%Y-%m-%d}, {zone.tzname()})")


def _gpu_label(uuid: str, numbers: Mapping[str, str | None]) -> str:
    number = numbers.get(uuid)
    return clean(uuid, 16) if number is None else f"GPU {number}"


def _num(wall: float) -> float:
    return wall / 86400.0  # matplotlib counts days from 1970
