"""The process that goes on dispatching when no notebook is open. Killing it loses nothing.

It starts by itself when a command is submitted, holds ``agent.lock`` so that there is one, and
leaves when the queue is empty. ``gpusched agent run`` is the same loop in the foreground; it stays.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.desks import Desks
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import JobKind
from gpusched_ipy.locks import Membership, alive_pid, is_member
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.notify import notifier
from gpusched_ipy.process import signal_if, survive_signals
from gpusched_ipy.retention import now_and_then
from gpusched_ipy.runners.command import CommandRunner
from gpusched_ipy.scheduler import Scheduler
from gpusched_ipy.signalflag import SignalFlag
from gpusched_ipy.statedir import StateDir, open_private, open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.summon import FAILED, IDLE, STOPPED, AgentLock

# How long an agent with nothing to do stays: a sweep's next submit finds it warm.
LINGER_S = 5.0
_LOG_BYTES = 1_000_000
# Between two looks at a lock whose holder dies.
_FIRST_S, _LONGEST_S = 0.01, 1.0


class Agent:
    """One agent of one state directory.

    Args:
        stays: do not leave when the queue is empty.
    """

    def __init__(self, settings: Settings, *, stays: bool = False) -> None:
        self._settings = settings
        self._stays = stays
        self._stop = SignalFlag()
        self.state = open_state_dir(settings)
        self._lock = AgentLock(self.state)

    def run(self) -> bool:
        """Dispatch until told to stop, or until idle; False where another agent lives already."""
        if not self._take_lock():
            return False
        store = Store(self.state)
        membership = Membership(self.state)
        store.join(membership.key, "agent", "agent")
        monitor = Monitor(self._settings, state_dir=self.state.root)
        runner = CommandRunner(
            store, log_cap=self._settings.log_cap, park_python=self._settings.park_python
        )
        runners = dict.fromkeys((JobKind.COMMAND, JobKind.CALLABLE, JobKind.ISOLATED), runner)
        scheduler = Scheduler(store, monitor, membership, runners, self._settings)
        runner.scheduler = scheduler
        scheduler.expect = runner.expect
        scheduler.start()
        runner.park()
        desks = Desks(store, scheduler, self._settings, membership.key)
        desks.start()
        telling = notifier(store, self._settings.notify)
        try:
            self._until_idle(store, scheduler, desks)
        finally:
            # (One that has nothing to do has given its lock back by now.)
            self._lock.leave_word(STOPPED if self._stop.wait(0) else FAILED)
            desks.stop()
            if telling is not None:
                telling.stop()
            scheduler.stop()
            runner.close()
            monitor.stop()
            store.leave(membership.key)
            membership.leave()
            store.close()
            self._lock.release()
        return True

    def _take_lock(self) -> bool:
        """Have the lock, from one that dies as soon as it lets go; False: somebody lives."""
        pause = _FIRST_S
        while not self._lock.take():
            if self._lock.holder is not None or self._stop.wait(pause):
                return False
            pause = min(2 * pause, _LONGEST_S)
        return True

    def stop(self) -> None:
        """Leave soon; callable from a signal handler."""
        self._stop.set()

    def _until_idle(self, store: Store, scheduler: Scheduler, desks: Desks) -> None:
        idle_since: float | None = None
        look_s = LINGER_S / 10
        while not self._stop.wait(look_s):
            if not self.state.database.exists():
                return  # the whole folder has been removed
            if not scheduler.idle or desks.busy:
                if idle_since is not None:
                    scheduler.wake()  # whoever has submitted may have died before he rang
                idle_since, look_s = None, LINGER_S / 4
                continue
            look_s = LINGER_S / 10
            if idle_since is None:
                idle_since = time.monotonic()
                now_and_then(store, self._settings, SystemClock().now().wall)
            lingered = time.monotonic() - idle_since >= LINGER_S
            if lingered and not self._stays and self._leave(scheduler):
                return

    def _leave(self, scheduler: Scheduler) -> bool:
        """Decide to leave under the queue lock: no submit can slip in between."""
        return scheduler.if_idle(self._give_back)

    def _give_back(self) -> None:
        self._lock.leave_word(IDLE)
        self._lock.release()


def running_agent(state: StateDir, store: Store) -> int | None:
    """The pid of the living agent, or None."""
    for key, kind in store.member_kinds().items():
        pid = alive_pid(state, key) if kind == "agent" else None
        if pid:
            return pid
    return None


def ask_to_leave(pid: int, state: StateDir, *, patience_s: float = 10.0) -> None:
    """End the agent of that pid and wait until it has left.

    Raises:
        UserError: it does not leave in time.
    """
    signal_if(pid, signal.SIGTERM, lambda: is_member(state, pid))
    deadline = time.monotonic() + patience_s
    while is_member(state, pid):
        if time.monotonic() >= deadline:
            raise UserError(
                f"the agent (pid {pid}) does not leave; it may be stopped: kill -CONT {pid}"
            )
        time.sleep(0.05)


def run_foreground(settings: Settings) -> None:
    """The agent in this process until interrupted; one that had started by itself gives way."""
    state = open_state_dir(settings)
    agent = Agent(settings, stays=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    while not agent.run():
        store = Store(state)
        pid = running_agent(state, store)
        store.close()
        if pid:
            ask_to_leave(pid, state)


def main(argv: Sequence[str]) -> int:
    """The agent as it is started by a submit."""
    parser = argparse.ArgumentParser(prog="gpusched agent")
    parser.add_argument("--state-dir", required=True)
    settings = Settings.load({"state_dir": parser.parse_args(argv).state_dir})
    agent = Agent(settings)
    signal.signal(signal.SIGTERM, lambda *_: agent.stop())
    survive_signals(signal.SIGINT, signal.SIGHUP)
    _log_to(agent.state.root / "agent.log")
    agent.run()
    return 0


def _log_to(path: Path) -> None:
    fd = open_private(path, os.O_WRONLY | os.O_APPEND)
    if os.fstat(fd).st_size > _LOG_BYTES:
        os.ftruncate(fd, 0)
    os.dup2(fd, sys.stderr.fileno())
    os.close(fd)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(process)d %(message)s"
    )
