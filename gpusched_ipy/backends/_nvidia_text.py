"""What nvidia-smi prints as CSV, as values. Pure: it runs nothing and never raises.

A cell that is not clearly a value is None, whatever its text (``[N/A]``, ``ERR!``, a broken
number). Text in place of data becomes a :class:`Fault`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpusched_ipy.backends._nvidia_faults import Fault, classify, printable
from gpusched_ipy.backends._values import byte_count, celsius, megahertz, ratio, watts, whole
from gpusched_ipy.snapshot import Health

_HEADER_CELL = re.compile(r"([a-zA-Z][a-zA-Z0-9_]*(?:\.[a-zA-Z0-9_]+)*)(?:\s*\[([^\]]*)\])?")
_MASK = re.compile(r"0x([0-9a-fA-F]{1,16})")
_BUS_ID = re.compile(r"[0-9a-fA-F]{4,8}(:[0-9a-fA-F]{2}){2}\.[0-9a-fA-F]")
_BOM = "\ufeff"
_BARE_NUMBER = re.compile(r"[0-9.,]+")
# HW slowdown, SW thermal, HW thermal, HW power brake. A software power cap is no fault.
_THROTTLE = 0x08 | 0x20 | 0x40 | 0x80
_MOST_BYTES = 1 << 60
_UNSUPPORTED = frozenset(("n/a", "not supported"))
_BROKEN = frozenset(("unknown error", "err!"))
_NOTHING = (
    _UNSUPPORTED
    | _BROKEN
    | {"", "-", "unknown", "none", "insufficient permissions"}
    | {"requested functionality has been deprecated", "not available in wddm driver model"}
)
_FREE_TEXT = ("process_name", "name", "gpu_name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One GPU of a ``--query-gpu`` answer; a column that was not asked for is None too."""

    index: int | None = None
    count: int | None = None
    uuid: str | None = None
    bus_id: str | None = None
    name: str | None = None
    driver: str | None = None
    utilization: float | None = None
    mem_total_bytes: int | None = None
    mem_used_bytes: int | None = None
    mem_reserved_bytes: int | None = None
    mem_free_bytes: int | None = None
    mem_unsupported: bool = False  # "not supported", or a total of 0: it has none of its own
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_clock_mhz: float | None = None
    throttled: bool | None = None
    fan: float | None = None
    pstate: str | None = None
    compute_mode: str | None = None
    mig: bool | None = None
    health: Health = Health.OK
    health_text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One process of a ``--query-compute-apps`` answer."""

    pid: int
    uuid: str | None = None
    name: str | None = None
    mem_bytes: int | None = None


@dataclass(slots=True)
class QueryReader:
    """Reads a ``--query-gpu`` answer line by line, as a looping nvidia-smi prints it.

    Args:
        fields: the columns where the answer has no header; None waits for the header.
    """

    fields: Sequence[str] | None = None
    columns: int | None = field(default=None, init=False)
    _names: tuple[tuple[str, str], ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        if self.fields is not None:
            self._names = tuple((name, "") for name in self.fields)
            self.columns = len(self._names)

    def line(self, text: str) -> Row | Fault | None:
        """A GPU, a fault, or None: a header, a blank line, a line that makes no sense here."""
        stripped = _stripped(text)
        if not stripped.strip():
            return None
        fault = classify(stripped)
        if fault is not None:
            return fault
        if self.fields is None and (header := _header(stripped)) is not None:
            self._names = header
            self.columns = len(header)
            return None
        cells = _cells(stripped, tuple(name for name, _ in self._names))
        return None if cells is None else _row(dict(zip(self._names, cells, strict=True)))


@dataclass(frozen=True, slots=True)
class Answer:
    """All of one ``--query-gpu`` answer."""

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    columns: int | None  # None: there was no header


def parse_query(text: str, fields: Sequence[str] | None = None) -> Answer:
    """A whole answer; an unfinished last line is left out, for its last number may be cut short.

    Args:
        text: what was printed; :func:`ended` mends what ended of itself.
        fields: the columns where there is no header.
    """
    reader = QueryReader(fields)
    read = [reader.line(line) for line in _finished(text)]
    rows = tuple(item for item in read if isinstance(item, Row))
    faults = tuple(item for item in read if isinstance(item, Fault))
    if not rows and len(faults) < 2 and (whole_text := classify(text)) is not None:
        faults = (whole_text,)  # a message may be broken over two lines
    return Answer(rows, faults, reader.columns)


def parse_apps(text: str, fields: Sequence[str] | None = None) -> tuple[App, ...] | None:
    """The processes of a ``--query-compute-apps`` answer, with or without its header.

    None where they are not told: no header came, a message stands in their place, or a line is no
    process (``[Not Supported]``): a shorter list would be a wrong one.
    """
    names = None if fields is None else tuple((name, "") for name in fields)
    apps: list[App] = []
    for line in _finished(text):
        stripped = _stripped(line)
        if not stripped.strip() or stripped.lower().startswith("warning:"):
            continue
        if fields is None and (header := _header(stripped)) is not None:
            names = header
            continue
        cells = None if names is None else _cells(stripped, tuple(name for name, _ in names))
        app = None if cells is None else _app(dict(zip(names or (), cells, strict=True)))
        if app is None:
            return None
        apps.append(app)
    return None if names is None else tuple(apps)


def ended(text: str) -> str:
    """An answer of a command that ended well: its last line is whole, line break or not."""
    return text if not text or text.endswith("\n") else f"{text}\n"


def _stripped(line: str) -> str:
    """``line`` without its ends; an empty last cell ends with a blank, which stays."""
    return line.removeprefix(_BOM).strip("\r\n")


def _finished(text: str) -> list[str]:
    """The lines that end with a line break."""
    return text.split("\n")[:-1]


def _header(line: str) -> tuple[tuple[str, str], ...] | None:
    """Names and units of the columns, where every cell of ``line`` looks like one."""
    found = [_HEADER_CELL.fullmatch(cell.strip()) for cell in line.split(",")]
    cells = [(cell[1], cell[2] or "") for cell in found if cell is not None]
    known = any(name in _COLUMNS or name in _APP_COLUMNS for name, _ in cells)
    return tuple(cells) if known and len(cells) == len(found) else None


def _cells(line: str, names: tuple[str, ...]) -> list[str] | None:
    """One cell for each column, or None; commas in a name stay in the name."""
    mark = ", " if ", " in line else ","
    cells = line.split(mark)
    surplus = len(cells) - len(names)
    place = next((names.index(name) for name in _FREE_TEXT if name in names), None)
    # Without blanks a comma may just as well be a decimal mark: then nothing is guessed.
    if surplus > 0 and place is not None and mark == ", ":
        cells[place : place + surplus + 1] = [mark.join(cells[place : place + surplus + 1])]
    return [cell.strip() for cell in cells] if len(cells) == len(names) else None


Cells = dict[tuple[str, str], str]


def _row(cells: Cells) -> Row:
    values: dict[str, Any] = {}
    broken = False
    for (name, unit), cell in cells.items():
        known = _COLUMNS.get(name)
        if known is not None and values.get(known[0]) is None:
            values[known[0]] = known[1](_with_unit(cell, unit))
        if name == "memory.total":
            values["mem_unsupported"] = bare(cell) in _UNSUPPORTED
            broken = bare(cell) in _BROKEN
    if values.get("mem_total_bytes") == 0:
        # Less than nothing to divide by: a part without memory of its own.
        values |= {"mem_total_bytes": None, "mem_used_bytes": None, "mem_unsupported": True}
    health, said = health_of(cells.values())
    if broken and health is Health.OK:
        health, said = Health.UNKNOWN, "the driver answers with errors; `dmesg` says more"
    return Row(**values, health=health, health_text=said)


def health_of(cells: Iterable[str]) -> tuple[Health, str | None]:
    """What is wrong with a card of which these values are told."""
    for cell in cells:
        low = bare(cell)
        if low.startswith("gpu is lost"):
            return Health.LOST, "the GPU is lost; restart the machine to get it back"
        if low.startswith("gpu requires reset"):
            return Health.RESET_REQUIRED, "the GPU requires a reset (nvidia-smi --gpu-reset)"
    return Health.OK, None


def _app(cells: Cells) -> App | None:
    values: dict[str, Any] = {}
    for (name, unit), cell in cells.items():
        known = _APP_COLUMNS.get(name)
        if known is not None:
            values[known[0]] = known[1](_with_unit(cell, unit))
    return App(**values) if values.get("pid") is not None else None


def _with_unit(cell: str, unit: str) -> str:
    """``cell`` with the unit of its column where it has none of its own."""
    return f"{cell} {unit}" if unit and _BARE_NUMBER.fullmatch(cell) else cell


def bare(cell: str) -> str:
    """A cell in small letters without its brackets."""
    return cell.strip().strip("[]").strip().lower()


def words(cell: str) -> str | None:
    """A text that says something, without control characters."""
    return None if bare(cell) in _NOTHING or bare(cell).startswith("gpu ") else printable(cell)


def memory(cell: str) -> int | None:
    """Bytes; a bare number is MiB. More than any machine has is no number of bytes."""
    amount = byte_count(cell, "MiB")
    return amount if amount is not None and amount <= _MOST_BYTES else None


def process_memory(cell: str) -> int | None:
    """Bytes of a process; 0 is how some drivers say that they do not know."""
    return memory(cell) or None


def mode(cell: str) -> str | None:
    """A compute mode as the snapshot names it."""
    return {
        "default": "default",
        "exclusive_process": "exclusive_process",
        "exclusive process": "exclusive_process",
        "prohibited": "prohibited",
    }.get(bare(cell))


def switch(cell: str) -> bool | None:
    """Enabled or disabled."""
    return {"enabled": True, "disabled": False}.get(bare(cell))


def uuid(cell: str) -> str | None:
    """A UUID of a card or an instance."""
    return cell if cell.startswith(("GPU-", "MIG-")) else None


def _throttled(cell: str) -> bool | None:
    found = _MASK.fullmatch(cell)
    return None if found is None else bool(int(found[1], 16) & _THROTTLE)


def _bus_id(cell: str) -> str | None:
    return cell if _BUS_ID.fullmatch(cell) else None


Parser = Callable[[str], Any]
# Later drivers renamed columns; the first of a line of names that has a value counts.
_COLUMNS: dict[str, tuple[str, Parser]] = {
    "index": ("index", whole),
    "count": ("count", whole),
    "uuid": ("uuid", uuid),
    "gpu_uuid": ("uuid", uuid),
    "pci.bus_id": ("bus_id", _bus_id),
    "gpu_bus_id": ("bus_id", _bus_id),
    "name": ("name", words),
    "gpu_name": ("name", words),
    "driver_version": ("driver", words),
    "utilization.gpu": ("utilization", ratio),
    "memory.total": ("mem_total_bytes", memory),
    "memory.used": ("mem_used_bytes", memory),
    "memory.free": ("mem_free_bytes", memory),
    "memory.reserved": ("mem_reserved_bytes", memory),
    "temperature.gpu": ("temperature_c", celsius),
    "power.draw": ("power_w", watts),
    "enforced.power.limit": ("power_limit_w", watts),
    "clocks.current.sm": ("sm_clock_mhz", megahertz),
    "clocks.sm": ("sm_clock_mhz", megahertz),
    "clocks_event_reasons.active": ("throttled", _throttled),
    "clocks_throttle_reasons.active": ("throttled", _throttled),
    "fan.speed": ("fan", ratio),
    "pstate": ("pstate", words),
    "compute_mode": ("compute_mode", mode),
    "mig.mode.current": ("mig", switch),
}
_APP_COLUMNS: dict[str, tuple[str, Parser]] = {
    "pid": ("pid", whole),
    "gpu_uuid": ("uuid", uuid),
    "process_name": ("name", words),
    "used_gpu_memory": ("mem_bytes", process_memory),
    "used_memory": ("mem_bytes", process_memory),
}
