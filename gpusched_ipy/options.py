"""The options of a submit, defined once for magic, terminal and Python. It only parses.

:func:`add_job_options` puts them on any argument parser; :func:`job_fields` gives what was parsed
under the names that ``Queue.submit`` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NoReturn, Protocol, TypedDict

from gpusched_ipy.config import parse_engine, parse_seconds
from gpusched_ipy.errors import UserError
from gpusched_ipy.optionvalues import (
    begin_time,
    parse_begin,
    parse_flag,
    parse_gpu_type,
    parse_gpus,
    parse_key,
    parse_label,
    parse_max_running,
    parse_name,
    parse_priority,
    parse_references,
    parse_retries,
    parse_share,
    parse_variables,
)
from gpusched_ipy.sweep import axes_of, parse_axis


class HasId(Protocol):
    """Something that stands for a job: a job itself, or a handle."""

    @property
    def id(self) -> int:
        """The id of the job."""
        ...


Reference = int | str | HasId
References = Reference | Iterable[Reference]


class RequestOptions(TypedDict, total=False):
    """The options of a submit as Python gives them; text is understood as on a command line."""

    name: str | None
    gpus: int
    mem: int | str | None  # bytes, or "8G"
    on_gpu: int | str | None
    after: References | None
    after_any: References | None
    begin: float | str | datetime | None  # wall clock (s), "22:00", "+2h"
    time: float | str | timedelta | None  # s, or "2h"
    gpu_type: int | str | None  # the same as on_gpu
    hold: bool
    label: Mapping[str, str] | Iterable[tuple[str, str]] | None


class JobOptions(RequestOptions, total=False):
    """Every option of a submit."""

    priority: int  # higher runs first
    retries: int
    requeue: bool
    retry_oom: bool


class SubmitOptions(JobOptions, total=False):
    """Every option of ``submit``."""

    key: str | None  # the same key again is the same job, unless that has ended badly
    max_running: int | None  # of a sweep, at once
    engine: str  # where it runs: "local", "slurm" …


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one-line :class:`UserError` s, in a cell as well."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint instead of leaving the process."""
        raise UserError(f"{message}; see `{self.prog} --help`")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """``--help`` ends here: not with the process, which may be a kernel."""
        raise HelpShown(status)


class HelpShown(Exception):  # noqa: N818 - not an error: help was asked for and given
    """Help was printed; nothing else is to be done."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its flags, how it is parsed, its help."""

    flags: tuple[str, ...]
    parse: Callable[[str], Any] | None  # None: a switch
    help: str
    metavar: str | None = None
    repeated: bool = False

    @property
    def dest(self) -> str:
        """The name of the parsed value."""
        return _dest(self.flags[-1])


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse`` for argparse, which shows only the messages of its own kind of error."""

    def call(text: str) -> Any:
        try:
            return parse(text)
        except UserError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None

    return call


@dataclass(frozen=True, slots=True)
class Isolation:
    """What an isolated cell takes along and brings back: the names of variables."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


# Of a cell alone.
CELL_OPTIONS: tuple[Option, ...] = (
    Option(("--wait",), None, "hold the cell's place while it waits"),
    Option(("--isolate",), None, "run it in a fresh Python of its own, which ends with it"),
    Option(("--in",), parse_variables, "variables that an isolated cell takes along", "a,b"),
    Option(("--out",), parse_variables, "variables that it brings back", "a,b"),
)


