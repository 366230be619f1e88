"""A real Ray head on this machine, with fake GPUs, for tests. Nothing of it outlives the tests."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from helpers import wait_until
from requires import require

from gpusched_ipy.engines.rayjobs import AnswerError, RayJobs, SilentError, Submission

HERE = Path(__file__).parent
# Ray gives the ports from 10002 to 19999 to its workers, unless told otherwise.
_ANY_PORT = ("--min-worker-port=0", "--max-worker-port=0")


def ray_program() -> Path:
    """Ray's own command; the test skips where there is none."""
    beside = Path(sys.prefix) / "ray" / "bin" / "ray"  # `make test` has put it there
    found = str(beside) if beside.exists() else shutil.which("ray")
    require("ray", found, "Ray is not installed; python -m pip install 'ray[default]'")
    return Path(str(found))


class RayHead:
    """One head: its address, its token, and the keeper that ends it."""

    def __init__(self, gpus: int = 2) -> None:
        program = ray_program()
        # Not under pytest's folder: Ray makes Unix sockets in it, whose paths are short.
        self.folder = Path(tempfile.mkdtemp(prefix="gpq-ray-", dir="/tmp"))
        self.token_file = self.folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        dashboard, *others = _free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        argv = [
            str(program), "start", "--head", "--node-ip-address=127.0.0.1",
            f"--port={others[0]}", f"--dashboard-agent-listen-port={others[1]}",
            f"--ray-client-server-port={others[2]}", f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1", "--include-dashboard=true", "--include-log-monitor=false",
            f"--num-gpus={gpus}", "--num-cpus=4", "--object-store-memory=80000000",
            '--resources={"accelerator_type:A100": 1}', f"--temp-dir={self.folder}", *_ANY_PORT,
        ]  # fmt: skip
        # It outlives the test that starts it, whose folders are no business of its jobs.
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "XDG_", "IPYTHONDIR", "GPUSCHED_"))
        }
        env |= {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0",
            "RAY_raylet_start_wait_time_s": "240",  # for its own parts, of 30 s
        }  # fmt: skip
        self.log = self.folder / "start.log"
        with self.log.open("w") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, str(HERE / "ray_keeper.py"), *argv],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, text=True,
                start_new_session=True,
            )  # fmt: skip

    @property
    def token(self) -> str:
        """Its token."""
        return self.token_file.read_text()

    def client(self, limit_s: float = 30.0) -> RayJobs:
        """Somebody who speaks with it."""
        return RayJobs(self.url, self.token, limit_s=limit_s)

    def start(self, **environment: str) -> None:
        """Start it and wait until it takes jobs; the API answers some seconds before it does."""
        line = " ".join(["start", *(f"{name}={value}" for name, value in environment.items())])
        for _ in range(3):  # a loaded machine is too slow for one or another time limit of Ray's
            if self._tell(line) == "0":
                break
            self.kill()
        else:
            raise AssertionError(self.log.read_text())
        wait_until(self._takes_jobs, timeout=120, what="a Ray head that takes jobs")

    def lose_node(self) -> None:
        """The program that stands for its one node dies; the rest of the head goes on."""
        below = psutil.Process(self._keeper.pid).children(recursive=True)
        (raylet,) = (process for process in below if process.name() == "raylet")
        raylet.kill()

    def kill(self) -> None:
        """All of it is gone at once, as after a power cut."""
        assert self._tell("kill") == "0"

    def close(self) -> None:
        """End it, and see to it that nothing is left."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        assert self._keeper.wait(timeout=60) == 0
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tell(self, line: str) -> str:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(f"{line}\n")
        self._keeper.stdin.flush()
        return self._keeper.stdout.readline().strip()

    def _takes_jobs(self) -> bool:
        try:
            self.client().submit(Submission(id="ready", entrypoint="true"))
        except AnswerError as exc:
            return exc.exists_already
        except SilentError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports
