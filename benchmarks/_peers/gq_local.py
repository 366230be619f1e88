"""gq-local, whose command is ``gq``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from _peers.peer import Peer


class GqLocal(Peer):
    """Its daemon starts with the first command; it reads NVML and looks every 2 s."""

    name = "gq-local"
    requirement = "gq-local==0.3.0"
    runner = "gq"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._run = self.home / "run"
        self.env |= {"GQ_DATA_DIR": str(self.home / "data"), "GQ_RUNTIME_DIR": str(self._run)}
        self.env["GQ_ALLOW_ROOT"] = "1"

    def start(self) -> None:
        self.call(self.command, "daemon", "start")

    def submit(self, argv: Sequence[str]) -> str:
        said = self.call(self.command, "run", "-g", "1", "--", *argv)
        return said.split()[-1]  # "Submitted job ID"

    def daemon(self) -> int:
        return int(Path(self._run / "gq.pid").read_text())

    def fate(self, job: str) -> str:
        return str(json.loads(self.call(self.command, "ps", "--json", job))[0]["state"])

    def log(self, job: str) -> str:
        return self.call(self.command, "logs", job)
