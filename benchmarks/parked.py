"""The hand-off gap between two isolated cells, and between two calls: the end of one to the first
line of the next, with a parked interpreter and without.

Ours, through the real agent and real shims on a scripted GPU, beside the least that Python can do:
wait for the exit by pidfd and start, with Popen, a Python that imports what such a job needs
(IPython for a cell, cloudpickle for a call). In turns, all in one run, as ratios.

    python benchmarks/parked.py [--jobs 20] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpusched_ipy import parcel
from gpusched_ipy.agent import ask_to_leave, running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.handle import submit
from gpusched_ipy.job import JobKind
from gpusched_ipy.parcel import Parcel
from gpusched_ipy.process import python_argv

TARGET = 0.25
BODY = (
    "import time; begin = time.monotonic(); time.sleep(0.8)\n"
    "f = open({trace!r}, 'a'); f.write(f'{{begin}} {{time.monotonic()}}\\n'); f.close()\n"
)
IMPORTS = {"cell": "import IPython", "call": "import cloudpickle"}


def gaps(trace: Path) -> list[float]:
    """Milliseconds from the end of each job to the beginning of the next."""
    rows = sorted([float(part) for part in line.split()] for line in trace.read_text().splitlines())
    return [(after[0] - before[1]) * 1000 for before, after in pairwise(rows)]


def bare(kind: str, trace: Path, jobs: int) -> None:
    """pidfd and Popen of a Python that imports the same, nothing else."""
    code = f"{IMPORTS[kind]}\n{BODY.format(trace=str(trace))}"
    for _ in range(jobs):
        child = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL)
        pidfd = os.pidfd_open(child.pid)
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        waiting.poll()
        os.close(pidfd)
        child.wait()


def noted(trace: str) -> None:
    """The work of a call."""
    exec(BODY.format(trace=trace))


def queue_one(queue: Queue, kind: str, trace: Path) -> None:
    """One more job."""
    if kind == "call":
        submit(noted, str(trace), queue=queue)
        return
    uid = uuid.uuid4().hex
    sent = Parcel(source=BODY.format(trace=str(trace)), outputs=(), log_cap=1 << 20)
    parcel.send(queue.state, uid, sent)
    argv = python_argv("isolatedmain", str(queue.state.root), uid, isolated=False)
    queue.submit(argv, kind=JobKind.ISOLATED, code=sent.source, uid=uid)


def ours(kind: str, trace: Path, jobs: int, *, parked: bool, folder: Path) -> None:
    """The queue: one scripted GPU, all jobs queued before the first may start."""
    os.environ["GPUSCHED_STATE_DIR"] = str(folder / f"state-{parked}")
    os.environ["GPUSCHED_PARK_PYTHON"] = str(parked)
    queue = Queue()
    queue.drain("the benchmark fills the queue")
    for _ in range(jobs):
        queue_one(queue, kind, trace)
    queue.resume()
    queue.wait(timeout=60 + 5 * jobs)
    agent = running_agent(queue.state, queue.store)
    if agent is not None:
        ask_to_leave(agent, queue.state)


def measure(kind: str, jobs: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    """The gaps of each way, measured in turns."""
    found: dict[str, list[float]] = {"pidfd + Popen": [], "fresh": [], "parked": []}
    for number in range(rounds):
        for name, values in found.items():
            trace = folder / f"{kind}-{number}-{name}"
            if name == "pidfd + Popen":
                bare(kind, trace, jobs)
            else:
                ours(kind, trace, jobs, parked=name == "parked", folder=folder)
            values += gaps(trace)
    return found


def report(kind: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """Print the figures of one kind and return them."""
    reference = statistics.median(found["pidfd + Popen"])
    print(f"{kind + 's':20} {'n':>4} {'median ms':>10} {'p95 ms':>8} {'ratio':>6}")
    for name, values in found.items():
        middle, p95 = statistics.median(values), statistics.quantiles(values, n=20)[-1]
        print(f"{name:20} {len(values):4} {middle:10.1f} {p95:8.1f} {middle / reference:6.2f}")
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def main() -> None:
    """Print all medians and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gpu = {"uuid": "GPU-0", "utilization": 0, "memory_used": 0, "memory_total": "40GiB"}
        (folder / "fake.json").write_text(json.dumps({"gpus": [{**gpu, "processes": []}]}))
        os.environ["GPUSCHED_FAKE"] = str(folder / "fake.json")
        for kind in IMPORTS:
            report(kind, measure(kind, args.jobs, args.rounds, folder))
    print(f"target of parked: {TARGET}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
