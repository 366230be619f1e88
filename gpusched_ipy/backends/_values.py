"""Numbers as tools print them. It reads no file and no clock, and never turns an unknown into 0.

Whatever is not clearly a number is None: ``N/A``, ``[Not Supported]``, ``-``, an empty cell, NaN,
infinity, a truth value, a unit that is not known, a thousands mark that could be a decimal mark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_NUMBER = re.compile(
    r"\(?\s*([+-]?[0-9][0-9., ]*|[+-]?[.,][0-9]+)(?:[eE]([+-]?[0-9]{1,3}))?\s*([^\d]*)"
)
_GROUPED = re.compile(r"[0-9]{1,3}([,. ])[0-9]{3}(?:\1[0-9]{3})*")
_MAX_TEXT = 80
_BYTES = {
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 1024,
    "kib": 1024,
    "k": 1024,
    "mb": 1024**2,
    "mib": 1024**2,
    "m": 1024**2,
    "gb": 1024**3,
    "gib": 1024**3,
    "g": 1024**3,
    "tib": 1024**4,
}
_WATTS = {"": 1.0, "w": 1.0, "watt": 1.0, "watts": 1.0, "mw": 1e-3, "uw": 1e-6, "kw": 1e3}
_CELSIUS = {
    "": 1.0,
    "c": 1.0,
    "°c": 1.0,
    "℃": 1.0,
    "celsius": 1.0,
    "celsius degree": 1.0,
    "mc": 1e-3,
}
_MHZ = {"": 1.0, "mhz": 1.0, "hz": 1e-6, "khz": 1e-3, "ghz": 1e3}
_PERCENT = {"": 1.0, "%": 1.0, "percent": 1.0}


def number(value: object, units: Mapping[str, float] | None = None) -> float | None:
    """``value`` as a finite float, or None.

    Args:
        value: a number, a text such as ``31.0`` or ``12,5 W``, or ``{"value": 31, "unit": "C"}``.
        units: what each known unit (lower case; ``""`` is none) is multiplied by; None: any unit
            is let pass and left alone.
    """
    unit = ""
    if isinstance(value, Mapping):
        unit = str(value.get("unit") or "")
        value = value.get("value")
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return _scaled(_finite(value), unit, units)
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        return None
    found = _NUMBER.fullmatch(value.strip())
    if found is None:
        return None
    plain = _plain(found[1].strip())
    if plain is None:
        return None
    amount = _finite(plain if found[2] is None else f"{plain}e{found[2]}")
    return _scaled(amount, found[3].strip(" ()") or unit, units)


def whole(value: object, units: Mapping[str, float] | None = None) -> int | None:
    """``value`` as a whole number that is not negative, or None; large integers stay exact."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value >= 0 else None
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        return int(value.strip()) if len(value) <= _MAX_TEXT else None
    amount = number(value, units)
    return None if amount is None or amount < 0 else int(amount)


def ratio(percent: object) -> float | None:
    """0-1 of per cent; None outside 0-100 (a counter that wrapped, a placeholder like 65535)."""
    amount = number(percent, _PERCENT)
    return amount / 100 if amount is not None and 0 <= amount <= 100 else None


def share(value: object) -> float | None:
    """0-1 of a value that is already a ratio; None outside (a rounding error above 1 is 1)."""
    amount = number(value, {"": 1.0})
    return min(amount, 1.0) if amount is not None and 0 <= amount <= 1.001 else None


def watts(value: object, scale: float = 1.0) -> float | None:
    """Watts, from 0 to 10 kW; ``scale`` is the unit of a bare number."""
    return _within(number(value, _WATTS), scale, 0, 10_000)


def celsius(value: object, scale: float = 1.0) -> float | None:
    """Degrees Celsius; 0 and below is what a missing sensor says, and is None."""
    amount = _within(number(value, _CELSIUS), scale, 0, 250)
    return amount or None


def megahertz(value: object, scale: float = 1.0) -> float | None:
    """MHz, from 0 (asleep) to 20 GHz."""
    return _within(number(value, _MHZ), scale, 0, 20_000)


def byte_count(value: object, unit: str = "b") -> int | None:
    """Bytes; ``unit`` is that of a bare number. What GPU tools call MB is MiB."""
    bare = _BYTES[unit.lower()]
    return whole(value, {**_BYTES, "": bare}) if not _bare_int(value) else _times(value, bare)


def clean_text(value: object) -> str | None:
    """A name without control characters, or None for what means "no name"."""
    if isinstance(value, bytes):
        value = value.split(b"\0", 1)[0].decode("utf-8", "replace")
    if not isinstance(value, str):
        return None
    text = " ".join("".join(char if char.isprintable() else " " for char in value).split())
    known = text.strip("[]").lower() not in {"", "n/a", "none", "unknown", "not supported", "-"}
    return text[:200] if known else None


def section(value: object, *keys: str) -> Mapping[str, Any]:
    """The mapping under ``keys``, or an empty one where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _bare_int(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.strip().isascii() and value.strip().isdigit()
    )


def _times(value: object, factor: int) -> int | None:
    amount = whole(value)
    return None if amount is None else amount * factor


def _within(amount: float | None, scale: float, low: float, high: float) -> float | None:
    if amount is None:
        return None
    scaled = amount * scale
    return scaled if low <= scaled <= high else None


def _scaled(amount: float | None, unit: str, units: Mapping[str, float] | None) -> float | None:
    if amount is None or units is None:
        return amount
    factor = units.get(unit.strip().lower())
    return None if factor is None else _finite(amount * factor)


def _finite(value: float | str) -> float | None:
    try:
        amount = float(value)
    except (OverflowError, ValueError):
        return None
    return amount if math.isfinite(amount) else None


def _plain(text: str) -> str | None:
    """``text`` with a decimal point and no thousands marks; None where that is ambiguous."""
    sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
    marks = [char for char in digits if char in ",. "]
    if not marks or marks == ["."]:
        return sign + digits
    if marks == [","]:
        # "1,234" is 1234 in one locale and 1.234 in another: a wrong guess is 1000 times off.
        tail = digits.partition(",")[2]
        return None if len(tail) == 3 else sign + digits.replace(",", ".")
    last = max(digits.rfind(","), digits.rfind("."))
    whole_part, decimals = (
        (digits, "") if len(set(marks)) == 1 else (digits[:last], digits[last + 1 :])
    )
    if not _GROUPED.fullmatch(whole_part) or not (decimals == "" or decimals.isdigit()):
        return None
    joined = re.sub(r"[,. ]", "", whole_part)
    return f"{sign}{joined}.{decimals}" if decimals else sign + joined
