"""A traffic controller for the GPU, at home in the notebook.

``%load_ext gpusched_ipy`` registers the magics. This module itself imports nothing heavy: every
public name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpusched_ipy._version import __version__

# Public name -> the module that holds it.
_HOMES: dict[str, str] = {"Queue": "gpusched_ipy.api", "UserError": "gpusched_ipy.errors"}

__all__ = ["__version__", "load_ipython_extension", "unload_ipython_extension", *_HOMES]

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics in ``shell``; loading twice changes nothing."""
    from gpusched_ipy.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take everything that loading added out of ``shell`` again."""
    from gpusched_ipy.magics import unload

    unload(shell)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
