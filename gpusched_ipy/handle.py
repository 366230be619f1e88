"""Queue a command or a function from Python, and hold what stands for it: its result, its log.

A function runs in a fresh Python beside this one, under a shim like a command: it survives this
process, and its result waits for whoever asks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Literal, TypeVar, Unpack, cast, overload

from gpusched_ipy.api import Queue
from gpusched_ipy.calls import (
    Call,
    Outcome,
    drop_call,
    keep_call,
    name_of,
    take_outcome,
)
from gpusched_ipy.errors import JobFailedError, JobNotFoundError, UserError
from gpusched_ipy.folding import ranges
from gpusched_ipy.here import current_queue
from gpusched_ipy.job import FINAL, Job, JobKind, JobSpec, JobState
from gpusched_ipy.joblog import written
from gpusched_ipy.look import job_table
from gpusched_ipy.options import SubmitOptions
from gpusched_ipy.preview import Preview
from gpusched_ipy.process import python_argv
from gpusched_ipy.records import how_it_stands
from gpusched_ipy.submission import Submission
from gpusched_ipy.text import clean
from gpusched_ipy.view import JOB_COLUMNS, html_table

T = TypeVar("T")
_STEP_S = 0.5  # a missed ring of the bell delays an await by no more than this


class JobHandle(Generic[T]):
    """One job of the queue; what it says is read from the record each time.

    ``await handle`` is :meth:`result` without blocking the event loop.

    Args:
        queue: where the job is.
        job_id: its id.
    """

    def __init__(self, queue: Queue, job_id: int) -> None:
        self.queue = queue
        self.id = job_id

    @property
    def job(self) -> Job:
        """Everything that the record has of the job now."""
        return self.queue.show(self.id)

    @property
    def state(self) -> JobState:
        """Where the job is in its life."""
        return self.job.state

    def wait(self, timeout: float | None = None) -> Job:
        """Wait until the job has ended, however, and return it.

        Raises:
            TimeoutError: it has not ended within ``timeout`` seconds.
        """
        (job,) = self.queue.wait(self.id, timeout=timeout)
        return job

    def result(self, timeout: float | None = None) -> T:
        """What the function has returned; of a command its exit status, which is 0; of an isolated
        cell its outputs by name.

        Raises:
            TimeoutError: it has not ended within ``timeout`` seconds.
            JobFailedError: the job was cancelled, was lost, or its command has failed.
            BaseException: whatever the function has raised; the cause shows where.
        """
        return cast(T, result_of(self.queue, self.wait(timeout)))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What :meth:`result` would raise, or None when it would return.

        Raises:
            TimeoutError: the job has not ended within ``timeout`` seconds.
        """
        return outcome_of(self.queue, self.wait(timeout)).error

    def cancel(self) -> JobState:
        """Cancel the job; one that runs is interrupted, terminated, killed. How it stands now."""
        (job,) = self.queue.cancel(self.id)
        return job.state

    def log(self) -> str:
        """What the job has printed so far; empty before it has begun."""
        job = self.job
        if self.queue.log_path(self.id) is None:
            return ""
        return b"".join(written(self.queue, job)).decode("utf-8", "replace")

    def __await__(self) -> Generator[Any, None, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        loop = asyncio.get_running_loop()
        rang = asyncio.Event()

        def heard() -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(rang.set)

        leave = self.queue.subscribe(heard)
        try:
            while (state := self.state) not in FINAL:
                self.queue.mend({self.id: state})
                with suppress(TimeoutError):
                    await asyncio.wait_for(rang.wait(), _STEP_S)
                rang.clear()
        finally:
            leave()
        return cast(T, result_of(self.queue, self.job))

    def __repr__(self) -> str:
        try:
            job = self.job
        except JobNotFoundError:
            return f"<job {self.id}: no longer kept>"
        return f"<job {job.id} {clean(job.name)}: {how_it_stands(job)}>"

    def _repr_html_(self) -> str | None:
        try:
            rows = job_table(self.queue, [self.job])
        except JobNotFoundError:
            return None  # then its repr is shown
        return html_table(JOB_COLUMNS, rows, numeric=("id", "priority"))


class SweepHandle(Sequence[JobHandle[T]]):
    """The jobs of a sweep, in the order of its values: a sequence of handles.

    Args:
        queue: where the jobs are.
        ids: theirs.
        array: the id of the sweep; ``array:<id>`` names all its jobs wherever jobs are named.
    """

    def __init__(self, queue: Queue, ids: Sequence[int], array: str) -> None:
        self.queue = queue
        self.ids = tuple(ids)
        self.array = array

    @overload
    def __getitem__(self, place: int) -> JobHandle[T]: ...

    @overload
    def __getitem__(self, place: slice) -> list[JobHandle[T]]: ...

    def __getitem__(self, place: int | slice) -> JobHandle[T] | list[JobHandle[T]]:
        if isinstance(place, slice):
            return [JobHandle(self.queue, job_id) for job_id in self.ids[place]]
        return JobHandle(self.queue, self.ids[place])

    def __len__(self) -> int:
        return len(self.ids)

    def wait(self, timeout: float | None = None) -> list[Job]:
        """Wait until every job has ended, however, and return them.

        Raises:
            TimeoutError: they have not ended within ``timeout`` seconds.
        """
        return self.queue.wait(*self.ids, timeout=timeout)

    def result(self, timeout: float | None = None) -> list[T]:
        """The results of all jobs.

        Raises:
            TimeoutError: they have not ended within ``timeout`` seconds.
            JobFailedError, BaseException: what the first of them raises that has no result.
        """
        return [cast(T, result_of(self.queue, job)) for job in self.wait(timeout)]

    def cancel(self) -> None:
        """Cancel every job that has not ended."""
        self.queue.cancel(*self.ids)

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self._awaited().__await__()

    async def _awaited(self) -> list[T]:
        return [await handle for handle in self]

    def __repr__(self) -> str:
        return f"<sweep {self.array}: jobs {ranges(self.ids)}>"

    def _repr_html_(self) -> str:
        rows = job_table(self.queue, self.queue.store.those(self.ids), fold=True)
        return html_table(JOB_COLUMNS, rows, numeric=("id", "priority"))


# The values of each variable: {"lr": [0.1, 0.01]}, or axes as on a command line.
Sweep = Mapping[str, Iterable[Any]] | Iterable[str] | str


@overload
def submit(
    work: Sequence[str],
    *,
    shell: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    env: Iterable[str] = (),
    queue: Queue | None = None,
    sweep: None = None,
    dry_run: Literal[False] = False,
    **options: Unpack[SubmitOptions],
) -> JobHandle[int]: ...


@overload
def submit(
    work: Callable[..., T],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Iterable[str] = (),
    queue: Queue | None = None,
    sweep: None = None,
    dry_run: Literal[False] = False,
    **options: Unpack[SubmitOptions],
) -> JobHandle[T]: ...


@overload
def submit(
    work: Sequence[str],
    *,
    shell: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    env: Iterable[str] = (),
    queue: Queue | None = None,
    sweep: Sweep,
    dry_run: Literal[False] = False,
    **options: Unpack[SubmitOptions],
) -> SweepHandle[int]: ...


@overload
def submit(
    work: Callable[..., T],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Iterable[str] = (),
    queue: Queue | None = None,
    sweep: Sweep,
    dry_run: Literal[False] = False,
    **options: Unpack[SubmitOptions],
) -> SweepHandle[T]: ...


@overload
def submit(
    work: Sequence[str] | Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    shell: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    env: Iterable[str] = (),
    queue: Queue | None = None,
    sweep: Sweep | None = None,
    dry_run: Literal[True],
    **options: Unpack[SubmitOptions],
) -> Preview: ...


def submit(
    work: Sequence[str] | Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    shell: bool = False,
    cwd: str | os.PathLike[str] | None = None,
    env: Iterable[str] = (),
    queue: Queue | None = None,
    sweep: Sweep | None = None,
    dry_run: bool = False,
    **options: Unpack[SubmitOptions],
) -> JobHandle[Any] | SweepHandle[Any] | Preview:
    """Queue a command or a function and return at once.

    Args:
        work: the command as a list of arguments, or the function.
        args: the function's arguments; ``kwargs`` those that are named. They are pickled.
        shell: the command is one line for /bin/sh.
        cwd: the working directory; the present one when None.
        env: ``NAME`` (the value here) or ``NAME=VALUE``; values never enter the record.
        queue: another queue than that of the settings in force.
        sweep: one job for each combination of these values: a function gets them as keyword
            arguments, a command in place of ``{name}`` and in its environment.
        dry_run: queue nothing, and say what would happen, and when.
        options: ``priority``, ``name``, ``gpus``, ``mem``, ``time`` …, as for ``gpusched submit``.

    Raises:
        UserError: something that was asked for cannot be; nothing is queued.
    """
    queue = queue or current_queue()
    asked: dict[str, Any] = {**options, "cwd": cwd, "env": env, "sweep": sweep}
    if not callable(work):
        if args or kwargs:
            raise UserError("a command takes its arguments in its list; write them there")
        asked |= {"argv": work, "shell": shell}
        if dry_run:
            return queue.preview(**asked)
        done = queue.submit_all(**asked)
        if done.caution is not None:
            warnings.warn(done.caution, UserWarning, stacklevel=2)
        return _handle(queue, done)
    if shell:
        raise UserError("shell=True is for commands; a function runs in Python")
    asked |= _call(queue, uuid.uuid4().hex)
    asked["name"] = asked.get("name") or name_of(work)
    if dry_run:
        return queue.preview(**asked)

    def keep(spec: JobSpec, values: Mapping[str, Any]) -> None:
        keep_call(queue.state, spec.uid, Call(work, args, {**(kwargs or {}), **values}))

    undo = partial(drop_call, queue.state)
    return _handle(queue, queue.submit_all(prepare=keep, undo=undo, **asked))


def _handle(queue: Queue, done: Submission) -> JobHandle[Any] | SweepHandle[Any]:
    """What stands for the jobs; that some stood already is said in one line."""
    if done.note is not None:
        print(done.note, file=sys.stderr)
    if done.array is None:
        return JobHandle(queue, done.jobs[0].id)
    return SweepHandle(queue, [job.id for job in done.jobs], done.array)


def _call(queue: Queue, uid: str) -> dict[str, Any]:
    """The job that makes the call of that uid."""
    argv = python_argv("callmain", str(queue.state.root), uid, isolated=False)
    return {"argv": argv, "kind": JobKind.CALLABLE, "uid": uid}


def queue_call(queue: Queue, uid: str, **options: Any) -> Job:
    """Queue the call that was kept under ``uid``; where that fails nothing of it is left.

    Raises:
        UserError: it cannot be queued.
    """
    try:
        for name in ("key", "sweep"):
            if options.get(name):
                raise UserError(
                    f"each call of an executor is a job of its own; {name} is for submit"
                )
        return queue.submit(**_call(queue, uid), **options)
    except BaseException:
        drop_call(queue.state, uid)
        raise


def result_of(queue: Queue, job: Job) -> Any:
    """The result of an ended job.

    Raises:
        JobFailedError: it has none.
        BaseException: what its function has raised.
    """
    outcome = outcome_of(queue, job)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def outcome_of(queue: Queue, job: Job) -> Outcome:
    """What came of an ended job: of a function its value, of a command its exit status, of an
    isolated cell its outputs by name."""
    if job.state not in (JobState.COMPLETED, JobState.FAILED):
        return Outcome(error=_failed(job))
    if job.kind not in (JobKind.CALLABLE, JobKind.ISOLATED):
        done = job.state is JobState.COMPLETED
        return Outcome(job.exit_code) if done else Outcome(error=_failed(job))
    try:
        outcome = take_outcome(queue.state, job.spec.uid)
    except UserError as exc:
        return Outcome(error=exc)
    if job.state is JobState.FAILED:
        known = outcome is not None and outcome.error is not None
        return outcome if outcome is not None and known else Outcome(error=_failed(job))
    if outcome is None or outcome.error is not None:
        return Outcome(error=UserError(f"the result of job {job.id} is no longer kept"))
    return outcome


def _failed(job: Job) -> JobFailedError:
    text = f"job {job.id} ({clean(job.name)}) has no result: {how_it_stands(job)}"
    return JobFailedError(job.id, job.state, text)
