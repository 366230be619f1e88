"""One attempt of a job at an engine, as this member knows it: its folder, and what is seen of it.

What the folder brings (log, outputs) is carried into the state directory, where everybody looks. It
moves no job and asks no engine.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpusched_ipy import calls, environment, oom
from gpusched_ipy.engines import EngineState, Status
from gpusched_ipy.engines.folder import JobFolder, Result, Task
from gpusched_ipy.job import ACTIVE, Job, JobKind, JobState, Place
from gpusched_ipy.outcome import Outcome
from gpusched_ipy.statedir import StateDir, open_private
from gpusched_ipy.text import clean

_CHUNK = 1 << 20
_NAMED = 400  # characters of what a node says of itself
# What a node's program writes every five seconds is old after so many.
LOST_S = 15.0
# … and where the engine may only have forgotten a job that goes on.
FORGOTTEN_S = 60.0


@dataclass(slots=True, eq=False)
class Errand:
    """One folder of ours, open until its end stands in the record."""

    uid: str
    attempt: int
    folder: JobFolder
    since_mono: float  # when we first knew of it
    key: str  # at the engine: the folder's own, or that of an array's member
    job_id: int | None = None  # None: no job asks for it any more
    rank: int = 0
    status: Status = field(default_factory=lambda: Status(state=EngineState.UNKNOWN))
    asked: bool = False  # the engine, since it was handed over or taken up
    ended_mono: float | None = None  # since when the engine has said that it is over
    result_mono: float | None = None  # since when its node has said that it is over
    tried_mono: float | None = None  # when it was handed over, and nobody knows whether it was
    told_mono: float | None = None  # when the engine was last told to end it
    beat: int | None = None
    beat_mono: float = 0.0
    claim_seen: bool = False  # that there is one, but not yet whose
    log_at: int = 0
    shown_at: int = 0

    def of(self, job: Job | None) -> bool:
        """Whether it is the attempt that the job waits for or runs as."""
        if job is None or job.spec.uid != self.uid or job.ended:
            return False
        return self.attempt == job.attempts + (job.state not in ACTIVE)

    def seen(self, status: Status, mono: float) -> None:
        """What the engine says of it now."""
        over = status.state not in (EngineState.QUEUED, EngineState.RUNNING)
        if not over:
            self.ended_mono = None
        elif self.ended_mono is None:
            self.ended_mono = mono
        self.status, self.asked = status, True

    def silent(self, mono: float) -> bool:
        """Whether it is over at the engine, and its node has given no sign for long enough."""
        beat = self.folder.heartbeat()
        if beat != self.beat or self.beat_mono == 0.0:
            self.beat, self.beat_mono = beat, mono
        if self.ended_mono is None:
            return False
        forgotten = self.status.state is EngineState.UNKNOWN
        limit_s = FORGOTTEN_S if forgotten else LOST_S
        return mono - max(self.beat_mono, self.ended_mono) >= limit_s


def open_errands(root: Path, mono: float) -> list[Errand]:
    """Every folder that lies there, whoever has made it."""
    found = []
    for path in sorted(root.iterdir()) if root.exists() else ():
        if path.name.startswith("."):  # somebody was killed while he made or removed it
            shutil.rmtree(path, ignore_errors=True)
            continue
        parts = path.name.rsplit("-", 2)
        if len(parts) == 3 and parts[1].isdecimal() and path.is_dir():
            folder = JobFolder(path)
            found.append(Errand(parts[0], int(parts[1]), folder, mono, folder.called))
    return found


def new_errand(root: Path, job: Job, mono: float) -> Errand:
    """The next attempt of a pending job; nothing is on the disk yet."""
    attempt = job.attempts + 1
    path = root / f"{job.spec.uid}-{attempt}-{secrets.token_hex(2)}"
    return Errand(job.spec.uid, attempt, JobFolder(path), mono, path.name, job_id=job.id)


def pack(errand: Errand, job: Job, state: StateDir, log_cap: int) -> None:
    """Put what the node needs into the folder.

    Raises:
        UserError: the folder cannot be made.
        StateDirError: the variables of the job cannot be read.
    """
    spec, inside = job.spec, str(errand.folder.state.root)
    own = {"GPUSCHED_JOB_ID": str(job.id), "GPUSCHED_JOB_NAME": job.name}
    # A cell or a call finds in its folder what it would find in the state directory here.
    argv = tuple(inside if word == str(state.root) else word for word in spec.argv or ())
    parcel = state.call(spec.uid)
    errand.folder.make(
        Task(
            argv=argv,
            shell=spec.shell,
            cwd=spec.cwd,
            env={**spec.env, **own},
            time_s=job.request.time_s,
            log_cap=log_cap,
            direct=job.kind is JobKind.ISOLATED,
        ),
        environment.take(state, spec.uid, spec.env_names, again=True),
        parcel if parcel.exists() else None,
    )


def place_of(errand: Errand, job: Job) -> Place:
    """Where a node has begun it."""
    claim = errand.folder.claimed or {}
    host, gpus = claim.get("host"), claim.get("gpus")
    return Place(
        engine=job.spec.engine,
        count=job.request.gpus,
        host=None if host is None else clean(str(host), _NAMED),
        gpus=clean(str(gpus), _NAMED) if gpus else None,
    )


def carry_home(errand: Errand, job: Job, state: StateDir) -> bool:
    """Bring what the job has written since the last time; whether there was anything."""
    if job.attempt is None:
        return False
    at = errand.log_at
    errand.log_at = _append(errand.folder.log, state.log(job.attempt), at)
    shown = errand.shown_at
    if job.kind is JobKind.ISOLATED:
        source = errand.folder.state.transcript(job.spec.uid)
        errand.shown_at = _append(source, state.transcript(job.spec.uid), shown)
    return (at, shown) != (errand.log_at, errand.shown_at)


def begin_anew(errand: Errand, job: Job, state: StateDir) -> None:
    """What an earlier attempt has shown goes."""
    errand.log_at = errand.shown_at = 0
    if job.kind in (JobKind.ISOLATED, JobKind.CALLABLE):
        calls.drop_outcome(state, job.spec.uid)
    if job.kind is JobKind.ISOLATED:
        state.transcript(job.spec.uid).unlink(missing_ok=True)


def go_on(errand: Errand, job: Job, state: StateDir) -> None:
    """Another member has brought a part already."""
    if job.attempt is not None:
        errand.log_at = _size(state.log(job.attempt))
    errand.shown_at = _size(state.transcript(job.spec.uid))


def bring_outcome(errand: Errand, job: Job, state: StateDir) -> None:
    """Bring what a call or a cell has made."""
    if job.kind not in (JobKind.ISOLATED, JobKind.CALLABLE):
        return
    away = errand.folder.state
    for source, target in (
        (away.call_result(job.spec.uid), state.call_result(job.spec.uid)),
        (away.call_error(job.spec.uid), state.call_error(job.spec.uid)),
    ):
        if source.exists():
            beside = target.with_name(f"{target.name}.new")
            beside.unlink(missing_ok=True)
            _append(source, beside, 0)
            os.replace(beside, target)


def ending(result: Result, job: Job, status: Status, engine: str, state: StateDir) -> Outcome:
    """What the node's result means for the record."""
    how, error = _HOW.get(result.ended), result.error
    if result.ended == "exit":
        how = JobState.COMPLETED if result.exit_code == 0 else JobState.FAILED
    elif how is JobState.TIMEOUT:
        error = "its walltime ran out"
    elif not job.cancel_requested and status.state is EngineState.TIMEOUT:
        how, error = JobState.TIMEOUT, status.text
    elif not job.cancel_requested:
        by_hand = status.state is EngineState.CANCELLED
        how = JobState.CANCELLED if by_hand else JobState.FAILED
        error = f"ended by {engine}{f': {status.text}' if status.text else ''}"
    assert how is not None
    short = Outcome(state=how, exit_code=result.exit_code, signal=result.signal, error=error)
    return _explained(short, job, state) if how is JobState.FAILED else short


