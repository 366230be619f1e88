"""What ``%load_ext`` adds to a shell, and how it is taken out again without a trace.

It imports nothing heavy: the queue is opened when a magic first needs it.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpusched_ipy.cellwatch import CellWatch

if TYPE_CHECKING:
    from gpusched_ipy.cellqueue import Asked
    from gpusched_ipy.config import Settings
    from gpusched_ipy.frontend import FrontEnd
    from gpusched_ipy.job import Job
    from gpusched_ipy.kernel import KernelSession

_log = logging.getLogger(__name__)
_MAGIC = "%%gpuqueue"  # every cell passes by here: nothing is loaded for those without it
_PARKED = "_gpusched_parked"  # a session whose cells wait until the extension is loaded again


class Extension:
    """The state of the extension in one shell.

    Args:
        settings: gives those in force now.
    """

    def __init__(self, shell: Any, settings: Callable[[], Settings]) -> None:
        self.shell = shell
        self.watch = CellWatch()
        self._settings = settings
        self._front: FrontEnd | None = None
        self._session: KernelSession | None = None
        self._pid = os.getpid()
        self.magics: Any = None  # the object that the shell knows

    def attach(self) -> None:
        """Put the hooks in; go on with cells that an unload has left waiting."""
        self.shell.input_transformers_cleanup.insert(0, self.transform)
        self.watch.register(self.shell.events)
        if self.shell.Completer is not None:
            self.shell.Completer.custom_matchers.append(self._matcher())
        atexit.register(self._at_exit)
        parked = self.shell.__dict__.pop(_PARKED, None)
        if parked is not None:
            parked.unpark(self.watch, self._settings())
            self._session = parked

    def detach(self) -> None:
        """Take the hooks out, stop every thread; cells that wait are kept for the next load."""
        if self.transform in self.shell.input_transformers_cleanup:
            self.shell.input_transformers_cleanup.remove(self.transform)
        self.watch.unregister(self.shell.events)
        if self.shell.Completer is not None:
            matchers = self.shell.Completer.custom_matchers
            matchers[:] = [item for item in matchers if getattr(item, "owner", None) is not self]
        atexit.unregister(self._at_exit)
        session, self._session = self._session, None
        if session is None:
            return
        waiting = len(session.open_cells)
        if waiting or session.allocations.open:
            session.park()
            setattr(self.shell, _PARKED, session)
        else:
            session.close()
        if waiting:
            cells = "1 queued cell" if waiting == 1 else f"{waiting} queued cells"
            wait = "waits" if waiting == 1 else "wait"
            self.front.tell(
                f"gpuqueue: {cells} of this notebook {wait} until gpusched_ipy is loaded again"
            )

    @property
    def front(self) -> FrontEnd:
        """The IPython around us."""
        if self._front is None:
            from gpusched_ipy.frontend import FrontEnd

            self._front = FrontEnd(self.shell)
        return self._front

    @property
    def session(self) -> KernelSession:
        """This kernel in the queue, opened when first used.

        Raises:
            UserError: the state directory, the record or a setting cannot be used.
        """
        if self._session is None:
            from gpusched_ipy.kernel import KernelSession

            self._session = KernelSession(self.front, self.watch, self._settings())
        return self._session

    def reconfigure(self) -> None:
        """A setting has changed."""
        settings = self._settings()
        if self._session is not None:
            self._session.reconfigure(settings)
        elif settings.warn_unqueued:
            _ = self.session  # it has to watch from now on

    # -- cells

    def transform(self, lines: list[str]) -> list[str]:
        """Give IPython the body of a queued cell whose turn it is, or one that holds its place."""
        if not any(line.startswith(_MAGIC) for line in lines):
            return lines
        from gpusched_ipy import cellsyntax
        from gpusched_ipy.frontend import MARK

        found = cellsyntax.split(lines)
        if found is None:
            return lines
        place, line = found
        mark = self.front.parent.get("metadata", {}).get(MARK)
        if mark is not None:
            begins = self.session.begin_marked(mark, "".join(lines))
            if begins is not None:
                return self._body(lines, place) if begins else []
        if not "".join(lines[place + 1 :]).strip():
            # IPython's own complaint about an empty body would say nothing of queues.
            return [f"get_ipython().run_cell_magic('gpuqueue', {line!r}, '\\n')\n"]
        if not self._holds_place(line):
            return lines  # the cell magic of that name queues it
        if self._several(line):
            # Its body is not this cell's: it runs once for each value, or not again.
            return [f"get_ipython()._gpusched.run_several({line!r})\n"]
        gate = f"get_ipython()._gpusched.hold_place({line!r})"
        return cellsyntax.with_gate(self._body(lines, place), place, gate)

    # A terminal asks of what is typed whether it is a whole cell: that must not begin one, and a
    # cell magic must still look like one.
    transform.has_side_effects = True  # type: ignore[attr-defined]

    def hold_place(self, line: str) -> None:
        """The statement in front of the body of a cell that holds its place.

        Raises:
            UserError: it cannot be queued, or it was cancelled while it waited.
        """
        self.session.cells.hold_place(self._asked_here(line))

    def run_several(self, line: str) -> None:
        """What stands for a cell that holds its place and is a sweep, or has a key.

        Raises:
            UserError: it cannot be queued, or some of it has not completed.
        """
        self.session.cells.run_several(self._asked_here(line), line)

    def defer(self, line: str, body: str) -> Job | None:
        """Queue the running cell to run later.

        Args:
            line: of the magic; IPython has put the values of variables into it.

        Raises:
            UserError: it cannot be; nothing is queued.
            HelpShown: help was asked for, and has been printed.
        """
        from gpusched_ipy.errors import UserError

        asked, wait = self._asked(line, body)
        if not body.strip():
            raise UserError("the cell is empty: write what is to run below %%gpuqueue")
        if asked.fields.get("dry_run"):
            self.session.cells.preview(asked)
            return None
        if asked.isolation is not None:
            return self.session.cells.isolate(asked, line, wait=self._waits(wait))
        if wait or self._settings().wait or not self.front.can_defer:
            raise UserError(
                "a cell that holds its place must begin with %%gpuqueue; here it stands inside "
                "something else"
            )
        if asked.fields.get("sweep") or asked.fields.get("key"):
            return self.session.cells.defer_several(asked, line)
        return self.session.cells.defer(asked, line)

    def _asked_here(self, line: str) -> Asked:
        """What the running cell asks for, whose first line stands in it as it was typed."""
        from gpusched_ipy import cellsyntax

        sent = str(self.front.parent.get("content", {}).get("code", ""))
        lines = sent.splitlines(keepends=True)
        found = cellsyntax.split(lines)
        body = "".join(lines[found[0] + 1 :]) if found else ""
        return self._asked(self.shell.var_expand(line), body)[0]

    def _asked(self, line: str, body: str) -> tuple[Asked, bool]:
        from gpusched_ipy.cellqueue import Asked
        from gpusched_ipy.lines import parse_cell, parse_isolation

        fields, wait = parse_cell(line)
        return Asked(fields, body, parse_isolation(line, self._settings().engine)), wait

    def _waits(self, asked: bool) -> bool:
        return asked or not self.front.can_defer or self._settings().wait

    def _holds_place(self, line: str) -> bool:
        """Whether a cell waits where it stands; a line that cannot be read is left to the magic."""
        from gpusched_ipy.errors import UserError
        from gpusched_ipy.lines import split_line

        try:
            words = split_line(self.shell.var_expand(line))
            known = "--help" not in words and "-h" not in words
            # One that runs elsewhere needs no gate: its magic waits for it.
            elsewhere = "--isolate" in words or "--dry-run" in words
            held = not elsewhere and self._waits("--wait" in words)
        except UserError:
            return False
        return known and held

    def _several(self, line: str) -> bool:
        """Whether the cell may run more or fewer times than once."""
        from gpusched_ipy.lines import split_line

        words = split_line(self.shell.var_expand(line))
        return any(word.partition("=")[0] in ("--sweep", "--key") for word in words)

    def _body(self, lines: list[str], place: int) -> list[str]:
        from gpusched_ipy import cellsyntax

        manager = self.shell.input_transformer_manager
        others = [item for item in manager.cleanup_transforms if item != self.transform]
        return cellsyntax.body_of(lines, place, [*others, *manager.line_transforms])

    # -- completion

    def _matcher(self) -> Any:
        from IPython.core.completer import SimpleCompletion, context_matcher

        @context_matcher(identifier="gpusched_ipy")
        def matcher(context: Any) -> Any:
            from gpusched_ipy.completion import answer, candidates
            from gpusched_ipy.errors import UserError

            line = context.line_with_cursor[: len(context.text_until_cursor.rpartition("\n")[2])]
            try:
                texts = candidates(line, lambda ended: self.session.queue.list(all=ended))
            except UserError as exc:
                _log.debug("no completion: %s", exc)
                texts = None
            return answer(texts, SimpleCompletion)

        matcher.owner = self
        return matcher

    def _at_exit(self) -> None:
        # A forked child that ends in the ordinary way must not leave in its parent's name.
        if self._session is not None and self._pid == os.getpid():
            from gpusched_ipy.errors import GpuSchedError

            try:
                self._session.close()
            except GpuSchedError as exc:
                _log.error("the queue could not be left: %s", exc)
