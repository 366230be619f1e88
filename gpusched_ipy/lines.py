"""The lines of the magics, parsed: what follows ``%%gpuqueue``, ``%gpurun``, ``%gpuq`` … . Only
parsing; the options of a submit are those of :mod:`gpusched_ipy.options`, one definition for all.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from gpusched_ipy.arguments import NOTEBOOK_VERBS, VERBS, as_json, command, nothing
from gpusched_ipy.config import LOCAL, parse_seconds
from gpusched_ipy.errors import UserError
from gpusched_ipy.options import (
    CELL_OPTIONS,
    JOB_OPTIONS,
    Isolation,
    Option,
    OptionParser,
    add_job_options,
    add_options,
    checked,
    job_fields,
)

CELL_EXAMPLES = """\
    %%gpuqueue                                   runs when a GPU is free; the prompt comes back
    %%gpuqueue --priority 3 --name train         before cells of lower priority
    %%gpuqueue --wait                            holds its place: for Run All and for nbconvert
    %%gpuqueue --isolate --in data --out model   in a fresh Python; its memory is freed at its end
    %%gpuqueue --mem 8G                          shares a GPU with other jobs that say their need
    %%gpuqueue --after prep                      only once the job named prep has completed"""
RUN_EXAMPLES = """\
    %gpurun -- python train.py --lr 0.1          in its own process; outlives this notebook
    %gpurun --priority 1 --env WANDB_API_KEY -- python train.py
    %gpurun --shell "python a.py | tee a.log"    a line for /bin/sh, asked for as such"""
QUEUE_EXAMPLES = """\
    %gpuq                         what waits and what runs, and why it waits
    %gpuq list --all --json       ended jobs as well, for programs
    %gpuq show 12                 all about a job; for a cell its output once more
    %gpuq log 12 [-f]             what it has written
    %gpuq cancel 12,14-16 prep*   ids, ranges, names and patterns
    %gpuq priority 12 5           higher runs first;  %gpuq top 12 moves it to the front
    %gpuq hold 12 / release 12    keep a job from starting, let it start
    %gpuq fetch 12                the outputs of an isolated cell become variables here
    %gpuq wait [12]               wait for jobs; queued cells of this notebook run meanwhile
    %gpuq drain / resume          start nothing more, start again
    %gpuq requeue 12              run an ended job again"""

Arguments = argparse.Namespace
_SWEPT = re.compile(r"--sweep[=\s]+[\"']?([A-Za-z_]\w*)=")


def split_line(line: str) -> list[str]:
    """The words of a magic's line, quoted as in a shell.

    Raises:
        UserError: a quotation is not closed.
    """
    try:
        return shlex.split(line)
    except ValueError as exc:
        raise UserError(f"{line.strip()!r} cannot be read: {exc}".lower()) from None


def with_variables(line: str, names: Mapping[str, Any]) -> str:
    """``line`` with ``{name}`` and ``$name`` replaced as in other line magics; but the names of its
    sweep stand for the values of each job, whatever they are in the notebook."""
    from IPython.utils.text import DollarFormatter

    kept = line
    for name in _SWEPT.findall(line):
        kept = re.sub(rf"\{{+{name}\}}+", _doubled, kept)
    try:
        expanded: str = DollarFormatter().vformat(kept, args=[], kwargs=dict(names))
    except Exception:  # noqa: BLE001 - as IPython does: what cannot be formatted stays as it is
        return line
    return expanded


def _doubled(found: re.Match[str]) -> str:
    """Braces that come out of a formatter as they were."""
    return found[0].replace("{", "{{").replace("}", "}}")


def cell_parser() -> OptionParser:
    """Of ``%%gpuqueue``."""
    parser = _parser("%%gpuqueue", "Queue the cell: it runs when a GPU is free.", CELL_EXAMPLES)
    add_job_options(parser)
    add_options(parser, CELL_OPTIONS)
    return parser


def parse_cell(line: str) -> tuple[dict[str, Any], bool]:
    """The fields of a submit, and whether the cell holds its place.

    Raises:
        UserError: an option is unknown or has a bad value.
        HelpShown: help was asked for, and has been printed.
    """
    parsed = cell_parser().parse_args(split_line(line))
    return job_fields(parsed), parsed.wait


def parse_isolation(line: str, engine: str = LOCAL) -> Isolation | None:
    """What an isolated cell takes along and brings back; None: the cell runs in its kernel.

    Args:
        engine: where cells run that do not say; with an engine a cell is an isolated one.

    Raises:
        UserError, HelpShown: as in :func:`parse_cell`.
    """
    given = vars(cell_parser().parse_args(split_line(line)))
    if given["isolate"] or (given["engine"] or engine) != LOCAL:
        return Isolation(given["in"] or (), given["out"] or ())
    for name in ("in", "out"):
        if given[name]:
            raise UserError(
                f"--{name} is for isolated cells: a cell in its own kernel has its variables; "
                "add --isolate"
            )
    return None


def run_parser() -> OptionParser:
    """Of ``%gpurun``."""
    parser = _parser("%gpurun", "Queue a command.", RUN_EXAMPLES, usage="[options] -- argv…")
    command(parser)
    return parser


def parse_run(line: str) -> dict[str, Any]:
    """What ``Queue.submit`` takes for a command.

    Raises:
        UserError: there is no command, or an option is wrong.
        HelpShown: help was asked for, and has been printed.
    """
    words = split_line(line)
    at = words.index("--") if "--" in words else len(words)
    parsed, more = run_parser().parse_known_args(words[:at])
    argv = words[at + 1 :]
    if more and at == len(words) and not more[0].startswith("-"):
        raise UserError(f"write the command after --: %gpurun -- {' '.join(more)}")
    if more:
        run_parser().error(f"unrecognized arguments: {' '.join(more)}")
    if parsed.shell is not None and argv:
        raise UserError("give either --shell LINE or a command after --, not both")
    if parsed.shell is None and not argv:
        raise UserError("there is no command to run; write it after --: %gpurun -- python train.py")
    return {
        "argv": argv if parsed.shell is None else [parsed.shell],
        "shell": parsed.shell is not None,
        "cwd": parsed.cwd,
        "env": parsed.env,
        **job_fields(parsed),
    }


def parse_queue(line: str) -> tuple[str, Arguments]:
    """The verb of ``%gpuq`` and its arguments; without a verb it is ``list``.

    Raises:
        UserError: there is no such verb, or an argument is wrong.
        HelpShown: help was asked for, and has been printed.
    """
    words = split_line(line)
    if words and words[0] in ("-h", "--help"):
        print(f"%gpuq: the queue; higher priority runs first.\n\n{QUEUE_EXAMPLES}")
        words = ["list", "--help"]
    verb = words.pop(0) if words and not words[0].startswith("-") else "list"
    verbs = VERBS | NOTEBOOK_VERBS
    if verb not in verbs:
        raise UserError(f"%gpuq has no verb {verb!r}; it knows {', '.join(verbs)}")
    parser = OptionParser(prog=f"%gpuq {verb}", allow_abbrev=False)
    verbs[verb](parser)
    return verb, parser.parse_args(words)


def parse_gpus(line: str) -> Arguments:
    """The arguments of ``%gpus``.

    Raises:
        UserError, HelpShown: as in :func:`parse_queue`.
    """
    parser = _parser("%gpus", "The GPUs now.", "    %gpus\n    %gpus --json")
    as_json(parser)
    return parser.parse_args(split_line(line))


def parse_plot(line: str) -> Arguments:
    """The arguments of ``%gpuplot``.

    Raises:
        UserError, HelpShown: as in :func:`parse_queue`.
    """
    parser = _parser("%gpuplot", "A still picture of the last minutes.", "    %gpuplot --last 10m")
    parser.add_argument(
        "--last", metavar="D", type=checked(parse_seconds), default=600.0, help="e.g. 10m or 1h"
    )
    parser.add_argument("--job", metavar="ID", help="only the GPUs of that job")
    return parser.parse_args(split_line(line))


def parse_none(name: str, line: str) -> None:
    """For a magic that takes nothing.

    Raises:
        UserError, HelpShown: as in :func:`parse_queue`.
    """
    OptionParser(prog=name, allow_abbrev=False).parse_args(split_line(line))


def _parser(prog: str, what: str, examples: str, usage: str | None = None) -> OptionParser:
    return OptionParser(
        prog=prog,
        usage=f"{prog} {usage}" if usage else None,
        description=what,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def options_help(*more: Option) -> str:
    """The options of a submit, one a line, for the help of a magic."""
    rows = [
        (", ".join(option.flags) + (f" {option.metavar}" if option.metavar else ""), option.help)
        for option in [*JOB_OPTIONS, *more]
    ]
    return "\n".join(f"    {flags:<22} {text}" for flags, text in rows)


def flags_of(magic: str, verb: str | None) -> list[str]:
    """The long options that a magic takes, for completion."""
    makers: dict[str, Callable[[], OptionParser]] = {"gpuqueue": cell_parser, "gpurun": run_parser}
    if magic in makers:
        parser = makers[magic]()
    else:
        parser = OptionParser(prog=magic, allow_abbrev=False)
        if magic == "gpuq":
            (VERBS | NOTEBOOK_VERBS).get(verb or "list", nothing)(parser)
        elif magic == "gpus":
            as_json(parser)
        elif magic == "gpuplot":
            return ["--help", "--job", "--last"]
    return sorted(flag for flag in parser._option_string_actions if flag.startswith("--"))


def help_of(magic: str) -> str:
    """What ``%%gpuqueue?`` shows: the options from their one definition, and examples."""
    options = options_help(*CELL_OPTIONS)
    texts = {
        "gpuqueue": f"""%%gpuqueue [options]

