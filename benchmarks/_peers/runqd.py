"""runqd from PyPI, which is gflow: ``gflowd``, ``gbatch`` and their kin."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

from _peers.peer import Peer, ready


class Runqd(Peer):
    """It reads NVML every 10 s. Its jobs run as processes, not in tmux: they leave nothing."""

    name = "runqd"
    requirement = "runqd==0.4.18"
    runner = "gflowd"
    patience_s = 35.0

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._bin = self.programs / self.name / "bin"
        self.env["PATH"] = f"{self._bin}:{self.env['PATH']}"
        for kind in ("CONFIG_HOME", "DATA_HOME", "CACHE_HOME", "RUNTIME_DIR"):
            folder = self.home / kind.lower()
            folder.mkdir(mode=0o700)
            self.env[f"XDG_{kind}"] = str(folder)

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.call(self.command, "init", "--yes", "--port", port)
        config = self.home / "config_home" / "gflow" / "gflow.toml"
        config.write_text(f'{config.read_text()}\n[executor]\ntype = "process"\n')
        self.restart()

    def restart(self) -> None:
        self._process = self.spawn(self.command)
        ready(lambda: self._call("gqueue"), self.name)

    def _call(self, command: str, *argv: str) -> str:
        return self.call(str(self._bin / command), *argv)

    def submit(self, argv: Sequence[str]) -> str:
        said = self._call("gbatch", "--gpus", "1", *argv)
        return said.split()[3]  # "Submitted batch job ID (name)"

    def daemon(self) -> int:
        return self._process.pid

    def fate(self, job: str) -> str:
        listed = json.loads(self._call("gqueue", "--all", "--user", "all", "--output", "json"))
        states = {str(found["id"]): str(found["state"]) for found in listed["jobs"]}
        return states.get(job, "")

    def log(self, job: str) -> str:
        return self._call("gjob", "log", job)
