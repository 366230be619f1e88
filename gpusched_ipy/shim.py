"""The small process beside each command: it outlives notebook and agent and records the end.

It takes the claim over (or finds itself fenced and leaves without a trace), starts the command in a
session of its own, ends the whole tree on cancel or walltime, and writes the result. Whatever
happens to it, the job's own processes hold the locks that tell the truth.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from gpusched_ipy import environment
from gpusched_ipy.errors import DamagedJobError, StateDirError, StoreError
from gpusched_ipy.job import BOUND_KINDS, Job, JobKind, JobState
from gpusched_ipy.locks import Membership
from gpusched_ipy.logcap import LogCap
from gpusched_ipy.process import (
    ProcessId,
    become_subreaper,
    end_tree,
    has_descendants,
    survive_signals,
)
from gpusched_ipy.retry import may_be_tried_again
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store

# How often zombies that a job's daemons leave to us are collected.
_COLLECT_S = 60.0
# First pause before an end that could not be recorded is recorded again (a full disk).
_RETRY_S = 0.2
_BELL, _EXIT = "bell", "exit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the command ended."""

    state: JobState
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    oom: bool = False  # it ran out of GPU memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the shim is to do: one claim of one job."""

    job: int
    epoch: int
    claimed_by: str
    env: Mapping[str, str]
    log_fd: int
    gpu_fds: tuple[int, ...]
    log_cap: int  # bytes


def main(argv: Sequence[str]) -> int:
    """Wait for the order on the socket that stdin is, and run that job."""
    root = Path(argv[argv.index("--state-dir") + 1])
    survive_signals(signal.SIGINT, signal.SIGHUP)
    become_subreaper()
    store = Store(StateDir(root))
    order = _receive()
    if order is not None:
        _obey(store, order)
    return 0


def _receive() -> Order | None:
    """The order, or None when whoever had started us is gone without needing us."""
    with socket.socket(fileno=os.dup(0)) as channel:
        text, fds, _, _ = socket.recv_fds(channel, 65536, 256)
        while more := channel.recv(65536):
            text += more
    if not text:
        return None
    return Order(log_fd=fds[0], gpu_fds=tuple(fds[1:]), **json.loads(text))


def _obey(store: Store, order: Order) -> None:
    membership = Membership(store.state)
    with store.writing():
        job = store.take_over(
            order.job, epoch=order.epoch, claimed_by=order.claimed_by, member=membership.key
        )
        if job is not None:
            store.join(membership.key, "shim", f"job {job.id}")
    if job is not None:
        with ExitStack() as later:
            outcome = _run(store, job, order, later)
            # None of its processes is left here; the lock is the truth, whatever can be recorded.
            _close(order.gpu_fds)
            try:
                _end(store, job, outcome, membership.key)
            except StoreError:
                _insist(store, job, outcome, membership.key)
    else:
        _close(order.gpu_fds)
    membership.leave()
    # Not before the next job has heard of it: it costs milliseconds on some disks.
    with suppress(OSError):
        store.sync()
    _call_agent(store)


def _end(store: Store, job: Job, outcome: Outcome, member: str) -> None:
    with store.writing(durable=False):
        # Of a job that cannot be read in the record nothing can be recorded; nobody waits for it.
        with suppress(DamagedJobError):
            record(store, job, outcome)
        store.leave(member)


def _insist(store: Store, job: Job, outcome: Outcome, member: str) -> None:
    """Record the end once it can be recorded: only this process knows how the job ended."""
    pause = _RETRY_S
    while store.state.database.exists():
        time.sleep(pause)
        pause = min(2 * pause, 10.0)
        with suppress(StoreError):
            _end(store, job, outcome, member)
            return


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _run(store: Store, job: Job, order: Order, later: ExitStack) -> Outcome:
    assert job.attempt is not None
    try:
        log = LogCap(store.state.log(job.attempt), order.log_cap)
        child = _start(store, job, order)
    except StateDirError as exc:
        return Outcome(state=JobState.FAILED, error=f"cannot be run: {exc}")
    except FileNotFoundError as exc:
        return Outcome(state=JobState.FAILED, exit_code=127, error=f"cannot be run: {exc}")
    except OSError as exc:
        return Outcome(state=JobState.FAILED, exit_code=126, error=f"cannot be run: {exc}")
    with _kept(log):
        leader = ProcessId.of(child.pid)
        if leader is not None:
            # It runs; whether the record can say so at once or not.
            with suppress(StoreError):
                store.set_process(job.attempt, leader)
        outcome = supervise(store, job, child, later)
    return _explained(outcome, store.state, job)


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


def _start(store: Store, job: Job, order: Order) -> subprocess.Popen[bytes]:
    spec = job.spec
    assert spec.argv is not None
    own = {"GPUSCHED_JOB_ID": str(job.id), "GPUSCHED_JOB_NAME": job.name}
    named = environment.take(store.state, spec.uid, spec.env_names, again=may_be_tried_again(job))
    child = subprocess.Popen(
        ["/bin/sh", "-c", spec.argv[0]] if spec.shell else list(spec.argv),
        # Empty to whoever reads it. What a launcher starts keeps no other lock that is seen from
        # another container.
        stdin=order.gpu_fds[0] if order.gpu_fds else subprocess.DEVNULL,
        stdout=order.log_fd,
        stderr=order.log_fd,
        cwd=spec.cwd,
        env={**spec.env, **named, **own, **order.env},
        start_new_session=True,
        pass_fds=order.gpu_fds,
    )
    # Only the job holds its log now: a free lock on it means that no process of the job lives.
    os.close(order.log_fd)
    return child


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


def record(store: Store, job: Job, outcome: Outcome) -> None:
    """Record how the job ended, unless its claim has fallen meanwhile."""
    ended = store.finish_if_active(
        job.id,
        epoch=job.epoch,
        state=outcome.state,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        error=outcome.error,
        oom=outcome.oom,
    )
    if ended is not None and ended.ended:
        environment.drop(store.state, job.spec.uid)  # kept for another try


def _collect_strays(leader: int) -> None:
    """Collect the zombies that our adopted descendants have become."""
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.Error, ChildProcessError):
            if child.pid != leader and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def _call_agent(store: Store) -> None:
    """If others wait and the agent has died, this end is what goes on."""
    if store.any_unheld(kind for kind in JobKind if kind not in BOUND_KINDS):
        from gpusched_ipy.summon import ensure_agent

        ensure_agent(store.state)
