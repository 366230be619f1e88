"""``with gpuqueue() as gpu:`` waits for GPUs, has them for the block, and gives them back.

The GPUs are the process's: they are shown to it by its environment, and if it dies they are free at
once. Inside a job that has GPUs already the block uses those and waits for nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

from gpusched_ipy import cuda, environment, framework, here
from gpusched_ipy.backends import Detail
from gpusched_ipy.calls import one_line
from gpusched_ipy.errors import JobFailedError, JobNotFoundError, UserError
from gpusched_ipy.interrupts import shielded, uninterrupted
from gpusched_ipy.job import Job, JobKind, JobState
from gpusched_ipy.news import News
from gpusched_ipy.options import RequestOptions, python_fields
from gpusched_ipy.runners.allocation import Turn
from gpusched_ipy.snapshot import Gpu
from gpusched_ipy.text import clean, escape, format_duration

_STEP_S = 0.1  # the longest that an interrupt of a waiting block takes
_READING_S = 1.0
_SAY_S = 1.0  # shorter waits are not worth a line


@dataclass(frozen=True, slots=True, eq=False)
class GpuAllocation:
    """GPUs that this code has now.

    ``uuid``, ``index`` and ``name`` are those of the first GPU; ``gpus`` are all of them.
    """

    job_id: int
    gpus: tuple[Gpu, ...]
    env: Mapping[str, str]  # shows a child process these GPUs and no other
    _turn: Turn | None = field(default=None, repr=False)

    @property
    def uuid(self) -> str:
        """The UUID of the first GPU."""
        return self.gpus[0].uuid

    @property
    def index(self) -> int | None:
        """The index of the first GPU in PCI order, for people; None where it is unknown."""
        return self.gpus[0].index

    @property
    def name(self) -> str:
        """The name of the first GPU."""
        return self.gpus[0].name

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants the GPUs back; code of other threads than main has to look."""
        return self._turn is not None and self._turn.wish is not None

    def __str__(self) -> str:
        return ", ".join(f"{_label(gpu)} ({clean(gpu.name)})" for gpu in self.gpus)

    def __repr__(self) -> str:
        return f"<job {self.job_id} on {self}>"

    def _repr_html_(self) -> str:
        return f"job {self.job_id} on {escape(str(self))}"


@contextmanager
def gpuqueue(
    priority: int = 0, *, timeout: float | None = None, **options: Unpack[RequestOptions]
) -> Iterator[GpuAllocation]:
    """Wait for GPUs, and have them for the length of the block or of the decorated function.

    While it has them ``CUDA_VISIBLE_DEVICES`` shows this process these GPUs and no other. CUDA
    reads it once: a process that has used a GPU can only be given that GPU again. Code that stands
    inside another such block, a queued cell or a queued command uses the GPUs of that one.

    Args:
        priority: -1000 ... 1000, higher runs first.
        timeout: seconds to wait at most; None waits for ever.
        options: as for a submit: ``name``, ``gpus``, ``mem``, ``on_gpu``, ``after`` …

    Raises:
        UserError: something that was asked for cannot be; nothing is queued.
        TimeoutError: the GPUs did not come in time; the place in the line is given up.
        JobFailedError: it was cancelled, or its walltime ran out.
    """
    outer = _outer(python_fields(options).get("gpus", 1))
    if outer is not None:
        yield outer
        return
    with here.home() as home:
        turn = home.runner.expect(uuid.uuid4().hex)
        try:
            job = _queued(home, turn, {**options, "priority": priority})
            _await(home, turn, job, timeout)
            yield from _held(home, turn, _begun(home, turn, job))
        finally:
            if not turn.over:
                shielded(partial(_give_up, home, turn))


def _queued(home: here.Home, turn: Turn, fields: dict[str, Any]) -> Job:
    home.pin.look(home.monitor, python_fields(fields).get("gpus", 1))

    def submit() -> Job:
        job = home.queue.submit(kind=JobKind.ALLOCATION, uid=turn.uid, home=home.key, **fields)
        turn.job_id = job.id
        return job

    job = uninterrupted(submit)
    home.runner.scheduler.wake()
    return job


def _await(home: here.Home, turn: Turn, job: Job, timeout: float | None) -> None:
    """Wait in short steps until the claim is there."""
    deadline = None if timeout is None else time.monotonic() + timeout
    news = News(_tell, after_s=_SAY_S)
    while not turn.granted.wait(_STEP_S):
        now = home.queue.show(job.id)
        if now.ended:
            raise _ended(now)
        if deadline is not None and time.monotonic() >= deadline:
            why = f": {clean(now.reason.text)}" if now.reason else ""
            raise TimeoutError(f"job {job.id} did not get its turn within {timeout:g} s{why}")
        if here.has_watcher():
            news.about(now)
    if news.told:
        now = home.queue.show(job.id)
        waited = format_duration(max(0.0, time.time() - now.submitted_at))
        _tell(f"job {job.id} begins after {waited}")


def _begun(home: here.Home, turn: Turn, job: Job) -> GpuAllocation:
    claim = turn.claim
    if claim is None or not turn.begin():
        raise JobFailedError(job.id, JobState.CANCELLED, f"job {job.id} was cancelled")
    gpus = claim.gpus or tuple(Gpu(uuid=gpu) for gpu in claim.job.gpus)
    own = {"GPUSCHED_JOB_ID": str(job.id), "GPUSCHED_JOB_NAME": job.name}
    home.granted(claim.job.gpus)
    return GpuAllocation(job.id, gpus, {**claim.env, **own}, turn)


def _give_up(home: here.Home, turn: Turn) -> None:
    """Leave the line: no claim may come any more, and nothing may go on waiting."""
    turn.end(JobState.CANCELLED)
    if turn.job_id is not None:
        home.queue.cancel(turn.job_id)