JOB_OPTIONS: tuple[Option, ...] = (
    Option(
        ("-p", "--priority"), parse_priority, "higher runs first; -1000 ... 1000, default 0", "N"
    ),
    Option(("-n", "--name"), parse_name, "a name, for lists and for --after", "NAME"),
    Option(("--gpus",), parse_gpus, "how many GPUs (default 1)", "N"),
    Option(
        ("--mem",), parse_share, "memory per GPU, e.g. 8G: jobs that say it may share a GPU", "SIZE"
    ),
    Option(
        ("--gpu-type", "--on-gpu"),
        parse_gpu_type,
        "only on such a GPU: name, UUID, number (0, a MIG instance 0:1) or MIG profile",
        "GPU",
    ),
    Option(("--after",), parse_references, "only after these jobs have completed", "JOB,…"),
    Option(
        ("--after-any",), parse_references, "only after these jobs have ended, however", "JOB,…"
    ),
    Option(("--begin",), parse_begin, "not before 22:00, +2h or 2026-11-22T22:00", "T"),
    Option(("--time",), parse_seconds, "walltime, e.g. 2h: the job is ended when it is over", "D"),
    Option(("--hold",), None, "queue it held: it waits until it is released"),
    Option(("--retries",), parse_retries, "run it again when it has failed, at most so often", "N"),
    Option(("--requeue",), None, "run it again when nobody knows how it ended; at most 3 times"),
    Option(
        ("--retry-oom",), None, "run it again once, with more memory, when it ran out of GPU memory"
    ),
    Option(("--label",), parse_label, "a label; may be given several times", "K=V", repeated=True),
    Option(
        ("--sweep",),
        parse_axis,
        "one job for each value, lr=0.1,0.01 or seed=1..5; given again: for each combination",
        "K=V,V",
        repeated=True,
    ),
    Option(("--max-running",), parse_max_running, "so many of a sweep at once, not more", "N"),
    Option(("--key",), parse_key, "the same key again is the same job, unless that failed", "K"),
    Option(("--engine",), parse_engine, "where it runs: local (here), slurm, ray, …", "NAME"),
    Option(("--dry-run",), None, "only say what would happen, and when; nothing is queued"),
)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Put every option of a submit on ``parser``."""
    add_options(parser, JOB_OPTIONS)


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Put these options on ``parser``."""
    for option in options:
        if option.parse is None:
            parser.add_argument(
                *option.flags, dest=option.dest, action="store_true", help=option.help
            )
        else:
            parser.add_argument(
                *option.flags,
                type=checked(option.parse),
                action="append" if option.repeated else "store",
                dest=option.dest,
                metavar=option.metavar,
                help=option.help,
            )


def job_fields(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was given, under the names that ``Queue.submit`` takes; what was not given is absent."""
    given = {option.dest: getattr(parsed, option.dest) for option in JOB_OPTIONS}
    return {name: value for name, value in given.items() if value not in (None, False)}


def python_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as Python gives them, checked, under the names and in the types of ``job_fields``.

    Raises:
        UserError: an option is unknown or has a value that it cannot have.
    """
    known = {
        _dest(flag): option
        for option in JOB_OPTIONS
        for flag in option.flags
        if flag.startswith("--")
    }
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"submit does not know the option {name!r}")
        if value is None or value is False:
            continue
        convert = _FROM_PYTHON.get(name) or known[name].parse or parse_flag
        try:
            fields[known[name].dest] = convert(value)
        except TypeError:
            raise UserError(f"{name}={value!r} is not a value for this option") from None
    return fields


def _references(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return parse_references(value)
    if isinstance(value, int):
        return (str(value),)
    job_id = getattr(value, "id", None)
    if job_id is not None:
        return (str(job_id),)
    return tuple(name for item in value for name in _references(item))


def _begin(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, datetime):
        return begin_time(value.timestamp())
    return begin_time(float(value)) if isinstance(value, (int, float)) else parse_begin(value)


def _span(value: Any) -> float:
    return parse_seconds(value.total_seconds() if isinstance(value, timedelta) else value)


def _label_pairs(value: Any) -> list[tuple[str, str]]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return [(str(key), str(text)) for key, text in pairs]


# Where Python has more ways to say it than a command line.
_FROM_PYTHON: dict[str, Callable[[Any], Any]] = {
    "after": _references,
    "after_any": _references,
    "begin": _begin,
    "time": _span,
    "label": _label_pairs,
    "sweep": axes_of,
}
