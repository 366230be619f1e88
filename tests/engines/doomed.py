"""An agent that dies by SIGKILL at one point between the first mark and the last; run as a program.

The product knows nothing of it: the point is put in place here, around functions of the product.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from gpusched_ipy import agent, errand
from gpusched_ipy.engines._slurm_keep import SlurmKeeper
from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.engines.kept import KeptFolder
from gpusched_ipy.engines.slurm import SlurmEngine
from gpusched_ipy.homecoming import Homecoming
from gpusched_ipy.openerrands import OpenErrands

# The name of each point: where it is, and whether death comes before or after.
POINTS: dict[str, tuple[type | Any, str, str]] = {
    "packed": (errand, "pack", "after"),
    "intended": (JobFolder, "intend", "after"),
    "taken": (SlurmEngine, "_batch", "after"),
    "told": (JobFolder, "set_submitted", "after"),
    "begun": (Homecoming, "_begin", "after"),
    "ending": (Homecoming, "_end", "before"),
    "recorded": (OpenErrands, "drop", "before"),
}

# Those of a job for which something is kept.
KEPT_POINTS: dict[str, tuple[type | Any, str, str]] = {
    "given": (KeptFolder, "take", "after"),
    "called": (SlurmKeeper, "_call", "after"),
}


def arm(point: str) -> None:
    """Die there, the first time that it is reached."""
    where, name, when = (POINTS | KEPT_POINTS)[point]
    real: Callable[..., Any] = getattr(where, name)

    def deadly(*args: Any, **more: Any) -> Any:
        if when == "after":
            real(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, name, deadly)


if __name__ == "__main__":
    arm(sys.argv[1])
    agent.main(sys.argv[2:])
