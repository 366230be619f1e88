"""What the amdgpu driver's files and amdsmi's answers mean, as plain data. It opens nothing.

amdsmi's answers differ by version: a scalar is a number, ``"N/A"`` or ``{"value", "unit"}``; its
"MB" is MiB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpusched_ipy.backends import _values as values

_CLOCK = re.compile(r"\s*\w+:\s*([0-9.]+\s*[a-zA-Z]+)\s*\*\s*")
_FIRST_APU_FORMAT = 2  # gpu_metrics v1.x: cards; v2.x and v3.x: processors with graphics


@dataclass(frozen=True, slots=True)
class Holder:
    """One process on a card."""

    pid: int
    name: str | None
    mem_bytes: int | None
    kind: str | None = None  # "compute" or "graphics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one source says of one card; None is what it does not say."""

    name: str | None = None
    utilization: float | None = None
    mem_used_bytes: int | None = None
    mem_total_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    holders: tuple[Holder, ...] | None = None


def current_clock(table: str | None) -> float | None:
    """MHz of the starred line of ``pp_dpm_sclk``."""
    for line in (table or "").splitlines():
        found = _CLOCK.fullmatch(line)
        if found is not None:
            return values.megahertz(found[1])
    return None


def is_apu(
    metrics: bytes | None, memory_vendor: str | None, vram: int | None, gtt: int | None
) -> bool:
    """Whether the graphics live in a processor and use its memory.

    The format of ``gpu_metrics`` decides; without it, a card has memory chips of some maker, and a
    processor has a small carve-out and a larger pool.
    """
    if metrics is not None and len(metrics) >= 4:
        return metrics[2] >= _FIRST_APU_FORMAT
    return (memory_vendor or "").lower() in ("", "unknown") and (gtt or 0) > (vram or 0)


def node_address(properties: str | None) -> str | None:
    """The PCI address of a KFD topology node, from its ``properties``; None for a processor's."""
    pairs = {
        line.partition(" ")[0]: line.partition(" ")[2] for line in (properties or "").splitlines()
    }
    location = values.whole(pairs.get("location_id"))
    domain = values.whole(pairs.get("domain", "0"))
    if not location or domain is None or not values.whole(pairs.get("simd_count")):
        return None
    bus, slot, function = location >> 8 & 0xFF, location >> 3 & 0x1F, location & 7
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"


def from_amdsmi(
    *,
    asic: object = None,
    board: object = None,
    activity: object = None,
    vram: object = None,
    power: object = None,
    temperature: object = None,
    clock: object = None,
    processes: object = None,
) -> Reading:
    """A card's reading from the answers of amdsmi; each may be None, of any version's shape."""
    return Reading(
        name=_text(asic, "market_name") or _text(board, "product_name"),
        utilization=values.ratio(_get(activity, "gfx_activity")),
        mem_used_bytes=values.byte_count(_get(vram, "vram_used"), "mib"),
        mem_total_bytes=values.byte_count(_get(vram, "vram_total"), "mib") or None,
        power_w=_first_power(power),
        power_limit_w=_power_limit(_get(power, "power_limit")),
        temperature_c=values.celsius(temperature),
        sm_clock_mhz=_first_clock(clock),
        holders=_holders(processes),
    )


def _first_power(power: object) -> float | None:
    for key in ("current_socket_power", "average_socket_power", "socket_power"):
        found = values.watts(_get(power, key))
        if found:  # the getter that a card does not have answers 0
            return found
    return None


def _power_limit(value: object) -> float | None:
    """Watts; some releases give microwatts."""
    amount = values.number(value)
    return values.watts(amount, 1e-6 if amount is not None and amount > 10_000 else 1.0) or None


def _first_clock(clock: object) -> float | None:
    return next(
        (
            mhz
            for key in ("clk", "cur_clk")
            if (mhz := values.megahertz(_get(clock, key))) is not None
        ),
        None,
    )


def _holders(processes: object) -> tuple[Holder, ...] | None:
    """The processes; one that cannot be read makes the list unknown, never shorter."""
    if not isinstance(processes, (list, tuple)):
        return None
    found: list[Holder] = []
    for item in processes:
        pid = values.whole(_get(item, "pid"))
        if not pid:
            return None
        vram = _get(_get(item, "memory_usage"), "vram_mem")
        memory = values.byte_count(_get(item, "mem") if vram is None else vram)
        found.append(Holder(pid, _text(item, "name"), memory))
    return tuple(found)


def _get(record: object, key: str) -> Any:
    return record.get(key) if isinstance(record, Mapping) else None


def _text(record: object, key: str) -> str | None:
    return values.clean_text(_get(record, key))
