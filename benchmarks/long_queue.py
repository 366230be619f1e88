"""How quick the notebook's views stay with 100,000 queued jobs: `%gpuq` and the panel.

Run it with ``python benchmarks/long_queue.py [--jobs 100000]``. A real kernel on a real record, one
fake card that a stranger uses, and beside it the same views with an empty queue. "The first" has
to import and open what the later ones have already; of the later ones the middle counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT)]

from kernel_cost import rate, say, updates  # noqa: E402
from limits import fill  # noqa: E402

from gpusched_ipy.config import Settings  # noqa: E402
from gpusched_ipy.statedir import open_state_dir  # noqa: E402
from gpusched_ipy.store import Store  # noqa: E402

LIMITS = {"%gpuq, ms": 250.0, "a page of the panel, ms": 250.0, "panel at 1 Hz, % of a core": 5.0}


def timed_ms(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1e3


def views(folder: Path, jobs: int, seconds: float) -> dict[str, float]:
    """The figures with that many jobs queued."""
    from kernels import started

    folder.mkdir()
    state = folder / "state"
    store = Store(open_state_dir(Settings.load({"state_dir": str(state)}, environ={})))
    fill(store, jobs)
    store.close()
    found: dict[str, float] = {}
    with started(folder, GPUSCHED_SAMPLE_INTERVAL_S="1.0") as made:
        made.fake.take()
        found["the first %gpuq, ms"] = timed_ms(lambda: made.run("%gpuq"))
        found["%gpuq, ms"] = statistics.median(
            timed_ms(lambda: made.run("%gpuq")) for _ in range(10)
        )
        assert str(jobs) in made.run("%gpuq").text() + str(made.run("%gpuq").displays) or not jobs
        shown = made.run("%gpupanel")
        comm = next(item for item in shown.of("comm_open") if "_esm" in str(item["data"]))
        found["a page of the panel, ms"] = page_ms(made, comm["comm_id"])
        rate(made, 3, comm["comm_id"])
        found["panel at 1 Hz, % of a core"] = 100 * rate(made, seconds, comm["comm_id"])
    return found


def page_ms(made: Any, comm: str) -> float:
    """From a page that says hello to the first thing that it is sent."""
    before = len(updates(made, comm))

    def hello() -> None:
        say(made, comm, "hello")
        made.until(lambda: len(updates(made, comm)) > before, "the panel is silent")

    return timed_ms(hello)


def main() -> int:
    """Measure, print; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        empty = views(Path(name) / "empty", 0, given.seconds)
        full = views(Path(name) / "full", given.jobs, given.seconds)
    missed = [what for what, limit in LIMITS.items() if full[what] > limit]
    print(f"{'':32}{'empty':>10}{given.jobs:>10,}{'limit':>10}")
    for what, value in full.items():
        limit = f"{LIMITS[what]:10.0f}" if what in LIMITS else f"{'-':>10}"
        print(f"{what:32}{empty[what]:10.1f}{value:10.1f}{limit}{'  MISSED' * (what in missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
