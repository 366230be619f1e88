"""What the files of i915 and xe tell of one card: idle time, memory, sensors.

Counters become rates between two readings. It sees no processes and runs nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpusched_ipy.backends import _fdinfo as fdinfo
from gpusched_ipy.backends import _sysfs as sysfs
from gpusched_ipy.backends import _values as values
from gpusched_ipy.backends._intel_text import Row
from gpusched_ipy.snapshot import Gpu, MemoryKind

SHORTEST_S = 0.2  # counters in ms say nothing of less: a reading sooner repeats the last one
_INTEGRATED = ":00:02.0"


@dataclass(slots=True)
class Rate:
    """A growing counter turned into its rate; the mean of a long pause says nothing of now."""

    longest_s: float
    base: tuple[float, float] | None = None
    last: float | None = None
    window_s: float | None = None

    def update(self, mono: float, counter: float | None) -> float | None:
        """Units a second since the last reading; None at first, or when the counter ran back."""
        if counter is None or (self.base is not None and not self._follows(mono, counter)):
            self.base, self.last = (None if counter is None else (mono, counter)), None
        elif self.base is None:
            self.base = (mono, counter)
        elif mono - self.base[0] >= SHORTEST_S:
            self.window_s = mono - self.base[0]
            self.last = (counter - self.base[1]) / self.window_s
            self.base = (mono, counter)
        return self.last

    def _follows(self, mono: float, counter: float) -> bool:
        assert self.base is not None
        return counter >= self.base[1] and mono - self.base[0] <= self.longest_s


@dataclass(slots=True)
class Meters:
    """The counters of one card."""

    longest_s: float
    energy: Rate
    idle: dict[Path, Rate] = field(default_factory=dict)


def is_integrated(card: sysfs.Card) -> bool:
    """Graphics of a processor always sit at that address."""
    return (card.bdf or "").endswith(_INTEGRATED)


def _idle_counters(card: sysfs.Card) -> list[Path]:
    """The files that count the idle time of each graphics unit, ms."""
    units = [
        path / "gtidle/idle_residency_ms"
        for tile in sysfs.folder(card.device)
        if tile.name.startswith("tile")
        for path in sysfs.folder(tile)
        if path.name.startswith("gt")
    ]
    units += [path / "rc6_residency_ms" for path in sysfs.folder(card.path / "gt")]
    units = [path for path in units if os.path.exists(path)]
    old = card.path / "power/rc6_residency_ms"
    return units or ([old] if os.path.exists(old) else [])


def awake_share(meters: Meters, card: sysfs.Card, now: float) -> tuple[float | None, float | None]:
    """The share of time in which the most wakeful unit was not idle, and over how many seconds."""
    rates = [
        (rate, rate.update(now, sysfs.read_count(path)))
        for path in _idle_counters(card)
        for rate in [meters.idle.setdefault(path, Rate(meters.longest_s))]
    ]
    if not rates or any(per_s is None for _, per_s in rates):
        return None, None  # one unit that is not known may be the busy one
    busiest = max(1 - (per_s or 0.0) / 1000 for _, per_s in rates)
    return min(1.0, max(0.0, busiest)), rates[0][0].window_s


def with_memory(
    gpu: Gpu, root: Path, card: sysfs.Card, scan: fdinfo.Scan | None, row: Row, size: int | None
) -> Gpu:
    if gpu.mem_kind is MemoryKind.UNIFIED:
        total, used = _machine_memory(root)
        return replace(gpu, mem_total_bytes=total, mem_used_bytes=used)
    total = (
        sysfs.read_count(card.path / "lmem_total_bytes")
        or sysfs.read_count(card.device / "tile0/physical_vram_size_bytes")
        or size
        or None
    )
    used = row.mem_used_bytes
    free = sysfs.read_count(card.path / "lmem_avail_bytes")
    if used is None and total and free is not None and free < total:
        used = total - free
    if used is None and total and row.mem_ratio:
        used = int(row.mem_ratio * total)
    if used is None and scan is not None and scan.complete and card.bdf is not None:
        sizes = [client.vram_bytes for client in scan.of(card.bdf)]
        told = [value for value in sizes if value is not None]
        used = sum(told) if len(told) == len(sizes) else None
    return replace(gpu, mem_total_bytes=total, mem_used_bytes=used)


def _machine_memory(root: Path) -> tuple[int | None, int | None]:
    pairs = {}
    for line in (sysfs.read_text(root / "proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        pairs[key.strip()] = values.byte_count(value.strip())
    total, free = pairs.get("MemTotal"), pairs.get("MemAvailable")
    known = total is not None and free is not None and free <= total
    return total or None, (total or 0) - (free or 0) if known else None


def with_sensors(gpu: Gpu, card: sysfs.Card, meters: Meters, row: Row, now: float) -> Gpu:
    hwmon = card.hwmon()
    temperature = power = limit = None
    clock = _clock_mhz(card)
    if hwmon is not None:
        place = (
            sysfs.labelled(hwmon, "temp", "input", "pkg", "card", "gpu") or hwmon / "temp1_input"
        )
        temperature = values.celsius(sysfs.read_text(place), 1e-3)
        place = sysfs.labelled(hwmon, "energy", "input", "card", "pkg") or hwmon / "energy1_input"
        micro_w = meters.energy.update(now, sysfs.read_count(place))
        power = values.watts(micro_w, 1e-6)
        limit = values.watts(sysfs.read_text(hwmon / "power1_max"), 1e-6) or None
    return replace(
        gpu,
        temperature_c=temperature if temperature is not None else row.temperature_c,
        power_w=power if power is not None else row.power_w,
        power_limit_w=limit,
        sm_clock_mhz=clock if clock is not None else row.clock_mhz,
    )


def _clock_mhz(card: sysfs.Card) -> float | None:
    """The present clock; 0 is a graphics unit that is asleep."""
    for path in (card.device / "tile0/gt0/freq0/act_freq", card.path / "gt_act_freq_mhz"):
        found = values.megahertz(sysfs.read_text(path))
        if found is not None:
            return found
    return None
