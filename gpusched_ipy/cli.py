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

from gpusched_ipy import arguments
from gpusched_ipy._version import __version__
from gpusched_ipy.config import Settings, parse_seconds
from gpusched_ipy.errors import UserError
from gpusched_ipy.options import HelpShown, OptionParser, checked
from gpusched_ipy.terminal import DONE, FAILED, INTERRUPTED, USAGE, note

Arguments = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Verb:
    """One command of the terminal: its help, its arguments, and the function of ``verbs``."""

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]


def _command(parser: argparse.ArgumentParser) -> None:
    arguments.command(parser)
    parser.add_argument("argv", metavar="-- argv", nargs=argparse.REMAINDER, help="the command")


def _submit(parser: argparse.ArgumentParser) -> None:
    arguments.as_json(parser)
    _command(parser)


def _gpus(parser: argparse.ArgumentParser) -> None:
    arguments.as_json(parser)
    parser.add_argument("--watch", action="store_true", help="again and again, until interrupted")
    parser.add_argument(
        "--interval",
        metavar="D",
        type=checked(parse_seconds),
        help="of --watch (default: sample_interval_s)",
    )


def _agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("run", "status", "stop"), help="run: in the foreground")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fix",
        action="store_true",
        help="set a damaged record aside, as queue.db.corrupt-<time>, and save every sound job",
    )


def _purge(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--older-than",
        metavar="D",
        type=checked(parse_seconds),
        help="forget jobs that ended so long ago (default: the setting keep_days)",
    )
    which.add_argument("--all", action="store_true", help="forget every ended job")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="a new file (default: stdout)")


def _admin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("init",), help="make the shared locks; again at each boot")
    parser.add_argument(
        "--lock-dir", metavar="DIR", help="where (default: /run/gpusched, which all users find)"
    )


VERBS = (
    Verb("submit", "queue a command; prints its id alone, of a sweep one a line", _submit),
    Verb("run", "wait for a turn, then run a command here, with this terminal", _command),
    Verb("list", "the queue", arguments.VERBS["list"]),
    Verb("show", "everything about one job", arguments.VERBS["show"]),
    Verb("log", "what a job has written", arguments.VERBS["log"]),
    Verb(
        "cancel",
        "cancel jobs; running ones are interrupted, terminated, killed",
        arguments.VERBS["cancel"],
    ),
    Verb("hold", "keep pending jobs from starting", arguments.VERBS["hold"]),
    Verb("release", "let held jobs start", arguments.VERBS["release"]),
    Verb("priority", "give jobs another priority; higher runs first", arguments.VERBS["priority"]),
    Verb("top", "move a job to the front", arguments.VERBS["top"]),
    Verb("wait", "wait until jobs have ended; ends with their status", arguments.VERBS["wait"]),
    Verb("requeue", "run ended jobs again", arguments.VERBS["requeue"]),
    Verb("drain", "start nothing more; what runs goes on", arguments.VERBS["drain"]),
    Verb("resume", "start jobs again after drain", arguments.VERBS["resume"]),
    Verb("history", "what the jobs that have ended came to and cost", arguments.VERBS["history"]),
    Verb("stats", "how much of the GPUs the jobs have used", arguments.VERBS["stats"]),
    Verb("gpus", "the GPUs now", _gpus),
    Verb("watch", "GPUs and queue as a live screen, steered by keys", arguments.nothing),
    Verb("engines", "where jobs can run", arguments.as_json),
    Verb("agent", "the process that starts commands while no notebook is open", _agent),
    Verb("doctor", "what works here, what does not, and what to do about it", _doctor),
    Verb("purge", "forget old jobs and remove their logs", _purge),
    Verb("export", "the jobs that have ended, as JSON lines", _export),
    Verb("admin", "for root: GPU locks and turns that all users of this machine share", _admin),
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
    _mend_streams()
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who read us has seen enough; the interpreter must not stumble over it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as exc:
        note(f"the output cannot be written: {exc.strerror or exc}")
        return FAILED
    return status


def _mend_streams() -> None:
    """Whatever a job is called can be written; where a stream is closed it goes nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _main(argv: list[str]) -> int:
    try:
        asked = parse(argv)
        explicit = _explicit([*(asked.set or []), *(asked.set_after or [])])
    except HelpShown as exc:
        return exc.status
    except UserError as exc:
        note(str(exc))
        return USAGE
    try:
        from gpusched_ipy import verbs

        return verbs.call(asked, explicit)
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
    asked = build_parser().parse_args(given)
    if verb in ("submit", "run"):
        asked.argv = _argv(asked, tail)
    return asked


def _argv(asked: Arguments, tail: list[str] | None) -> list[str]:
    words: list[str] = list(asked.argv)
    if tail is not None:
        words = [*words, "--", *tail] if words else tail
    if asked.shell is not None and words:
        raise UserError("--shell takes the place of a command; give one of them")
    if asked.shell is None and not words:
        raise UserError(
            f"there is no command to run; write it after --, for example "
            f"`gpusched {asked.verb} -- python train.py`"
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
