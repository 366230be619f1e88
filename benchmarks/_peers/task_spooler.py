"""Debian's task-spooler, ``tsp``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from _peers.peer import NotThereError, Peer


class TaskSpooler(Peer):
    """A server that starts with the first job; each queued job is a process that waits."""

    name = "task-spooler"
    runner = "tsp"

    @classmethod
    def install(cls, programs: Path) -> None:
        """The system's, or else the package without installing it."""
        place = programs / cls.name
        if (place / "bin" / "tsp").exists():
            return
        (place / "bin").mkdir(parents=True, exist_ok=True)
        found = shutil.which("tsp")
        if found is not None:
            (place / "bin" / "tsp").symlink_to(found)
            return
        try:
            fetch = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", cls.name]
            subprocess.run(fetch, cwd=place, check=True, capture_output=True, timeout=120)
            (package,) = place.glob("*.deb")
            unpack = ["dpkg-deb", "-x", str(package), str(place / "root")]
            subprocess.run(unpack, check=True, capture_output=True, timeout=60)
            (place / "bin" / "tsp").symlink_to(place / "root" / "usr" / "bin" / "tsp")
        except subprocess.CalledProcessError as exc:
            raise NotThereError(exc.stderr.decode().strip().splitlines()[-1]) from exc
        except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
            raise NotThereError(f"its package cannot be had: {exc}") from exc

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.env["TS_SOCKET"] = str(self.home / "socket")

    def submit(self, argv: Sequence[str]) -> str:
        return self.call(self.command, *argv).strip()

    def daemon(self) -> int:
        # The server is the process that is everybody's parent.
        parents = {_parent(pid) for pid in self.processes()}
        return next(pid for pid in self.processes() if _parent(pid) == 1 or pid in parents)

    def fate(self, job: str) -> str:
        return self.call(self.command, "-s", job, may_fail=True).strip()

    def log(self, job: str) -> str:
        return self.call(self.command, "-c", job, may_fail=True)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
