"""``%%gpuqueue``, ``%gpurun``, ``%gpuq``, ``%gpus``, ``%gpupanel``, ``%gpuplot``, ``%gpufree``.

Thin: each parses its line and hands over. Loading them imports nothing heavy; what a magic needs is
imported when it is first used, the settings (``%config GpuQueue.panel_hz = 2``) as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from IPython.core.magic import (
    Magics,
    line_cell_magic,
    line_magic,
    magics_class,
    needs_local_scope,
    no_var_expand,
)

from gpusched_ipy.extension import Extension

if TYPE_CHECKING:
    from gpusched_ipy import traits
    from gpusched_ipy.config import Settings

_STATE = "_gpusched"


def _quiet_help(magic: Any) -> Any:
    """Help that was asked for with ``--help`` has been printed: nothing else is to be done."""

    @wraps(magic)
    def call(self: Any, *args: Any, **local: Any) -> Any:
        from gpusched_ipy.options import HelpShown

        try:
            return magic(self, *args, **local)
        except HelpShown:
            return None

    return call


@magics_class
class GpuQueue(Magics):
    """The magics of the GPU queue.

    What ``%config`` asks of it is answered by :class:`gpusched_ipy.traits.GpuQueue`, made when it
    is first needed: 30 settings take longer to load than all the rest.
    """

    def __init__(self, shell: Any) -> None:
        self.extension = Extension(shell, self.settings)
        self._given: traits.GpuQueue | None = None
        super().__init__(shell=shell)

    @property
    def given(self) -> traits.GpuQueue:
        """The settings as this shell has them."""
        if self._given is None:
            self._given = _traits_class()(self.shell, self._changed)
        return self._given

    def settings(self) -> Settings:
        """The settings in force now.

        Raises:
            UserError: one in the environment or in the file cannot be used.
        """
        return self.given.settings()

    def _changed(self) -> None:
        if getattr(self.shell, _STATE, None) is self.extension:
            self.extension.reconfigure()

    @classmethod
    def class_traits(cls, **metadata: Any) -> Any:
        """The settings, for ``%config``."""
        return _traits_class().class_traits(**metadata)

    @classmethod
    def class_get_help(cls, inst: Any = None) -> str:
        """What ``%config GpuQueue`` shows."""
        return _traits_class().class_get_help(None if inst is None else inst.given)

    def update_config(self, config: Any) -> None:
        """What ``%config`` does to every configurable, whichever is meant."""
        if type(self).__name__ in config:
            self.given.update_config(config)

    @property
    def _notebook(self) -> Any:
        from gpusched_ipy.notebook import Notebook

        return Notebook(self.extension.session)

    @line_cell_magic
    @_quiet_help
    def gpuqueue(self, line: str, cell: str | None = None) -> None:
        if cell is None:
            from gpusched_ipy.lines import cell_parser

            cell_parser().print_help()
            return
        self.extension.defer(line, cell)

    @line_magic
    @no_var_expand
    @needs_local_scope
    @_quiet_help
    def gpurun(self, line: str, local_ns: Any = None) -> None:
        from gpusched_ipy.lines import parse_run, with_variables

        names = {**self.shell.user_ns, **(local_ns or {})}
        self._notebook.run(parse_run(with_variables(line, names)))

    @line_magic
    @_quiet_help
    def gpuq(self, line: str) -> None:
        self._notebook.queue(line)

    @line_magic
    @_quiet_help
    def gpus(self, line: str) -> None:
        from gpusched_ipy.lines import parse_gpus

        self._notebook.gpus(parse_gpus(line))

    @line_magic
    @_quiet_help
    def gpupanel(self, line: str) -> Any:
        from gpusched_ipy.lines import parse_none

        parse_none("%gpupanel", line)
        return self._notebook.panel()

    @line_magic
    @_quiet_help
    def gpuplot(self, line: str) -> Any:
        from gpusched_ipy.lines import parse_plot

        return self._notebook.plot(parse_plot(line))

    @line_magic
    @_quiet_help
    def gpufree(self, line: str) -> None:
        from gpusched_ipy.lines import parse_none

        parse_none("%gpufree", line)
        self._notebook.free()


def _describe() -> None:
    """``%%gpuqueue?`` asks for its text when it is wanted: it takes the options' definitions."""

    def later(name: str) -> Callable[[], str]:
        def getdoc() -> str:
            from gpusched_ipy.lines import help_of

            return help_of(name)

        return getdoc

    for name in (*GpuQueue.magics["line"], *GpuQueue.magics["cell"]):
        getattr(GpuQueue, name).getdoc = later(name)


_describe()


def load(shell: Any) -> None:
    """Register the magics in ``shell``; loading twice changes nothing."""
    if getattr(shell, _STATE, None) is not None:
        return
    magics = GpuQueue(shell)
    if shell.config.get(GpuQueue.__name__):
        _ = magics.given  # says at once what is wrong there
    shell.register_magics(magics)
    setattr(shell, _STATE, magics.extension)
    magics.extension.magics = magics
    magics.extension.attach()


def unload(shell: Any) -> None:
    """Take everything out again; unloading what is not loaded changes nothing."""
    extension = getattr(shell, _STATE, None)
    if extension is None:
        return
    extension.detach()
    _close_panels()
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        for name in GpuQueue.magics[kind]:
            manager.magics[kind].pop(name, None)
    manager.registry.pop(GpuQueue.__name__, None)
    if extension.magics in shell.configurables:
        shell.configurables.remove(extension.magics)
    delattr(shell, _STATE)


def _traits_class() -> type[traits.GpuQueue]:
    from gpusched_ipy.traits import GpuQueue as Traits

    return Traits


def _close_panels() -> None:
    import sys

    panel = sys.modules.get("gpusched_ipy.panel")
    if panel is not None:
        panel.close_all()
