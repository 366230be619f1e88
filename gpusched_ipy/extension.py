"""What ``%load_ext`` adds to a shell; :mod:`~gpusched_ipy.unloading` takes it out again.

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
    from gpusched_ipy.cellentry import CellEntry
    from gpusched_ipy.config import Settings
    from gpusched_ipy.frontend import FrontEnd
    from gpusched_ipy.kernel import KernelSession

_log = logging.getLogger(__name__)
_MAGIC = "%%gpuqueue"  # every cell passes by here: nothing is loaded for those without it
PARKED = "_gpusched_parked"  # of a shell: a session whose cells wait for the next load


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
        parked = self.shell.__dict__.pop(PARKED, None)
        if parked is not None:
            parked.unpark(self.watch, self._settings())
            self._session = parked
        elif self.front.notebook is not None:
            self.front.on_main(self._go_on)

    def _go_on(self) -> None:
        """After the cell that loads us: what an earlier kernel has sent off is shown on."""
        from gpusched_ipy import awaynotes
        from gpusched_ipy.errors import GpuSchedError
        from gpusched_ipy.statedir import usual_root

        if self._session is not None or self.front.notebook is None:
            return
        try:
            if awaynotes.found(usual_root(self._settings()), self.front.notebook):
                _ = self.session
        except GpuSchedError as exc:
            self.front.tell(f"gpuqueue: {exc}")

    def detach(self) -> KernelSession | None:
        """Take the hooks out again; a session that was open is the caller's to end."""
        if self.transform in self.shell.input_transformers_cleanup:
            self.shell.input_transformers_cleanup.remove(self.transform)
        self.watch.unregister(self.shell.events)
        if self.shell.Completer is not None:
            matchers = self.shell.Completer.custom_matchers
            matchers[:] = [item for item in matchers if getattr(item, "owner", None) is not self]
        atexit.unregister(self._at_exit)
        session, self._session = self._session, None
        return session

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

    @property
    def entry(self) -> CellEntry:
        """The way of this shell's cells into the queue."""
        from gpusched_ipy.cellentry import CellEntry

        return CellEntry(self, self._settings)

    def transform(self, lines: list[str]) -> list[str]:
        """Give IPython the body of a queued cell whose turn it is, or one that holds its place."""
        if not any(line.startswith(_MAGIC) for line in lines):
            return lines
        return self.entry.rewritten(lines)

    # A terminal asks of what is typed whether it is a whole cell: that must not begin one, and a
    # cell magic must still look like one.
    transform.has_side_effects = True  # type: ignore[attr-defined]

    def _matcher(self) -> Any:
        from IPython.core.completer import context_matcher

        @context_matcher(identifier="gpusched_ipy")
        def matcher(context: Any) -> Any:
            from gpusched_ipy.completion import answer

            return answer(context, lambda ended: self.session.queue.list(all=ended))

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
