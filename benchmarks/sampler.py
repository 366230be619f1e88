"""What watching costs: the sampler at 1 Hz on 8 GPUs, held against 0.1 % of a core.

Run it with ``python benchmarks/sampler.py [seconds] [--rounds N]``. Real NVML calls through
nvidia-ml-py into a library of our own that plays 8 GPUs with 2 processes each, whose memory stays;
process lists are wanted at 1 Hz, as while a job waits. In each round: one process alone, then three
that share one reader's readings, both 30 s after the start, when the two that live on them sleep
(until then they wake each second); three of which each needs every reading, as panels do; and one
that reads 8 AMD cards from files like the kernel's.
Figures are CPU time of whole processes, the least and the median of the rounds: a busy machine only
ever adds. A real driver's own cost is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
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

from monitoring import machine

from gpusched_ipy.backends import Detail, Detected
from gpusched_ipy.backends.amd import AmdBackend
from gpusched_ipy.backends.nvml import NvmlBackend
from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.monitor.recent import HISTORY_S, Recent

GPUS = 8
LIMIT = 0.001  # of one core
SETTLED_S = 2.5  # the backend is chosen and the first readings taken
SHARED_S = 30.0  # those that only wait sleep, and nobody asks for each reading any more
RATIO = 1.3  # three that share one reader's readings, over one alone
GIB = 2**30


def open_monitor(folder: Path) -> Monitor:
    """A monitor that shares its readings with the other processes of this benchmark."""
    if not (folder / "sys").is_dir():
        return Monitor(Settings(backend="nvml"), None, folder / "state")

    def choose(_settings: Settings, clock: Clock) -> Detected:
        return Detected(AmdBackend(folder, clock), ())

    return Monitor(Settings(), None, folder / "state", choose=choose)


def write_amd(root: Path) -> Path:
    """The files of 8 cards, as far as a light reading looks at them."""
    for place in range(GPUS):
        device = root / f"sys/class/drm/card{place}/device"
        files = {
            "vendor": "0x1002",
            "device": "0x740c",
            "uevent": f"DRIVER=amdgpu\nPCI_SLOT_NAME=0000:{place + 1:02x}:00.0",
            "unique_id": f"abcdef012345678{place}",
            "gpu_busy_percent": str(10 * place),
            "mem_info_vram_total": str(64 * GIB),
            "mem_info_vram_used": str((place + 1) * GIB),
            "mem_info_gtt_total": str(32 * GIB),
            "power/runtime_status": "active",
        }
        for name, text in files.items():
            path = device / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
    return root


def share(given: argparse.Namespace, detail: Detail) -> dict[str, Any]:
    """The share of one core that this process takes; it goes on until its input ends."""
    monitor, seconds = open_monitor(given.member), given.seconds
    # Patient as the loop of a member whose job waits, or not, as a panel.
    with monitor.wanting("benchmark", 1.0, detail, patient=not given.panel):
        threading.Event().wait(given.settled)
        seen = len(monitor.history(3600))
        cpu, wall = time.process_time(), time.perf_counter()
        threading.Event().wait(seconds)
        used = (time.process_time() - cpu) / (time.perf_counter() - wall)
        seen = len(monitor.history(3600)) - seen
        result = {"share": used, "readings": seen, "sharing": monitor.sharing}
        latest = monitor.latest(detail)
        print(json.dumps(result), flush=True)
        sys.stdin.read()
    monitor.stop()
    assert latest is not None
    assert latest.problem is None, latest.problem
    assert len(latest.gpus) == GPUS
    return result


def members(
    folder: Path, seconds: float, count: int, detail: Detail, *, panels: bool = False
) -> list[dict[str, Any]]:
    """What each of some processes takes that sample at the same time."""
    running = []
    for _ in range(count):
        argv = [sys.executable, __file__, str(seconds), "--member", str(folder)]
        argv += ["--detail", detail.name]
        pipe = subprocess.PIPE
        argv += ["--settled", str(SHARED_S if detail is Detail.PROCESSES else SETTLED_S)]
        argv += ["--panel"] if panels else []
        running.append(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True))
        time.sleep(0.4)
    results = [json.loads(process.stdout.readline()) for process in running if process.stdout]
    for process in running:
        process.communicate()
    if any(process.returncode for process in running):
        raise SystemExit("a process of the benchmark has failed")
    return results


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


def history_bytes() -> int:
    """Memory of an hour of readings at 1 Hz."""
    snapshot = NvmlBackend().read()
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


def three(folder: Path, seconds: float, *, panels: bool) -> tuple[list[float], list[float]]:
    """The share of the one of three that reads, and the shares of those that live on that."""
    results = members(folder, seconds, 3, Detail.PROCESSES, panels=panels)
    reads = [result["share"] for result in results if "adopts" not in result["sharing"]]
    lives = [result["share"] for result in results if "adopts" in result["sharing"]]
    assert len(reads) == 1, [result["sharing"] for result in results]
    return reads, lives


def report(folder: Path, seconds: float, rounds: int) -> bool:
    """Measure and print; whether all is within the limit."""
    found: dict[str, list[float]] = {}
    together: list[float] = []
    for number in range(rounds):
        for detail in (Detail.PROCESSES, Detail.LOAD):
            (alone,) = members(folder / f"a{number}{detail.name}", seconds, 1, detail)
            found.setdefault(f"alone, {detail.name.lower()}", []).append(alone["share"])
        (amd,) = members(write_amd(folder / f"c{number}"), seconds, 1, Detail.LOAD)
        found.setdefault("alone, AMD files, load", []).append(amd["share"])
        reads, lives = three(folder / f"b{number}", seconds, panels=False)
        found.setdefault("reads for three, processes", []).extend(reads)
        found.setdefault("lives on its readings", []).extend(lives)
        together.append(sum(reads + lives))
        reads, lives = three(folder / f"d{number}", seconds, panels=True)
        found.setdefault("reads for three panels", []).extend(reads)
        found.setdefault("a panel on its readings", []).extend(lives)
    print(
        f"{GPUS} GPUs with 2 processes each, 1 Hz, {rounds} rounds of {seconds:.0f} s; of a core:"
    )
    for title, values in found.items():
        verdict = "within" if min(values) <= LIMIT else "ABOVE"
        print(f"{title:28} {min(values):8.4%}  median {statistics.median(values):8.4%}  {verdict}")
    ratio = min(together) / min(found["alone, processes"])
    verdict = "within" if ratio <= RATIO else "ABOVE"
    print(f"{'three together':28} {min(together):8.4%}  {ratio:.2f} x one alone  {verdict} {RATIO}")
    print(f"{'a reading on demand':28} {on_demand(folder) * 1e3:8.2f} ms median")
    print(f"{'an hour of history':28} {history_bytes() / 2**20:8.1f} MiB")
    return ratio <= RATIO and all(min(values) <= LIMIT for values in found.values())


def main() -> int:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", nargs="?", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--detail", default="PROCESSES", help=argparse.SUPPRESS)
    parser.add_argument("--settled", type=float, default=SETTLED_S, help=argparse.SUPPRESS)
    parser.add_argument("--panel", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.member is not None:
        share(given, Detail[given.detail])
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "FAKE_NVML_STATE" not in os.environ:  # the library is found by a new process only
            again = [sys.executable, __file__, str(given.seconds), "--rounds", str(given.rounds)]
            return subprocess.run(
                again, env={**os.environ, **machine(folder)}, check=False
            ).returncode
        return 0 if report(folder, given.seconds, given.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
