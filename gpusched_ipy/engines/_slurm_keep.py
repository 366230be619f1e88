"""Keeps what jobs have had at Slurm: an allocation whose batch script runs one job after another.

The node itself gives an allocation back that was idle for too long. A job is given to it by a mark
in its folder, and a step of a few milliseconds then calls its program: nothing that the job needs
runs here. One that is called in vain looks for itself soon.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpusched_ipy.engines import (
    NAME_PREFIX,
    EngineJob,
    EngineState,
    Status,
    UnreachableError,
    _slurm_script,
    _slurm_text,
)
from gpusched_ipy.engines._slurm_run import asked, cancel_named, run
from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.engines.kept import GoneError, Idle, KeptFolder, Need, Terms, kept_folders

_log = logging.getLogger(__name__)

_CALL_S = 10.0
_LEAVE_S = 3.0  # for all that is told to Slurm while the agent leaves
# A job runs in it only where so much more is left than it may take.
_MARGIN_S = 60.0
# What was given and has not begun after so long is given to another one …
_BEGIN_S = 60.0
# … and what should have left by itself so long ago is ended.
_OVERDUE_S = 60.0
_AGAIN_S = 10.0  # between two tries


@dataclass(slots=True, eq=False)
class _Kept:
    """One allocation."""

    folder: KeptFolder
    terms: Terms
    idle_s: float
    least_min: int | None
    idle: Idle | None = None
    uses: list[str] = field(default_factory=list)  # the keys of those it was given to, in turn
    over: bool = False  # nothing more runs in it
    left: bool = False  # its node has said so by itself
    native: str | None = None  # Slurm's id, once we know for how long it lasts
    limit_s: float | None = None
    until_mono: float | None = None  # None: without a limit
    since_mono: float = 0.0  # since when it stands as it does now
    used_mono: float = 0.0  # when its last job was open here for the last time
    asked_mono: float = float("-inf")
    ended_mono: float = float("-inf")  # when Slurm was told to end it

    @property
    def key(self) -> str:
        return self.folder.key

    @property
    def turn(self) -> int:
        """The next one."""
        return len(self.uses) + 1

    @property
    def ready(self) -> bool:
        """Whether its node waits for a job."""
        return not self.over and self.idle is not None and self.idle.turn == self.turn

    @property
    def last(self) -> JobFolder:
        """The folder of the job that has it, or had it last."""
        beside = self.folder.path.parent.parent
        return JobFolder(beside / (self.uses[-1] if self.uses else self.key))


class SlurmKeeper:
    """The allocations that are kept.

    Args:
        root: the folder of this queue's jobs.
        idle_s: how long one may be idle; 0: none is kept.
        options: those of sbatch.
    """

    def __init__(self, root: Path, idle_s: float, options: Sequence[str]) -> None:
        self._root = root
        self._idle_s = idle_s
        self._options = tuple(options)
        self._kept: dict[str, _Kept] = {}
        self._lowered: set[str] = set()
        self._look()

    # -- what the desk asks

    @property
    def busy(self) -> bool:
        """Whether anything is kept, or used by a job in its turn."""
        return bool(self._kept)

    def tend(self, waiting: Sequence[Need], *, keep: bool) -> None:
        """Look how they stand, and give back what nobody needs.

        One is kept for the next job, whatever has been; and none that idles holds up a job of ours
        that could have its GPUs.
        """
        self._look()
        self._learn()
        idle = [kept for kept in self._kept.values() if kept.ready]
        if not keep or not self._idle_s:
            surplus = idle
        elif waiting:
            surplus = [] if self.offers(waiting[0]) else idle[:1]
        else:
            surplus = idle[1:]
        for kept in surplus:
            kept.over = kept.folder.take(kept.turn, None) or kept.over
        for kept in list(self._kept.values()):
            self._clear(kept)

    def offers(self, need: Need) -> bool:
        """Whether such a job would start at once in what is kept."""
        return self._fitting(need) is not None

    def leave(self) -> None:
        """Give back whatever is idle: nobody will come for it."""
        self._look()
        until = time.monotonic() + _LEAVE_S
        for kept in self._kept.values():
            if kept.ready and kept.folder.take(kept.turn, None):
                left_s = max(0.1, until - time.monotonic())
                try:
                    cancel_named(NAME_PREFIX + kept.key, left_s)
                except UnreachableError as exc:  # its node sees the mark by itself
                    _log.warning("what is kept as %s has not been given back: %s", kept.key, exc)

    # -- what the engine asks

    def prepare(self, job: EngineJob) -> KeptFolder | None:
        """The folder of what this job will have had; None: that is not kept."""
        if not self._idle_s:
            return None
        folder = KeptFolder(self._root / "kept" / job.key)
        least = None if job.time_s is None else _slurm_script.minutes(job.time_s)
        try:
            folder.make(self._terms(job.gpus, job.gpu_type), self._idle_s, least)
        except OSError as exc:
            _log.warning("what %s has had is not kept: %s", job.key, exc)
            return None
        return folder

    def give(self, job: EngineJob) -> str | None:
        """Start the job in what is kept; None: nothing fits it.

        Raises:
            GoneError: it was given to an allocation that is not there any more.
        """
        kept = self._fitting(Need(gpus=job.gpus, gpu_type=job.gpu_type, time_s=job.time_s))
        if kept is None or not kept.folder.take(kept.turn, job.folder.path):
            return None
        kept.uses.append(job.key)
        kept.since_mono = time.monotonic()
        self._call(kept)
        return kept.native

    def there(self, key: str) -> str:
        """The key under which Slurm knows the allocation of a job."""
        kept = self._of(key)
        return key if kept is None else kept.key

    def told(self, key: str, row: Status) -> Status:
        """How a job stands, by what Slurm says of its allocation."""
        kept = self._of(key)
        if kept is None:
            return row
        if self._past(kept, key):
            return Status(state=EngineState.ENDED, native=row.native, where=row.where)
        if key == kept.key:
            self._lower(kept, row)
            return row
        over = row.state not in (EngineState.QUEUED, EngineState.RUNNING)
        late = time.monotonic() - kept.since_mono >= _BEGIN_S
        if (over or late) and kept.last.claimed is None:
            # Whatever has become of the allocation, this job has had nothing to do with it.
            return Status(state=EngineState.UNKNOWN)
        return row

    def ends(self, key: str) -> bool:
        """Whether ending the allocation ends this job, and no other one."""
        kept = self._of(key)
        if kept is None:
            return True
        return not self._past(kept, key) and not (key != kept.key and kept.last.revoked)

    # -- inside

    def _terms(self, gpus: int, gpu_type: str | None) -> Terms:
        return Terms(gpus=gpus, gpu_type=gpu_type, options=self._options, python=sys.executable)

    def _of(self, key: str) -> _Kept | None:
        return next((one for one in self._kept.values() if key in (one.key, *one.uses)), None)

    @staticmethod
    def _past(kept: _Kept, key: str) -> bool:
        """Whether the node has said that this job is over there."""
        at = (kept.key, *kept.uses).index(key)
        return kept.idle is not None and kept.idle.turn > at

    def _look(self) -> None:
        """What the folders say now."""
        mono, known = time.monotonic(), {}
        for folder in kept_folders(self._root):
            kept = self._kept.get(folder.key) or _read(folder, mono)
            if kept is not None:
                known[folder.key] = kept
                _refresh(kept, mono)
        self._kept = known

    def _learn(self) -> None:
        """For how long those last that have just become idle; one call for all."""
        mono = time.monotonic()
        new = [
            kept
            for kept in self._kept.values()
            if kept.ready and kept.native is None and mono - kept.asked_mono >= _AGAIN_S
        ]
        if not new:
            return
        for kept in new:
            kept.asked_mono = mono
        names = ",".join(NAME_PREFIX + kept.key for kept in new)
        try:
            text = asked(
                "squeue", "-h", "-t", "running", "-n", names, "-o", _slurm_text.LEFT_ROW,
                limit_s=_CALL_S,
            )  # fmt: skip
        except UnreachableError as exc:
            _log.warning("what is kept at Slurm cannot be used now: %s", exc)
            return
        found, mono = _slurm_text.left(text), time.monotonic()
        for kept in new:
            row = found.get(NAME_PREFIX + kept.key)
            if row is None:
                kept.over = kept.folder.take(kept.turn, None) or kept.over
                continue
            kept.native, left_s, kept.limit_s = row
            kept.until_mono = None if left_s is None else mono + left_s

    def _fitting(self, need: Need) -> _Kept | None:
        terms = self._terms(need.gpus, need.gpu_type)
        fit = (one for one in self._kept.values() if one.ready and one.native is not None)
        return next((one for one in fit if one.terms == terms and _lasts(one, need)), None)

    def _call(self, kept: _Kept) -> None:
        """Have the program of the allocation look at once; if not, it looks soon by itself.

        Raises:
            GoneError: Slurm does not have the allocation any more.
        """
        assert kept.idle is not None
        # Nobody minds this signal who does not wait for it, should the id be another's by now.
        line = f"kill -CONT {kept.idle.pid}"
        try:
            done = run(
                "srun", f"--jobid={kept.native}", "--overlap", "--nodes=1", "--ntasks=1",
                "--gres=none", "--mem=0", "--mpi=none", "--input=none", "--output=none", "--quiet",
                "/bin/sh", "-c", line, limit_s=_CALL_S,
            )  # fmt: skip
            if done.returncode == 0:
                return
            _log.warning("srun: %s", _slurm_text.words(done.stderr))
            name = NAME_PREFIX + kept.key
            there = asked("squeue", "-h", "-t", "running", "-n", name, "-o", "%i", limit_s=_CALL_S)
        except UnreachableError as exc:
            _log.warning("what is kept as %s was called in vain: %s", kept.key, exc)
            return
        if not there.strip():
            kept.over = kept.folder.take(kept.turn, None) or kept.over
            raise GoneError("what was kept for it is not there any more")

    def _lower(self, kept: _Kept, row: Status) -> None:
        """Do without the time of being idle where that is more than a job may ask for."""
        if kept.least_min is None or not _slurm_text.too_long(row) or kept.key in self._lowered:
            return
        self._lowered.add(kept.key)
        run(
            "scontrol", "update", f"JobId={row.native}", f"TimeLimit={kept.least_min}",
            limit_s=_CALL_S,
        )  # fmt: skip

    def _clear(self, kept: _Kept) -> None:
        """Forget what is over; see that nothing stays for ever, whatever its node does."""
        mono = time.monotonic()
        if kept.last.path.exists():
            return
        if kept.ready:
            dead = mono - kept.since_mono >= kept.idle_s + _OVERDUE_S
        else:
            # Its first job was taken back, or its node has died before it could say a word.
            dead = mono - kept.used_mono >= _OVERDUE_S
        if not (kept.over or dead) or mono - kept.ended_mono < _AGAIN_S:
            return
        if not kept.left:
            kept.ended_mono = mono
            try:
                cancel_named(NAME_PREFIX + kept.key, _CALL_S)
            except UnreachableError as exc:
                _log.warning("what is kept as %s has not been given back: %s", kept.key, exc)
                return
        kept.folder.remove()
        self._kept.pop(kept.key)


def _read(folder: KeptFolder, mono: float) -> _Kept | None:
    about = folder.about()
    if about is None:
        return None
    try:
        terms = Terms(
            gpus=about["gpus"],
            gpu_type=about["gpu_type"],
            options=tuple(about["options"]),
            python=about["python"],
        )
        idle_s, least_min = about["idle_s"], about["least_min"]
    except KeyError:  # another version's, or damaged: nobody can use it
        return None
    return _Kept(folder, terms, idle_s, least_min, since_mono=mono, used_mono=mono)


def _refresh(kept: _Kept, mono: float) -> None:
    idle = kept.folder.idle()
    if idle != kept.idle:
        kept.idle, kept.since_mono = idle, mono
    while not kept.over and (use := kept.folder.use(kept.turn)) is not None:
        given = use.get("folder")
        if given is None:
            kept.over, kept.left = True, bool(use.get("left"))
        else:
            kept.uses.append(os.path.basename(given))
            kept.since_mono = mono
    if kept.last.path.exists():
        kept.used_mono = mono


def _lasts(kept: _Kept, need: Need) -> bool:
    """Whether enough time is left; a job without a walltime wants half of all there was."""
    if kept.until_mono is None:
        return True
    left_s = kept.until_mono - time.monotonic()
    if need.time_s is not None:
        return left_s >= need.time_s + _MARGIN_S
    return kept.limit_s is None or left_s >= kept.limit_s / 2
