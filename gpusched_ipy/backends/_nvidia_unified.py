"""The memory of NVIDIA parts that have none of their own (GB10, Jetson): the machine's."""

from __future__ import annotations

from typing import NamedTuple

import psutil

# Shares of the machine's memory that are still available, below which the pressure is named.
_WARN = 0.15
_CRITICAL = 0.05


class UnifiedMemory(NamedTuple):
    """Memory that GPU and CPU share, in bytes."""

    used: int
    total: int
    pressure: str  # "normal", "warn", "critical"


def unified_memory() -> UnifiedMemory:
    """The machine's memory now; used is what cannot be had without swapping."""
    memory = psutil.virtual_memory()
    share = memory.available / memory.total
    pressure = "critical" if share < _CRITICAL else "warn" if share < _WARN else "normal"
    return UnifiedMemory(memory.total - memory.available, memory.total, pressure)
