"""A command that really writes 10 GB through a real shim: memory, disk and time, limits beside.

Run it with ``python benchmarks/big_log.py [--gb 10]``. The command is `head -c` of zeros, as fast
as the disk takes them; the log's cap is the default, 100 MiB. Peak disk is what the log takes at
the worst moment that is seen (every 10 ms), memory the most that the shim ever held (VmHWM).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from gpusched_ipy.agent import ask_to_leave, running_agent  # noqa: E402
from gpusched_ipy.api import Queue  # noqa: E402
from gpusched_ipy.config import Settings  # noqa: E402
from gpusched_ipy.joblog import written  # noqa: E402
from gpusched_ipy.locks import alive_pid  # noqa: E402
from gpusched_ipy.statedir import StateDir  # noqa: E402

MIB = 2**20
LIMITS = {"memory of the shim, MiB": 64.0, "log at the end, MB": 106.0}
FAKE = '{"gpus": [{"uuid": "GPU-0", "memory_total": "40GiB", "memory_used": 0, "utilization": 0}]}'


def peak_rss(pid: int) -> float:
    """The most memory that process has held, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def shim_of(state: StateDir, member: str | None) -> int | None:
    """The pid of that living member."""
    return alive_pid(state, member) if member is not None else None


def measure(folder: Path, size: int) -> dict[str, float]:
    """Run the command; what it took."""
    script = folder / "gpus.json"
    script.write_text(FAKE)
    os.environ |= {
        "GPUSCHED_STATE_DIR": str(folder / "state"),
        "GPUSCHED_BACKEND": "fake",
        "GPUSCHED_FAKE": str(script),
    }
    queue = Queue(Settings.load())
    bare = time.perf_counter()
    job = queue.submit(["head", "-c", str(size), "/dev/zero"])
    memory = disk = 0.0
    while not (shown := queue.show(job.id)).ended:
        log = queue.log_path(job.id)
        if log is not None and log.exists():
            disk = max(disk, log.stat().st_blocks * 512 / 1e6)
        pid = shim_of(queue.state, shown.member)
        if pid and shown.started_at is not None:
            with suppress(FileNotFoundError, StopIteration):  # it has ended just now
                memory = max(memory, peak_rss(pid))
        time.sleep(0.01)
    whole = time.perf_counter() - bare
    log = queue.log_path(job.id)
    assert log is not None
    assert shown.exit_code == 0, shown.error
    began = time.perf_counter()
    read = sum(map(len, written(queue, shown)))
    reading = time.perf_counter() - began
    agent = running_agent(queue.state, queue.store)
    if agent is not None:
        ask_to_leave(agent, queue.state)
    return {
        "written, GB": size / 1e9,
        "whole time, s": whole,
        "run time by the record, s": shown.run_s or 0.0,
        "memory of the shim, MiB": memory,
        "log at its largest, MB on the disk": disk,
        "log at the end, MB": log.stat().st_blocks * 512 / 1e6,
        "reading it back, s": reading,
        "read back, MB": read / 1e6,
    }


def main() -> int:
    """Measure, print; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=10.0)
    size = int(parser.parse_args().gb * 1e9)
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), size)
    missed = [what for what, limit in LIMITS.items() if found[what] > limit]
    for what, value in found.items():
        limit = f"  limit {LIMITS[what]:g}" if what in LIMITS else ""
        print(f"{what:36}{value:10.2f}{limit}{'  MISSED' * (what in missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
