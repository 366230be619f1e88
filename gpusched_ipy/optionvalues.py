"""The values of options as they are written: one function each, text in, value out. Pure parsing.

They raise one-line :class:`~gpusched_ipy.errors.UserError` s that say what can be written instead.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from keyword import iskeyword

from gpusched_ipy.config import parse_bytes, parse_seconds
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import MAX_NAME_BYTES, PRIORITY_RANGE
from gpusched_ipy.text import END_OF_TIME, VARIABLE

MAX_RETRIES = 100
_NAME = re.compile(r"\S(.*\S)?", re.DOTALL)
_NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?")


def parse_priority(text: object) -> int:
    """A whole number from -1000 to 1000; higher runs first.

    Raises:
        UserError: it is not one.
    """
    low, high = PRIORITY_RANGE
    try:
        value = int(str(text))
    except ValueError:
        value = high + 1
    if not low <= value <= high:
        raise UserError(
            f"priority {text!s} is not a whole number from {low} to {high} (higher runs first)"
        )
    return value


def parse_gpus(text: object) -> int:
    """How many GPUs: 1 or more.

    Raises:
        UserError: it is not such a number.
    """
    try:
        value = int(str(text))
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"--gpus {text!s} is not a number of GPUs; write 1 or more")
    return value


def parse_retries(text: object) -> int:
    """How often a job that has failed is tried again: 0 to 100.

    Raises:
        UserError: it is not such a number.
    """
    try:
        value = int(str(text))
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_RETRIES:
        raise UserError(f"--retries {text!s} is not a whole number from 0 to {MAX_RETRIES}")
    return value


def parse_max_running(text: object) -> int:
    """How many members of a sweep may run at once: 1 or more.

    Raises:
        UserError: it is not such a number.
    """
    try:
        value = int(str(text))
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"--max-running {text!s} is not a number of jobs; write 1 or more")
    return value


def parse_name(text: object) -> str:
    """A name for people, by which the job can be named.

    Raises:
        UserError: it is empty, longer than 256 bytes, no text, or stands for other jobs.
    """
    name = _short("name", text)
    if own_name(name) != name:
        raise UserError(
            f"the name {name} would stand for other jobs; use none that is a number or a range, "
            "begins with array: or has one of , * ?"
        )
    return name


def own_name(name: str) -> str:
    """The name, changed where it would stand for other jobs: ``12`` to ``job-12``, ``a,b`` to
    ``a_b``."""
    own = re.sub(r"[,*?]", "_", name)
    return f"job-{own}" if _NUMBERS.fullmatch(own) or own.startswith("array:") else own


def parse_key(text: object) -> str:
    """What makes a submit the same as an earlier one.

    Raises:
        UserError: it is empty or longer than 256 bytes.
    """
    return _short("key", text)


def _short(what: str, text: object) -> str:
    value = str(text)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise UserError(f"the {what} {value!a} is no text in UTF-8") from None
    if not _NAME.fullmatch(value):
        raise UserError(f"a {what} must not be empty or begin or end with a blank")
    if size > MAX_NAME_BYTES:
        raise UserError(f"the {what} has {size} bytes; at most {MAX_NAME_BYTES} are kept")
    return value


def parse_begin(text: object, *, now: datetime | None = None) -> float:
    """The wall-clock time (s) of ``22:00`` (the next one), ``+2h`` or ``2026-11-22T22:00``.

    Raises:
        UserError: it is no such time.
    """
    now = now or datetime.now().astimezone()
    raw = str(text).strip()
    if raw.startswith("+"):
        return begin_time(now.timestamp() + parse_seconds(raw[1:]))
    try:
        clock = datetime.strptime(raw, "%H:%M").time()  # noqa: DTZ007 - combined with a zone below
    except ValueError:
        clock = None
    try:
        when = datetime.fromisoformat(raw) if clock is None else datetime.combine(now, clock)
    except ValueError:
        raise UserError(
            f"{raw} is not a begin time; write 22:00, +2h or 2026-11-22T22:00"
        ) from None
    when = when.replace(tzinfo=when.tzinfo or now.tzinfo)
    if clock is not None and when <= now:
        when += timedelta(days=1)
    return begin_time(when.timestamp())


def begin_time(wall: float) -> float:
    """A begin time (s since the epoch) that people and programs can be told.

    Raises:
        UserError: no calendar has it.
    """
    if not 0 <= wall < END_OF_TIME:  # nor is NaN
        raise UserError(f"{wall:g} s since 1970 is not a begin time; write 22:00, +2h or a date")
    return wall


def parse_flag(value: object) -> bool:
    """What is on or off.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError
    return value


def parse_variable(text: object) -> str:
    """``NAME`` or ``NAME=VALUE``, as it stands.

    Raises:
        UserError: no variable can be called so.
    """
    name = str(text).partition("=")[0]
    if not VARIABLE.fullmatch(name):
        raise UserError(f"--env: {name!r} is not the name of a variable")
    return str(text)


def parse_line(text: object) -> str:
    """A line for the shell.

    Raises:
        UserError: it is empty.
    """
    if not str(text).strip():
        raise UserError("the line of --shell is empty; write what /bin/sh is to run")
    return str(text)


def parse_share(text: object) -> int:
    """The memory (bytes) that a job declares on each GPU.

    Raises:
        UserError: it is no size, or nothing.
    """
    size = parse_bytes(text)
    if size < 1:
        raise UserError(f"--mem {text!s} declares nothing; without --mem a job has its GPU alone")
    return size


def parse_gpu_type(text: object) -> str:
    """A name, UUID, number or MIG profile of a GPU.

    Raises:
        UserError: it is empty.
    """
    if not str(text).strip():
        raise UserError("--gpu-type is empty; `gpusched gpus` lists the names that there are")
    return str(text)


def parse_label(text: object) -> tuple[str, str]:
    """``KEY=VALUE`` as a pair.

    Raises:
        UserError: it has no ``=`` or an empty key.
    """
    key, found, value = str(text).partition("=")
    if not found or not key.strip():
        raise UserError(f"--label {text!s} is not of the form KEY=VALUE")
    return key.strip(), value


def parse_references(text: object) -> tuple[str, ...]:
    """The jobs named in ``12,14-16,prep*``: ids, ranges of ids, names and patterns, still as text.

    Raises:
        UserError: nothing is named.
    """
    names = tuple(part.strip() for part in str(text).split(",") if part.strip())
    if not names:
        raise UserError(f"{text!s} names no job; write an id or a name, for example 12,prep")
    return names


def parse_variables(text: object) -> tuple[str, ...]:
    """The variables named in ``a,b``.

    Raises:
        UserError: one is no name of a variable.
    """
    names = tuple(dict.fromkeys(part.strip() for part in str(text).split(",") if part.strip()))
    for name in names:
        if not name.isidentifier() or iskeyword(name):
            raise UserError(f"{name!r} is not the name of a variable; write names, as in a,b")
    if not names:
        raise UserError("no variable is named; write names, as in a,b")
    return names
