"""The machine on which the programs are compared: one card that plays, its stranger, their jobs.

The card is a ``libnvidia-ml.so.1`` and an ``nvidia-smi`` of our own that read files. Jobs do not
show on it. Each program gets a machine to itself: they do not see one another's strangers.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
UUID = "GPU-fake-0"
TOTAL, TAKEN = 40 << 30, 8000 << 20  # a stranger leaves room, as most do
# Its last act, like that of a driver, is that the card no longer shows it.
STRANGER = """
import os, sys, time
sys.stdin.readline()
for left, shown in zip(sys.argv[1::2], sys.argv[2::2]): os.replace(left, shown)
# Only now: some file systems put the new file on the disk before it stands in the other's place.
print(time.monotonic(), flush=True)
os._exit(0)
"""


def until(condition: Callable[[], bool], limit_s: float, every_s: float = 0.005) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def has_ended(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether the process ended in time; waits on its pidfd, so that the end is seen at once."""
    pidfd = os.pidfd_open(process.pid)
    try:
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        return bool(waiting.poll(1000 * limit_s))
    finally:
        os.close(pidfd)


@cache
def probe(folder: Path) -> Path:
    """The job that all programs are given, built once."""
    built = folder / "probe"
    source = str(HERE / "probe.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", str(built), source], check=True)
    return built


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job, in seconds of the monotonic clock; ``ended`` is None while it runs."""

    name: str
    began: float
    ended: float | None


class Trace:
    """What the jobs of one measurement have noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    def runs(self) -> list[Run]:
        """All runs so far, in the order in which they began."""
        began: dict[str, float] = {}
        ended: dict[str, float] = {}
        for line in self.path.read_text().splitlines():
            what, name, at = line.split()
            (began if what == "begin" else ended)[name] = float(at)
        found = [Run(name, at, ended.get(name)) for name, at in began.items()]
        return sorted(found, key=lambda run: run.began)

    def began(self, name: str) -> float | None:
        """When that job began, if it has."""
        return next((run.began for run in self.runs() if run.name == name), None)

    def done(self) -> int:
        """How many are over."""
        return f"\n{self.path.read_text()}".count("\nend ")

    def ended(self) -> list[Run]:
        """The runs that are over."""
        return [run for run in self.runs() if run.ended is not None]


class Stranger:
    """A process of somebody else's that holds the card."""

    def __init__(self, machine: Machine) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", STRANGER, *machine.prepare_leaving()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        machine.show(self._process.pid)

    def leave(self) -> float:
        """End it; when, in seconds of the monotonic clock."""
        said, _ = self._process.communicate("now\n", timeout=30)
        return float(said)


class Machine:
    """One card.

    Args:
        folder: where its files lie.
        programs: a folder for what is built once and serves all machines.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.probe = probe(programs)
        sys.path[:0] = [str(TESTS)] if str(TESTS) not in sys.path else []
        from fake_nvidia_smi import FakeSmi
        from fake_nvml import build

        for name in ("libnvidia-ml.so.1", "libnvidia-ml.so"):
            (self.folder / name).symlink_to(build() / "libnvidia-ml.so.1")
        self._nvml, self._smi = self.folder / "nvml.state", FakeSmi(self.folder).state_file
        self.show(None)

    @property
    def env(self) -> dict[str, str]:
        """The environment in which programs see this card."""
        return {
            "PATH": f"{self.folder}:/usr/local/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(self.folder),
            "FAKE_NVML_STATE": str(self._nvml),
            "LANG": "C.UTF-8",
        }

    def show(self, stranger: int | None) -> None:
        """Let the card show that process, or nobody."""
        _write(self._smi, _smi_text(stranger is not None))
        _write(self._nvml, _nvml_text(stranger))

    def prepare_leaving(self) -> list[str]:
        """What to move where for the card to show nobody: pairs of paths."""
        moves: list[str] = []
        for shown, text in ((self._smi, _smi_text(False)), (self._nvml, _nvml_text(None))):
            left = shown.with_suffix(".left")
            left.write_text(text)
            moves += [str(left), str(shown)]
        return moves

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def _nvml_text(stranger: int | None) -> str:
    lines = [f"gpu.0.uuid={UUID}", f"gpu.0.mem_total={TOTAL}"]
    if stranger is not None:
        lines += ["gpu.0.util=90", f"gpu.0.mem_used={TAKEN}", f"gpu.0.proc={stranger}:{TAKEN}:C:90"]
    return "\n".join([*lines, ""])


def _smi_text(taken: bool) -> str:
    card = {"index": 0, "uuid": UUID, "name": "Fake A100", "memory.total": TOTAL >> 20}
    card |= {"utilization.gpu": 90 if taken else 0, "memory.used": TAKEN >> 20 if taken else 0}
    return json.dumps({"gpus": [card]})
