"""Who is killed at random while jobs go to an engine: an agent, a submitting process, a kernel.

Each job writes its own name into the file ``ran`` when it runs: that says how often it has run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from helpers import wait_until
from kernels import Kernel

from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.process import start_ticks
from gpusched_ipy.summon import ensure_agent

_SPARE = 2  # kernels that are started while others die


def gone(pid: int) -> bool:
    """Whether it is dead with all its threads: the last one takes its locks along."""
    try:
        return start_ticks(pid) is None and len(os.listdir(f"/proc/{pid}/task")) < 2
    except OSError:
        return True


@dataclass
class Victims:
    """They, and what each job that they are about is called.

    Args:
        environment: what the processes find the engine by.
    """

    queue: Queue
    folder: Path
    dice: random.Random
    environment: Mapping[str, str]
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    must: set[str] = field(default_factory=set)  # their submit was acknowledged
    cells: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._number = 0
        self._spare: list[Kernel] = []
        began = time.monotonic()
        self._submitted(self._name("command"))
        self._submit_s = time.monotonic() - began  # what a submit takes that nobody kills
        self._again: list[str] = []  # killed in their submit, and to be submitted again later

    def kill(self, kind: str) -> None:
        """Kill one of them, somewhere in what it does."""
        {"agent": self._agent, "submitter": self._submitter, "kernel": self._kernel}[kind]()
        self.kills[kind] += 1

    def submit(self) -> None:
        """A job whose submit nobody kills."""
        name = self._name("command")
        self.queue.submit(
            [self._line(name)], shell=True, engine="slurm", name=name,
            env=["WORD=kept"], priority=self.dice.randint(-3, 3),
        )  # fmt: skip
        self.must.add(name)

    def close(self) -> None:
        """Submit again what is still to be, and end what was only kept ready."""
        for name in self._again:
            self._submitted(name)
        for kernel in self._spare:
            kernel.stop()

    # -- an agent

    def _agent(self) -> None:
        ensure_agent(self.queue.state)
        agent = wait_until(lambda: running_agent(self.queue.state, self.queue.store), 60, "agent")
        # Anywhere in what an agent does: how long that takes is what is drawn.
        time.sleep(self.dice.uniform(0.0, 1.5))
        _end(agent)

    # -- a process that submits

    def _submitter(self) -> None:
        name = self._name("command")
        with self._submitting(name) as victim:
            time.sleep(self.dice.uniform(0.3, 1.3) * self._submit_s)
            _end(victim.pid)
            assert victim.stdout is not None
            if victim.stdout.read().strip():
                self.must.add(name)
        # Whoever does not know whether his submit went through repeats it with the same key.
        if self.dice.random() < 0.5:
            self._submitted(name)
        else:
            self._again.append(name)

    def _submitted(self, name: str) -> None:
        with self._submitting(name) as whole:
            out, err = whole.communicate(timeout=120)
        assert whole.returncode == 0, err
        assert out.strip().isdecimal()
        self.must.add(name)

    def _submitting(self, name: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "gpusched_ipy", "submit", "--engine", "slurm", "--name", name]
        argv += ["--key", name, "--env", "WORD=kept", "--shell", self._line(name)]
        environment = {**os.environ, **self.environment}
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    # -- a notebook's kernel

    def _kernel(self) -> None:
        while len(self._spare) < _SPARE:
            self._spare.append(self._launched(self._name("kernel")))
        kernel = self._spare.pop(0)
        kernel.connect()
        assert kernel.run("%load_ext gpusched_ipy\nx = 7").errors == []
        name = self._name("cell")
        self.cells.add(name)
        cell = kernel.send(
            f"%%gpuqueue --engine slurm -n {name} --in x --out y\n"
            f"with open({str(self.folder / 'ran')!r}, 'a') as ran: print({name!r}, file=ran)\n"
            "y = x + 1\nprint('out')"
        )
        until = time.monotonic() + self.dice.uniform(0.0, 0.8)
        while time.monotonic() < until:
            kernel.receive(0.01)
        pid = kernel.manager.provisioner.pid
        _end(pid)
        kernel.receive()
        if cell.badges:  # it has been told the number of its job
            self.must.add(name)
        kernel.kill()

    def _launched(self, name: str) -> Kernel:
        folder = self.folder / name
        folder.mkdir()
        state = {"GPUSCHED_STATE_DIR": str(self.queue.state.root)}
        kernel = Kernel(folder, **{**self.environment, **state})
        kernel.launch()
        return kernel

    # -- small things

    def _name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}-{self._number}"

    def _line(self, name: str) -> str:
        pause = self.dice.randint(0, 9)
        return f"echo {name} >> {self.folder}/ran; echo out $WORD; sleep 0.{pause}"


KINDS = ("agent", "submitter", "kernel")


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):  # it may just have left by itself
        os.kill(pid, signal.SIGKILL)
    wait_until(partial(gone, pid), 60, "its end")
