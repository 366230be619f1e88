"""What a shim adds to a command's start when none waits for its order: from cold (Linux, macOS).

From the moment at which somebody sets out to start the command to the command's first instruction:
once with Popen alone, once with a shim that is started for it, takes the claim over, and begins it.
In turns; what the shim adds is the difference of each pair. The agent keeps one shim started, so
that as a rule a command waits for none of this.

    python benchmarks/shim_start.py [--starts 20]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from gpusched_ipy.config import Settings
from gpusched_ipy.job import JobKind, JobSpec
from gpusched_ipy.locks import Membership
from gpusched_ipy.output import create_log, read_log
from gpusched_ipy.runners.command import ParkedShim
from gpusched_ipy.scheduler import Claim
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

LIMIT_MS = 60.0
ARGV = (sys.executable, "-I", "-S", "-c", "import time; print(time.monotonic())")


def bare() -> float:
    """Milliseconds until the command's first instruction, without a shim."""
    begun = time.monotonic()
    done = subprocess.run(ARGV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    return (float(done.stdout) - begun) * 1e3


def cold(store: Store, member: str, number: int) -> float:
    """The same under a shim of its own, which is not even started before."""
    spec = JobSpec(uid=f"u{number}", kind=JobKind.COMMAND, name="probe", argv=ARGV, cwd="/")
    job = store.claim(store.submit(spec), (), member=member)
    assert job.attempt is not None
    path = store.state.log(job.attempt)
    log = create_log(path)
    begun = time.monotonic()
    shim = ParkedShim(store, log_cap=1 << 20)
    assert shim.order(Claim(job=job, gpus=(), lock_fds=()), log)
    os.close(log)
    shim.dismiss()  # nobody here hears the end: it records that itself
    while not store.job(job.id).ended:
        time.sleep(0.02)
    return (float(read_log(path)) - begun) * 1e3


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--starts", type=int, default=20)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as folder:
        state = open_state_dir(Settings.load({"state_dir": f"{folder}/state"}, environ={}))
        store, member = Store(state), Membership(state)
        cold(store, member.key, 0)  # compiles what was never run
        bare()
        # In turns: what else the machine does meets both alike.
        pairs = [(bare(), cold(store, member.key, number + 1)) for number in range(starts)]
        time.sleep(0.5)  # shims that still leave write here
        member.leave()
        store.close()
    without, with_shim = zip(*pairs, strict=True)
    added = [under - alone for alone, under in pairs]
    found: dict[str, object] = {"limit_ms": LIMIT_MS, "load": os.getloadavg()[0]}
    for name, values in (("popen", without), ("shim", with_shim), ("added", added)):
        found[f"{name}_ms"] = {
            "least": round(min(values), 1), "median": round(statistics.median(values), 1),
        }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
