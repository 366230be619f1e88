"""Sees a command through: waits for its end, ends it when it must, tells and records how it went.

It has begun nothing and decides nothing. Whoever started the shim hears of the end first and
records it, together with what starts next; where it does not answer the end is recorded here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from gpusched_ipy.errors import DamagedJobError, StoreError
from gpusched_ipy.job import BOUND_KINDS, Job, JobKind, JobState
from gpusched_ipy.locks import Membership
from gpusched_ipy.logcap import LogCap
from gpusched_ipy.outcome import RECORDED, Outcome, record
from gpusched_ipy.process import end_tree, has_descendants
from gpusched_ipy.rows import to_job
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store
from gpusched_ipy.takeover import TakeOver

# How often zombies that a job's daemons leave to us are collected.
_COLLECT_S = 60.0
# First pause before an end that could not be recorded is recorded again (a full disk).
_RETRY_S = 0.2
# So long whoever was told of an end may take to record it; then it is recorded here as well, which
# changes nothing where it had been.
_ANSWER_S = 1.0
# Once somebody else has recorded the end, what is left to do waits so long: the next job first.
_AFTERWARDS_S = 0.05
_BELL, _EXIT = "bell", "exit"


class Supervision:
    """One job that this process has begun.

    Args:
        opened: the record.
        row: the job, as it was begun.
        gpu_fds: the locks of its GPUs.
        channel: leads to whoever has started this process.
    """

    def __init__(
        self,
        opened: TakeOver,
        row: Mapping[str, Any],
        membership: Membership,
        gpu_fds: tuple[int, ...],
        channel: socket.socket,
    ) -> None:
        self._store = opened if isinstance(opened, Store) else Store.over(opened)
        self._job = to_job(row)
        self._membership = membership
        self._gpu_fds = gpu_fds
        self._channel = channel

    def see_through(
        self,
        child: subprocess.Popen[bytes] | None,
        log: LogCap | None,
        failure: tuple[int | None, str] | None,
    ) -> None:
        """Wait for the end of the command, and record it.

        Args:
            failure: of a command that could not be run: the exit code that says so, and why.
        """
        with ExitStack() as later:
            if child is not None and log is not None:
                outcome = self._until_it_ends(child, log, later)
            else:
                code, why = failure or (None, "cannot be run")
                outcome = Outcome(state=JobState.FAILED, exit_code=code, error=why)
            # None of its processes is left here; the lock is the truth, whatever can be recorded.
            for fd in self._gpu_fds:
                os.close(fd)
            told = self._told(outcome)
            if not told:
                self._record(outcome)
        if told:
            time.sleep(_AFTERWARDS_S)
        self._membership.leave()
        # Not before the next job has heard of it: it costs milliseconds on some disks.
        with suppress(OSError):
            self._store.sync()
        call_agent(self._store)
        with suppress(StoreError):
            self._store.checkpoint()

    def _until_it_ends(
        self, child: subprocess.Popen[bytes], log: LogCap, later: ExitStack
    ) -> Outcome:
        store, job = self._store, self._job
        with _kept(log):
            outcome = supervise(store, job, child, later)
        return _explained(outcome, store.state, job)

    def _told(self, outcome: Outcome) -> bool:
        """Tell whoever has started us how the job ended; whether that one has recorded it."""
        end = {
            "member": self._membership.key,
            "state": str(outcome.state),
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "error": outcome.error,
            "oom": outcome.oom,
        }
        try:
            self._channel.settimeout(_ANSWER_S)
            self._channel.sendall(json.dumps(end).encode() + b"\n")
            return self._channel.recv(len(RECORDED)) == RECORDED
        except OSError:  # it is gone, stopped, or slow
            return False

    def _record(self, outcome: Outcome) -> None:
        """Record the end once it can be recorded: only this process knows how the job ended."""
        pause = _RETRY_S
        while True:
            with suppress(StoreError):
                _end(self._store, self._job, outcome, self._membership.key)
                return
            if not self._store.state.database.exists():
                return
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def _end(store: Store, job: Job, outcome: Outcome, member: str) -> None:
    with store.writing(durable=False):
        # Of a job that cannot be read in the record nothing can be recorded; nobody waits for it.
        with suppress(DamagedJobError):
            record(store, job, outcome)
        store.leave(member)


def _explained(outcome: Outcome, state: StateDir, job: Job) -> Outcome:
    """A failure whose log says that the GPU's memory was not enough is one of that kind.

    An isolated cell says by itself why it has failed.
    """
    if outcome.state is not JobState.FAILED or job.attempt is None:
        return outcome
    from gpusched_ipy import calls, oom

    said = calls.take_error(state, job.spec.uid) if job.kind is JobKind.ISOLATED else None
    if said is not None:
        return replace(outcome, oom=said.startswith(oom.LEAD), error=said)
    line = oom.in_log(state.log(job.attempt))
    return outcome if line is None else replace(outcome, oom=True, error=f"{oom.LEAD}{line}")


@contextmanager
def _kept(log: LogCap) -> Iterator[None]:
    """While the job runs its log is kept within its cap."""
    over = threading.Event()
    keeper = threading.Thread(target=log.keep, args=(over,), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        log.settle()


def supervise(store: Store, job: Job, child: subprocess.Popen[bytes], later: ExitStack) -> Outcome:
    """Wait for the end of the command, a cancel, or the walltime.

    ``later`` gets what is to be closed once the end has been recorded.
    """
    happened: SimpleQueue[str] = SimpleQueue()

    def await_exit() -> None:
        child.wait()
        happened.put(_EXIT)

    threading.Thread(target=await_exit, daemon=True).start()
    # Imported only now: the job is running already.
    from gpusched_ipy.bell import Bell

    later.callback(Bell(store.state.bell, lambda: happened.put(_BELL)).close)
    happened.put(_BELL)  # a cancel may have come before we listened
    forced = _until_end(store, job, child, happened)
    if has_descendants():
        end_tree(os.getpid(), first=signal.SIGTERM)
        _collect_strays(child.pid)
    return _outcome(child.returncode, forced)


def _until_end(
    store: Store, job: Job, child: subprocess.Popen[bytes], happened: SimpleQueue[str]
) -> JobState | None:
    """Returns once the command is over; the state that was forced on it, if one was."""
    deadline = None if job.request.time_s is None else time.monotonic() + job.request.time_s
    while True:
        left = _COLLECT_S if deadline is None else deadline - time.monotonic()
        try:
            what = happened.get(timeout=max(0.0, min(left, _COLLECT_S)))
        except Empty:
            what = ""
        forced = None
        if what == _EXIT:
            return None
        if what == _BELL and _cancel_wanted(store, job):
            forced = JobState.CANCELLED
        elif deadline is not None and time.monotonic() >= deadline:
            forced = JobState.TIMEOUT
        if forced is not None:
            end_tree(os.getpid())
            while happened.get() != _EXIT:
                pass
            return forced
        _collect_strays(child.pid)


def _cancel_wanted(store: Store, job: Job) -> bool:
    """Whether the user wants the job to end; a record that cannot be read wants nothing."""
    try:
        return store.job(job.id).cancel_requested
    except StoreError:
        return False


def _outcome(status: int, forced: JobState | None) -> Outcome:
    exit_code, number = (status, None) if status >= 0 else (None, -status)
    if forced is JobState.TIMEOUT:
        return Outcome(
            state=forced, exit_code=exit_code, signal=number, error="its walltime ran out"
        )
    ended = JobState.COMPLETED if status == 0 else JobState.FAILED
    return Outcome(state=forced or ended, exit_code=exit_code, signal=number)


def _collect_strays(leader: int) -> None:
    """Collect the zombies that our adopted descendants have become."""
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.Error, ChildProcessError):
            if child.pid != leader and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def call_agent(store: Store) -> None:
    """If others wait and the agent has died, this end is what goes on."""
    if store.any_unheld(kind for kind in JobKind if kind not in BOUND_KINDS):
        from gpusched_ipy.summon import ensure_agent

        ensure_agent(store.state)