Queue the cell below: it runs on this kernel, with its variables, when a GPU is free. The prompt
comes back at once; a line under the cell says how the job stands, and its output appears there.
Higher priority runs first.

Options:
{options}

Examples:
{CELL_EXAMPLES}
""",
        "gpurun": f"""%gpurun [options] -- argv...

Queue a command: it runs in a process of its own, sees its GPUs only, and outlives this notebook.

Options:
{options_help()}
    --cwd DIR              where it runs
    --env NAME[=VALUE]     a variable for it
    --shell LINE           a line for /bin/sh in place of a command

Examples:
{RUN_EXAMPLES}
""",
        "gpuq": f"""%gpuq [verb] [arguments]

The queue, shared by all notebooks, terminals and scripts of this user.

Examples:
{QUEUE_EXAMPLES}
""",
        "gpus": "%gpus [--json]\n\nThe GPUs now: utilization, memory, temperature, processes.\n",
        "gpupanel": "%gpupanel\n\nThe live panel: each GPU's usage, and the queue with buttons.\n",
        "gpuplot": "%gpuplot [--last 10m] [--job ID]\n\nA still picture of the last minutes.\n",
        "gpufree": "%gpufree\n\nGive cached GPU memory of this kernel's frameworks back.\n",
    }
    return texts[magic]
