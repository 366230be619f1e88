"""What each magic does with its line: parse it, and hand over. Loaded with the first of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpusched_ipy.extension import Extension
from gpusched_ipy.lines import (
    cell_parser,
    parse_gpus,
    parse_none,
    parse_plot,
    parse_run,
    with_variables,
)
from gpusched_ipy.notebook import Notebook
from gpusched_ipy.options import HelpShown


def answer(extension: Extension, magic: str, line: str, *more: Any) -> Any:
    """Do what the magic of that name does.

    Args:
        more: the body of a cell, or the variables around the line.

    Raises:
        UserError: the line cannot be understood, or what it asks for cannot be done.
    """
    try:
        return _ANSWERS[magic](extension, line, *more)
    except HelpShown:  # by ``--help``: it has been printed, and nothing else is to be done
        return None


def _gpuqueue(extension: Extension, line: str, cell: str | None) -> None:
    if cell is None:
        cell_parser().print_help()
    else:
        extension.entry.defer(line, cell)


def _gpurun(extension: Extension, line: str, local_ns: dict[str, Any] | None) -> None:
    names = {**extension.shell.user_ns, **(local_ns or {})}
    run = parse_run(with_variables(line, names))
    Notebook(extension.session).run(run)


def _gpuq(extension: Extension, line: str) -> None:
    Notebook(extension.session).queue(line)


def _gpus(extension: Extension, line: str) -> None:
    asked = parse_gpus(line)
    Notebook(extension.session).gpus(asked)


def _gpupanel(extension: Extension, line: str) -> Any:
    parse_none("%gpupanel", line)
    return Notebook(extension.session).panel()


def _gpuplot(extension: Extension, line: str) -> Any:
    asked = parse_plot(line)
    return Notebook(extension.session).plot(asked)


def _gpufree(extension: Extension, line: str) -> None:
    parse_none("%gpufree", line)
    Notebook(extension.session).free()


_ANSWERS: dict[str, Callable[..., Any]] = {
    "gpuqueue": _gpuqueue,
    "gpurun": _gpurun,
    "gpuq": _gpuq,
    "gpus": _gpus,
    "gpupanel": _gpupanel,
    "gpuplot": _gpuplot,
    "gpufree": _gpufree,
}
