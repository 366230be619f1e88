"""``%%gpuqueue``, ``%gpurun``, ``%gpuq``, ``%gpus``, ``%gpupanel``, ``%gpuplot``, ``%gpufree``.

What IPython sees of them, and no more: ``%load_ext`` is to be as quick as that of an empty magic.
What a magic does is imported when it is first used (:mod:`~gpusched_ipy.answers`), the settings
(``%config GpuQueue.panel_hz = 2``) as well.
"""

from __future__ import annotations

from collections.abc import Callable
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

STATE = "_gpusched"  # the attribute of a shell that holds its extension


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
        if getattr(self.shell, STATE, None) is self.extension:
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

    def _answer(self, magic: str, *given: Any) -> Any:
        """What the magic of that name does."""
        from gpusched_ipy import answers

        return answers.answer(self.extension, magic, *given)

    @line_cell_magic
    def gpuqueue(self, line: str, cell: str | None = None) -> None:
        self._answer("gpuqueue", line, cell)

    @line_magic
    @no_var_expand
    @needs_local_scope
    def gpurun(self, line: str, local_ns: Any = None) -> None:
        self._answer("gpurun", line, local_ns)

    @line_magic
    def gpuq(self, line: str) -> None:
        self._answer("gpuq", line)

    @line_magic
    def gpus(self, line: str) -> None:
        self._answer("gpus", line)

    @line_magic
    def gpupanel(self, line: str) -> Any:
        return self._answer("gpupanel", line)

    @line_magic
    def gpuplot(self, line: str) -> Any:
        return self._answer("gpuplot", line)

    @line_magic
    def gpufree(self, line: str) -> None:
        self._answer("gpufree", line)


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
    if getattr(shell, STATE, None) is not None:
        return
    magics = GpuQueue(shell)
    if shell.config.get(GpuQueue.__name__):
        _ = magics.given  # says at once what is wrong there
    shell.register_magics(magics)
    setattr(shell, STATE, magics.extension)
    magics.extension.magics = magics
    magics.extension.attach()


def _traits_class() -> type[traits.GpuQueue]:
    from gpusched_ipy.traits import GpuQueue as Traits

    return Traits
