"""Completion in the lines of the magics: options, verbs, ids and names of jobs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job

_log = logging.getLogger(__name__)
_LINE = re.compile(r"\s*%{1,2}(gpuqueue|gpurun|gpuq|gpus|gpuplot)(\s.*)$", re.DOTALL)
# Verbs and options that name jobs, and which jobs can be meant.
_ENDED_TOO = frozenset({"show", "log", "requeue", "fetch"})
_NAMING = frozenset({"cancel", "hold", "release", "priority", "top", "wait"}) | _ENDED_TOO
_AFTER = ("--after", "--after-any", "--job")


def candidates(line: str, jobs: Callable[[bool], list[Job]]) -> list[str] | None:
    """What may stand at the end of ``line``; None: it is no line of ours.

    Args:
        line: up to the cursor.
        jobs: gives the jobs, ended ones too when asked with True.
    """
    found = _LINE.match(line)
    if found is None or re.search(r"\s--\s", found[2]):
        return None
    magic, words = found[1], found[2].split()
    begun = "" if found[2][-1].isspace() else words.pop()
    return [item for item in _all(magic, words, begun, jobs) if item.startswith(begun)]


def _all(magic: str, words: list[str], begun: str, jobs: Callable[[bool], list[Job]]) -> list[str]:
    from gpusched_ipy.arguments import NOTEBOOK_VERBS, VERBS
    from gpusched_ipy.lines import flags_of

    verb = words[0] if words else None
    if begun.startswith("-"):
        return flags_of(magic, verb)
    if words and words[-1] in _AFTER:
        return _named(jobs(True))
    if magic == "gpuq" and verb is None:
        return sorted(VERBS | NOTEBOOK_VERBS)
    if magic == "gpuq" and verb in _NAMING:
        return _named(jobs(verb in _ENDED_TOO))
    return flags_of(magic, verb) if not begun else []


def _named(jobs: list[Job]) -> list[str]:
    """Names first, then ids, the newest first."""
    names = dict.fromkeys(job.name for job in reversed(jobs) if " " not in job.name)
    return [*names, *(str(job.id) for job in reversed(jobs))]


def answer(context: Any, jobs: Callable[[bool], list[Job]]) -> dict[str, Any]:
    """What IPython's completer takes: nothing else is offered where the line is ours."""
    from IPython.core.completer import SimpleCompletion

    line = context.line_with_cursor[: len(context.text_until_cursor.rpartition("\n")[2])]
    try:
        texts = candidates(line, jobs)
    except UserError as exc:
        _log.debug("no completion: %s", exc)
        texts = None
    completions = [SimpleCompletion(text=text, type="param") for text in texts or ()]
    # For a line of ours without anything to offer, the others' offers are better than none.
    return {"completions": completions, "suppress": bool(completions)}
