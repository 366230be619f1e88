"""What a job of ours has had at an engine, kept there idle for the next one.

Each has a folder beside those of the jobs, named after its first job: ``keep.json`` (what it is and
for how long it may idle), the node's ``idle`` (which turn is next, and since when), and ``use-N``:
what is run in that turn, or that nothing is any more. A ``use-N`` is made once, by the queue or by
the node: whoever comes first has decided.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gpusched_ipy.engines.folder import read_json, sync_folder, write_new
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import Job

_PROGRAM = "keep.py"


class GoneError(GpuSchedError):
    """What was kept for this job is not there any more: nothing will start it there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a job needs of what is kept."""

    gpus: int
    gpu_type: str | None
    time_s: float | None

    @classmethod
    def of(cls, job: Job) -> Need:
        """That of a job of the queue."""
        request = job.request
        return cls(gpus=request.gpus, gpu_type=request.on_gpu, time_s=request.time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """As what it was asked for. A job goes into it only where its own terms are the same."""

    gpus: int
    gpu_type: str | None
    options: tuple[str, ...]  # of the site, by the user's setting
    python: str  # that runs the jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """What the node has said when a job was over."""

    turn: int  # whose job it waits for
    pid: int  # the one to call
    host: str
    since_wall: float


@dataclass(frozen=True, slots=True)
class KeptFolder:
    """The folder of one; its name is the key of the first job."""

    path: Path

    @property
    def key(self) -> str:
        """The key of the first job, by whose name the engine knows it."""
        return self.path.name

    @property
    def program(self) -> Path:
        """What the engine starts, with this folder and that of the first job as arguments."""
        return self.path / _PROGRAM

    def make(self, terms: Terms, idle_s: float, least_min: int | None) -> None:
        """Make it, whole or not at all.

        Args:
            idle_s: how long it may be idle.
            least_min: the minutes that its first job needs by itself.

        Raises:
            OSError: it cannot be made.
        """
        if self.path.exists():
            return
        beside = self.path.with_name(f".{self.key}.new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(mode=0o700, parents=True)
        about = asdict(terms) | {"idle_s": idle_s, "least_min": least_min}
        write_new(beside / "keep.json", json.dumps(about))
        text = files("gpusched_ipy.engines").joinpath(_PROGRAM).read_text(encoding="utf-8")
        write_new(beside / _PROGRAM, text)
        os.rename(beside, self.path)
        sync_folder(self.path.parent)

    def about(self) -> dict[str, Any] | None:
        """What :meth:`make` was told; None where it cannot be read."""
        return read_json(self.path / "keep.json")

    def idle(self) -> Idle | None:
        """The last word of its node; None before the first job is over."""
        path = self.path / "idle"
        found = read_json(path)
        if found is None:
            return None
        try:
            since = path.stat().st_mtime
            return Idle(turn=found["turn"], pid=found["pid"], host=found["host"], since_wall=since)
        except (FileNotFoundError, KeyError):
            return None

    def use(self, turn: int) -> dict[str, Any] | None:
        """What has become of that turn; empty while it is being written; None: nothing yet."""
        path = self.path / f"use-{turn}"
        return (read_json(path) or {}) if path.exists() else None

    def uses(self) -> list[str | None]:
        """The key of the job of each turn from the first one on; None: nothing any more."""
        found: list[str | None] = []
        while None not in found and (use := self.use(len(found) + 1)) is not None:
            folder = use.get("folder")
            found.append(None if folder is None else os.path.basename(folder))
        return found

    def take(self, turn: int, folder: Path | None) -> bool:
        """Decide what that turn is for, None: for nothing; False: somebody has decided already."""
        mark = {"folder": None if folder is None else str(folder)}
        try:
            write_new(self.path / f"use-{turn}", json.dumps(mark))
        except FileExistsError:
            return False
        except FileNotFoundError:
            return False  # its folder is gone
        sync_folder(self.path)
        return True

    def remove(self) -> None:
        """Delete all of it; its node, should it still wait there, leaves."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # others are kept beside it
            self.path.parent.rmdir()


def kept_folders(root: Path) -> list[KeptFolder]:
    """Every one below the folder of an engine's jobs, whoever has made it."""
    folder = root / "kept"
    if not folder.exists():
        return []
    return [KeptFolder(path) for path in sorted(folder.iterdir()) if path.name[0] != "."]


class Keeper(Protocol):
    """What keeps, for one engine, what jobs of ours have had there. One thread calls it."""

    @property
    def busy(self) -> bool:
        """Whether anything is kept, or used by a job in its turn."""
        ...

    def tend(self, waiting: Sequence[Need], *, keep: bool) -> None:
        """Look how they stand, and give back what nobody needs. Asks the engine seldom.

        Args:
            waiting: the jobs that wait for GPUs of the engine, the next one first.
            keep: False: give back whatever is idle.
        """
        ...

    def offers(self, need: Need) -> bool:
        """Whether such a job would start at once in what is kept."""
        ...

    def leave(self) -> None:
        """Give back whatever is idle, without long waiting: nobody will come for it."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """An engine that can keep what jobs have had; its ``submit`` starts in it what fits."""

    def keeper(self, root: Path) -> Keeper:
        """What keeps it.

        Args:
            root: the folder of this queue's jobs at the engine.
        """
        ...