_HOW: Mapping[str, JobState] = {
    "timeout": JobState.TIMEOUT,
    "cancel": JobState.CANCELLED,
    "engine": JobState.CANCELLED,
}


def _explained(end: Outcome, job: Job, state: StateDir) -> Outcome:
    """A failure with what the job itself, or its log, says about it."""
    told = calls.take_error(state, job.spec.uid) if job.kind is JobKind.ISOLATED else None
    error, out = told or end.error, False
    if told is not None:
        out = told.startswith(oom.LEAD)
    elif job.attempt is not None and (line := oom.in_log(state.log(job.attempt))) is not None:
        error, out = f"{oom.LEAD}{line}", True
    return Outcome(
        state=end.state, exit_code=end.exit_code, signal=end.signal, error=error, oom=out
    )


def _append(source: Path, target: Path, at: int) -> int:
    """Copy what stands in ``source`` beyond ``at``; up to where it has been copied now."""
    try:
        stream = source.open("rb")
    except FileNotFoundError:
        return at
    with stream, os.fdopen(open_private(target, os.O_WRONLY | os.O_APPEND), "wb", 0) as out:
        stream.seek(at)
        had = os.fstat(out.fileno()).st_size
        try:
            while chunk := memoryview(stream.read(_CHUNK)):
                while chunk:
                    chunk = chunk[out.write(chunk) :]
        except OSError:  # a full disk: nothing of this has been copied
            os.ftruncate(out.fileno(), had)
            raise
        return stream.tell()


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
