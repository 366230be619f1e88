"""What watching costs: the sampler at 1 Hz on 8 scripted GPUs, held against 0.1 % of a core.

Run it with ``python benchmarks/sampler.py [seconds]``. It prints, for the process that reads and
for one that adopts its readings, the share of one core; the time of a reading on demand; and the
memory of an hour of history. A real driver's own cost is not in these figures: they are what this
program adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends.fake import FakeBackend
from gpusched_ipy.config import Settings
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.monitor.recent import HISTORY_S, Recent

GPUS = 8
LIMIT = 0.001  # of one core
GIB = 2**30


def write_script(folder: Path) -> Path:
    """Eight busy GPUs with two processes each."""
    path = folder / "fake.json"
    gpus = [
        {
            "uuid": f"GPU-{place}",
            "utilization": 0.9,
            "memory_total": "80GiB",
            "memory_used": "30GiB",
            "temperature": 61,
            "power": 400,
            "processes": [
                {"pid": 1000 * place + k, "user": "u", "name": "python", "memory": "15GiB"}
                for k in (1, 2)
            ],
        }
        for place in range(GPUS)
    ]
    path.write_text(json.dumps({"gpus": gpus}))
    return path


def open_monitor(folder: Path) -> Monitor:
    """A monitor that shares its readings with the other processes of this benchmark."""
    return Monitor(Settings(fake=folder / "fake.json"), None, folder / "state")


def share(folder: Path, seconds: float) -> dict[str, Any]:
    """The share of one core that this process takes while it samples at 1 Hz."""
    monitor = open_monitor(folder)
    with monitor.wanting("benchmark", 1.0, Detail.PROCESSES):
        threading.Event().wait(1.5)  # the backend is chosen and the first reading taken
        seen = len(monitor.history(3600))
        cpu, wall = time.process_time(), time.perf_counter()
        threading.Event().wait(seconds)
        used = (time.process_time() - cpu) / (time.perf_counter() - wall)
        seen = len(monitor.history(3600)) - seen
        sharing = monitor.sharing
    monitor.stop()
    return {"share": used, "readings": seen, "sharing": sharing}


def shared(folder: Path, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of this process and of a second one that lives on its readings."""
    command = [sys.executable, __file__, "--adopt", str(folder), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        mine = share(folder, seconds + 1)
        answer, _ = other.communicate()
    return mine, json.loads(answer)


def on_demand(folder: Path, rounds: int = 300) -> float:
    """Median seconds of a reading on demand, thread hand-over and publishing included."""
    monitor = open_monitor(folder)
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        monitor.read_now()
        spent.append(time.perf_counter() - began)
    monitor.stop()
    return statistics.median(spent)


def history_bytes(folder: Path) -> int:
    """Memory of an hour of readings at 1 Hz."""
    snapshot = FakeBackend(folder / "fake.json").read()
    tracemalloc.start()
    recent = Recent()
    for second in range(int(HISTORY_S)):
        gpus = tuple(
            replace(
                gpu,
                utilization=(second % 97) / 97,
                mem_used_bytes=30 * GIB + second,
                processes=tuple(replace(item) for item in gpu.processes or ()),
            )
            for gpu in snapshot.gpus
        )
        recent.add(replace(snapshot, taken_mono=float(second), gpus=gpus))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


def report(folder: Path, seconds: float) -> None:
    """Measure and print."""
    write_script(folder)
    print(f"{GPUS} scripted GPUs with 2 processes each, 1 Hz, {seconds:.0f} s a measurement")
    alone = share(folder, seconds)
    mine, other = shared(folder, seconds)
    for title, result in (("alone", alone), ("one of two", mine), ("the other of two", other)):
        verdict = "within" if result["share"] <= LIMIT else "ABOVE"
        print(
            f"{title:22} {result['share']:8.4%} of a core, {verdict} {LIMIT:.1%}"
            f" ({result['readings']} readings; {result['sharing']})"
        )
    print(f"{'a reading on demand':22} {on_demand(folder) * 1e3:8.2f} ms median")
    print(f"{'an hour of history':22} {history_bytes(folder) / 2**20:8.1f} MiB")


def main() -> None:
    """Run the benchmark, or its second process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", nargs="?", type=float, default=20.0)
    parser.add_argument("--adopt", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.adopt is not None:
        print(json.dumps(share(given.adopt, given.seconds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), given.seconds)


if __name__ == "__main__":
    main()
