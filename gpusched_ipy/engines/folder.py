"""The folder of one attempt of a job at an engine, on a file system that its nodes see as well.

``task.json`` (what to run) and ``secret.json`` (variables, gone once it runs) stand there before
``intent`` (it is being handed over, and under which key) and ``submitted.json`` (the engine has
it). Then the node's ``claim`` (made once: whoever makes it runs the job), ``heartbeat``, ``log``
and at the end ``result.json``, which alone is the truth. ``cancel`` asks the node to end it.
Nothing here asks an engine anything.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gpusched_ipy.errors import UserError
from gpusched_ipy.statedir import StateDir, create_private

_RUNNER = "node.py"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the node runs."""

    argv: tuple[str, ...]
    shell: bool = False
    cwd: str | None = None
    env: Mapping[str, str]
    time_s: float | None = None
    log_cap: int = 100_000_000
    # It writes into the log itself, uncapped: a cell caps what it shows, and says how long the log
    # was before each part of it.
    direct: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How the job ended, as the node has seen it."""

    ended: str  # "exit", "timeout", "cancel" (we asked) or "engine" (it was told to end)
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None  # it could not be run
    run_s: float | None = None


@dataclass(frozen=True, slots=True)
class JobFolder:
    """One folder; its name is the key."""

    path: Path

    @property
    def key(self) -> str:
        """The key of the attempt."""
        return self.path.name

    @property
    def log(self) -> Path:
        """What the job writes."""
        return self.path / "log"

    @property
    def runner(self) -> Path:
        """The program that the engine is to start, with the folder as its one argument."""
        return self.path / _RUNNER

    @property
    def state(self) -> StateDir:
        """What an isolated cell or a call finds in place of the queue's own state directory."""
        return StateDir(self.path / "state")

    def make(self, task: Task, secret: Mapping[str, str], parcel: Path | None = None) -> None:
        """Make the folder, whole or not at all; where it stands already nothing changes.

        Args:
            secret: variables that are gone from the disk once the job runs.
            parcel: what an isolated cell or a call takes along.

        Raises:
            UserError: it cannot be made.
        """
        if self.path.exists():
            return
        beside = self.path.with_name(f".{self.key}.new")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(mode=0o700)
            write_new(beside / "task.json", _task_json(task))
            if secret:
                write_new(beside / "secret.json", json.dumps(dict(secret)))
            text = files("gpusched_ipy.engines").joinpath(_RUNNER).read_text(encoding="utf-8")
            write_new(beside / _RUNNER, text)
            _pack(beside / "state", parcel)
            os.rename(beside, self.path)
            sync_folder(self.path.parent)
        except OSError as exc:
            shutil.rmtree(beside, ignore_errors=True)
            raise UserError(
                f"the folder {self.path} of the job cannot be made ({exc.strerror}); "
                "set engine_dir to a folder that every node sees"
            ) from exc

    def remove(self) -> None:
        """Delete all of it; what is gone already is gone.

        It goes at once: half a folder, left by a kill, would lack the claim that stands in it, and
        be taken for a job that has not begun.
        """
        gone = self.path.with_name(f".{self.key}.gone")
        try:
            os.rename(self.path, gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    # -- marks of the one who hands it over

    @property
    def intended(self) -> bool:
        """Whether somebody was about to hand it over, or has."""
        return (self.path / "intent").exists()

    @property
    def called(self) -> str:
        """The key under which it is handed over: its own, or that of an array's member."""
        return str((read_json(self.path / "intent") or {}).get("called") or self.key)

    def intend(self, called: str) -> None:
        """It is being handed over from now on, under that key."""
        if not self.intended:
            _replace(self.path / "intent", json.dumps({"called": called}))

    def not_taken(self) -> None:
        """The engine has surely not taken it."""
        (self.path / "intent").unlink(missing_ok=True)

    @property
    def submitted(self) -> str | None:
        """The engine's own id once it has the job."""
        found = read_json(self.path / "submitted.json")
        return None if found is None else str(found.get("native"))

    def set_submitted(self, native: str) -> None:
        """The engine has the job."""
        _replace(self.path / "submitted.json", json.dumps({"native": native}))

    def ask_to_cancel(self) -> None:
        """Have the node end it, whatever the engine does."""
        with suppress(FileExistsError):
            write_new(self.path / "cancel", "")

    def revoke(self) -> bool:
        """Take the claim, so that no node will ever run it; False: one does already."""
        try:
            write_new(self.path / "claim", json.dumps({"host": None, "revoked": True}))
        except FileExistsError:
            return self.revoked
        (self.path / "secret.json").unlink(missing_ok=True)
        return True

    # -- what the node has left

    @property
    def claimed(self) -> Mapping[str, Any] | None:
        """Who has claimed it (``host``, ``pid``, ``gpus``); empty where only that it was is known
        yet; None: nobody."""
        path = self.path / "claim"
        return (read_json(path) or {}) if path.exists() else None

    @property
    def revoked(self) -> bool:
        """Whether we have taken the claim ourselves."""
        return bool((self.claimed or {}).get("revoked"))

    def heartbeat(self) -> int | None:
        """A number that changes while the node works on it; None before it does."""
        try:
            return (self.path / "heartbeat").stat().st_mtime_ns
        except OSError:
            return None

    def result(self) -> Result | None:
        """How it ended; None while nobody knows."""
        found = read_json(self.path / "result.json")
        if found is None:
            return None
        known: dict[str, Any] = {name: found.get(name) for name in Result.__dataclass_fields__}
        return Result(**known)

    def logs(self, offset: int) -> bytes:
        """What the log holds from there on, at most 1 MiB."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(offset)
                return stream.read(_CHUNK)
        except FileNotFoundError:
            return b""


def _pack(folder: Path, parcel: Path | None) -> None:
    for name in ("calls", "cells"):
        (folder / name).mkdir(mode=0o700, parents=True)
    if parcel is not None:
        with os.fdopen(create_private(folder / "calls" / parcel.name), "wb") as stream:
            stream.write(parcel.read_bytes())
            stream.flush()
            os.fsync(stream.fileno())


def _task_json(task: Task) -> str:
    return json.dumps(
        {
            "argv": list(task.argv),
            "shell": task.shell,
            "cwd": task.cwd,
            "env": dict(task.env),
            "time_s": task.time_s,
            "log_cap": task.log_cap,
            "direct": task.direct,
        }
    )


def write_new(path: Path, text: str) -> None:
    """A new private file that has reached the disk."""
    with os.fdopen(create_private(path), "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    write_new(beside, text)
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """What has been made or named in that folder has reached the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: Path) -> dict[str, Any] | None:
    """What stands in a small file; None where it is not there, or not whole yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
