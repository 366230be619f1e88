"""Starts shims and agents of a chaos run with its failpoint and its mutant in place."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def argv_of(module: str, *arguments: str, isolated: bool = True) -> list[str]:
    """What stands for :func:`gpusched_ipy.process.python_argv` in a run."""
    start = (
        f"import sys; sys.path.insert(0, {ROOT!r}); "
        "from tests.chaos.launch import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-I" if isolated else "-P", "-c", start, f"chaos-{module}", *arguments]


def instrument(kind: str) -> None:
    """Let this process start others as the run wants it, and maybe die at a failpoint."""
    from gpusched_ipy import summon
    from tests.chaos import failpoints

    faulthandler.register(signal.SIGUSR2)  # says where its threads are
    summon.python_argv = argv_of
    if kind in ("agent", "commander"):
        from gpusched_ipy.runners import command

        command.python_argv = argv_of
    share = float(os.environ.get("CHAOS_FAILPOINTS", "0"))
    folder = Path(os.environ["CHAOS_FOLDER"])
    if not (folder / "drain").exists():
        failpoints.arm_next(str(folder), kind, share)


def main(argv: Sequence[str]) -> int:
    """The shim or the agent, as the product would have started it."""
    kind = argv[0].removeprefix("chaos-")
    mutant = os.environ.get("CHAOS_MUTANT")
    if mutant:
        from tests.chaos.mutants import MUTANTS

        MUTANTS[mutant]()
    if kind == "shim":
        instrument("shim")
        from gpusched_ipy import shim

        return shim.main(argv[1:])
    instrument("agent")
    from gpusched_ipy import agent

    agent.LINGER_S = 0.2  # so that agents leave, and are missed, often
    return agent.main(argv[1:])
