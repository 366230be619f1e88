"""A process that dies by SIGKILL at one point between the first mark of a job and the last.

As a program it is an agent, or a submit. The product knows nothing of it: the point is put in place
here, around functions of the product.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from gpusched_ipy import agent, api, cli, environment, errand, parcel
from gpusched_ipy.board import Board
from gpusched_ipy.engines._slurm_keep import SlurmKeeper
from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.engines.kept import KeptFolder
from gpusched_ipy.engines.slurm import SlurmEngine
from gpusched_ipy.homecoming import Homecoming
from gpusched_ipy.openerrands import OpenErrands
from gpusched_ipy.store import Store

# The name of each point: where it is, and whether death comes before or after.
_Points = dict[str, tuple[type | Any, str, str]]
POINTS: _Points = {
    "packed": (errand, "pack", "after"),
    "intended": (JobFolder, "intend", "after"),
    "taken": (SlurmEngine, "_batch", "after"),
    "told": (JobFolder, "set_submitted", "after"),
    "begun": (Homecoming, "_begin", "after"),
    "ending": (Homecoming, "_end", "before"),
    "recorded": (OpenErrands, "drop", "before"),
}
_COMMON: _Points = {
    "committed": (Store, "submit_all", "after"),
    "summoned": (api, "ensure_agent", "after"),
}
SUBMITTERS: _Points = {"kept": (environment, "keep", "after"), **_COMMON}
KERNELS: _Points = {
    "parcelled": (parcel, "send", "after"),
    **_COMMON,
    "shown": (Board, "put_up", "after"),
}

# Those of a job for which something is kept.
KEPT_POINTS: dict[str, tuple[type | Any, str, str]] = {
    "given": (KeptFolder, "take", "after"),
    "called": (SlurmKeeper, "_call", "after"),
}


def arm(point: str) -> None:
    """Die there, the first time that it is reached."""
    where, name, when = (POINTS | KEPT_POINTS | SUBMITTERS | KERNELS)[point]
    real: Callable[..., Any] = getattr(where, name)

    def deadly(*args: Any, **more: Any) -> Any:
        if when == "after":
            real(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, name, deadly)


if __name__ == "__main__":
    arm(sys.argv[1])
    if sys.argv[2] == "submit":
        cli.main(sys.argv[2:])
    else:
        agent.main(sys.argv[2:])
