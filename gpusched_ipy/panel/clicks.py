"""What the panel's buttons do: each click is one verb of the queue, checked before it is obeyed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import PRIORITY_RANGE
from gpusched_ipy.panel.needs import PanelQueue


def obey(queue: PanelQueue, message: Mapping[str, Any]) -> str:
    """Do what a click asks, and say so in one line.

    Raises:
        GpuSchedError: the queue refuses, or the page asked for something unknown.
    """
    verb = message.get("verb")
    if verb == "drain":
        queue.drain()
        return "Drained: what runs goes on, nothing new starts."
    if verb == "resume":
        queue.resume()
        return "Resumed: pending jobs start again."
    job = number(message.get("id"), message)
    if verb == "priority":
        low, high = PRIORITY_RANGE
        priority = min(high, max(low, number(message.get("value"), message)))
        queue.set_priority([job], priority)
        return f"Job {job} has priority {priority} now."
    verbs: dict[object, tuple[Callable[[int], object], str]] = {
        "cancel": (queue.cancel, "Job {} is cancelled, or ends now if it runs."),
        "hold": (queue.hold, "Job {} is held: it waits until it is released."),
        "release": (queue.release, "Job {} is released."),
        "top": (queue.top, "Job {} is the first in line."),
    }
    if verb not in verbs:
        raise _unknown(message)
    action, text = verbs[verb]
    action(job)
    return text.format(job)


def number(value: object, message: Mapping[str, Any]) -> int:
    """``value`` where it is a whole number; what a page sends is never trusted to be one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _unknown(message)
    return value


def _unknown(message: Mapping[str, Any]) -> GpuSchedError:
    return GpuSchedError(f"the panel's page asked for something unknown ({message.get('verb')!s})")
