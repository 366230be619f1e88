"""What a reading by NVML costs on our side, held against its limits and against nvitop and gpustat.

Run it with ``python benchmarks/monitoring.py``. Every program reads the same machine in the same
run: a libnvidia-ml.so.1 of our own (built with cc) that plays 8 GPUs with 2 processes each, so that
these are the costs of the programs and not of a driver. Peers that are not installed are left out
and said so; ``--install`` gets them into a temporary environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import timeit
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
ROOT = TESTS.parent
GPUS = 8
PEERS = ("nvitop", "gpustat")
# Microseconds of our own time, from the plan of the project.
LIMITS = {"utilization and memory, all changed": 50.0, "full, with processes": 300.0}


def machine(folder: Path) -> dict[str, str]:
    """Build the library and write its state; the environment that leads a child to it."""
    sys.path.insert(0, str(TESTS))
    from fake_nvml import FakeNvml

    fake = FakeNvml(folder)
    state: dict[str, Any] = {}
    for place in range(GPUS):
        state |= {
            f"gpu.{place}.uuid": f"GPU-{place}",
            f"gpu.{place}.util": 10 * place,
            f"gpu.{place}.mem_used": place << 30,
            f"gpu.{place}.proc": [f"{os.getpid()}:{1 << 30}:C:50", f"{os.getppid()}:{1 << 29}:G"],
        }
    fake.set(state)
    # The file is looked at ten times a second: the cost of the double is not ours.
    return {**fake.env, "FAKE_NVML_POLL_US": "100000"}


def best_us(call: Callable[[], object], number: int, repeat: int = 7) -> float:
    """Microseconds of one call in the best of ``repeat`` rounds."""
    return min(timeit.repeat(call, number=number, repeat=repeat)) / number * 1e6


def measure_ours() -> dict[str, float]:
    """Our backend, by how much it is asked for."""
    began = timeit.default_timer()
    from gpusched_ipy.backends import Detail
    from gpusched_ipy.backends.nvml import NvmlBackend

    backend = NvmlBackend()
    snapshot = backend.read(Detail.FULL)
    first = (timeit.default_timer() - began) * 1e6
    assert snapshot.problem is None
    assert len(snapshot.gpus) == GPUS
    assert all(gpu.processes and len(gpu.processes) == 2 for gpu in snapshot.gpus)

    def changed() -> None:
        for unit in backend._units:
            unit._last_values = None
        backend.read(Detail.LOAD)

    return {
        "import, open, first reading": first,
        "utilization and memory": best_us(lambda: backend.read(Detail.LOAD), 2000),
        "utilization and memory, all changed": best_us(changed, 2000),
        "with processes": best_us(lambda: backend.read(Detail.PROCESSES), 500),
        "full, with processes": best_us(lambda: backend.read(Detail.FULL), 500),
    }


def measure_nvitop() -> dict[str, float]:
    """nvitop's API: the plain values, and its snapshots."""
    began = timeit.default_timer()
    from nvitop import Device, take_snapshots

    devices = Device.all()
    take_snapshots()
    first = (timeit.default_timer() - began) * 1e6
    assert len(devices) == GPUS

    def light() -> None:
        for device in devices:
            with device.oneshot():
                device.gpu_utilization()
                device.memory_info()

    return {
        "import, open, first reading": first,
        "utilization and memory": best_us(light, 100),
        "with processes": best_us(lambda: [device.processes() for device in devices], 50),
        "full, with processes": best_us(take_snapshots, 20),
    }


def measure_gpustat() -> dict[str, float]:
    """gpustat's one query."""
    began = timeit.default_timer()
    import gpustat

    stats = gpustat.GPUStatCollection.new_query()
    first = (timeit.default_timer() - began) * 1e6
    assert len(stats) == GPUS
    query = gpustat.GPUStatCollection.new_query
    return {
        "import, open, first reading": first,
        "full, with processes": best_us(query, 1, repeat=3),
    }


MEASURES = {"ours": measure_ours, "nvitop": measure_nvitop, "gpustat": measure_gpustat}


def in_child(python: str, who: str, env: dict[str, str]) -> dict[str, float] | str:
    """The figures of one program in a process of its own, or why there are none."""
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [python, str(Path(__file__).resolve()), "--measure", who],
        env={**os.environ, "PYTHONPATH": paths, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 0:
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    missing = f"No module named '{who}'" in last
    return f"{who} is not installed; --install gets it" if missing else f"{who} failed: {last}"


def install(folder: Path) -> str:
    """The Python of a temporary environment with the peers."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *PEERS], check=True, timeout=600)
    return python


def report(results: dict[str, dict[str, float] | str]) -> bool:
    """Print the table; whether our figures are within their limits."""
    print(
        f"{GPUS} GPUs with 2 processes each on a library that plays them; microseconds, best of 7"
    )
    rows = list(
        dict.fromkeys(row for item in results.values() if isinstance(item, dict) for row in item)
    )
    print(f"{'':38}" + "".join(f"{who:>12}" for who in results) + f"{'limit':>10}")
    within = True
    for row in rows:
        shown = [item.get(row) if isinstance(item, dict) else None for item in results.values()]
        cells = "".join(f"{'-' if value is None else format(value, '.1f'):>12}" for value in shown)
        limit = LIMITS.get(row)
        verdict = ""
        if limit is not None and shown[0] is not None:
            within = within and shown[0] <= limit
            verdict = f"{limit:>10.0f}  {'within' if shown[0] <= limit else 'ABOVE'}"
        print(f"{row:38}{cells}{verdict}")
    for item in results.values():
        if isinstance(item, str):
            print(f"left out: {item}")
    return within


def main() -> int:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="get the peers for this run")
    parser.add_argument("--measure", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        print(json.dumps(MEASURES[given.measure]()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        env = machine(Path(folder))
        python = install(Path(folder) / "peers") if given.install else sys.executable
        results = {"ours": in_child(sys.executable, "ours", env)}
        results |= {who: in_child(python, who, env) for who in PEERS}
        return 0 if report(results) else 1


if __name__ == "__main__":
    sys.exit(main())
