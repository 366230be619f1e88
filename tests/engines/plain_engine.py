"""An engine of another package, as small as one can be: each job is a process on this machine.

What an engine must do is all here; how a job ended, its folder says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpusched_ipy.config import Settings
from gpusched_ipy.engines import Capabilities, EngineJob, EngineState, Health, Status


class PlainEngine:
    """Processes whose numbers stand in a folder, by the names of their jobs."""

    name = "plain"

    def __init__(self, pids: Path) -> None:
        self._pids = pids
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def capabilities(self) -> Capabilities:
        """Nothing beyond the least."""
        return Capabilities()

    def ping(self, timeout: float) -> Health:
        """It is always there."""
        return Health(up=True, text="processes on this machine", version="1", gpus=2)

    def submit(self, job: EngineJob) -> str:
        """Start the program of the folder."""
        self._pids.mkdir(mode=0o700, parents=True, exist_ok=True)
        argv = [sys.executable, "-I", str(job.folder.runner), str(job.folder.path)]
        started = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(job.gpus)))},
            start_new_session=True,
        )
        self._started[job.key] = started
        (self._pids / job.key).write_text(str(started.pid))
        return str(started.pid)

    def status(self, keys: Sequence[str]) -> Mapping[str, Status]:
        """What the processes do."""
        return {key: self._one(key) for key in keys}

    def rank(self, ranks: Mapping[str, int]) -> None:
        """Nobody waits here."""

    def cancel(self, keys: Sequence[str]) -> None:
        """Ask the program to end its job."""
        for key in keys:
            if self._one(key).state is EngineState.RUNNING:
                os.kill(self._pid(key) or 0, signal.SIGTERM)

    def reattach(self) -> Sequence[str]:
        """Those that run."""
        keys = [path.name for path in self._pids.iterdir()] if self._pids.exists() else []
        return [key for key in keys if self._one(key).state is EngineState.RUNNING]

    def _pid(self, key: str) -> int | None:
        path = self._pids / key
        return int(path.read_text()) if path.exists() else None

    def _one(self, key: str) -> Status:
        pid = self._pid(key)
        if pid is None:
            return Status(state=EngineState.UNKNOWN)
        started = self._started.get(key)
        if started is not None and started.poll() is not None:
            return Status(state=EngineState.ENDED, native=str(pid))
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return Status(state=EngineState.ENDED, native=str(pid))
        return Status(state=EngineState.RUNNING, native=str(pid), where="this machine")


def make(settings: Settings) -> PlainEngine:
    """What the entry point names."""
    assert settings.engine_dir is not None
    return PlainEngine(settings.engine_dir / "plain-pids")
