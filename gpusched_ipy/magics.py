"""``%%gpuqueue``, ``%gpurun``, ``%gpuq``, ``%gpus``, ``%gpupanel``, ``%gpuplot``, ``%gpufree``.

Thin: each parses its line and hands over. Loading them imports nothing heavy; what a magic needs is
imported when it is first used. Every setting is a trait: ``%config GpuQueue.panel_hz = 2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class
from traitlets import TraitError, TraitType, observe

from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.extension import Extension

_STATE = "_gpusched"


class SettingTrait(TraitType[Any, Any]):
    """One setting; None: not set here, so that environment, file and default speak."""

    default_value = None
    allow_none = True

    def __init__(self, setting: str, **kwargs: Any) -> None:
        super().__init__(default_value=None, allow_none=True, **kwargs)
        self.setting = setting

    def validate(self, obj: Any, value: Any) -> Any:
        """Refuse what the setting does not take."""
        try:
            Settings.parse(self.setting, value)
        except UserError as exc:
            raise TraitError(str(exc)) from None
        return value

    def from_string(self, text: str) -> Any:
        """A value of the command line: settings parse text themselves."""
        return None if text == "None" else text


def _traits() -> dict[str, SettingTrait]:
    return {
        item.name: SettingTrait(
            item.name, help=f"{item.metadata['doc']} (default: {item.metadata['shown']})"
        ).tag(config=True)
        for item in fields(Settings)
        if "parse" in item.metadata
    }


def _quiet_help(magic: Any) -> Any:
    """Help that was asked for with ``--help`` has been printed: nothing else is to be done."""

    @wraps(magic)
    def call(self: Any, *args: Any) -> Any:
        from gpusched_ipy.options import HelpShown

        try:
            return magic(self, *args)
        except HelpShown:
            return None

    return call


@magics_class
class GpuQueue(Magics):
    """The magics of the GPU queue."""

    vars().update(_traits())

    def __init__(self, shell: Any, **kwargs: Any) -> None:
        self.extension = Extension(shell, self.settings)
        super().__init__(shell=shell, **kwargs)

    def settings(self) -> Settings:
        """The settings in force now.

        Raises:
            UserError: one in the environment or in the file cannot be used.
        """
        given = {name: getattr(self, name) for name in Settings.names()}
        return Settings.load({name: value for name, value in given.items() if value is not None})

    @observe(*Settings.names())
    def _reconfigure(self, change: Any) -> None:
        # The values that the class is made with come before its shell knows it.
        if getattr(self.shell, _STATE, None) is self.extension:
            self.extension.reconfigure()

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
    @_quiet_help
    def gpurun(self, line: str) -> None:
        from gpusched_ipy.lines import parse_run

        self._notebook.run(parse_run(line))

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
    magics = _configured(shell)
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


def _configured(shell: Any) -> GpuQueue:
    """The magics with the shell's configuration; a bad value there is dropped, and said.

    A value that ``%config`` has refused stays in the shell's configuration all the same.
    """
    section = shell.config.get(GpuQueue.__name__, {})
    for name in list(section):
        try:
            Settings.parse(name, section[name])
        except UserError as exc:
            del section[name]
            print(f"gpuqueue: {exc}; it is passed over")
    return GpuQueue(shell, parent=shell)


def _close_panels() -> None:
    import sys

    panel = sys.modules.get("gpusched_ipy.panel")
    if panel is not None:
        panel.close_all()
