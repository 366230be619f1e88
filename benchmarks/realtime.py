"""How soon things start: the next cell after a cell, and a waiting job after the GPU falls idle.

With a real kernel and the real agent, beside the limits of the project. On a scripted GPU: the next
cell of an idle kernel within 50 ms; after a stranger who cannot be watched has left, the waiting
command within one sampling interval. On a libnvidia-ml.so.1 of our own, with a real process as the
stranger: the command within 20 ms of his exit in 99 of 100 (needs cc; about five minutes).

    python benchmarks/realtime.py [--rounds 30] [--exits 200]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

CELL = """%%gpuqueue
import time
begin = time.monotonic()
with open({trace!r}, 'a') as f: print(begin, time.monotonic(), file=f)
"""
GPU = {"uuid": "GPU-0", "memory_total": "40GiB", "utilization": 0, "memory_used": 0}
STRANGER = {"pid": 4242, "user": "user1", "name": "python", "memory": "30GiB"}


def script(path: Path, *, busy: bool) -> None:
    """Write the fake's script in one step."""
    used = {"utilization": 0.97, "memory_used": "30GiB"} if busy else {}
    gpu = {**GPU, **used, "processes": [STRANGER] if busy else []}
    path.with_suffix(".new").write_text(json.dumps({"gpus": [gpu]}))
    path.with_suffix(".new").rename(path)


def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    """Wait for it, closely."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the benchmark does not get on")
        time.sleep(0.001)


def cells(folder: Path, rounds: int) -> list[float]:
    """Milliseconds from the end of each cell to the beginning of the next, kernel idle."""
    from jupyter_client.manager import start_new_kernel

    trace, fake = folder / "cells", Path(os.environ["GPUSCHED_FAKE"])
    script(fake, busy=True)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute_interactive("%load_ext gpusched_ipy", timeout=60)
        for _ in range(rounds):
            client.execute(CELL.format(trace=str(trace)), allow_stdin=True)
        client.execute_interactive("pass", timeout=60)
        script(fake, busy=False)
        until(lambda: trace.exists() and len(trace.read_text().splitlines()) == rounds)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    rows = [[float(part) for part in line.split()] for line in trace.read_text().splitlines()]
    return [(after[0] - before[1]) * 1000 for before, after in pairwise(rows)]


def drops(folder: Path, rounds: int) -> list[float]:
    """Milliseconds from the stranger's leaving to the first instruction of the command."""
    from gpusched_ipy.api import Queue

    fake, queue, found = Path(os.environ["GPUSCHED_FAKE"]), Queue(), []
    dice = random.Random(1)
    code = "import time; t = time.monotonic(); import sys; print(t, file=open(sys.argv[1], 'w'))"
    for number in range(rounds):
        script(fake, busy=True)
        mark = folder / f"drop-{number}"
        job = queue.submit([sys.executable, "-I", "-S", "-c", code, str(mark)])
        until(lambda job=job: queue.show(job.id).reason is not None)
        time.sleep(dice.random())  # he leaves at any moment between two readings
        left = time.monotonic()
        script(fake, busy=False)
        queue.wait(job.id, timeout=60)
        found.append((float(mark.read_text()) - left) * 1000)
    return found


def exits(folder: Path, rounds: int) -> list[float]:
    """Milliseconds from the exit of a stranger's process to the first instruction of the command.

    The card shows him no more from his last act on, as a driver does that frees what a process had
    before others see its end.
    """
    from _peers.machine import Machine, Stranger, Trace

    from gpusched_ipy.api import Queue

    machine = Machine(folder / "machine", folder)
    trace = Trace(folder / "exits")
    del os.environ["GPUSCHED_FAKE"]
    os.environ |= {key: machine.env[key] for key in ("LD_LIBRARY_PATH", "FAKE_NVML_STATE")}
    os.environ |= {"GPUSCHED_BACKEND": "nvml", "GPUSCHED_STATE_DIR": str(folder / "nvml")}
    queue, found, dice = Queue(), [], random.Random(1)
    for number in range(rounds):
        stranger = Stranger(machine)
        job = queue.submit([str(machine.probe), str(trace.path), str(number), "0"])
        until(lambda job=job: queue.show(job.id).reason is not None)
        time.sleep(dice.random())
        left = stranger.leave()
        queue.wait(job.id, timeout=60)
        found.append(((trace.began(str(number)) or 0.0) - left) * 1000)
    end_agent()
    return found


def end_agent() -> None:
    """Leave nothing behind."""
    from gpusched_ipy.agent import ask_to_leave, running_agent
    from gpusched_ipy.api import Queue

    queue = Queue()
    agent = running_agent(queue.state, queue.store)
    if agent is not None:
        ask_to_leave(agent, queue.state)


def main() -> None:
    """Print medians and tails beside their limits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--exits", type=int, default=200)
    given = parser.parse_args()
    # A shim that is just leaving may still write.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= {
            "GPUSCHED_STATE_DIR": str(folder / "state"),
            "GPUSCHED_FAKE": str(folder / "fake.json"),
        }
        found = (
            ("next cell on an idle kernel", cells(folder, given.rounds), 50.0, 50),
            ("start after a stranger has left", drops(folder, given.rounds), 1000.0, 50),
        )
        end_agent()
        found += (("start after a stranger's exit", exits(folder, given.exits), 20.0, 99),)
    print(f"{'':32} {'n':>4} {'median':>8} {'p95':>8} {'p99':>8}  limit, ms")
    for label, values, limit, which in found:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        row = f"{label:32} {len(values):4} {cuts[49]:8.1f} {cuts[94]:8.1f} {cuts[98]:8.1f}"
        name = "median" if which == 50 else f"p{which}"
        print(f"{row}  {name} {limit:.0f}: {cuts[which - 1] / limit:.2f} of it")


if __name__ == "__main__":
    main()
