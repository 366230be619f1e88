"""What a shim costs before its command can begin: from cold until it waits for its order (Linux).

Beside the least that this Python can do: an isolated interpreter that only waits. Wall clock and
CPU time of both, in turns; on a busy machine only the CPU time and the ratio say something.
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
from pathlib import Path

from gpusched_ipy.config import Settings
from gpusched_ipy.process import python_argv
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

LIMIT_MS = 60.0
# Whoever sleeps so long and uses no CPU waits for us.
ASLEEP_S = 0.2


def cost(argv: Sequence[str]) -> tuple[float, float]:
    """Wall clock and CPU (ms) until a process waits for what its standard input will tell."""
    ours, theirs = socket.socketpair()
    begun = time.perf_counter()
    with theirs:
        child = subprocess.Popen(argv, stdin=theirs.fileno(), cwd="/")
    with ours:
        ready, used = _until_it_waits(child.pid)
    assert child.wait() == 0
    return (ready - begun) * 1e3, used * 1e3


def _until_it_waits(pid: int) -> tuple[float, float]:
    """When the process fell asleep for good, and the CPU time (s) it had used by then."""
    clock = (~pid << 3) | 2  # the CPU clock of that process, clock_getcpuclockid(3)
    since, before = time.perf_counter(), -1.0
    while True:
        used = time.clock_gettime(clock)
        asleep = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
        if used != before or not asleep:
            since, before = time.perf_counter(), used
        elif time.perf_counter() - since > ASLEEP_S:
            return since, used
        time.sleep(0.001)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=20)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as folder:
        state = open_state_dir(Settings.load({"state_dir": f"{folder}/state"}, environ={}))
        Store(state).close()
        argv = {
            "bare": [sys.executable, "-I", "-c", "import os; os.read(0, 1)"],
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
