"""What a shim costs before its command can begin: a process with the package, from cold.

Beside the least that this Python can do: an isolated interpreter that does nothing. Wall clock and
CPU time of both, in one run; on a busy machine only the CPU time and the ratio say something.
The agent keeps one shim started, so that a command waits for none of this.

    python benchmarks/shim_start.py [--starts 20]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from gpusched_ipy.config import Settings
from gpusched_ipy.process import python_argv
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

LIMIT_MS = 60.0


def cost(argv: Sequence[str]) -> tuple[float, float]:
    """Wall clock and CPU (ms) of a process that is told at once that nobody needs it."""
    ours, theirs = socket.socketpair()
    ours.close()
    begun = time.perf_counter()
    with theirs:
        child = subprocess.Popen(argv, stdin=theirs.fileno(), cwd="/")
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return (time.perf_counter() - begun) * 1e3, (used.ru_utime + used.ru_stime) * 1e3


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=20)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as folder:
        state = open_state_dir(Settings.load({"state_dir": f"{folder}/state"}, environ={}))
        Store(state).close()
        argv = {
            "bare": [sys.executable, "-I", "-c", "pass"],
            "shim": python_argv("shim", "--state-dir", str(state.root)),
        }
        for line in argv.values():
            cost(line)  # compiles what was never run
        # In turns: what else the machine does meets both alike.
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in argv}
        for _ in range(starts):
            for name, line in argv.items():
                figures[name].append(cost(line))
    found: dict[str, object] = {"limit_ms": LIMIT_MS, "load": os.getloadavg()[0]}
    for name, costs in figures.items():
        for place, what in enumerate(("wall", "cpu")):
            values = sorted(pair[place] for pair in costs)
            found[f"{name}_{what}_ms"] = {
                "least": round(values[0], 1), "median": round(statistics.median(values), 1),
            }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
