"""``%%gpuqueue`` as text: found in the first line of a cell, and turned into a cell that holds its
place. Pure: lines in, lines out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

NAME = "%%gpuqueue"
_FUTURE = re.compile(r"from\s+__future__\s+import\s+[\w\s,]+?\s*(#.*)?$")

Transform = Callable[[list[str]], list[str]]


def split(lines: Sequence[str]) -> tuple[int, str] | None:
    """Where the magic stands and what its line says; None: the cell is not ours."""
    for place, line in enumerate(lines):
        if line.startswith(NAME):
            rest = line[len(NAME) :]
            return (place, rest.strip()) if not rest or rest[0].isspace() else None
        if line.strip():
            return None
    return None


def body_of(lines: Sequence[str], place: int, others: Sequence[Transform]) -> list[str]:
    """The body as IPython would read it as a cell; the magic is a comment, and each line of the
    body stands where it stood.

    Args:
        lines: the cell.
        place: of the magic.
        others: what IPython would have done if the body had been the cell: take prompts and
            indentation away, find a cell magic of its own.
    """
    body = list(lines[place + 1 :])
    blank = 0
    while blank < len(body) and not body[blank].strip():
        blank += 1
    rest = body[blank:]
    for transform in others:
        rest = transform(rest)
    # IPython drops empty lines at the top, and with them every line number.
    above = ["#\n"] * place + [f"# {lines[place].strip()}\n"]
    return above + ["\n"] * blank + rest


def with_gate(lines: list[str], place: int, gate: str) -> list[str]:
    """The outcome of :func:`body_of` with the statement ``gate`` in place of the comment.

    Imports from ``__future__`` must come first in a cell: there the gate stands behind the last.
    """
    last = None
    for number, line in enumerate(lines):
        if _FUTURE.match(line.strip()):
            last = number
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    out = list(lines)
    if last is None:
        out[place] = f"{gate}\n"
    else:
        out[last] = f"{out[last].split('#')[0].rstrip()}; {gate}\n"
    return out


def source(sent: str, line: str, body: str) -> str:
    """The cell that queued ``body`` as it stands in the notebook, so that line numbers are right.

    Args:
        sent: the request that is being executed; it may hold more than the magic.
        line: what the magic's line says.
    """
    lines = sent.splitlines(keepends=True)
    found = split(lines)
    if found is not None and "".join(lines[found[0] + 1 :]).rstrip("\n") == body.rstrip("\n"):
        return sent
    return f"{NAME} {line}\n{body}"
