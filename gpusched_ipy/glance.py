"""A glance from Python: the GPUs now, and still pictures of the last minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpusched_ipy.api import Queue
from gpusched_ipy.config import parse_seconds
from gpusched_ipy.here import current_monitor, current_queue
from gpusched_ipy.look import Look
from gpusched_ipy.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_READING_S = 5.0


def gpus(timeout: float = _READING_S, *, queue: Queue | None = None) -> Snapshot:
    """A reading of the GPUs of this machine that begins now, our own jobs and notebooks by name.

    Args:
        timeout: seconds; what cannot be had in time is the ``problem`` of the snapshot.
        queue: another queue than that of the settings in force.

    Raises:
        UserError: a setting, the state directory or the record cannot be used.
    """
    queue = queue or current_queue()
    return Look(queue, current_monitor(queue)).now(timeout)


def plot_usage(
    last: float | str = "10m", *, job: int | str | None = None, queue: Queue | None = None
) -> Figure:
    """Utilization and memory of each GPU over time, with the jobs below.

    Only what this process has watched can be drawn: a notebook with the extension or the panel, a
    script that has taken GPUs.

    Args:
        last: seconds, or a span like "2h".
        job: only the GPUs of that job, and its span.
        queue: another queue than that of the settings in force.

    Raises:
        UserError: there is no such job, or no reading to draw.
    """
    from gpusched_ipy.panel.plots import plot_usage as plot

    queue = queue or current_queue()
    span, monitor = parse_seconds(last), current_monitor(queue)
    Look(queue, monitor).now(_READING_S)
    now = queue.clock.now().wall
    jobs = queue.ran_since(now - span) if job is None else [queue.show(job)]
    uuids = None if job is None else jobs[0].gpus or None
    return plot(monitor.history(span), jobs, gpus=uuids, now=now)


def plot_timeline(last: float | str = "24h", *, queue: Queue | None = None) -> Figure:
    """Who ran when: one line for each GPU, one bar for each job.

    Args:
        last: seconds, or a span like "2h".
        queue: another queue than that of the settings in force.

    Raises:
        UserError: no job has run.
    """
    from gpusched_ipy.panel.plots import plot_timeline as plot

    queue = queue or current_queue()
    now = queue.clock.now().wall
    numbers = {gpu.uuid: gpu.number for gpu in gpus(queue=queue).gpus}
    return plot(queue.ran_since(now - parse_seconds(last)), numbers=numbers, now=now)
