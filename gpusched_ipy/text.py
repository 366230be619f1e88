"""Strings for people: made safe for a terminal and a page, and numbers in words.

Whatever a job, another user or a driver may have chosen (names, arguments, paths, errors) goes
through :func:`clean` before a terminal and through :func:`escape` before HTML. Pure functions.
"""

from __future__ import annotations

import math
import re
from itertools import chain

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # what one of the environment may be called
END_OF_TIME = 253402300800.0  # s since the epoch: the year 10000, which ISO 8601 has not
UNKNOWN = "\u2013"  # a dash: never 0, never an empty cell

# Characters that move a cursor, start a terminal's commands or turn text round: shown, not sent.
_CONTROLS = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for code in chain(
        range(0x20),  # C0
        range(0x7F, 0xA0),  # DEL and C1
        (0x061C, 0x200E, 0x200F),  # marks of direction
        range(0x2028, 0x202F),  # line and paragraph separator, embeddings and overrides
        range(0x2066, 0x206A),  # isolates
        range(0xD800, 0xE000),  # lone surrogates: no encoding takes them
    )
}


def clean(text: object, limit: int | None = None) -> str:
    """``text`` without any character that acts: those become visible escapes like ``\\x1b``.

    Args:
        text: what is shown, by its ``str``.
        limit: the most characters of the result; a longer one ends in ``…``.
    """
    raw = str(text)
    if limit is not None and len(raw) > limit:
        raw = raw[: limit + 1]  # one more than fits: it is still seen that it was cut
    shown = raw.translate(_CONTROLS)
    if limit is not None and len(shown) > limit:
        return shown[: max(0, limit - 1)] + "…" if limit else ""
    return shown


def escape(text: object, limit: int | None = None) -> str:
    """:func:`clean`, and nothing in it is markup: for HTML text and quoted attributes."""
    import html

    return html.escape(clean(text, limit), quote=True)


def format_bytes(count: float | None) -> str:
    """A size like ``12.3 GiB``; unknown is a dash."""
    if count is None:
        return UNKNOWN
    value, unit = float(count), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        # Three digits at most: 1023.9 MiB would be rounded to 1024.
        if abs(value) < 1000:
            break
        value, unit = value / 1024, bigger
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.1f} {unit}"


def format_memory(used: int | None, total: int | None) -> str:
    """Memory used of a total, like ``12.3 GiB / 40.0 GiB``."""
    if used is None and total is None:
        return UNKNOWN
    return f"{format_bytes(used)} / {format_bytes(total)}"


def format_duration(seconds: float | None) -> str:
    """A span like ``12 s``, ``41 min``, ``2 h 05`` or ``3 d 04 h``; unknown is a dash."""
    if seconds is None or not math.isfinite(seconds) or seconds >= END_OF_TIME:
        return UNKNOWN
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d}"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def format_energy(joules: float | None) -> str:
    """An energy like ``12 kJ`` or, where it is much, ``3.4 kWh``; unknown is a dash."""
    if joules is None:
        return UNKNOWN
    if joules < 1000:
        return f"{joules:.0f} J"
    return f"{joules / 1000:.0f} kJ" if joules < 360_000 else f"{joules / 3.6e6:.1f} kWh"


def format_percent(ratio: float | None) -> str:
    """A ratio (0-1) like ``97 %``; unknown is a dash."""
    return UNKNOWN if ratio is None else f"{100 * ratio:.0f} %"


def format_number(value: float | None, unit: str) -> str:
    """A whole number with its unit, like ``61 °C``; unknown is a dash."""
    return UNKNOWN if value is None else f"{value:.0f} {unit}"
