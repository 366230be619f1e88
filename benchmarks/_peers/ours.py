"""gpusched_ipy, from this checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from _peers.peer import NotThereError, Peer

ROOT = Path(__file__).resolve().parents[2]
# A script of a user's: one submit a line, the id printed once it is accepted.
SCRIPT = """
import json, sys
from gpusched_ipy import Queue
queue = Queue()
for line in sys.stdin: print(queue.submit(json.loads(line)).id, flush=True)
"""
AGENT = """
from gpusched_ipy import Queue
from gpusched_ipy.agent import running_agent
queue = Queue()
print(running_agent(queue.state, queue.store) or "")
"""


class Ours(Peer):
    """The agent starts with the first submit and leaves 5 s after the last job."""

    name = "gpusched_ipy"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.env |= {"GPUSCHED_STATE_DIR": str(self.home / "state"), "PYTHONPATH": str(ROOT)}
        self.env |= {"GPUSCHED_BACKEND": "nvml"}

    @classmethod
    def install(cls, programs: Path) -> None:
        """It is here."""

    def _gpusched(self, *argv: str) -> str:
        return self.call(sys.executable, "-m", "gpusched_ipy", *argv)

    def submit(self, argv: Sequence[str]) -> str:
        return self._gpusched("submit", "--", *argv).strip()

    def fill(self, jobs: Iterable[Sequence[str]]) -> None:
        pipe = subprocess.PIPE
        argv = [sys.executable, "-c", SCRIPT]
        with subprocess.Popen(
            argv, env=self.env, cwd=self.home, stdin=pipe, stdout=pipe, text=True
        ) as script:
            assert script.stdin
            assert script.stdout
            for job in jobs:
                if self.enough:
                    break
                print(json.dumps(list(job)), file=script.stdin, flush=True)
                if not script.stdout.readline():
                    raise NotThereError("the script that submits has ended")
                self.accepted += 1
            script.stdin.close()

    def daemon(self) -> int:
        return int(self.call(sys.executable, "-c", AGENT))

    def _shown(self, job: str) -> dict[str, object]:
        shown: dict[str, object] = json.loads(self._gpusched("show", job, "--json"))
        return shown

    def fate(self, job: str) -> str:
        return str(self._shown(job)["state"])

    def reason(self, job: str) -> str:
        """Why the job waits, in a word for people; empty where it does not."""
        return str(self._shown(job)["reason"] or "")

    def log(self, job: str) -> str:
        return self._gpusched("log", job)
