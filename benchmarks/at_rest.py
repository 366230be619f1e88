"""What a member takes while its job waits and nothing changes: loop, sampler and all its threads.

Run it with ``python benchmarks/at_rest.py [seconds]``. Real members on a libnvidia-ml.so.1 of our
own that plays 8 GPUs, each in use by a stranger who stays: an agent with a command that waits, a
kernel with a cell that waits, and both with a second such kernel, which share one reader's
readings. Figures are CPU time of whole processes and all their threads, as shares of one core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT)]

from monitoring import GPUS, machine  # noqa: E402

LIMIT = 0.005  # of one core, for each of them
GIB = 2**30
SETTLED_S = 16.0  # the loop has said why the job waits, and goes round less often


def occupied(folder: Path) -> dict[str, str]:
    """The environment that leads to 8 GPUs on which a stranger computes."""
    env = machine(folder)
    state = Path(env["FAKE_NVML_STATE"])
    lines = state.read_text().splitlines()
    for place in range(GPUS):
        lines += [f"gpu.{place}.util=97", f"gpu.{place}.mem_used={20 * GIB}"]
        lines = [line for line in lines if not line.startswith(f"gpu.{place}.proc")]
        lines += [f"gpu.{place}.proc={os.getpid()}:{20 * GIB}:C:90"]
    state.write_text("\n".join(lines) + "\n")
    return {**env, "GPUSCHED_BACKEND": "nvml", "GPUSCHED_SAMPLE_INTERVAL_S": "1.0"}


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its threads."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            spent += int((task / "schedstat").read_text().split()[0])
        except OSError:  # a thread that has ended
            continue
    return spent / 1e9


def shares(pids: Sequence[int], seconds: float) -> list[float]:
    """What each of these processes takes of a core from now on."""
    before, began = [cpu_s(pid) for pid in pids], time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - began
    return [(cpu_s(pid) - had) / spent for pid, had in zip(pids, before, strict=True)]


@contextmanager
def agent(env: dict[str, str]) -> Iterator[int]:
    """The pid of an agent with a command that waits for a GPU."""
    gpusched = [sys.executable, "-m", "gpusched_ipy"]
    process = subprocess.Popen([*gpusched, "agent", "run"], env={**os.environ, **env})
    try:
        subprocess.run([*gpusched, "submit", "true"], env={**os.environ, **env},
                       check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def kernel(folder: Path, env: dict[str, str]) -> Iterator[int]:
    """The pid of a kernel with a cell that waits for a GPU."""
    from kernels import started

    folder.mkdir()
    with started(folder, **env) as made:
        cell = made.run("%%gpuqueue\n1")
        made.badge(cell, "queued")
        yield int(made.manager.provisioner.pid)


def measure(folder: Path, seconds: float) -> dict[str, float]:
    """The share of each member."""
    env = {**occupied(folder), "PYTHONPATH": str(ROOT)}
    found: dict[str, float] = {}
    with agent({**env, "GPUSCHED_STATE_DIR": str(folder / "a")}) as pid:
        time.sleep(SETTLED_S)
        (found["an agent"],) = shares([pid], seconds)
    with kernel(folder / "kernel", {**env, "GPUSCHED_STATE_DIR": str(folder / "k")}) as pid:
        time.sleep(SETTLED_S)
        (found["a kernel"],) = shares([pid], seconds)
    shared = {**env, "GPUSCHED_STATE_DIR": str(folder / "all")}
    with ExitStack() as stack:
        pids = [stack.enter_context(agent(shared))]
        pids += [stack.enter_context(kernel(folder / f"k{n}", shared)) for n in range(2)]
        time.sleep(SETTLED_S)
        together = shares(pids, seconds)
    found |= {f"together: {who}": part for who, part in zip(
        ("the agent", "a kernel", "another kernel"), together, strict=True)}  # fmt: skip
    return found


def main() -> int:
    """Measure, print; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", nargs="?", type=float, default=10.0)
    given = parser.parse_args()
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), given.seconds)
    for who, part in found.items():
        print(f"{who:28} {part:8.3%}  {'within' if part <= LIMIT else 'ABOVE'} {LIMIT:.1%}")
    return 0 if all(part <= LIMIT for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
