"""gpuqu, whose command is ``gpuq``: a server with a dashboard."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterable, Sequence

from _peers.peer import Peer, ready


class Gpuqu(Peer):
    """It reads ``nvidia-smi`` and looks every 2 s."""

    name = "gpuqu"
    requirement = "gpuqu==0.1.3"
    runner = "gpuq"

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        self.restart()

    def restart(self) -> None:
        self._process = self.spawn(self.command, "serve", "--port", self._port)
        ready(lambda: self._ask("system"), self.name)

    def _ask(self, path: str, body: object = None) -> dict[str, object]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/api/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, object] = json.load(answer)["data"]
        return found

    def submit(self, argv: Sequence[str]) -> str:
        said = self.call(self.command, "submit", "--port", self._port, "--", *argv)
        return said.split()[2]  # "submitted task ID (queued)"

    def fill(self, jobs: Iterable[Sequence[str]]) -> None:
        for argv in jobs:
            if self.enough:
                return
            self._ask("tasks", {"command": list(argv)})
            self.accepted += 1

    def daemon(self) -> int:
        return self._process.pid

    def fate(self, job: str) -> str:
        return str(self._ask(f"tasks/{job}")["status"])

    def log(self, job: str) -> str:
        return self.call(self.command, "logs", "--port", self._port, job)
