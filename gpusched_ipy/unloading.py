"""How ``%unload_ext`` takes everything that loading has added out of a shell, without a trace."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from gpusched_ipy.extension import PARKED, Extension
from gpusched_ipy.magics import STATE, GpuQueue

if TYPE_CHECKING:
    from gpusched_ipy.kernel import KernelSession


def unload(shell: Any) -> None:
    """Take everything out again; unloading what is not loaded changes nothing."""
    extension = getattr(shell, STATE, None)
    if extension is None:
        return
    session = extension.detach()
    if session is not None:
        _end(extension, session)
    _close_panels()
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        for name in GpuQueue.magics[kind]:
            manager.magics[kind].pop(name, None)
    manager.registry.pop(GpuQueue.__name__, None)
    if extension.magics in shell.configurables:
        shell.configurables.remove(extension.magics)
    delattr(shell, STATE)


def _end(extension: Extension, session: KernelSession) -> None:
    """Stop every thread; cells that wait are kept for the next load."""
    waiting = len(session.open_cells)
    if waiting or session.allocations.open:
        session.park()
        setattr(extension.shell, PARKED, session)
    else:
        session.close()
    if waiting:
        cells = "1 queued cell" if waiting == 1 else f"{waiting} queued cells"
        wait = "waits" if waiting == 1 else "wait"
        extension.front.tell(
            f"gpuqueue: {cells} of this notebook {wait} until gpusched_ipy is loaded again"
        )


def _close_panels() -> None:
    panel = sys.modules.get("gpusched_ipy.panel")
    if panel is not None:
        panel.close_all()
