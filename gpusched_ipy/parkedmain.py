"""The Python that waits for a cell or a call: it imports, takes its order and becomes the job.

Until the order has come it is nobody's: it runs nothing of a user's, loads nothing that looks for
GPUs, and holds no lock. It leaves when nobody can give it an order any more.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from gpusched_ipy.interpreter import BEGUN
from gpusched_ipy.orders import Orders

# What IPython imports only while it makes its first shell and runs its first cell, as far as this
# version of it has these.
_OF_A_SHELL = (
    *("IPython.core.application", "IPython.core.completer", "IPython.core.completerlib"),
    *("IPython.core.crashhandler", "IPython.core.logger", "IPython.core.magics"),
    *("IPython.core.oinspect", "IPython.utils.generics", "IPython.utils.wildcard"),
    *("bdb", "glob", "hashlib", "shutil", "tempfile", "unicodedata"),
)
# Whoever has one of these may have looked for GPUs already, and seen others than the job's.
_LOOK_FOR_GPUS = frozenset({"cupy", "jax", "numba", "pycuda", "tensorflow", "torch"})


def main(argv: Sequence[str]) -> int:
    """Wait for the order, and do that job.

    Args:
        argv: the module that does it, and the number of the socket through which the order comes.
    """
    module, number = argv
    prepare(module)
    if _LOOK_FOR_GPUS & sys.modules.keys():
        return 0  # what this Python loads at every start is not ours to keep waiting
    with socket.socket(fileno=int(number)) as channel:
        orders = Orders(channel)
        order = orders.receive()
        if order is None:
            return 0
        become(order, orders.fds)
        with suppress(OSError):  # who has died since, or waited too long, has given it all the same
            channel.sendall(BEGUN)
    entry = importlib.import_module(f"gpusched_ipy.{module}")
    return int(entry.main(order["arguments"]))


def prepare(module: str) -> None:
    """Import what every job of that module needs."""
    gc.disable()  # nothing that is imported becomes garbage
    importlib.import_module(f"gpusched_ipy.{module}")
    importlib.import_module("cloudpickle")
    if module == "isolatedmain":
        importlib.import_module("gpusched_ipy.isolatedshell")
        for name in _OF_A_SHELL:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
    gc.freeze()
    gc.enable()


def become(order: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Be as if just started for the job: its variables, folder, streams and arguments.

    Raises:
        OSError: its folder cannot be entered.
    """
    log, *gpus = fds
    os.chdir(order["cwd"])
    env: Mapping[str, str] = order["env"]
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)
    for fd in gpus:
        os.set_inheritable(fd, True)
    empty = gpus[0] if gpus else os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if not gpus:
        os.close(empty)
    sys.argv[1:] = order["arguments"]
    # Modules that have been written since this Python first looked into their folders.
    importlib.invalidate_caches()
