"""Who kills and stops the processes of a run. It knows nothing of what they do."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from tests.chaos.tree import Process, send

# How often each kind is killed; a job dies with its worker or without it.
_WEIGHTS = {
    "kernel": 16,
    "commander": 8,
    "agent": 12,
    "shim": 24,
    "job": 16,
    "worker": 8,
    "submitter": 10,
    "fork": 6,
}


class Nemesis:
    """Kills and stops, at random but from a seed.

    Args:
        look: the living processes of the run.
    """

    def __init__(self, dice: random.Random, look: Callable[[], list[Process]]) -> None:
        self._dice = dice
        self._look = look
        self._stopped: list[tuple[float, Process]] = []
        self.killed: Counter[str] = Counter()
        self.stopped = 0

    @property
    def kills(self) -> int:
        """How many processes it has killed."""
        return self.killed.total()

    def act(self) -> None:
        """Do one bad thing, if there is anybody to do it to."""
        self.wake_due()
        alive = self._look()
        if not alive:
            return
        act = self._dice.choices(
            [self._kill_one, self._kill_shim_and_job, self._strand_orders, self._stop_one],
            [20, 5, 2, 6],
        )[0]
        act(alive)

    def wake_due(self, *, everybody: bool = False) -> None:
        """Let those go on that have been stopped for long enough."""
        now = time.monotonic()
        due = [entry for entry in self._stopped if everybody or entry[0] <= now]
        self._stopped = [entry for entry in self._stopped if entry not in due]
        for _, process in due:
            send(process, signal.SIGCONT)

    def _kill_one(self, alive: list[Process]) -> None:
        kinds = sorted({process.kind for process in alive} & set(_WEIGHTS))
        if kinds:
            kind = self._dice.choices(kinds, [_WEIGHTS[name] for name in kinds])[0]
            self._kill(self._dice.choice([found for found in alive if found.kind == kind]))

    def _kill_shim_and_job(self, alive: list[Process]) -> None:
        """What is left of the job has neither a supervisor nor a leader; often there is a child."""
        jobs = [found for found in alive if found.kind == "job"]
        heads = {found.parent for found in alive if found.kind == "worker"}
        if jobs:
            leave = [found for found in jobs if found.pid in heads]
            job = self._dice.choice(leave if leave and self._dice.random() < 0.8 else jobs)
            for shim in alive:
                if shim.pid == job.parent and shim.kind == "shim":
                    self._kill(shim)
            self._kill(job)

    def _strand_orders(self, alive: list[Process]) -> None:
        """Stop the shims of a dispatcher, and kill it: their orders are stale when they go on."""
        heads = [found for found in alive if found.kind in ("agent", "commander")]
        if not heads:
            return
        head = self._dice.choice(heads)
        for shim in alive:
            if shim.parent == head.pid and shim.kind == "shim":
                self._stop(shim, self._dice.uniform(0.4, 1.2))
        time.sleep(self._dice.uniform(0.02, 0.15))
        self._kill(head)

    def _stop_one(self, alive: list[Process]) -> None:
        stopped = {process.pid for _, process in self._stopped}
        others = [found for found in alive if found.pid not in stopped]
        if others:
            kind = self._dice.choice(sorted({found.kind for found in others}))
            one = self._dice.choice([found for found in others if found.kind == kind])
            self._stop(one, self._dice.uniform(0.02, 0.8))

    def _stop(self, process: Process, seconds: float) -> None:
        if send(process, signal.SIGSTOP):
            self.stopped += 1
            self._stopped.append((time.monotonic() + seconds, process))

    def _kill(self, process: Process) -> None:
        if send(process, signal.SIGKILL):
            self.killed[process.kind] += 1
