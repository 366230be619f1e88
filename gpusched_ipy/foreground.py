"""``gpusched run``: one command in this terminal, begun by this process when its turn has come.

The command keeps the terminal: its input, output and signals are this process's own. The queue
knows it as an allocation that ends with this process; its GPU locks are held by the command too, so
that no GPU is given on while a process of it lives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

from gpusched_ipy import environment, secrecy
from gpusched_ipy.api import Queue
from gpusched_ipy.job import Job, JobKind, JobState
from gpusched_ipy.locks import Membership
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.news import News
from gpusched_ipy.outcome import Outcome, record
from gpusched_ipy.process import ProcessId, become_subreaper, end_tree
from gpusched_ipy.scheduler import Claim, Scheduler
from gpusched_ipy.snapshot import Gpu
from gpusched_ipy.supervision import supervise

_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_ENDS_WAITING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})

Tell = Callable[[str], None]


def run_here(
    queue: Queue,
    argv: Sequence[str],
    tell: Tell,
    *,
    shell: bool = False,
    cwd: str | None = None,
    env: Iterable[str] = (),
    **fields: Any,
) -> Job:
    """Queue the command, wait for its turn, run it in this terminal, and return the ended job.

    Args:
        tell: is given one line whenever there is news: why it waits, that it begins.
        env: ``NAME`` or ``NAME=VALUE``, as for a submit.
        fields: the options of a submit.

    Raises:
        UserError: something that was asked for cannot be; nothing is queued.
    """
    named = environment.named(env, os.environ)
    become_subreaper()
    with ExitStack() as stack:
        turn = _Turn(queue, stack)
        job = queue.submit(
            argv, kind=JobKind.ALLOCATION, home=turn.key, shell=shell, cwd=cwd, **fields
        )
        if caution := secrecy.warning(job.spec.argv or ()):
            tell(caution)
        queue.store.wait_for_ever()
        stack.callback(queue.cancel, job.id)  # whatever goes wrong here, nothing is left waiting
        signals = _Signals()
        stack.enter_context(signals)
        claim = turn.wait(job.id, signals, tell)
        started = None if claim is None else turn.begin(claim)
        if claim is not None and started is not None:
            tell(f"job {job.id} begins on {', '.join(_gpu_name(gpu) for gpu in claim.gpus)}")
            outcome = _run(queue, started, claim, named, signals)
            turn.give_back(claim)
            record(queue.store, started, outcome)
        return queue.show(job.id)


class _Turn:
    """This process as a member of the queue that has one job: waits until the job is claimed."""

    def __init__(self, queue: Queue, stack: ExitStack) -> None:
        self._queue = queue
        membership = Membership(queue.state)
        self.key = membership.key
        stack.callback(membership.leave)
        queue.store.join(self.key, "terminal", queue.owner)
        stack.callback(queue.store.leave, self.key)
        self._monitor = Monitor(queue.settings, queue.clock, queue.state.root)
        stack.callback(self._monitor.stop)
        self._scheduler = Scheduler(
            queue.store,
            self._monitor,
            membership,
            {JobKind.ALLOCATION: self},
            queue.settings,
            queue.clock,
        )
        stack.callback(self._scheduler.stop)
        self._claims: list[Claim] = []
        self._came = threading.Event()

    def ready(self, job: Job) -> bool:
        """The command can begin at any time."""
        return True

    def start(self, claim: Claim) -> None:
        """The turn has come; the main thread does the rest."""
        self._claims.append(claim)
        self._came.set()

    def cancel(self, job: Job) -> None:
        """Nothing to do: who runs the command hears of it by itself."""

    def wait(self, job_id: int, signals: _Signals, tell: Tell) -> Claim | None:
        """The claim of the job; None when it was cancelled or ended by a signal before."""
        news = News(tell)
        self._scheduler.start()
        while not self._came.wait(0.1):
            if signals.ended_waiting:
                self._queue.cancel(job_id)
            job = self._queue.show(job_id)
            if job.ended:
                return None
            news.about(job)
        return self._claims[0]

    def begin(self, claim: Claim) -> Job | None:
        """Take the claim over, or give it up when it is no longer wanted; ends the loop."""
        cancelled = self._queue.show(claim.job.id).cancel_requested
        job = None if cancelled else self._scheduler.begin(claim)
        if cancelled:
            self._scheduler.finish(claim, state=JobState.CANCELLED)
        self._scheduler.stop()
        self._monitor.stop()
        return job

    def give_back(self, claim: Claim) -> None:
        """Let go of the GPUs: before the end is recorded, so that the next job finds them free."""
        self._scheduler.hand_over(claim)


class _Signals:
    """Remembers signals while the job waits, and passes them on once its command runs."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.ended_waiting = False

    def __enter__(self) -> _Signals:
        for name in _PASSED_ON:
            number = signal.Signals[name]
            # What is ignored here (nohup) is ignored by the command as well.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def pass_on_to(self, child: subprocess.Popen[bytes]) -> None:
        """From now on signals are the command's."""
        self._child = child
        if self.ended_waiting:
            child.terminate()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._child is None:
            self.ended_waiting |= number in _ENDS_WAITING
        elif number not in (signal.SIGINT, signal.SIGQUIT) or not _terminal_is_ours():
            self._child.send_signal(number)


def _terminal_is_ours() -> bool:
    """Whether the terminal's own keys signal this process group, the command included."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    return False


def _run(
    queue: Queue, job: Job, claim: Claim, named: Mapping[str, str], signals: _Signals
) -> Outcome:
    spec = job.spec
    assert spec.argv is not None
    own = {"GPUSCHED_JOB_ID": str(job.id), "GPUSCHED_JOB_NAME": job.name}
    try:
        child = subprocess.Popen(
            ["/bin/sh", "-c", spec.argv[0]] if spec.shell else list(spec.argv),
            cwd=spec.cwd,
            env={**os.environ, **named, **own, **claim.env},
            pass_fds=claim.lock_fds,
        )
    except OSError as exc:
        status = 127 if isinstance(exc, FileNotFoundError) else 126
        return Outcome(state=JobState.FAILED, exit_code=status, error=f"cannot be run: {exc}")
    try:
        signals.pass_on_to(child)
        leader = ProcessId.of(child.pid)
        if leader is not None and job.attempt is not None:
            queue.store.set_process(job.attempt, leader)
        with ExitStack() as later:
            return supervise(queue.store, job, child, later)
    except BaseException:
        end_tree(os.getpid())  # nothing may go on that nobody can record
        raise


def _gpu_name(gpu: Gpu) -> str:
    return f"GPU {gpu.number or gpu.uuid} ({gpu.name})"
