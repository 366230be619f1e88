"""What ioreg, powermetrics, macmon and sysctl print on a Mac, as plain data. It runs nothing.

A document that is not complete gives None or nothing: half a document never becomes a number.
"""

from __future__ import annotations

import json
import plistlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.parsers.expat import ExpatError

from gpusched_ipy.backends import _values as values

_PRESSURE = {"1": "normal", "2": "warn", "4": "critical"}
_THROTTLES = {
    **dict.fromkeys(("nominal", "light", "moderate"), False),
    **dict.fromkeys(("heavy", "critical", "trapping", "sleeping"), True),
}
_CREATOR = re.compile(r"\s*pid\s+([0-9]{1,9})\s*(?:,\s*(.*))?", re.DOTALL)
_BAD_XML = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_TEXT = rb"(?:[^<&]|&[#\w]{1,10};)*"
_KEY = rb"<key>" + _TEXT + rb"</key>"
_VALUE = (
    rb"<(?P<kind>string|date|data)>"
    + _TEXT
    + rb"</(?P=kind)>|<(?:true|false|string|data|dict|array)/>"
    rb"|<integer>\s*-?\d+\s*</integer>|<real>\s*[-+.\deE]*\d[-+.\deE]*\s*</real>"
)
_SOUND_LINE = re.compile(
    rb"(?:(?:" + _KEY + rb")?\s*(?:" + _VALUE + rb")|(?:" + _KEY + rb")?\s*<(?:dict|array)>|"
    rb"</?(?:dict|array)>|<plist[^<>]*>|</plist>|<\?xml[^<>]*\?>|<!DOCTYPE[^<>]*>|)"
)
_LONE_KEY = re.compile(_KEY)
_PARSE_ERRORS = (
    ExpatError,
    plistlib.InvalidFileException,
    ValueError,
    TypeError,
    LookupError,  # an encoding that nobody knows, among others
    AttributeError,
    OverflowError,
    RecursionError,
)
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Client:
    """One process that holds a connection to the GPU."""

    pid: int
    name: str | None  # cut to 16 characters by the kernel
    gpu_ns: int | None  # GPU time since it opened the GPU


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One accelerator of the I/O registry."""

    name: str | None
    class_name: str
    cores: int | None
    utilization: float | None
    mem_used_bytes: int | None
    vram_total_bytes: int | None  # a card with memory of its own (Macs with Intel processors)
    temperature_c: float | None  # these three: AMD's cards alone
    power_w: float | None
    freq_mhz: float | None
    clients: tuple[Client, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading of powermetrics or macmon; ratios 0-1."""

    model: str | None = None
    elapsed_s: float | None = None
    active: float | None = None  # share of the time in which the GPU was not idle, at any clock
    scaled: float | None = None  # the same, weighted by the clock: 1 is all the time at full clock
    freq_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    thermal_pressure: str | None = None
    ram_used_bytes: int | None = None
    ram_total_bytes: int | None = None


def parse_ioreg(output: bytes) -> tuple[Accelerator, ...]:
    """The accelerators of ``ioreg -a -r -c IOAccelerator``, in the order of the registry.

    Raises:
        ValueError: the output is not a property list.
    """
    if not output.strip():
        return ()  # what ioreg prints when nothing matches
    try:
        tree = plistlib.loads(_BAD_XML.sub(b"", output))
    except _PARSE_ERRORS as exc:
        raise ValueError(f"ioreg printed no property list ({type(exc).__name__})") from None
    entries = tree if isinstance(tree, list) else [tree]
    return tuple(_accelerator(entry) for entry in entries if _is_accelerator(entry))


def parse_powermetrics(document: bytes) -> Sample | None:
    """One document of ``powermetrics -f plist``; None where it is cut or not one."""
    tree = _load_plist(document.strip(b"\0\r\n\t "))
    gpu = values.section(tree, "gpu")
    if not isinstance(tree, Mapping) or not gpu:
        return None
    elapsed_ns = values.number(tree.get("elapsed_ns"))
    elapsed_s = elapsed_ns / 1e9 if elapsed_ns is not None and elapsed_ns > 0 else None
    return Sample(
        model=values.clean_text(tree.get("hw_model")),
        elapsed_s=elapsed_s,
        active=_active(gpu, elapsed_ns),
        scaled=_scaled(gpu.get("dvfm_states")),
        freq_mhz=_gpu_mhz(gpu.get("freq_hz")),
        power_w=_power(gpu, values.section(tree, "processor"), elapsed_s),
        thermal_pressure=values.clean_text(tree.get("thermal_pressure")),
    )


def split_documents(stream: bytes) -> list[bytes]:
    """The complete documents of a powermetrics stream (NUL starts the next one)."""
    parts = [part.strip() for part in stream.split(b"\0")]
    return [part for part in parts if part.endswith(b"</plist>")]


