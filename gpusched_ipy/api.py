"""The queue as programs use it: submit, look, wish, wait. It needs no GPU and no Jupyter.

:class:`Queue` is what the magics, the panel and the terminal are made of. It records wishes and
reads the record; starting jobs is the business of agents and kernels.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpusched_ipy import environment
from gpusched_ipy.attribution import attribute
from gpusched_ipy.bell import Bell
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import JobNotFoundError, UserError
from gpusched_ipy.job import (
    ACTIVE,
    BOUND_KINDS,
    FINAL,
    PRIORITY_RANGE,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Request,
)
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.options import parse_priority, python_fields
from gpusched_ipy.reap import orphans, reap
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.statedir import StateDir, open_state_dir
from gpusched_ipy.store import Event, Store
from gpusched_ipy.summon import ensure_agent

# How long a reading may take when a submit asks whether the machine could ever run the job.
_READING_S = 3.0
# While waiting, how often it is made sure that somebody is left who goes on with the queue.
_MEND_S = 1.0


# Inside the class below the name ``list`` is its method.
_Jobs = list[Job]
_Events = list[Event]
_Ids = list[int]


class Queue:
    """The queue of this user on this machine.

    Args:
        settings: those in force when None.
        store: the record; opened in the state directory of the settings when None.
        monitor: asked only whether a job could ever fit; made when first needed when None.
        owner: where jobs come from, for people: "notebook train.ipynb", "terminal pts/3".
        own_python: commands find the programs beside this interpreter first: "python" is then the
            notebook's own, also where its environment has not been activated.

    Raises:
        StateDirError, StoreError: the state directory or the record cannot be used.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
        monitor: Monitor | None = None,
        clock: Clock | None = None,
        owner: str | None = None,
        own_python: bool = False,
    ) -> None:
        self.settings = settings or Settings.load()
        self.clock = clock or SystemClock()
        self.store = store or Store(_opened(self.settings), self.clock)
        self.owner = owner or default_owner()
        self._monitor = monitor
        self._own_python = own_python

    @property
    def state(self) -> StateDir:
        """The private folder of the queue."""
        return self.store.state

    def submit(
        self,
        argv: Sequence[str] | None = None,
        *,
        kind: JobKind = JobKind.COMMAND,
        code: str | None = None,
        shell: bool = False,
        cwd: str | os.PathLike[str] | None = None,
        env: Iterable[str] = (),
        uid: str | None = None,
        home: str | None = None,
        cell_id: str | None = None,
        in_place: bool = False,
        **fields: Any,
    ) -> Job:
        """Queue a job and return it; ``fields`` are the options of a submit by their long names.

        Args:
            argv: the command; with ``shell`` one line for /bin/sh.
            kind: what the job runs; ``code`` is the body of a cell.
            env: ``NAME`` (the value here) or ``NAME=VALUE``; values never enter the record.
            uid: made by the caller, so that repeating the call queues no second job.
            home: the member that alone can run it, for cells and allocations.

        Raises:
            UserError: something that was asked for cannot be; nothing is queued.
        """
        fields = python_fields(fields)
        if kind is JobKind.COMMAND or argv is not None:
            argv = self._command(argv, shell=shell, cwd=cwd)
        named = environment.named(env, os.environ)
        request = self._request(fields)
        self._must_fit(request)
        spec = JobSpec(
            uid=uid or uuid.uuid4().hex,
            kind=kind,
            name=fields.get("name") or _name_of(kind, argv),
            priority=fields.get("priority", 0),
            request=request,
            held=fields.get("hold", False),
            argv=tuple(argv) if argv is not None else None,
            shell=shell,
            code=code,
            cwd=str(Path(cwd or os.getcwd()).absolute()),
            env=self._environment() if kind not in BOUND_KINDS else {},
            labels=dict(fields.get("label", ())),
            owner=self.owner,
            home=home,
            cell_id=cell_id,
            in_place=in_place,
        )
        environment.keep(self.state, spec.uid, named)
        try:
            job = self.store.submit(spec)
        except BaseException:
            environment.drop(self.state, spec.uid)
            raise
        if kind not in BOUND_KINDS:
            ensure_agent(self.state)
        return job

    # -- look

    def list(self, *, all: bool = False, limit: int | None = None) -> _Jobs:  # noqa: A002
        """The jobs not yet ended, or all of them, oldest first; ``limit`` keeps the newest."""
        return self.store.jobs(ended=all, limit=limit)

    def page(self, offset: int, limit: int) -> Sequence[Job]:
        """A part of the jobs not yet ended: who runs, who waits by priority, then who is held."""
        return self.store.page(offset, limit, self.settings.aging_s)

    def counts(self) -> Mapping[str, int]:
        """How many jobs are ``running`` (or starting), ``waiting`` and ``held``."""
        return self.store.counts()

    def ran_since(self, wall: float) -> Sequence[Job]:
        """Jobs that had a GPU at ``wall`` (s since the epoch) or later."""
        return self.store.ran_since(wall)

    def members(self) -> Mapping[str, str]:
        """What each process that uses the queue is called, by its key."""
        return {key: member.label for key, member in self.store.members().items()}

    def mark(self, snapshot: Snapshot, jobs: Iterable[Job]) -> Snapshot:
        """``snapshot`` with the job and the member of each process filled in.

        Args:
            jobs: those that run.
        """
        running = list(jobs)
        leaders = {
            process.pid: job.id for job in running if (process := self.store.process_of(job))
        }
        members = self.store.member_pids()
        return attribute(snapshot, running, leaders=leaders, members=members)

    def show(self, reference: str | int) -> Job:
        """The one job of an id or, for a name, its newest job.

        Raises:
            JobNotFoundError: there is none.
        """
        return self.store.job(self.resolve([reference])[0])

    def resolve(self, references: Iterable[str | int]) -> tuple[int, ...]:
        """The ids that ``12``, ``14-16``, ``12,prep`` or ``prep*`` stand for, in the order given.

        Raises:
            JobNotFoundError: a reference stands for no job.
        """
        found: dict[int, None] = {}
        for reference in references:
            for part in str(getattr(reference, "id", reference)).split(","):
                found |= dict.fromkeys(self._ids(part.strip()))
        return tuple(found)

    def events(self, reference: str | int) -> _Events:
        """What happened to a job, in order."""
        return self.store.events(self.show(reference).id)

    def log_path(self, reference: str | int) -> Path | None:
        """The file that holds the output of the job's last attempt; None before it has begun."""
        job = self.show(reference)
        if job.kind in BOUND_KINDS:
            path = self.state.transcript(job.spec.uid)
        elif job.attempt is None:
            return None
        else:
            path = self.state.log(job.attempt)
        return path if path.exists() else None

    # -- wishes

    def cancel(self, *references: str | int) -> _Jobs:
        """Cancel jobs: pending ones at once, running ones are interrupted, terminated, killed."""
        jobs = [self.store.request_cancel(job_id) for job_id in self.resolve(references)]
        for job in jobs:
            if job.ended:
                environment.drop(self.state, job.spec.uid)
        return jobs

    def hold(self, *references: str | int) -> _Jobs:
        """Hold pending jobs: they keep their place in line and do not start until released."""
        return self._each(references, lambda job_id: self.store.set_held(job_id, True))

    def release(self, *references: str | int) -> _Jobs:
        """Release held jobs."""
        return self._each(references, lambda job_id: self.store.set_held(job_id, False))

    def set_priority(self, references: Iterable[str | int], priority: int) -> _Jobs:
        """Give jobs another priority; higher runs first."""
        value = parse_priority(priority)
        return self._each(references, lambda job_id: self.store.set_priority(job_id, value))

    def top(self, reference: str | int) -> Job:
        """Move a job to the front: its priority becomes one more than the highest that waits."""
        job = self.show(reference)
        waiting = [
            other.priority
            for other in self.list()
            if other.state is JobState.PENDING and other.id != job.id
        ]
        front = min(max([job.priority, *(value + 1 for value in waiting)]), PRIORITY_RANGE[1])
        return self.store.set_priority(job.id, front)

    def requeue(self, *references: str | int) -> _Jobs:
        """Run ended jobs again: same id, behind those that wait already.

        Raises:
            UserError: a job has not ended, or it is a cell whose kernel is gone.
        """
        return self._each(references, self._requeue_one)

    def drain(self, why: str = "drained by its user") -> None:
        """Start nothing more; what runs goes on."""
        self.store.set_drained(why)

    def resume(self) -> None:
        """Start jobs again after :meth:`drain` or a reboot."""
        self.store.set_drained(None)
        if any(job.kind not in BOUND_KINDS for job in self.list()):
            ensure_agent(self.state)

    @property
    def drained(self) -> str | None:
        """Why nothing is started at present, or None."""
        return self.store.drained

    # -- wait

    def wait(
        self,
        *references: str | int,
        timeout: float | None = None,
        tick: Callable[[], None] | None = None,
    ) -> _Jobs:
        """Wait until the jobs (all open ones when none is named) have ended, and return them.

        Args:
            timeout: seconds; None waits for ever.
            tick: called a few times a second while waiting (progress; it may raise).

        Raises:
            TimeoutError: they have not ended in time.
        """
        ids = self.resolve(references) if references else tuple(job.id for job in self.list())
        rang = threading.Event()
        bell = Bell(self.state.bell, rang.set)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            mended = time.monotonic()
            while not FINAL.issuperset((states := self.store.states(ids)).values()):
                if time.monotonic() - mended >= _MEND_S:
                    self.mend(states)
                    mended = time.monotonic()
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"jobs {', '.join(map(str, ids))} have not ended in time")
                if tick is not None:
                    tick()
                # Short steps: an interrupt must reach the main thread of a notebook.
                rang.wait(0.1)
                rang.clear()
        finally:
            bell.close()
        return [self.store.job(job_id) for job_id in ids]

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call ``changed`` from a thread after every change of the record, until unsubscribed."""
        return Bell(self.state.bell, changed).close

    def mend(self, states: Mapping[int, JobState]) -> None:
        """End what the dead have left of these jobs, and have an agent where one is needed.

        Members do so by themselves; but somebody who waits may be the last one alive.
        """
        active = [self.store.job(job_id) for job_id, state in states.items() if state in ACTIVE]
        if orphans(self.store, active):
            reap(self.store, active)
        waiting = [job_id for job_id, state in states.items() if state is JobState.PENDING]
        if any(self.store.job(job_id).kind not in BOUND_KINDS for job_id in waiting):
            ensure_agent(self.state)

    # -- inside

    def _each(self, references: Iterable[str | int], act: Callable[[int], Job]) -> _Jobs:
        with self.store.writing():
            return [act(job_id) for job_id in self.resolve(references)]

    def _requeue_one(self, job_id: int) -> Job:
        job = self.store.job(job_id)
        if not job.ended:
            raise UserError(f"job {job_id} is {job.state}; only an ended job can be queued again")
        if job.kind in BOUND_KINDS:
            raise UserError(f"job {job_id} is a cell of {job.spec.owner}; run the cell again there")
        again = self.store.requeue(job)
        ensure_agent(self.state)
        return again

    def _ids(self, part: str) -> _Ids:
        low, dash, high = part.partition("-")
        if part.isdigit():
            return [self.store.job(int(part)).id]
        if dash and low.isdigit() and high.isdigit():
            ids = list(self.store.states(range(int(low), int(high) + 1)))
        else:
            ids = [job.id for job in self.store.named(part)]
            ids = ids if any(mark in part for mark in "*?") else ids[-1:]
        if not ids:
            raise JobNotFoundError(part)
        return ids

    def _command(
        self, argv: Sequence[str] | None, *, shell: bool, cwd: str | os.PathLike[str] | None
    ) -> tuple[str, ...]:
        if isinstance(argv, str):
            raise UserError("a command is a list of arguments; for a shell line ask for shell=True")
        if not argv or not argv[0]:
            raise UserError("there is no command to run; write it after --")
        if cwd is not None and not Path(cwd).is_dir():
            raise UserError(f"the working directory {cwd} does not exist")
        if shell:
            return (" ".join(argv),)
        path = shutil.which(argv[0], path=self._search_path())
        if path is None:
            raise UserError(f"there is no program {argv[0]!r}; give its path or mend PATH")
        return (os.path.abspath(path), *argv[1:])

    def _search_path(self) -> str:
        """PATH without its relative entries: nothing is run because it lies in some folder."""
        own = [os.path.dirname(sys.executable)] if self._own_python else []
        entries = [*own, *os.environ.get("PATH", os.defpath).split(os.pathsep)]
        return os.pathsep.join(entry for entry in entries if os.path.isabs(entry))

    def _environment(self) -> dict[str, str]:
        return {**environment.allowed(os.environ), "PATH": self._search_path()}

    def _request(self, fields: Mapping[str, Any]) -> Request:
        return Request(
            gpus=fields.get("gpus", 1),
            mem_bytes=fields.get("mem"),
            on_gpu=fields.get("on_gpu"),
            after=self.resolve(fields.get("after") or ()),
            after_any=self.resolve(fields.get("after_any") or ()),
            begin_at=fields.get("begin"),
            time_s=fields.get("time"),
        )

    def _must_fit(self, request: Request) -> None:
        """Refuse what this machine could never run; without a reading nothing is known."""
        if (request.gpus, request.mem_bytes, request.on_gpu) == (1, None, None):
            return
        self._monitor = self._monitor or Monitor(self.settings, self.clock)
        snapshot = self._monitor.read_now(_READING_S)
        if snapshot.problem is None:
            fits(request, snapshot.gpus)


def fits(request: Request, gpus: Sequence[Gpu]) -> None:
    """Check a request against the GPUs of a machine.

    Raises:
        UserError: the machine could never run it, even when idle.
    """
    parents = {gpu.parent for gpu in gpus}
    usable = [gpu for gpu in gpus if gpu.uuid not in parents]
    if request.gpus > len(usable):
        raise UserError(f"--gpus {request.gpus}: this machine has {len(usable)}")
    sizes = [gpu.mem_total_bytes for gpu in usable]
    if request.mem_bytes is None or None in sizes:
        return
    enough = sum(1 for size in sizes if size is not None and size >= request.mem_bytes)
    if enough < request.gpus:
        gib = 2**30
        largest = max((size for size in sizes if size is not None), default=0)
        raise UserError(
            f"--mem {request.mem_bytes / gib:.1f} GiB: the largest GPU here has "
            f"{largest / gib:.1f} GiB"
        )


def _opened(settings: Settings) -> StateDir:
    state = open_state_dir(settings)
    if state.note is not None:
        warnings.warn(state.note, UserWarning, stacklevel=3)
    return state


def default_owner() -> str:
    """Where a submit comes from, for people."""
    try:
        return f"terminal {os.ttyname(0).removeprefix('/dev/')}"
    except OSError:
        return f"script (pid {os.getpid()})"


def _name_of(kind: JobKind, argv: Sequence[str] | None) -> str:
    if not argv:
        return str(kind)
    # One word may be a whole line for the shell, with any quotes in it.
    words = (argv[0].split() if len(argv) == 1 else list(argv)) or [str(kind)]
    script = next((word for word in words[1:] if word.endswith((".py", ".sh"))), words[0])
    return Path(script).name[:64] or str(kind)
