"""A traffic controller for the GPU, at home in the notebook.

``%load_ext gpusched_ipy`` registers the magics. This module itself imports nothing heavy: every
public name below is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Public name -> the module that holds it.
_HOMES: dict[str, str] = {
    "__version__": "gpusched_ipy._version",
    "GpuAllocation": "gpusched_ipy.allocation",
    "gpuqueue": "gpusched_ipy.allocation",
    "Queue": "gpusched_ipy.api",
    "JobFailedError": "gpusched_ipy.errors",
    "JobNotFoundError": "gpusched_ipy.errors",
    "RemoteError": "gpusched_ipy.errors",
    "StateDirError": "gpusched_ipy.errors",
    "StoreError": "gpusched_ipy.errors",
    "UserError": "gpusched_ipy.errors",
    "GpuExecutor": "gpusched_ipy.executor",
    "GpuFuture": "gpusched_ipy.executor",
    "gpus": "gpusched_ipy.glance",
    "plot_timeline": "gpusched_ipy.glance",
    "plot_usage": "gpusched_ipy.glance",
    "JobHandle": "gpusched_ipy.handle",
    "submit": "gpusched_ipy.handle",
    "JobState": "gpusched_ipy.job",
    "Snapshot": "gpusched_ipy.snapshot",
}

__all__ = ["load_ipython_extension", "unload_ipython_extension", *_HOMES]

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from gpusched_ipy._version import __version__ as __version__
    from gpusched_ipy.allocation import GpuAllocation as GpuAllocation
    from gpusched_ipy.allocation import gpuqueue as gpuqueue
    from gpusched_ipy.api import Queue as Queue
    from gpusched_ipy.errors import JobFailedError as JobFailedError
    from gpusched_ipy.errors import JobNotFoundError as JobNotFoundError
    from gpusched_ipy.errors import RemoteError as RemoteError
    from gpusched_ipy.errors import StateDirError as StateDirError
    from gpusched_ipy.errors import StoreError as StoreError
    from gpusched_ipy.errors import UserError as UserError
    from gpusched_ipy.executor import GpuExecutor as GpuExecutor
    from gpusched_ipy.executor import GpuFuture as GpuFuture
    from gpusched_ipy.glance import gpus as gpus
    from gpusched_ipy.glance import plot_timeline as plot_timeline
    from gpusched_ipy.glance import plot_usage as plot_usage
    from gpusched_ipy.handle import JobHandle as JobHandle
    from gpusched_ipy.handle import submit as submit
    from gpusched_ipy.job import JobState as JobState
    from gpusched_ipy.snapshot import Snapshot as Snapshot


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics in ``shell``; loading twice changes nothing."""
    from gpusched_ipy.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take everything that loading added out of ``shell`` again."""
    from gpusched_ipy.unloading import unload

    unload(shell)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
