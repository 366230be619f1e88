"""``gpusched``: the same queue from a terminal. It parses and hands over; it decides nothing.

Exit status: 0 done, 1 a lookup or operation failed, 2 usage; ``wait`` and ``run`` end with the
job's own status. The verbs themselves are in :mod:`gpusched_ipy.verbs`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpusched_ipy._version import __version__
from gpusched_ipy.config import Settings, parse_seconds
from gpusched_ipy.errors import UserError
from gpusched_ipy.options import HelpShown, OptionParser, add_job_options, checked, parse_priority
from gpusched_ipy.terminal import DONE, FAILED, INTERRUPTED, USAGE, note

Arguments = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Verb:
    """One command of the terminal: its help, its arguments, and the function of ``verbs``."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]


def _nothing(parser: argparse.ArgumentParser) -> None:
    """A verb without arguments."""


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def _one(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="a job: its id, or a name for its newest job")


def _several(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="+", help="jobs: 12, 12,14-16, a name, prep*")


def _command(parser: argparse.ArgumentParser) -> None:
    add_job_options(parser)
    parser.add_argument("--cwd", metavar="DIR", help="where the command runs (default: here)")
    parser.add_argument(
        "--env",
        metavar="NAME[=VALUE]",
        action="append",
        default=[],
        help="a variable for the command; its value never enters the record",
    )
    parser.add_argument("--shell", metavar="LINE", help="a line for /bin/sh in place of a command")
    parser.add_argument("argv", metavar="-- argv", nargs=argparse.REMAINDER, help="the command")


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="ended jobs as well")
    _json(parser)


def _show(parser: argparse.ArgumentParser) -> None:
    _one(parser)
    _json(parser)


def _log(parser: argparse.ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")


def _priority(parser: argparse.ArgumentParser) -> None:
    _several(parser)
    parser.add_argument(
        "priority", metavar="N", type=checked(parse_priority), help="-1000 ... 1000; higher first"
    )


def _wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ids", metavar="ID", nargs="*", help="jobs; without any: all that are open now"
    )


def _history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="N", type=_count, default=50, help="the newest N")
    _json(parser)


def _gpus(parser: argparse.ArgumentParser) -> None:
    _json(parser)
    parser.add_argument("--watch", action="store_true", help="again and again, until interrupted")
    parser.add_argument(
        "--interval",
        metavar="D",
        type=checked(parse_seconds),
        help="of --watch (default: sample_interval_s)",
    )


def _agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("run", "status", "stop"), help="run: in the foreground")


VERBS = (
    Verb("submit", "queue a command; prints its id alone", _command),
    Verb("run", "wait for a turn, then run a command here, with this terminal", _command),
    Verb("list", "the queue", _list),
    Verb("show", "everything about one job", _show),
    Verb("log", "what a job has written", _log),
    Verb("cancel", "cancel jobs; running ones are interrupted, terminated, killed", _several),
    Verb("hold", "keep pending jobs from starting", _several),
    Verb("release", "let held jobs start", _several),
    Verb("priority", "give jobs another priority; higher runs first", _priority),
    Verb("top", "move a job to the front", _one),
    Verb("wait", "wait until jobs have ended; ends with their status", _wait),
    Verb("requeue", "run ended jobs again", _several),
    Verb("drain", "start nothing more; what runs goes on", _nothing),
    Verb("resume", "start jobs again after drain", _nothing),
    Verb("history", "the jobs that have ended", _history),
    Verb("gpus", "the GPUs now", _gpus),
    Verb("engines", "where jobs can run", _json),
    Verb("agent", "the process that starts commands while no notebook is open", _agent),
    Verb("doctor", "what works here, what does not, and what to do about it", _nothing),
)


def build_parser() -> OptionParser:
    """The parser of the whole command line."""
    parser = OptionParser(
        prog="gpusched",
        allow_abbrev=False,
        description="A queue for the GPUs of this machine, shared by notebooks, terminals and "
        "scripts: each job starts the moment its GPU is free.",
    )
    parser.add_argument("--version", action="version", version=f"gpusched {__version__}")
    _add_set(parser, "set")
    commands = parser.add_subparsers(
        dest="verb", metavar="command", required=True, parser_class=OptionParser
    )
    for verb in VERBS:
        sub = commands.add_parser(
            verb.name, help=verb.help, description=f"{verb.help}.", allow_abbrev=False
        )
        verb.arguments(sub)
        _add_set(sub, "set_after")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who read us has seen enough; the interpreter must not stumble over it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    return status


def _main(argv: list[str]) -> int:
    try:
        arguments = parse(argv)
        explicit = _explicit([*(arguments.set or []), *(arguments.set_after or [])])
    except HelpShown as exc:
        return exc.status
    except UserError as exc:
        note(str(exc))
        return USAGE
    try:
        from gpusched_ipy import verbs

        return verbs.call(arguments, explicit)
    except UserError as exc:
        note(str(exc))
        return FAILED


def parse(argv: Sequence[str]) -> Arguments:
    """What was asked for.

    Raises:
        UserError: it cannot be understood.
        HelpShown: help or the version was asked for, and has been printed.
    """
    given = list(argv)
    names = {verb.name for verb in VERBS}
    verb = next((word for word in given if word in names), None)
    tail: list[str] | None = None
    if verb in ("submit", "run") and "--" in given[given.index(verb) :]:
        # Cut here by ourselves: what argparse makes of "--" differs from Python to Python.
        at = given.index("--", given.index(verb))
        given, tail = given[:at], given[at + 1 :]
    arguments = build_parser().parse_args(given)
    if verb in ("submit", "run"):
        arguments.argv = _argv(arguments, tail)
    return arguments


def _argv(arguments: Arguments, tail: list[str] | None) -> list[str]:
    words: list[str] = list(arguments.argv)
    if tail is not None:
        words = [*words, "--", *tail] if words else tail
    if arguments.shell is not None and words:
        raise UserError("--shell takes the place of a command; give one of them")
    if arguments.shell is None and not words:
        raise UserError(
            f"there is no command to run; write it after --, for example "
            f"`gpusched {arguments.verb} -- python train.py`"
        )
    return words


def _explicit(pairs: Sequence[str]) -> dict[str, object]:
    """The settings given by ``--set``, checked, so that a bad one is a fault of usage."""
    explicit: dict[str, object] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise UserError(f"--set {pair} is not of the form NAME=VALUE")
        Settings.parse(name.strip(), value)
        explicit[name.strip()] = value
    return explicit


def _add_set(parser: argparse.ArgumentParser, dest: str) -> None:
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        dest=dest,
        help="a setting, for this command only; `gpusched doctor` lists them",
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above zero")
    return int(text)
