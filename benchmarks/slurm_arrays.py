"""What one array spares a real Slurm beside one sbatch for each member of a sweep.

``python benchmarks/slurm_arrays.py [--jobs 100] [--times 5]`` prints one JSON object. It starts the
Slurm of the tests, takes its partition down so that nothing starts, and hands the same jobs over
one by one and as one array, in turns: how long that took (``ms``), and the processor time that the
controller spent on it (``controller_ms``), of each the median; ``array_share`` is what the array
took of what single jobs took. One look at all of them by squeue is in it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpusched_ipy.engines import EngineJob, EngineState, member_key  # noqa: E402
from gpusched_ipy.engines.folder import JobFolder  # noqa: E402
from gpusched_ipy.engines.slurm import SlurmEngine  # noqa: E402
from tests.engines.slurmcluster import SlurmCluster  # noqa: E402


def controller_s(cluster: SlurmCluster) -> float:
    """The processor time that slurmctld has had."""
    pid = int((cluster.root / "slurmctld.pid").read_text())
    return time.clock_gettime((~pid << 3) | 2)  # Linux: the clock of another process


def cost(cluster: SlurmCluster, act: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of that act, and of the controller until it has come to rest."""
    before, began = controller_s(cluster), time.perf_counter()
    act()
    took = time.perf_counter() - began
    time.sleep(2.0)  # its scheduler looks at what has come
    return {"ms": took * 1000, "controller_ms": (controller_s(cluster) - before) * 1000}


def jobs(folder: Path, turn: int, count: int, array: bool) -> list[EngineJob]:
    """So many jobs whose folders nobody will ever look into."""
    name = f"{turn:032x}-{'array' if array else 'single'}"
    return [
        EngineJob(
            key=member_key(name, at) if array else f"{name}-{at}",
            folder=JobFolder(folder / f"{turn:032x}-1-{at:04x}"),
            name="job",
        )
        for at in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    cluster = SlurmCluster()
    found: dict[str, list[dict[str, float]]] = {}
    try:
        os.environ.update(cluster.environ)
        cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
        engine = SlurmEngine()
        assert engine.ping(10.0).up
        with tempfile.TemporaryDirectory() as name:
            for turn in range(asked.times):
                for kind in ("single", "array"):
                    these = jobs(Path(name), turn, asked.jobs, kind == "array")
                    keys = [job.key for job in these]

                    def hand_over(these: list[EngineJob] = these, kind: str = kind) -> None:
                        if kind == "array":
                            engine.submit_array(these)
                        else:
                            for job in these:
                                engine.submit(job)

                    def look(keys: list[str] = keys) -> None:
                        states = {status.state for status in engine.status(keys).values()}
                        assert states == {EngineState.QUEUED}

                    found.setdefault(kind, []).append(cost(cluster, hand_over))
                    found.setdefault(f"{kind}_look", []).append(cost(cluster, look))
                    cluster.empty()
    finally:
        cluster.stop()
    medians = {
        kind: {what: median(one[what] for one in costs) for what in ("ms", "controller_ms")}
        for kind, costs in found.items()
    }
    share = {
        what: medians["array"][what] / medians["single"][what] for what in ("ms", "controller_ms")
    }
    figures: dict[str, object] = {
        kind: {what: round(value, 1) for what, value in one.items()}
        for kind, one in medians.items()
    }
    figures["array_share"] = {what: round(value, 3) for what, value in share.items()}
    figures["sbatch_calls"] = {"single": asked.jobs, "array": 1}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
