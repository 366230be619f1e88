"""The hand-off gap between two commands: the end of one to the first instruction of the next.

Ours, through the real agent and real shims on a scripted GPU, beside the least that Python can do:
wait for the exit by pidfd and start the next with Popen. Both in one run, as a ratio.

    python benchmarks/handoff.py [--jobs 100]
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
from itertools import pairwise
from pathlib import Path

PROBE = (
    "import time; begin = time.monotonic(); import sys; time.sleep(0.2);"
    "f = open(sys.argv[1], 'a'); f.write(f'{begin} {time.monotonic()}\\n')"
)


def argv(trace: Path) -> list[str]:
    """A job of 0.2 s that notes when it began and when it ended."""
    return [sys.executable, "-I", "-S", "-c", PROBE, str(trace)]


def gaps(trace: Path) -> list[float]:
    """Milliseconds from the end of each job to the beginning of the next."""
    rows = sorted([float(part) for part in line.split()] for line in trace.read_text().splitlines())
    return [(after[0] - before[1]) * 1000 for before, after in pairwise(rows)]


def bare(folder: Path, jobs: int) -> list[float]:
    """pidfd and Popen, nothing else."""
    trace = folder / "bare"
    for _ in range(jobs):
        child = subprocess.Popen(argv(trace), stdin=subprocess.DEVNULL)
        pidfd = os.pidfd_open(child.pid)
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        waiting.poll()
        os.close(pidfd)
        child.wait()
    return gaps(trace)


def ours(folder: Path, jobs: int) -> list[float]:
    """The queue: one scripted GPU, all jobs queued before the first may start."""
    fake = folder / "fake.json"
    gpu = {"uuid": "GPU-0", "utilization": 0, "memory_used": 0, "memory_total": "40GiB"}
    fake.write_text(json.dumps({"gpus": [{**gpu, "processes": []}]}))
    os.environ |= {"GPUSCHED_STATE_DIR": str(folder / "state"), "GPUSCHED_FAKE": str(fake)}
    from gpusched_ipy.agent import ask_to_leave, running_agent
    from gpusched_ipy.api import Queue

    queue = Queue()
    queue.drain("the benchmark fills the queue")
    trace = folder / "ours"
    for _ in range(jobs):
        queue.submit(argv(trace))
    queue.resume()
    queue.wait(timeout=60 + jobs)
    agent = running_agent(queue.state, queue.store)
    if agent is not None:
        ask_to_leave(agent, queue.state)
    return gaps(trace)


def main() -> None:
    """Print both medians and their ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=100)
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as name:
        results = {"pidfd + Popen": bare(Path(name), jobs), "gpusched": ours(Path(name), jobs)}
    print(f"{'hand-off of ' + str(jobs) + ' commands':28} {'median ms':>10} {'p95 ms':>8}")
    for label, values in results.items():
        p95 = statistics.quantiles(values, n=20)[-1]
        print(f"{label:28} {statistics.median(values):10.1f} {p95:8.1f}")
    reference, ratio = (statistics.median(results[key]) for key in ("pidfd + Popen", "gpusched"))
    print(f"ratio {ratio / reference:.2f} (limit of this gap: 100 ms; target 1.25)")


if __name__ == "__main__":
    main()
