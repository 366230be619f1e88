"""How long a job waits for its node at a real Slurm: by batch, and in what is kept, in one run.

``python benchmarks/kept.py [--jobs 15]`` brings up the Slurm of the tests and prints one JSON
object: seconds from the call of ``submit`` to the node's claim, and to the first line that the job
writes; the worst and the median. The limit of the claim in what is kept is 100 ms, by the median.
The load average goes with it: a loaded machine says little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 0.1


def measured(folder: Path, jobs: int, keep: str) -> tuple[list[float], list[float]]:
    """Seconds to the claim and to the first line of each job; with ``keep`` not of the first."""
    from gpusched_ipy.agent import ask_to_leave, running_agent
    from gpusched_ipy.api import Queue
    from gpusched_ipy.config import Settings

    os.environ["GPUSCHED_SLURM_KEEP"] = keep
    os.environ["GPUSCHED_STATE_DIR"] = str(folder / f"state-{keep}")
    os.environ["GPUSCHED_ENGINE_DIR"] = str(folder / f"engines-{keep}")
    queue = Queue(Settings.load())
    claims, lines = [], []
    for number in range(jobs + 1):
        began = time.time()
        # The job itself tells when its node claimed its folder, which is gone when it is over.
        line = 'stat -c %.9Y "$PWD/claim"; date +%s.%N; sleep 0.5'
        job = queue.submit([f'cd "{folder}"/engines-{keep}/*/slurm/*-1-*; {line}'], shell=True,
                           engine="slurm")  # fmt: skip
        queue.wait(job.id, timeout=60)
        path = queue.log_path(job.id)
        assert path is not None
        claimed, first = map(float, path.read_text().split())
        if number:
            claims.append(claimed - began)
            lines.append(first - began)
        time.sleep(0.6)  # the next one finds it idle
    agent = running_agent(queue.state, queue.store)
    if agent is not None:
        ask_to_leave(agent, queue.state)
    queue.store.close()
    return claims, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=15)
    jobs = parser.parse_args().jobs
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from tests.engines.slurmcluster import SlurmCluster

    cluster = SlurmCluster()
    found: dict[str, object] = {"load": os.getloadavg()[0], "jobs": jobs}
    medians = {}
    try:
        os.environ["SLURM_CONF"] = str(cluster.conf)
        with tempfile.TemporaryDirectory() as name:
            for how, keep in (("batch", "0"), ("kept", "5m")):
                for what, times in zip(
                    ("claim", "line"), measured(Path(name), jobs, keep), strict=True
                ):
                    medians[how, what] = statistics.median(times)
                    found[f"{how}_{what}_s"] = round(medians[how, what], 3)
                    found[f"{how}_{what}_worst_s"] = round(max(times), 3)
    finally:
        cluster.stop()
    found["ratio"] = round(medians["batch", "claim"] / medians["kept", "claim"], 1)
    found["limit_s"], found["held"] = LIMIT_S, medians["kept", "claim"] <= LIMIT_S
    print(json.dumps(found, indent=1))
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
