"""What 10,000 jobs of an engine cost this side: asking how they stand, and a round of the desk.

``python benchmarks/engines.py [--jobs 10000]`` prints one JSON object. Slurm's ``squeue`` and Ray's
head are stand-ins that speak as they do and list that many jobs, so these are the costs of this
program alone, not those of a cluster; the desk, its queue and its disk are real. ``*_cpu_ms`` is
the processor time of this process, ``*_ms`` the least of several on the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.enginedesk import EngineDesk
from gpusched_ipy.engines import Capabilities, EngineJob, EngineState, Health, Status
from gpusched_ipy.engines.ray import RayEngine
from gpusched_ipy.engines.slurm import SlurmEngine
from gpusched_ipy.job import JobKind, JobSpec
from gpusched_ipy.locks import Membership
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

GPUS = 8
_REASON = (
    "Job has not started yet. It may be waiting for resources (CPUs, GPUs, memory, custom "
    "resources) to become available."
)


def cost(act: Callable[[], object], times: int = 5) -> dict[str, float]:
    """Milliseconds of one such act, the least of several: on the clock, and of our processor."""
    took, own = [], []
    for _ in range(times):
        began, began_own = time.perf_counter(), time.process_time()
        act()
        took.append(time.perf_counter() - began)
        own.append(time.process_time() - began_own)
    return {"ms": min(took) * 1000, "cpu_ms": min(own) * 1000}


def keys(count: int) -> list[str]:
    """Keys as the queue makes them."""
    return [f"{number:032x}-1-beef" for number in range(count)]


def slurm(folder: Path, count: int) -> dict[str, float]:
    """One status of that many jobs by a ``squeue`` that only prints them."""
    rows = [f"{n}|gpuq-{key}|PENDING|Priority|" for n, key in enumerate(keys(count))]
    (folder / "rows").write_text("\n".join(rows) + "\n", encoding="utf-8")
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\nexec cat {folder}/rows\n", encoding="utf-8")
    program.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    engine, asked = SlurmEngine(), keys(count)

    def act() -> None:
        assert {one.state for one in engine.status(asked).values()} == {EngineState.QUEUED}

    return cost(act)


@contextmanager
def ray_head(count: int) -> Iterator[tuple[str, int]]:
    """A head that only lists: its address, and the bytes of its answer."""
    job = {
        "type": "SUBMISSION", "job_id": None, "driver_info": None, "status": "PENDING",
        "entrypoint": "exec python3 /shared/engines/0123456789ab/ray/key/node.py /shared/key",
        "message": _REASON, "error_type": None, "start_time": 1795392062401, "end_time": None,
        "metadata": {"name": "train"},
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "20"}},
        "driver_agent_http_address": None, "driver_node_id": None, "driver_exit_code": None,
    }  # fmt: skip
    text = json.dumps([job | {"submission_id": f"gpuq-{key}"} for key in keys(count)]).encode()

    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", len(text)
    server.shutdown()


def ray(count: int) -> dict[str, float]:
    """One status of that many jobs by Ray's list; its own processor time has the stand-in's too."""
    with ray_head(count) as (url, size):
        engine, asked = RayEngine(Settings.load({"ray_address": url}, environ={})), keys(count)

        def act() -> None:
            assert {one.state for one in engine.status(asked).values()} == {EngineState.QUEUED}

        return cost(act) | {"answer_mib": size / 2**20}


class Idle:
    """An engine whose jobs wait for ever."""

    name = "idle"

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def ping(self, timeout: float) -> Health:
        return Health(up=True, text="", gpus=GPUS)

    def submit(self, job: EngineJob) -> str:
        return job.key

    def status(self, keys: Sequence[str]) -> Mapping[str, Status]:
        return {key: Status(state=EngineState.QUEUED, text="(Priority)") for key in keys}

    def rank(self, ranks: Mapping[str, int]) -> None:
        pass

    def cancel(self, keys: Sequence[str]) -> None:
        pass

    def reattach(self) -> Sequence[str]:
        return ()


def desk(folder: Path, count: int) -> dict[str, float]:
    """Rounds of the desk with that many pending jobs: the first, one in which nothing has changed,
    and one after a job in front is gone, which changes the place of every other."""
    settings = Settings.load({"state_dir": str(folder / "state")}, environ={})
    store = Store(open_state_dir(settings))
    member = Membership(store.state)
    for start in range(0, count, 5000):
        with store.writing():
            for number in range(start, min(start + 5000, count)):
                store.submit(
                    JobSpec(
                        uid=f"{number:032x}", kind=JobKind.COMMAND, name="job", engine="idle",
                        argv=("/bin/true",), cwd="/", env={"PATH": "/usr/bin:/bin"},
                    )
                )  # fmt: skip
    made = EngineDesk(Idle(), folder / "engines", store, settings, SystemClock(), member.key)
    jobs = store.jobs()

    def round_of_it() -> None:
        made.round(jobs, {})

    def after_an_end() -> None:
        jobs.pop(0)
        made.round(jobs, {})

    first = cost(round_of_it, 1)
    made.round(jobs, {})
    measured = {"first": first, "quiet": cost(round_of_it), "moved": cost(after_an_end, 3)}
    store.close()
    return {f"{what}_{name}": took for what, one in measured.items() for name, took in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    wanted = parser.parse_args().jobs
    found: dict[str, object] = {}
    for count in sorted({10, wanted // 10, wanted}):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            figures = {"slurm": slurm(folder, count), "ray": ray(count)}
            figures["desk"] = desk(folder, count)
        found[str(count)] = {
            f"{what}_{key}": round(value, 2)
            for what, values in figures.items()
            for key, value in values.items()
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