def _held(home: here.Home, turn: Turn, allocation: GpuAllocation) -> Iterator[GpuAllocation]:
    """Hold the GPUs while the block runs, and say how it ended."""
    outside = _current.get()
    _shown.add(allocation)
    _current.set(allocation)
    state, error, exit_code = JobState.COMPLETED, None, None
    try:
        yield allocation
    except BaseException as exc:
        state, error, exit_code = _outcome(exc, turn)
        if state is turn.wish:
            raise _ended_while_held(allocation.job_id, state) from exc
        raise
    finally:
        _current.set(outside)
        _shown.remove(allocation)
        if not turn.over:  # in the child of a fork it is the parent's
            _bind(home, allocation)
            turn.end(state, error, exit_code)
            home.given_back()


def _outcome(exc: BaseException, turn: Turn) -> tuple[JobState, str | None, int | None]:
    if isinstance(exc, KeyboardInterrupt) and turn.wish is not None:
        return turn.wish, None, None
    if isinstance(exc, (SystemExit, GeneratorExit)) and not getattr(exc, "code", None):
        return JobState.COMPLETED, None, None
    code = exc.code if isinstance(exc, SystemExit) and isinstance(exc.code, int) else None
    return JobState.FAILED, one_line(exc), code


def _ended_while_held(job_id: int, state: JobState) -> JobFailedError:
    why = "its walltime ran out" if state is JobState.TIMEOUT else "it was cancelled"
    return JobFailedError(job_id, state, f"job {job_id} was interrupted: {why}")


def _ended(job: Job) -> JobFailedError:
    why = f": {job.error}" if job.error else " while it waited"
    return JobFailedError(job.id, job.state, f"job {job.id} was {job.state}{why}")


def _bind(home: here.Home, allocation: GpuAllocation) -> None:
    """A process that has opened GPUs in the block can use no others from now on."""
    uuids = tuple(gpu.uuid for gpu in allocation.gpus)
    bound = cuda.opened(len(uuids))
    if bound is not None:
        home.pin.bind(cuda.match(bound, uuids) or home.pin.gpus or uuids)
    elif framework.has_context() and home.pin.gpus is None:
        home.pin.bind(uuids)


# -- code that has GPUs already

# The block that this code stands in; threads begin outside of any.
_current: ContextVar[GpuAllocation | None] = ContextVar("gpusched_allocation", default=None)


def _outer(count: int) -> GpuAllocation | None:
    """What this code has already.

    Raises:
        UserError: that is less than it asks for.
    """
    outer = _current.get() or _of_cell() or _of_job()
    if outer is not None and count > len(outer.gpus):
        raise UserError(
            f"this runs inside job {outer.job_id}, which has {len(outer.gpus)} GPU(s); "
            f"ask for {count} there"
        )
    return outer


def _of_cell() -> GpuAllocation | None:
    claim = here.running_cell()
    return None if claim is None else GpuAllocation(claim.job.id, claim.gpus, claim.env)


def _of_job() -> GpuAllocation | None:
    """The job whose process, or descendant, this process is: if its environment is true."""
    environ = _shown.outside()
    number = environ.get("GPUSCHED_JOB_ID", "")
    if not number.isdigit():
        return None
    queue = here.current_queue()
    try:
        job = queue.show(int(number))
    except JobNotFoundError:
        return None
    shows = [environment.for_gpus(job.gpus, vendor) for vendor in ("nvidia", "amd")]
    env = next((env for env in shows if env.items() <= environ.items()), None)
    if job.state is not JobState.RUNNING or env is None:
        return None
    snapshot = here.current_monitor(queue).read_now(_READING_S, Detail.LOAD)
    gpus = tuple(snapshot.gpu(gpu) or Gpu(uuid=gpu) for gpu in job.gpus)
    return GpuAllocation(job.id, gpus, env)


# -- what the process is shown


class _Shown:
    """The environment of the process while blocks of it have GPUs.

    It is one for all threads: while several blocks have GPUs it shows those of all of them, in the
    order in which they began.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[GpuAllocation] = []
        self._before: dict[str, str | None] = {}
        self._put: set[str] = set()

    def add(self, allocation: GpuAllocation) -> None:
        """A block has begun."""
        with self._lock:
            self._held.append(allocation)
            self._apply()

    def remove(self, allocation: GpuAllocation) -> None:
        """A block has ended."""
        with self._lock:
            if allocation in self._held:
                self._held.remove(allocation)
                self._apply()

    def outside(self) -> dict[str, str]:
        """The environment as it is without any block."""
        with self._lock:
            kept = {name: value for name, value in os.environ.items() if name not in self._put}
            return kept | {name: old for name, old in self._before.items() if old is not None}

    def _apply(self) -> None:
        wanted = self._wanted()
        for name in self._put - wanted.keys():
            before = self._before.pop(name)
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before
        for name in wanted.keys() - self._put:
            self._before[name] = os.environ.get(name)
        os.environ.update(wanted)
        self._put = set(wanted)

    def _wanted(self) -> dict[str, str]:
        if not self._held:
            return {}
        if len(self._held) == 1:
            return dict(self._held[0].env)
        # A child process belongs to none of them in particular, so it is told of no job.
        gpus = dict.fromkeys(gpu.uuid for held in self._held for gpu in held.gpus)
        return environment.for_gpus(tuple(gpus), self._held[0].gpus[0].vendor)


_shown = _Shown()


def _label(gpu: Gpu) -> str:
    return f"GPU {gpu.number or clean(gpu.uuid)}"


def _tell(text: str) -> None:
    print(f"gpuqueue: {clean(text)}", file=sys.stderr, flush=True)
