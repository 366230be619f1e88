"""What plots and still pictures have in common: their colours, and when a line is interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

UTILIZATION, MEMORY = "#1f6fd6", "#b45309"
JOBS = ("#1f6fd6", "#0f8a7e", "#7b3fc4", "#b45309", "#b0307a", "#5b7a12")


def gap_s(times: Sequence[float]) -> float:
    """Nobody has read where two readings (s, in order) are further apart than this."""
    steps = sorted(later - sooner for sooner, later in pairwise(times))
    return max(5.0, 3 * steps[len(steps) // 2]) if steps else 5.0
