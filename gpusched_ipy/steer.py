"""What the panel's buttons and the terminal screen's keys do: each is one verb of the queue.

What a page sends is checked before it is obeyed. It shows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import PRIORITY_RANGE


class Steered(Protocol):
    """The wishes that can be made of a queue."""

    def cancel(self, *references: str | int) -> object: ...
    def hold(self, *references: str | int) -> object: ...
    def release(self, *references: str | int) -> object: ...
    def set_priority(self, references: Iterable[str | int], priority: int) -> object: ...
    def top(self, reference: str | int) -> object: ...
    def drain(self) -> object: ...
    def resume(self) -> object: ...


def obey(queue: Steered, message: Mapping[str, Any]) -> str:
    """Do what a click or a key asks, and say so in one line.

    Args:
        queue: whose jobs.
        message: ``verb``, and with most of them ``id`` (a job), ``sweep`` (all of the sweep that
            this job is a member of is meant) and ``value`` (a priority).

    Raises:
        GpuSchedError: the queue refuses, or something unknown was asked for.
    """
    verb = message.get("verb")
    if verb == "drain":
        queue.drain()
        return "Drained: what runs goes on, nothing new starts."
    if verb == "resume":
        queue.resume()
        return "Resumed: pending jobs start again."
    job = number(message.get("id"), message)
    whole = message.get("sweep") is True
    meant, who = (f"array:{job}", f"The sweep of job {job}") if whole else (job, f"Job {job}")
    if verb == "priority":
        low, high = PRIORITY_RANGE
        priority = min(high, max(low, number(message.get("value"), message)))
        queue.set_priority([meant], priority)
        return f"{who} has priority {priority} now."
    verbs: dict[object, tuple[Callable[[str | int], object], str]] = {
        "cancel": (queue.cancel, "is cancelled, or ends now if it runs."),
        "hold": (queue.hold, "is held: it waits until it is released."),
        "release": (queue.release, "is released."),
        "top": (queue.top, "is the first in line."),
    }
    if verb not in verbs:
        raise _unknown(message)
    action, text = verbs[verb]
    action(meant)
    return f"{who} {text}"


def number(value: object, message: Mapping[str, Any]) -> int:
    """``value`` where it is a whole number; what a page sends is never trusted to be one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _unknown(message)
    return value


def _unknown(message: Mapping[str, Any]) -> GpuSchedError:
    return GpuSchedError(f"the panel's page asked for something unknown ({message.get('verb')!s})")