def parse_macmon(line: bytes) -> Sample | None:
    """One line of ``macmon pipe``, old (``gpu_usage``) or new (``gpu_freq_mhz`` …) names."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not any(str(key).startswith("gpu_") for key in record):
        return None
    memory = values.section(record, "memory")
    pair = record.get("gpu_usage")
    freq, scaled = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
    return Sample(
        active=values.share(record.get("gpu_active_ratio")),
        scaled=values.share(record.get("gpu_scaled_ratio", scaled)),
        freq_mhz=values.megahertz(record.get("gpu_freq_mhz", freq)),
        power_w=values.watts(record.get("gpu_power")),
        temperature_c=values.celsius(values.section(record, "temp").get("gpu_temp_avg")),
        ram_used_bytes=values.byte_count(memory.get("ram_usage")),
        ram_total_bytes=values.byte_count(memory.get("ram_total")) or None,
    )


def parse_pressure(output: bytes) -> str | None:
    """``kern.memorystatus_vm_pressure_level`` in words."""
    return _PRESSURE.get(output.decode("ascii", "replace").strip())


def is_throttled(thermal_pressure: str | None) -> bool | None:
    """Whether that thermal pressure slows the GPU down; an unknown word is unknown."""
    return _THROTTLES.get((thermal_pressure or "").lower())


def _is_accelerator(entry: object) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("PerformanceStatistics"), Mapping)


def _accelerator(entry: Mapping[str, Any]) -> Accelerator:
    stats = values.section(entry, "PerformanceStatistics")
    vram_used = values.byte_count(stats.get("vramUsedBytes"))
    vram_free = values.byte_count(stats.get("vramFreeBytes"))
    dedicated = vram_used is not None and vram_free is not None and vram_used + vram_free > 0
    # "In use system memory (driver)" is another counter, and always 0.
    shared_used = values.byte_count(stats.get("In use system memory"))
    return Accelerator(
        name=values.clean_text(entry.get("model")),
        class_name=values.clean_text(entry.get("IOObjectClass") or entry.get("IOClass")) or "",
        cores=values.whole(entry.get("gpu-core-count")),
        utilization=_first_ratio(stats, "Device Utilization %", "GPU Activity(%)"),
        mem_used_bytes=vram_used if dedicated else shared_used,
        vram_total_bytes=(vram_used or 0) + (vram_free or 0) if dedicated else None,
        temperature_c=values.celsius(stats.get("Temperature(C)")),
        power_w=values.watts(stats.get("Total Power(W)")),
        freq_mhz=values.megahertz(stats.get("Core Clock(MHz)")),
        clients=tuple(_clients(entry)),
    )


def _clients(entry: Mapping[str, Any]) -> Iterator[Client]:
    merged: dict[int, Client] = {}
    for node in _descendants(entry):
        creator = node.get("IOUserClientCreator")
        found = _CREATOR.fullmatch(creator) if isinstance(creator, str) else None
        if found is None:
            continue
        pid = int(found[1])
        known = merged.get(pid)
        merged[pid] = Client(
            pid=pid,
            name=values.clean_text(found[2]) or (known.name if known else None),
            gpu_ns=_sum(known.gpu_ns if known else None, _gpu_ns(node)),
        )
    yield from merged.values()


def _descendants(entry: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    children = entry.get("IORegistryEntryChildren")
    if not isinstance(children, list) or depth > _MAX_DEPTH:
        return
    for child in children:
        if isinstance(child, Mapping):
            yield child
            yield from _descendants(child, depth + 1)


def _gpu_ns(node: Mapping[str, Any]) -> int | None:
    total = values.whole(node.get("accumulatedGPUTime"))
    usages = node.get("AppUsage")
    for usage in usages if isinstance(usages, list) else ():
        total = _sum(total, values.whole(values.section({"": usage}, "").get("accumulatedGPUTime")))
    return total


def _sum(left: int | None, right: int | None) -> int | None:
    return left if right is None else right + (left or 0)


def _first_ratio(stats: Mapping[str, Any], *keys: str) -> float | None:
    return next(
        (found for key in keys if (found := values.ratio(stats.get(key))) is not None), None
    )


def _active(gpu: Mapping[str, Any], elapsed_ns: float | None) -> float | None:
    idle = values.share(gpu.get("idle_ratio"))
    if idle is None and elapsed_ns:
        idle_ns = values.number(gpu.get("idle_ns"))
        idle = values.share(idle_ns / elapsed_ns) if idle_ns is not None else None
    return None if idle is None else 1 - idle


def _scaled(states: object) -> float | None:
    """Residency weighted by clock: a display at 338 MHz is not a busy GPU."""
    pairs: list[tuple[float, float]] = []
    for state in states if isinstance(states, list) else ():
        freq = values.number(values.section({"": state}, "").get("freq"))
        used = values.share(values.section({"": state}, "").get("used_ratio"))
        if freq is None or used is None or freq < 0:
            return None
        pairs.append((freq, used))
    top = max((freq for freq, _ in pairs), default=0)
    return min(1.0, sum(freq * used for freq, used in pairs) / top) if top > 0 else None


def _gpu_mhz(value: object) -> float | None:
    """The GPU's ``freq_hz`` is in MHz; a release that means its name is understood too."""
    amount = values.number(value)
    return values.megahertz(amount, 1e-6 if amount is not None and amount > 20_000 else 1.0)


def _power(
    gpu: Mapping[str, Any], processor: Mapping[str, Any], elapsed_s: float | None
) -> float | None:
    energy_mj = values.number(gpu.get("gpu_energy"))
    if energy_mj is not None and elapsed_s:
        return values.watts(energy_mj / 1000 / elapsed_s)
    return values.watts(gpu.get("gpu_power", processor.get("gpu_power")), 1e-3)


def _load_plist(document: bytes) -> object:
    if not document.endswith(b"</plist>"):
        return None
    for attempt in (_BAD_XML.sub(b"", document), None):
        try:
            return plistlib.loads(_mended(document) if attempt is None else attempt)
        except _PARSE_ERRORS:
            continue
    return None


def _mended(document: bytes) -> bytes:
    """``document`` without the lines that are not sound (some releases break one at the end)."""
    sound: list[bytes] = []
    for line in (raw.strip() for raw in _BAD_XML.sub(b"", document).splitlines()):
        lone = bool(sound) and _LONE_KEY.fullmatch(sound[-1]) is not None
        if lone and (b"<key>" in line or b"</dict>" in line):
            sound.pop()
        if _SOUND_LINE.fullmatch(line) or _LONE_KEY.fullmatch(line):
            sound.append(line)
    return b"\n".join(sound)
