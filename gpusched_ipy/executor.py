"""``GpuExecutor``: a ``concurrent.futures.Executor`` whose calls wait in the queue for a GPU.

Each call is a job of its own in a fresh Python. One thread brings the results back; it lives only
while calls are on their way, and the interpreter waits for it at its end, as for other executors.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, ParamSpec, TypeVar, Unpack

from gpusched_ipy.api import Queue
from gpusched_ipy.bell import Bell
from gpusched_ipy.calls import Batch, Call, drop_call, keep_call, name_of
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.handle import JobHandle, outcome_of, queue_call
from gpusched_ipy.here import current_queue
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.options import JobOptions, python_fields

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)
# A missed ring of the bell, or the death of whoever would have rung, delays a result by this.
_STEP_S = 1.0


class GpuFuture(Future[T]):
    """The future of a call. ``job`` is its job, None while it waits for ``max_workers``."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls
        self.job: JobHandle[T] | None = None

    def cancel(self) -> bool:
        """Cancel the call if it has not begun; ``future.job.cancel()`` also ends one that runs."""
        return self._calls.cancel(self)

    def cancel_here(self) -> bool:
        """Cancel only the future: its call will never begin."""
        return super().cancel()


class GpuExecutor(Executor):
    """Calls functions in fresh Pythons, each when a GPU is free for it.

    Args:
        max_workers: how many calls stand in the queue or run at a time; None: all at once, and the
            GPUs decide.
        cwd: the working directory of the calls; the present one when None.
        env: ``NAME`` (the value here) or ``NAME=VALUE``; values never enter the record.
        queue: another queue than that of the settings in force.
        options: of every call: ``priority``, ``gpus``, ``mem``, ``time`` …

    Raises:
        ValueError: ``max_workers`` is not above zero.
        UserError: an option is unknown or has a value that it cannot have.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Iterable[str] = (),
        queue: Queue | None = None,
        **options: Unpack[JobOptions],
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        fields = {**python_fields(options), "cwd": cwd, "env": tuple(env)}
        self._calls = _Calls(queue or current_queue(), max_workers, fields)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> GpuFuture[T]:
        """Queue one call.

        Raises:
            UserError: the call cannot be pickled or queued; nothing is.
            RuntimeError: the executor, or the interpreter, has been shut down.
        """
        return self._calls.submit(Call(fn, args, kwargs))

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[T]:
        """The results of ``fn`` for the items, in their order.

        Args:
            timeout: seconds from now in which all of them must have come.
            chunksize: how many items one job takes: a fresh Python for each costs ~0.1 s.

        Raises:
            ValueError: ``chunksize`` is below 1.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout)
        items = zip(*iterables, strict=False)
        batches = iter(lambda: tuple(islice(items, chunksize)), ())
        found = super().map(Batch(fn), batches, timeout=timeout)
        return (item for batch in found for item in batch)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls.

        Args:
            wait: return when every call has ended.
            cancel_futures: cancel those that have not begun.
        """
        self._calls.close(cancel_futures)
        if wait:
            self._calls.join()


@dataclass(slots=True, eq=False)
class _Flight:
    """One call on its way."""

    uid: str
    name: str
    future: GpuFuture[Any]


class _Calls:
    """The calls of one executor that have not ended."""

    def __init__(self, queue: Queue, limit: int | None, fields: dict[str, Any]) -> None:
        self._queue = queue
        self._limit = limit
        self._fields = fields
        self._lock = threading.RLock()
        self._backlog: deque[_Flight] = deque()
        self._flying: dict[int, _Flight] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- from the threads of the user

    def submit(self, call: Call) -> GpuFuture[Any]:
        """Put one call on its way."""
        self._check_open()
        flight = _Flight(uuid.uuid4().hex, name_of(call.function), GpuFuture(self))
        keep_call(self._queue.state, flight.uid, call)
        with self._lock:
            try:
                self._check_open()
                if self._limit is None or len(self._flying) < self._limit:
                    self._start(flight)
                else:
                    self._backlog.append(flight)
            except BaseException:
                drop_call(self._queue.state, flight.uid)
                raise
            if self._thread is None:
                # Not a daemon: the interpreter does not end before the results are there.
                self._thread = threading.Thread(target=self._collect, name="gpusched-executor")
                self._thread.start()
        return flight.future

    def cancel(self, future: GpuFuture[Any]) -> bool:
        """Whether the call of ``future`` will never run, because it has not begun."""
        with self._lock:
            flight = next((one for one in self._backlog if one.future is future), None)
            if flight is not None:
                self._backlog.remove(flight)
            elif future.job is not None and not future.done():
                if not self._cancel_pending([future.job.id]):
                    return False
            else:
                return future.cancel_here()
        future.cancel_here()
        if flight is not None:
            self._drop(flight)
        return True

    def close(self, cancel_pending: bool) -> None:
        """Take no more calls."""
        with self._lock:
            self._closed = True
            if not cancel_pending:
                return
            dropped, self._backlog = list(self._backlog), deque()
            ended = self._cancel_pending(list(self._flying))
            futures = [self._flying[job_id].future for job_id in ended]
        for flight in reversed(dropped):
            flight.future.cancel_here()
            self._drop(flight)
        for future in futures:
            future.cancel_here()

    def join(self) -> None:
        """Wait until every call has ended."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if not threading.main_thread().is_alive():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def _start(self, flight: _Flight) -> None:
        fields = {"name": flight.name, **self._fields}
        job = queue_call(self._queue, flight.uid, **fields)
        flight.future.job = JobHandle(self._queue, job.id)
        self._flying[job.id] = flight

    def _cancel_pending(self, ids: list[int]) -> list[int]:
        """Cancel those of the jobs that have not begun; which they were."""
        store = self._queue.store
        with store.writing():
            states = store.states(ids)
            pending = [job_id for job_id in ids if states.get(job_id) is JobState.PENDING]
            if pending:
                self._queue.cancel(*pending)
        return pending

    def _drop(self, flight: _Flight) -> None:
        """A call that never stood in the queue is over: tell who waits for it."""
        drop_call(self._queue.state, flight.uid)
        flight.future.set_running_or_notify_cancel()

    # -- from the thread that brings results back

    def _collect(self) -> None:
        rang = threading.Event()
        bell = Bell(self._queue.state.bell, rang.set)
        rev: int | None = None
        mended = time.monotonic()
        try:
            while True:
                try:
                    rev = self._look(rev)
                except GpuSchedError as exc:
                    _log.error("results cannot be brought back now: %s", exc)
                with self._lock:
                    if not self._flying and not self._backlog:
                        self._thread = None
                        return
                rang.wait(_STEP_S)
                rang.clear()
                if time.monotonic() - mended >= _STEP_S:
                    self._mend()
                    mended = time.monotonic()
        finally:
            bell.close()

    def _look(self, rev: int | None) -> int:
        """Tell the futures what has changed since ``rev``, and start what may start now."""
        with self._lock:
            newest, changed = self._queue.store.changed_since(rev)
            known = {job.id: job for job in changed if job.id in self._flying}
            if rev is None:  # only the open ones were listed
                gone = self._flying.keys() - known.keys()
                known |= {job_id: self._queue.store.job(job_id) for job_id in gone}
            flights = [(self._flying[job_id], job) for job_id, job in known.items()]
            for job_id, job in known.items():
                if job.ended:
                    del self._flying[job_id]
            refused = self._refill()
        while flights:  # not one of them is kept here once its result is out
            self._tell(*flights.pop(0))
        for flight, error in refused:
            if flight.future.set_running_or_notify_cancel():
                flight.future.set_exception(error)
        return newest

    def _refill(self) -> list[tuple[_Flight, Exception]]:
        refused: list[tuple[_Flight, Exception]] = []
        while self._backlog and (self._limit is None or len(self._flying) < self._limit):
            flight = self._backlog.popleft()
            try:
                self._start(flight)
            except Exception as exc:  # noqa: BLE001 - whatever it is, its future says it
                refused.append((flight, exc))
        return refused

    def _tell(self, flight: _Flight, job: Job) -> None:
        future = flight.future
        if job.state is JobState.RUNNING and not future.running():
            future.set_running_or_notify_cancel()
        if not job.ended:
            return
        if job.state is JobState.CANCELLED and not future.running():
            future.cancel_here()
        wanted = future.running() or future.set_running_or_notify_cancel()
        outcome = outcome_of(self._queue, job) if wanted else None
        # Before the result is out: whoever gets it may expect that nobody else refers to it.
        drop_call(self._queue.state, flight.uid)
        if outcome is None:
            return
        if outcome.error is None:
            future.set_result(outcome.value)
        else:
            future.set_exception(outcome.error)

    def _mend(self) -> None:
        with self._lock:
            ids = list(self._flying)
        self._queue.mend(self._queue.store.states(ids))
