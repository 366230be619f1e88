"""What every adapter can do, and what they share: calls from a clean environment, and an end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import venv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from _peers.machine import Machine, has_ended, until

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class NotThereError(Exception):
    """A program cannot be measured here, and why."""


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds so far and memory (PSS, MiB) of all processes of a program."""

    cpu_s: float
    mem_mib: float
    processes: int


class Peer(ABC):
    """One queue of one program, in folders of its own.

    Args:
        programs: the folder into which :meth:`install` has put the program.
        machine: the card that it sees.
    """

    name: ClassVar[str]
    requirement: ClassVar[str] = ""  # of pip
    runner: ClassVar[str] = ""  # the first word of its commands
    patience_s: ClassVar[float] = 15.0  # so long after a GPU fell idle a job may still start

    def __init__(self, programs: Path, machine: Machine) -> None:
        self.programs, self.machine = programs, machine
        self.home = machine.folder / self.name
        self.home.mkdir()
        self.mark = f"PEERS_RUN={self.home}"
        self.accepted = 0
        self.enough = False
        self.env = {
            **machine.env,
            "HOME": str(self.home),
            "USER": "user1",
            "TMPDIR": str(self.home),
            "PEERS_RUN": str(self.home),
        }

    @classmethod
    def install(cls, programs: Path) -> None:
        """Get the program, once.

        Raises:
            NotThereError: it cannot be had here.
        """
        place = programs / cls.name
        if (place / "bin" / cls.runner).exists():
            return
        try:
            venv.create(place, with_pip=True)
            pip = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", cls.requirement]
            subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
        except subprocess.CalledProcessError as exc:
            last = (exc.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NotThereError(f"pip cannot install {cls.requirement}: {last}") from exc
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise NotThereError(f"{cls.requirement} cannot be installed: {exc}") from exc

    @property
    def command(self) -> str:
        """The path of the program."""
        return str(self.programs / self.name / "bin" / self.runner)

    # What each adapter says in its program's words.

    def start(self) -> None:  # noqa: B027 - most need nothing
        """Bring it up as its manual says; nothing where a submit does that."""

    @abstractmethod
    def submit(self, argv: Sequence[str]) -> str:
        """Queue one job as at a terminal; its id."""

    def fill(self, jobs: Iterable[Sequence[str]]) -> None:
        """Queue many in the quickest way that its manual shows, until :attr:`enough`."""
        for argv in jobs:
            if self.enough:
                return
            self.submit(argv)
            self.accepted += 1

    @abstractmethod
    def daemon(self) -> int:
        """The pid of the process that dispatches."""

    def restart(self) -> None:  # noqa: B027 - most need nothing
        """What its user does after that process was killed; nothing where a submit does it."""

    def fate(self, job: str) -> str:
        """What it says became of that job, in its own word; empty where it knows nothing."""
        return ""

    def log(self, job: str) -> str:
        """What it kept of that job's output."""
        return ""

    # What they share.

    def spawn(self, *argv: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a process that goes on; its output goes into a file."""
        with (self.home / "daemon.out").open("ab") as out:
            return subprocess.Popen(
                argv, env=self.env, cwd=self.home, stdin=stdin, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def call(self, *argv: str, limit_s: float = 120.0, may_fail: bool = False) -> str:
        """Run a command of it to its end; what it printed.

        Raises:
            NotThereError: it failed, or did not end.
        """
        with tempfile.TemporaryFile(dir=self.home) as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                argv, env=self.env, cwd=self.home, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
            ended = has_ended(process, limit_s)
            if not ended:
                process.kill()
            status = process.wait()
            out.seek(0), err.seek(0)
            said, complained = out.read().decode(), err.read().decode().strip()
        if not ended or (status and not may_fail):
            why = complained.splitlines()[-1:] or [f"status {status}" if ended else "does not end"]
            raise NotThereError(f"{' '.join(argv[:3])}: {why[0]}")
        return said

    def processes(self) -> list[int]:
        """The pids of all that this queue has started, its jobs left out."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and self._is_ours(entry):
                    found.append(int(entry.name))
        return found

    def _is_ours(self, entry: Path) -> bool:
        marked = self.mark.encode() in (entry / "environ").read_bytes().split(b"\0")
        return marked and os.readlink(entry / "exe") != str(self.machine.probe)

    def cost(self) -> Cost:
        """What its processes have used so far; what ends between two looks is not seen."""
        cpu = memory = 0.0
        pids = self.processes()
        for pid in pids:
            with suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                cpu += (int(stat[11]) + int(stat[12])) * TICK_S
                memory += _pss_kib(pid) / 1024
        return Cost(cpu, memory, len(pids))

    def stop(self) -> None:
        """End everything that this queue has started."""

        def all_gone() -> bool:
            pids = [
                int(entry.name)
                for entry in Path("/proc").iterdir()
                if entry.name.isdigit() and _has(entry, self.mark)
            ]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        until(all_gone, 30, 0.05)


def _has(entry: Path, mark: str) -> bool:
    try:
        return mark.encode() in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def ready(answers: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
    """Wait until a daemon answers.

    Raises:
        NotThereError: it does not in time.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            answers()
        except (NotThereError, OSError) as exc:
            if time.monotonic() > deadline:
                raise NotThereError(f"{what} does not come up: {exc}") from exc
            time.sleep(0.1)
        else:
            return
