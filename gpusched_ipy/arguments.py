"""The arguments of the verbs, one definition for ``%gpuq`` and ``gpusched``. It only parses.

The options of a submit are in :mod:`gpusched_ipy.options`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from gpusched_ipy.config import parse_seconds
from gpusched_ipy.options import add_job_options, checked
from gpusched_ipy.optionvalues import parse_line, parse_priority, parse_variable


def nothing(parser: argparse.ArgumentParser) -> None:
    """A verb without arguments."""


def as_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def command(parser: argparse.ArgumentParser) -> None:
    """The options of a job that is a command; the command itself stands after them."""
    add_job_options(parser)
    parser.add_argument("--cwd", metavar="DIR", help="where the command runs (default: here)")
    parser.add_argument(
        "--env",
        metavar="NAME[=VALUE]",
        type=checked(parse_variable),
        action="append",
        default=[],
        help="a variable for the command; its value never enters the record",
    )
    parser.add_argument(
        "--shell",
        metavar="LINE",
        type=checked(parse_line),
        help="a line for /bin/sh in place of a command",
    )


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="ended jobs as well")
    parser.add_argument("--members", action="store_true", help="each job of a sweep in its own row")
    as_json(parser)


def _one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a job: its id, or a name for its newest job")


def _show(parser: argparse.ArgumentParser) -> None:
    _one(parser)
    as_json(parser)


def _log(parser: argparse.ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")


_JOBS = "jobs: 12, 12,14-16, a name, prep*, array:12 (the sweep of job 12)"


def _several(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="+", help=_JOBS)


def _priority(parser: argparse.ArgumentParser) -> None:
    _several(parser)
    parser.add_argument(
        "priority", metavar="N", type=checked(parse_priority), help="-1000 ... 1000; higher first"
    )


def _wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="*", help="jobs; without any: all that are open")
    parser.add_argument(
        "--timeout", metavar="D", type=checked(parse_seconds), help="the longest wait, e.g. 10m"
    )


def _history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="N", type=count, default=50, help="the newest N")
    parser.add_argument("--by", choices=("name", "day"), help="sums, one row for each")
    parser.add_argument(
        "--since", metavar="D", type=checked(parse_seconds), help="ended within that time, e.g. 7d"
    )
    as_json(parser)


def _stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since",
        metavar="D",
        type=checked(parse_seconds),
        default=7 * 86400.0,
        help="over the last so long (default: 7d)",
    )
    as_json(parser)


def count(text: str) -> int:
    """A whole number above zero."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above zero")
    return int(text)


# The verbs that the notebook and the terminal have in common.
VERBS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "list": _list,
    "show": _show,
    "log": _log,
    "cancel": _several,
    "hold": _several,
    "release": _several,
    "priority": _priority,
    "top": _one,
    "wait": _wait,
    "drain": nothing,
    "resume": nothing,
    "requeue": _several,
    "history": _history,
    "stats": _stats,
}
# Those that only a notebook can do: its variables are asked for.
NOTEBOOK_VERBS = {"fetch": _one}
