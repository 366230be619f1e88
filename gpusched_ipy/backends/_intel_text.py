"""What xpu-smi prints, as plain data. It runs nothing.

Columns are found by their names, whatever was asked for and in whatever order; a line that does not
fit its header is no reading.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gpusched_ipy.backends import _values as values

_COLUMN = re.compile(r"\s*(.*?)\s*(?:\(([^()]*)\))?\s*")
_DEVICE = ("deviceid", "device id", "device")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of ``xpu-smi dump``: one card at one moment."""

    device: int
    utilization: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    clock_mhz: float | None = None
    mem_used_bytes: int | None = None
    mem_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """One card of ``xpu-smi discovery -j``."""

    device: int
    bdf: str
    name: str | None


class DumpReader:
    """Lines of ``xpu-smi dump`` as they come; each gives the newest row of every card.

    A card that two rounds have left out is gone.
    """

    def __init__(self) -> None:
        self._columns: list[tuple[str, str]] | None = None
        self._round: dict[int, Row] = {}
        self._before: dict[int, Row] = {}

    def __call__(self, line: bytes) -> Mapping[int, Row] | None:
        """All cards after this line; None for a header or what is no row."""
        row = self.row(line)
        if row is None:
            return None
        if row.device in self._round:
            self._before, self._round = self._round, {}
        self._round[row.device] = row
        return {**self._before, **self._round}

    def row(self, line: bytes) -> Row | None:
        """The row of this line; a header is kept and gives None."""
        cells = _cells(line)
        if any(_column(cell)[0] in _DEVICE for cell in cells):
            self._columns = [_column(cell) for cell in cells]
            return None
        if self._columns is None or len(cells) != len(self._columns):
            return None
        record = dict(zip(self._columns, cells, strict=True))
        return _row(record)


def parse_discovery(output: bytes) -> tuple[Listed, ...]:
    """The cards of ``xpu-smi discovery -j``; nothing where it is not that."""
    try:
        record = json.loads(output)
    except (ValueError, RecursionError):
        return ()
    listed = record.get("device_list") if isinstance(record, dict) else None
    found = []
    for item in listed if isinstance(listed, list) else ():
        entry = values.section({"": item}, "")
        device = values.whole(entry.get("device_id"))
        bdf = values.clean_text(entry.get("pci_bdf_address"))
        if device is not None and bdf is not None:
            found.append(Listed(device, bdf.lower(), values.clean_text(entry.get("device_name"))))
    return tuple(found)


def parse_memory_size(output: bytes) -> int | None:
    """The memory of the one card of ``xpu-smi discovery -d N -j``, bytes."""
    try:
        record = json.loads(output)
    except (ValueError, RecursionError):
        return None
    size = record.get("memory_physical_size_byte") if isinstance(record, dict) else None
    return values.byte_count(size) or None


def _row(record: Mapping[tuple[str, str], str]) -> Row | None:
    device = next(
        (values.whole(cell) for (name, _), cell in record.items() if name in _DEVICE), None
    )
    if device is None:
        return None
    return Row(
        device=device,
        utilization=values.ratio(_cell(record, "gpu utilization")),
        power_w=values.watts(_cell(record, "gpu power")),
        temperature_c=values.celsius(_cell(record, "gpu core temperature")),
        clock_mhz=values.megahertz(_cell(record, "gpu frequency")),
        # Without the permission to ask, the answer is 0: no card that works holds nothing.
        mem_used_bytes=values.byte_count(_cell(record, "gpu memory used")) or None,
        mem_ratio=values.ratio(_cell(record, "gpu memory utilization")),
    )


def _cell(record: Mapping[tuple[str, str], str], name: str) -> dict[str, str] | None:
    """A cell with the unit of its column."""
    return next(
        ({"value": cell, "unit": unit} for (key, unit), cell in record.items() if key == name), None
    )


def _column(cell: str) -> tuple[str, str]:
    """``GPU Power (W)`` as name and unit, in lower case."""
    found = _COLUMN.fullmatch(cell[:200])
    if found is None:
        return (cell[:200].strip().lower(), "")
    return (found[1].lower(), (found[2] or "").strip().lower())


def _cells(line: bytes) -> list[str]:
    text = line.decode("utf-8", "replace").replace("\0", "").strip("\r\n")
    try:
        return next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error:
        return []
