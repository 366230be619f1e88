"""Text for a terminal: tables, and the output of jobs made safe. It decides nothing.

On a terminal tables are drawn by rich; into a pipe go plain columns. Every string in a row has been
cleaned already; the raw bytes of a log are made safe here.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from gpusched_ipy.text import clean

Cell = str | Sequence[str]

# Exit statuses of every verb but `wait` and `run`, which end with the job's own.
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# What a log may send to a terminal: text, line ends, tabs, and colours (SGR, ECMA-48 8.3.117).
_ALLOWED = re.compile(r"\x1b\[[0-9;:]*m|[\n\r\t]")
# Such a sequence may be cut in two by the end of a chunk.
_CUT = re.compile(r"\x1b(?:\[[0-9;:]{0,32})?\Z")


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at what is written there."""
    return stream.isatty()


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Write a table to stdout; a cell that is a sequence of strings has one line for each."""
    if is_terminal(sys.stdout):
        _show_rich(columns, list(rows))
    else:
        for line in plain_table(columns, rows):
            print(line)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> list[str]:
    """The lines of a table in plain columns, two blanks apart."""
    lines: list[list[str]] = [list(columns)]
    for row in rows:
        cells = [[cell] if isinstance(cell, str) else list(cell) or [""] for cell in row]
        height = max(len(cell) for cell in cells)
        lines += [[cell[at] if at < len(cell) else "" for cell in cells] for at in range(height)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


# Columns that a narrower terminal (in characters) does not show, and those that are not folded.
_LEAST_WIDTH = {"owner": 90, "since": 70, "GPU": 60, "priority": 50}
_WHOLE = frozenset({"id", "state"})


def _show_rich(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = [at for at, name in enumerate(columns) if console.width >= _LEAST_WIDTH.get(name, 0)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (columns[at] for at in shown):
        table.add_column(name, overflow="fold", no_wrap=name in _WHOLE)
    for row in rows:
        cells = (row[at] for at in shown)
        # Text, not str: nothing in a name is markup.
        table.add_row(*(Text(cell if isinstance(cell, str) else "\n".join(cell)) for cell in cells))
    console.print(table)


def note(text: str) -> None:
    """One line for people, on stderr."""
    print(f"gpusched: {clean(text)}", file=sys.stderr, flush=True)


class LogWriter:
    """Writes the bytes of a log to stdout: as they are into a pipe, made safe on a terminal."""

    def __init__(self) -> None:
        self._text = SafeText() if is_terminal(sys.stdout) else None

    def write(self, chunk: bytes) -> None:
        """Write the next bytes."""
        if self._text is not None:
            sys.stdout.write(self._text.more(chunk))
            sys.stdout.flush()
            return
        sys.stdout.flush()
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()

    def close(self) -> None:
        """Write what was held back, and leave no colour behind."""
        if self._text is not None:
            sys.stdout.write(f"{self._text.rest()}\x1b[0m")
            sys.stdout.flush()


class SafeText:
    """The bytes of a log as :func:`safe_text`, wherever a piece of it was cut off."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def more(self, chunk: bytes) -> str:
        """The text of the next bytes; a begun character or colour is held back."""
        text = self._held + self._decoder.decode(chunk)
        cut = _CUT.search(text)
        self._held = text[cut.start() :] if cut else ""
        return safe_text(text[: cut.start()] if cut else text)

    def rest(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return safe_text(held + self._decoder.decode(b"", final=True))


def safe_text(text: str) -> str:
    """``text`` with its lines, tabs and colours; every other control becomes visible."""
    parts: list[str] = []
    at = 0
    for found in _ALLOWED.finditer(text):
        parts += [clean(text[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*parts, clean(text[at:])])
