"""simple_gpu_scheduler: commands on its standard input, one at a time for each GPU listed."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence

from _peers.peer import Peer


class SimpleGpuScheduler(Peer):
    """No queue but the pipe: a job is submitted when its line is written."""

    name = "simple_gpu_scheduler"
    requirement = "simple_gpu_scheduler==0.1.4"
    runner = "simple_gpu_scheduler"

    def start(self) -> None:
        self._process = self.spawn(self.command, "--gpus", "0", stdin=subprocess.PIPE)

    restart = start

    def submit(self, argv: Sequence[str]) -> str:
        assert self._process.stdin
        self._process.stdin.write(f"{shlex.join(argv)}\n".encode())
        self._process.stdin.flush()
        return ""

    def daemon(self) -> int:
        return self._process.pid
