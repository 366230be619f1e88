"""How a cell that begins with ``%%gpuqueue`` gets into the queue: what its text becomes before
IPython runs it, and what its first line asks for. Loaded with the first such cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gpusched_ipy import cellsyntax
from gpusched_ipy.cellqueue import Asked
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import MARK
from gpusched_ipy.lines import parse_cell, parse_isolation, split_line

if TYPE_CHECKING:
    from gpusched_ipy.config import Settings
    from gpusched_ipy.extension import Extension
    from gpusched_ipy.job import Job


class CellEntry:
    """The way of one shell's cells into the queue.

    Args:
        settings: gives those in force now.
    """

    def __init__(self, extension: Extension, settings: Callable[[], Settings]) -> None:
        self._extension = extension
        self._settings = settings

    def rewritten(self, lines: list[str]) -> list[str]:
        """What IPython is to run for a cell in which some line begins with the magic."""
        found = cellsyntax.split(lines)
        if found is None:
            return lines
        place, line = found
        mark = self._extension.front.parent.get("metadata", {}).get(MARK)
        if mark is not None:
            begins = self._extension.session.begin_marked(mark, "".join(lines))
            if begins is not None:
                return self._body(lines, place) if begins else []
        if not "".join(lines[place + 1 :]).strip():
            # IPython's own complaint about an empty body would say nothing of queues.
            return [f"get_ipython().run_cell_magic('gpuqueue', {line!r}, '\\n')\n"]
        if not self._holds_place(line):
            return lines  # the cell magic of that name queues it
        if self._several(line):
            # Its body is not this cell's: it runs once for each value, or not again.
            return [f"get_ipython()._gpusched.entry.run_several({line!r})\n"]
        gate = f"get_ipython()._gpusched.entry.hold_place({line!r})"
        return cellsyntax.with_gate(self._body(lines, place), place, gate)

    def hold_place(self, line: str) -> None:
        """The statement in front of the body of a cell that holds its place.

        Raises:
            UserError: it cannot be queued, or it was cancelled while it waited.
        """
        self._extension.session.cells.hold_place(self._asked_here(line))

    def run_several(self, line: str) -> None:
        """What stands for a cell that holds its place and is a sweep, or has a key.

        Raises:
            UserError: it cannot be queued, or some of it has not completed.
        """
        self._extension.session.cells.run_several(self._asked_here(line), line)

    def defer(self, line: str, body: str) -> Job | None:
        """Queue the running cell to run later.

        Args:
            line: of the magic; IPython has put the values of variables into it.

        Raises:
            UserError: it cannot be; nothing is queued.
            HelpShown: help was asked for, and has been printed.
        """
        asked, wait = self._asked(line, body)
        if not body.strip():
            raise UserError("the cell is empty: write what is to run below %%gpuqueue")
        if asked.fields.get("dry_run"):
            self._extension.session.cells.preview(asked)
            return None
        if asked.isolation is not None:
            return self._extension.session.cells.isolate(asked, line, wait=self._waits(wait))
        if wait or self._settings().wait or not self._extension.front.can_defer:
            raise UserError(
                "a cell that holds its place must begin with %%gpuqueue; here it stands inside "
                "something else"
            )
        if asked.fields.get("sweep") or asked.fields.get("key"):
            return self._extension.session.cells.defer_several(asked, line)
        return self._extension.session.cells.defer(asked, line)

    def _asked_here(self, line: str) -> Asked:
        """What the running cell asks for, whose first line stands in it as it was typed."""
        sent = str(self._extension.front.parent.get("content", {}).get("code", ""))
        lines = sent.splitlines(keepends=True)
        found = cellsyntax.split(lines)
        body = "".join(lines[found[0] + 1 :]) if found else ""
        return self._asked(self._extension.shell.var_expand(line), body)[0]

    def _asked(self, line: str, body: str) -> tuple[Asked, bool]:
        fields, wait = parse_cell(line)
        return Asked(fields, body, parse_isolation(line, self._settings().engine)), wait

    def _waits(self, asked: bool) -> bool:
        return asked or not self._extension.front.can_defer or self._settings().wait

    def _holds_place(self, line: str) -> bool:
        """Whether a cell waits where it stands; a line that cannot be read is left to the magic."""
        try:
            words = split_line(self._extension.shell.var_expand(line))
            known = "--help" not in words and "-h" not in words
            # One that runs elsewhere needs no gate: its magic waits for it.
            elsewhere = "--isolate" in words or "--dry-run" in words
            held = not elsewhere and self._waits("--wait" in words)
        except UserError:
            return False
        return known and held

    def _several(self, line: str) -> bool:
        """Whether the cell may run more or fewer times than once."""
        words = split_line(self._extension.shell.var_expand(line))
        return any(word.partition("=")[0] in ("--sweep", "--key") for word in words)

    def _body(self, lines: list[str], place: int) -> list[str]:
        manager = self._extension.shell.input_transformer_manager
        others = [item for item in manager.cleanup_transforms if item != self._extension.transform]
        return cellsyntax.body_of(lines, place, [*others, *manager.line_transforms])
