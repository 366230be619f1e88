"""A sweep as plain data: axes of values, their product, and what each member of it is told.

Pure: it parses and combines; it reads no environment and submits nothing.
"""

from __future__ import annotations

import keyword
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from gpusched_ipy.errors import UserError

MAX_MEMBERS = 10_000

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_NO_RANGE = re.compile(r"-?[\d.]*\d\.\.-?\.?\d[\d.]*")
_WHOLE = re.compile(r"[+-]?(?:0|[1-9]\d*)")
_REAL = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")
_WORDS: Mapping[str, Any] = {"True": True, "False": False, "None": None}
# {name}, not ${name}; {{name}} stands for {name} itself.
_PLACE = re.compile(r"(?<!\$)\{\{(\w+)\}\}|(?<!\$)\{([^\W\d]\w*)\}")


class Value(NamedTuple):
    """One value of an axis: as it is written, and as Python has it."""

    text: str
    value: Any


@dataclass(frozen=True, slots=True)
class Axis:
    """One variable of a sweep."""

    name: str
    values: tuple[Value, ...]


Member = Mapping[str, Value]


def value_of(text: str) -> Any:
    """A value as a cell sees it: ``1`` and ``1e-3`` are numbers, True, False and None are Python's
    own, all else is text."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _REAL.fullmatch(text) else text


def values_of(texts: Mapping[str, str]) -> dict[str, Any]:
    """The values of a member as Python has them, from what its spec keeps."""
    return {name: value_of(text) for name, text in texts.items()}


def parse_axis(text: object) -> Axis:
    """``lr=0.1,0.01``, ``seed=1..5`` or ``n=0..100..25``: a name and its values.

    Raises:
        UserError: it is no such thing.
    """
    name, found, values = str(text).partition("=")
    if not found:
        raise UserError(f"--sweep {text} is not of the form NAME=VALUE,VALUE or NAME=1..5")
    parts = [part.strip() for part in values.split(",")]
    if "" in parts:
        raise UserError(f"--sweep {text}: a value is missing")
    return _axis(name.strip(), [value for part in parts for value in _expanded(part, text)])


def axes_of(given: object) -> tuple[Axis, ...]:
    """A sweep as Python gives it: ``{"lr": [0.1, 0.01], "seed": range(5)}``, or texts of axes.

    Raises:
        UserError: it is no sweep.
    """
    if isinstance(given, str):
        return (parse_axis(given),)
    if not isinstance(given, Mapping):
        if not isinstance(given, Iterable):
            raise UserError(f"sweep={given!r} is no mapping of names to values")
        return tuple(item if isinstance(item, Axis) else parse_axis(item) for item in given)
    if not given:
        raise UserError("the sweep names no values; without sweep= it is one job")
    return tuple(_python_axis(str(name), values) for name, values in given.items())


def members_of(axes: Sequence[Axis]) -> tuple[Member, ...]:
    """Every combination, the last axis running fastest.

    Raises:
        UserError: an axis is named twice, or there are more members than are taken.
    """
    names = [axis.name for axis in axes]
    for place, name in enumerate(names):
        if name.upper() in map(str.upper, names[:place]):
            raise UserError(f"--sweep names {name} twice; give all its values at once: {name}=1,2")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_MEMBERS:
        raise UserError(f"the sweep has {count} members; at most {MAX_MEMBERS} are taken")
    return tuple(
        dict(zip(names, values, strict=True)) for values in product(*(axis.values for axis in axes))
    )


def texts(member: Member) -> dict[str, str]:
    """What the spec of a member keeps."""
    return {name: value.text for name, value in member.items()}


def label(values: Mapping[str, str]) -> str:
    """A member for people: ``lr=0.1 seed=3``."""
    return " ".join(f"{name}={text}" for name, text in values.items())


def filled(argv: Sequence[str], values: Mapping[str, str], *, shell: bool = False) -> list[str]:
    """``argv`` with ``{lr}`` replaced by the value of ``lr``; in a line for the shell it is quoted.

    ``{{lr}}`` becomes ``{lr}``; ``${lr}`` and braces around anything but one name stay.

    Raises:
        UserError: a name in braces is not swept.
    """

    def put(found: re.Match[str]) -> str:
        if found[1] is not None:
            return f"{{{found[1]}}}"
        name = found[2]
        if name not in values:
            known = ", ".join(values)
            raise UserError(
                f"{{{name}}} in the command is no variable of the sweep ({known}); "
                f"write {{{{{name}}}}} for the braces themselves"
            )
        return shlex.quote(values[name]) if shell else values[name]

    return [_PLACE.sub(put, word) for word in argv]


def environment(values: Mapping[str, str], array: str, index: int, size: int) -> dict[str, str]:
    """The variables of a member's process."""
    return {
        "GPUSCHED_ARRAY_ID": array,
        "GPUSCHED_ARRAY_INDEX": str(index),
        "GPUSCHED_ARRAY_SIZE": str(size),
        **{f"GPUSCHED_SWEEP_{name.upper()}": text for name, text in values.items()},
    }


def _expanded(part: str, whole: object) -> list[Value]:
    found = _RANGE.fullmatch(part)
    if found is None:
        if _NO_RANGE.fullmatch(part):
            raise UserError(f"--sweep {whole}: a range takes whole numbers, like 1..5 or 0..9..3")
        return [Value(part, value_of(part))]
    first, last = int(found[1]), int(found[2])
    step = abs(int(found[3])) if found[3] else 1
    if step == 0:
        raise UserError(f"--sweep {whole}: the step of a range must not be 0")
    if abs(last - first) // step >= MAX_MEMBERS:
        raise UserError(f"--sweep {whole}: more than {MAX_MEMBERS} values")
    way = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [Value(str(number), number) for number in way]


def _python_axis(name: str, values: object) -> Axis:
    if isinstance(values, str):
        return parse_axis(f"{name}={values}")
    if not isinstance(values, Iterable):
        raise UserError(f"sweep: the values of {name} are no list; write {{{name!r}: [...]}}")
    return _axis(name, [_python_value(item) for item in values])


def _python_value(item: Any) -> Value:
    """Scalars of numpy and of torch stand for their number."""
    plain = item.item() if callable(getattr(item, "item", None)) else item
    return Value(str(plain), plain)


def _axis(name: str, values: Sequence[Value]) -> Axis:
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        raise UserError(f"--sweep: {name!r} is not the name of a variable")
    if not values:
        raise UserError(f"--sweep {name}: no values")
    seen: set[str] = set()
    for value in values:
        if value.text in seen:
            raise UserError(f"--sweep {name}: the value {value.text} stands there twice")
        seen.add(value.text)
    return Axis(name, tuple(values))
