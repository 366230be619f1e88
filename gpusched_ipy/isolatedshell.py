"""The IPython shell of an isolated cell: what it shows goes onto a tape; it keeps no history."""

from __future__ import annotations

from typing import Any

from IPython.core import page
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from gpusched_ipy.tape import Tape, plain

_NO_GUIS = (None, "inline", "agg")


class TapePublisher(DisplayPublisher):
    """``display()`` and ``clear_output()``."""

    def publish(
        self,
        data: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        *args: Any,
        transient: dict[str, Any] | None = None,
        update: bool = False,
        **kwargs: Any,
    ) -> None:
        content = {"data": data, "metadata": metadata or {}, "transient": transient or {}}
        kind = "update_display_data" if update else "display_data"
        self.shell.tape.message(kind, plain(content))

    def clear_output(self, wait: bool = False) -> None:
        self.shell.tape.message("clear_output", {"wait": wait})


class TapeHook(DisplayHook):
    """The value of the cell's last line."""

    def write_output_prompt(self) -> None:
        """A front end shows no number: the value is not in its ``Out``."""

    def write_format_data(
        self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None
    ) -> None:
        content = {"data": format_dict, "metadata": md_dict or {}, "execution_count": None}
        self.shell.tape.message("execute_result", plain(content))

    def finish_displayhook(self) -> None:
        """The default ends a line of the terminal."""
        self._is_active = False


class IsolatedShell(InteractiveShell):
    """An IPython shell without a terminal, a kernel or a history."""

    display_pub_class = TapePublisher
    displayhook_class = TapeHook
    tape: Tape

    def enable_gui(self, gui: str | None = None) -> None:
        """Nobody can see the windows of a GUI here.

        Raises:
            NotImplementedError: one was asked for.
        """
        if gui not in _NO_GUIS:
            raise NotImplementedError(f"an isolated cell has no GUI ({gui}): %matplotlib inline")

    def _showtraceback(self, etype: type[BaseException], evalue: Any, stb: list[str]) -> None:
        content = {"ename": etype.__name__, "evalue": str(evalue), "traceback": list(stb)}
        self.tape.message("error", content)


def make_shell(tape: Tape) -> IsolatedShell:
    """The one shell of this process."""
    config = Config()
    config.HistoryManager.enabled = False
    config.HistoryAccessor.enabled = False
    IsolatedShell.tape = tape
    shell: IsolatedShell = IsolatedShell.instance(config=config)
    # `x?` would start a pager, which nobody could leave.
    shell.set_hook("show_in_pager", page.as_hook(page.display_page), 90)
    return shell
