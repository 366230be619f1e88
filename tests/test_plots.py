"""The still pictures: what they draw, how they are labelled, and that pyplot stays out."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from helpers import GIB
from matplotlib.figure import Figure

from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.panel.plots import plot_timeline, plot_usage
from gpusched_ipy.snapshot import Gpu, Snapshot

NOW = 1_800_000_000.0


def snapshot(at: float, *utilizations: float | None) -> Snapshot:
    gpus = tuple(
        Gpu(
            uuid=f"GPU-{place}",
            index=place,
            name="Fake $A100$",
            utilization=utilization,
            mem_used_bytes=(place + 1) * GIB,
            mem_total_bytes=40 * GIB,
        )
        for place, utilization in enumerate(utilizations)
    )
    return Snapshot(backend="fake", source="", taken_at=at, taken_mono=at - NOW, gpus=gpus)


def job(number: int, start: float, end: float | None, **fields: Any) -> Job:
    spec = JobSpec(uid=str(number), kind=JobKind.COMMAND, name=f"$job_{number}$")
    state = JobState.RUNNING if end is None else JobState.COMPLETED
    values: dict[str, Any] = {"state": state, "gpus": ("GPU-0",), "priority": 0}
    return Job(
        id=number,
        spec=spec,
        started_at=NOW + start,
        ended_at=None if end is None else NOW + end,
        **values | fields,
    )


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(figure: Figure) -> int:
    return sum(len(axes.collections) for axes in figure.axes if not axes.lines)


def test_usage_draws_each_gpu_with_units_and_its_jobs() -> None:
    readings = [snapshot(NOW + i, 0.5, None) for i in range(10)]
    jobs = [job(1, 2, 5), job(2, 6, None), job(3, 1, 4, state=JobState.FAILED, gpus=("GPU-1",))]
    figure = plot_usage(readings, jobs)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels.count("utilization (%)") == 2
    assert labels.count("memory used (GiB)") == 2
    assert any(axes.get_xlabel().startswith("time (20") for axes in figure.axes)
    assert legend(figure) == ["utilization (%)", "memory used (GiB)", "job", "job that failed"]
    drawn = [axes.lines[0].get_ydata() for axes in figure.axes if axes.lines]
    assert list(drawn[0]) == [50.0] * 10
    assert list(drawn[1]) == [1.0] * 10
    assert all(math.isnan(value) for value in drawn[2])
    assert bars(figure) == 3
    assert figure.axes[1].get_ylim()[1] >= 40


def test_a_gap_in_the_readings_breaks_the_line() -> None:
    readings = [snapshot(NOW + at, 0.5) for at in (0, 1, 2, 60, 61)]
    line = plot_usage(readings).axes[0].lines[0].get_ydata()
    assert [math.isnan(value) for value in line] == [False, False, False, True, False, False]


def test_failed_readings_break_the_line() -> None:
    readings = [snapshot(NOW + at, 0.5) for at in range(4)]
    readings += [replace(snapshot(NOW + at), problem="driver lost") for at in range(4, 7)]
    readings += [snapshot(NOW + at, 0.5) for at in range(7, 9)]
    line = plot_usage(readings).axes[0].lines[0].get_ydata()
    assert [math.isnan(value) for value in line] == [False] * 4 + [True] * 3 + [False] * 2


def test_only_the_wanted_gpus_are_drawn() -> None:
    readings = [snapshot(NOW + i, 0.5, 0.6) for i in range(3)]
    figure = plot_usage(readings, gpus=["GPU-1"])
    assert [axes.get_title("left") for axes in figure.axes if axes.get_title("left")] == [
        "GPU 1 · Fake $A100$"
    ]


def test_timeline_has_a_line_for_each_gpu_and_a_bar_for_each_job_on_it() -> None:
    jobs = [
        job(1, 0, 50, gpus=("GPU-1", "GPU-0")),
        job(2, 60, None),
        job(3, 10, 20, state=JobState.CANCELLED, gpus=("GPU-1",)),
        job(
            4,
            0,
            None,
            state=JobState.PENDING,
            gpus=(),
        ),
    ]
    figure = plot_timeline(jobs, numbers={"GPU-0": "0", "GPU-1": "1"}, now=NOW + 100)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["GPU 0", "GPU 1"]
    assert len(axes.collections) == 4
    assert "#2 $job_2$" in [text.get_text().strip() for text in axes.texts]
    assert legend(figure) == ["job", "cancelled job"]


@pytest.mark.parametrize("figure_of", ["usage", "timeline"])
def test_a_figure_shows_itself_without_pyplot(figure_of: str) -> None:
    make = {
        "usage": lambda: plot_usage([snapshot(NOW, 0.5), snapshot(NOW + 1, 0.6)], [job(1, 0, 1)]),
        "timeline": lambda: plot_timeline([job(1, 0, 1)]),
    }[figure_of]
    png, size = make()._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2 * size["width"]


def test_nothing_to_draw_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="no reading to plot"):
        plot_usage([Snapshot(backend="x", source="", taken_at=0, taken_mono=0, problem="lost")])
    with pytest.raises(UserError, match="no job has run"):
        plot_timeline([])


def test_pyplot_and_its_global_state_are_never_touched() -> None:
    code = (
        "import sys, gpusched_ipy.panel.plots; print('matplotlib.pyplot' in sys.modules);"
        "from gpusched_ipy.job import *; from gpusched_ipy.panel.plots import plot_timeline;"
        "s = JobSpec(uid='1', kind=JobKind.CELL, name='a');"
        "j = Job(id=1, spec=s, state=JobState.RUNNING, priority=0, gpus=('g',), started_at=1.0);"
        "plot_timeline([j], now=9.0)._repr_png_(); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
