"""The documentation is complete and true: nothing a user can type or set is missing from it."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from gpusched_ipy import __version__, cli, lines
from gpusched_ipy.config import BACKENDS, Settings
from gpusched_ipy.job import JobState
from gpusched_ipy.options import JOB_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def section(title: str) -> str:
    """The text of one section of the README."""
    _, found, rest = README.partition(f"\n## {title}\n")
    assert found, f"the README has no section {title!r}"
    return rest.partition("\n## ")[0]


def cells(title: str) -> list[list[str]]:
    """The rows of the table in a section."""
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    (commands,) = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(commands.choices)


def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings


@pytest.mark.parametrize("name", Settings.names())
def test_each_setting_is_documented_with_its_default(name: str) -> None:
    rows = {row[0].strip("`"): row for row in cells("Settings")}
    assert name in rows
    (field,) = [item for item in fields(Settings) if item.name == name]
    shown, default = rows[name][1], field.metadata["shown"]
    if isinstance(default, bool):
        assert shown == f"`{str(default).lower()}`"
    elif default is None or name == "ignore_processes":
        assert "`" not in shown, "it has no value to be quoted"
    else:
        assert shown == f"`{default}`"


def test_no_setting_is_documented_that_is_not_there() -> None:
    assert {row[0].strip("`") for row in cells("Settings")} == set(Settings.names())


def test_each_option_of_a_job_is_documented() -> None:
    listed = " ".join(row[0] for row in cells("Options of a job"))
    documented = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", listed))
    assert documented == {flag for option in JOB_OPTIONS for flag in option.flags}


@pytest.mark.parametrize("verb", [verb.name for verb in cli.VERBS])
def test_each_command_and_its_options_are_documented(verb: str) -> None:
    rows = cells("Terminal")
    named = [row for row in rows if re.search(rf"`{verb}\b", row[0])]
    assert named, f"gpusched {verb} is not in the table"
    shared = {flag for option in JOB_OPTIONS for flag in option.flags} | {"-h", "--help", "--set"}
    text = " ".join(cell for row in named for cell in row)
    if verb == "run":  # its options are those of submit
        shared |= {"--cwd", "--env", "--shell"}
    for flag in set(flags(verb_parsers()[verb])) - shared:
        assert f"`{flag}" in text, f"{flag} of gpusched {verb} is not in the table"


def test_the_table_names_no_command_that_is_not_there() -> None:
    named = {
        found.split()[0] for row in cells("Terminal") for found in re.findall(r"`([^`]+)`", row[0])
    }
    assert named == {verb.name for verb in cli.VERBS}


def test_global_options_are_documented() -> None:
    for flag in flags(cli.build_parser()):
        assert flag == "-h" or f"`{flag}" in section("Terminal"), flag


def test_each_magic_is_documented() -> None:
    from gpusched_ipy.magics import GpuQueue

    magics = set(GpuQueue.magics["line"]) | set(GpuQueue.magics["cell"])
    named = {re.match(r"`%+(\w+)", row[0]) for row in cells("Magics")}
    assert {found[1] for found in named if found} == magics


@pytest.mark.parametrize("magic", ["gpuqueue", "gpurun", "gpus", "gpuplot"])
def test_each_option_of_a_magic_is_documented(magic: str) -> None:
    (row,) = [row for row in cells("Magics") if re.match(rf"`%+{magic}\b", row[0])]
    shared = {flag for option in JOB_OPTIONS for flag in option.flags} | {"--help"}
    for flag in set(lines.flags_of(magic, None)) - shared:
        assert f"`{flag}" in row[1], f"{flag} of {magic} is not in the table"


def test_the_verbs_of_the_notebook_are_those_of_the_terminal() -> None:
    assert set(lines.VERBS) <= {verb.name for verb in cli.VERBS}


def test_each_backend_and_state_is_named() -> None:
    settings = section("Settings")
    assert all(f"`{name}`" in settings for name in BACKENDS)
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert all(str(state) in glossary for state in JobState)


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    told = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.join(shlex.split(line, comments=True)) for line in told]


def test_the_commands_of_the_readme_can_be_typed() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert len(commands()) >= 8
    for command in commands():
        words = shlex.split(command)
        for part in " ".join(words).split(" && "):
            program = part.split()[0]
            if program == "make":
                assert part.split()[1] in targets, part
            else:
                assert program == "gpusched", part
        if words[0] == "gpusched" and "&&" not in words:
            cli.parse(words[1:])


def test_the_cell_magics_of_the_readme_can_be_typed() -> None:
    told = re.findall(r"^(%%?gpu\w+)(.*)$", README, re.MULTILINE)
    assert {name for name, _ in told} >= {"%%gpuqueue", "%gpurun", "%gpuq", "%gpus", "%gpupanel"}
    parsers = {"%%gpuqueue": lines.parse_cell, "%gpurun": lines.parse_run}
    for name, line in told:
        if name in parsers:
            parsers[name](line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased" or versions[0] == __version__
    assert len(versions) == len(set(versions))


def test_decisions_are_numbered_without_gaps() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [int(page.name[:4]) for page in pages]
    assert numbers == list(range(1, len(numbers) + 1))
