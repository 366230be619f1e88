"""The longest backlog of the last days, kept in the record, so that every member orders alike.

``order = shortest`` lets a job be passed for about as long as the machine needed for all that
waited at its worst (:class:`gpusched_ipy.policy.order.Patience`); it decides nothing here.
"""

from __future__ import annotations

import json
import math

from gpusched_ipy.archive import Archive

KEPT_DAYS = 3
# A longer backlog is noted once it is this much longer: not every round is worth a write.
STEP = 1.1

_KEY = "backlog"
_DAY_S = 86400.0


def worst_s(store: Archive, wall: float) -> float:
    """The longest backlog noted within the last days, s; 0 where none was."""
    return max(_noted(store, wall).values(), default=0.0)


def note(store: Archive, backlog_s: float, wall: float) -> None:
    """Remember a backlog, where it is longer than what today has seen."""
    noted, today = _noted(store, wall), int(wall // _DAY_S)
    if math.isfinite(backlog_s) and backlog_s > STEP * noted.get(today, 0.0):
        store.set_value(_KEY, json.dumps({**noted, today: round(backlog_s, 3)}))


def _noted(store: Archive, wall: float) -> dict[int, float]:
    oldest = int(wall // _DAY_S) - KEPT_DAYS + 1
    noted = json.loads(store.value(_KEY) or "{}")
    return {int(day): float(backlog_s) for day, backlog_s in noted.items() if int(day) >= oldest}
