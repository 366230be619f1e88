"""The processes of a chaos run that are forked by its controller: kernels, commanders, submitters.

Each runs the real scheduler; only what a notebook's main thread would do is played here.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from gpusched_ipy import summon
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import FINAL, Job, JobKind, JobSpec, JobState, Request
from gpusched_ipy.locks import Membership
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.runners.command import CommandRunner
from gpusched_ipy.scheduler import Claim, Scheduler
from gpusched_ipy.signalflag import SignalFlag
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
from tests.chaos import job as witness
from tests.chaos import launch

_JOB = str(Path(witness.__file__))
_MOST_OPEN = 12  # per box: the submitters keep the line this long
_GIB = 2**30
# Where a protection is missing whoever takes the GPU of an orphan shall meet it there, on a slow
# machine too.
_ORPHAN_S = 6.0
PRIVATE_GPU = "GPU-fake-0"


def see_gpus(box: str) -> None:
    """Let this process, and whom it starts, see the cards of that box."""
    os.environ["GPUSCHED_FAKE"] = f"{box}.json"


class Life:
    """What every member does: open the box, and leave when it is told to or the run drains."""

    def __init__(self, box: str) -> None:
        self.folder = os.environ["CHAOS_FOLDER"]
        self.alone = box.endswith("box0")  # it has a card that the other box has not
        self.settings = Settings.load({"state_dir": box})
        self.store = Store(open_state_dir(self.settings))
        self.dice = random.Random(os.urandom(8))
        self.over = SignalFlag()
        signal.signal(signal.SIGTERM, lambda *_: self.over.set())

    @property
    def draining(self) -> bool:
        """Whether nothing new is to be submitted."""
        return os.path.exists(f"{self.folder}/drain")

    def note(self, *words: object) -> None:
        """A line in the ledger."""
        witness.note(self.folder, *words)


def fork(kind: str, box: str) -> int:
    """Start a member in a process of its own and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # that of the controller means something else
        _die_with_the_controller()
        os.setsid()
        log = os.open(f"{os.environ['CHAOS_FOLDER']}/members.log", os.O_WRONLY | os.O_APPEND)
        nowhere = os.open("/dev/null", os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        see_gpus(box)
        launch.instrument(kind)
        MEMBERS[kind](Life(box))
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stderr.flush()
        os._exit(status)


def _die_with_the_controller() -> None:
    """A run that is killed itself must leave nobody behind; its agents then leave by themselves."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def submitter(life: Life) -> None:
    """Submit commands, and now and then cancel, hold, release or requeue one, until killed."""
    _release_all(life)
    while not life.draining and not life.over.wait(life.dice.uniform(0.005, 0.06)):
        if sum(life.store.counts().values()) >= _MOST_OPEN:
            # As the next submit would: an agent that was killed is missed by nobody else.
            summon.ensure_agent(life.store.state)
            life.over.wait(0.1)
            continue
        if life.dice.random() < 0.04:
            _let_the_agent_leave(life)
        spec = _command(life)
        life.note("try", spec.uid)
        submitted = life.store.submit(spec)
        summon.ensure_agent(life.store.state)
        life.note("ack", spec.uid)
        if life.dice.random() < 0.3:
            _change_mind(life, submitted)


def _release_all(life: Life) -> None:
    """What one before us was killed in holding: no agent would ever find its work done."""
    for job in life.store.jobs():
        if job.held:
            with suppress(GpuSchedError):  # it has moved meanwhile
                life.store.set_held(job.id, False)


def _let_the_agent_leave(life: Life) -> None:
    """Submit nothing until an agent has found for a while that nothing is to be done."""
    limit = time.monotonic() + 4
    while time.monotonic() < limit and not life.draining:
        if all(job.kind is not JobKind.COMMAND for job in life.store.jobs()):
            life.over.wait(0.6)
            return
        life.over.wait(0.05)


def _command(life: Life) -> JobSpec:
    dice = life.dice
    styles = ["plain", "redirect", "workers", "quiet"]
    style = dice.choices(styles, [4, 2, 2, 2 if life.alone else 0])[0]
    delegates = style in ("workers", "quiet")
    often = dice.random() < 0.25
    shared = dice.random() < 0.15
    uid = "-".join(["many" if often else "once", "shared" if shared else "alone", uuid.uuid4().hex])
    seconds = dice.uniform(0.3, 0.9) if delegates and dice.random() < 0.3 else dice.uniform(0, 0.15)
    argv = [sys.executable, "-I", "-S", _JOB, life.folder, uid, style]
    return JobSpec(
        uid=uid,
        kind=JobKind.COMMAND,
        name=style,
        priority=dice.randint(-3, 3),
        request=Request(
            # Of several GPUs a launcher's child keeps the lock of the first only.
            gpus=2 if dice.random() < 0.15 and not shared and not delegates else 1,
            # An orphan without input holds its log only, which another box cannot see: there the
            # driver alone tells of it, and the scripted GPUs have no driver.
            on_gpu=PRIVATE_GPU if style == "quiet" else None,
            mem_bytes=4 * _GIB if shared else None,
            requeue=often,
        ),
        argv=(*argv, str(seconds), str(_ORPHAN_S if os.environ["CHAOS_MUTANT"] else 1.0)),
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )


def _change_mind(life: Life, submitted: Job) -> None:
    """What users do; each is a race with whoever moves the job meanwhile."""
    known = life.store.jobs(ended=True, limit=20)
    job = life.dice.choice([submitted, *known])
    try:
        if job.state in FINAL and job.kind is JobKind.COMMAND:
            life.note("again", job.spec.uid)
            life.store.requeue(job)
            summon.ensure_agent(life.store.state)
        elif life.dice.random() < 0.5:
            life.store.request_cancel(job.id)
        else:
            life.store.set_held(job.id, True)
            life.store.set_held(job.id, False)
    except GpuSchedError:
        return  # it was too late for that, and the message said so


def commander(life: Life) -> None:
    """Dispatch commands as an agent does, but beside it: the claims of several members race."""
    membership = Membership(life.store.state)
    life.store.join(membership.key, "script", "commander")
    monitor = Monitor(life.settings, state_dir=life.store.state.root)
    runner = CommandRunner(life.store, log_cap=life.settings.log_cap)
    scheduler = Scheduler(life.store, monitor, membership, {JobKind.COMMAND: runner}, life.settings)
    runner.scheduler = scheduler
    scheduler.start()
    life.over.wait(None)
    scheduler.stop()
    runner.close()
    monitor.stop()
    life.store.leave(membership.key)
    membership.leave()


class _MainThread:
    """Stands for the main thread of a notebook: one cell at a time."""

    def __init__(self) -> None:
        self.claims: SimpleQueue[Claim] = SimpleQueue()
        self.busy = False

    def ready(self, job: Job) -> bool:
        return not self.busy

    def start(self, claim: Claim) -> None:
        self.busy = True
        self.claims.put(claim)

    def cancel(self, job: Job) -> None:
        """A cell of a few milliseconds is not interrupted."""


def kernel(life: Life) -> None:
    """Submit cells and run them in this very process, until killed or all is over."""
    witness.open_witness(life.folder)
    membership = Membership(life.store.state)
    life.store.join(membership.key, "kernel", f"notebook {os.getpid()}")
    monitor = Monitor(life.settings, state_dir=life.store.state.root)
    main = _MainThread()
    scheduler = Scheduler(life.store, monitor, membership, {JobKind.CELL: main}, life.settings)
    scheduler.start()
    waiting: set[int] = set()
    while not life.over.wait(0):
        waiting -= {n for n, state in life.store.states(waiting).items() if state in FINAL}
        if len(waiting) < 2 and not life.draining:
            waiting.add(_submit_cell(life, membership.key))
        try:
            claim = main.claims.get(timeout=0.1)
        except Empty:
            continue
        _run_cell(life, scheduler, claim)
        main.busy = False
        scheduler.wake()
    scheduler.stop()
    monitor.stop()
    life.store.leave(membership.key)
    membership.leave()


def _submit_cell(life: Life, home: str) -> int:
    uid = f"once-alone-{uuid.uuid4().hex}"
    life.note("try", uid)
    spec = JobSpec(uid=uid, kind=JobKind.CELL, name="cell", code="train()", home=home)
    job = life.store.submit(spec)
    life.note("ack", uid)
    return job.id


def _run_cell(life: Life, scheduler: Scheduler, claim: Claim) -> None:
    uid = claim.job.spec.uid
    if scheduler.begin(claim) is None:
        life.note("buried-alive", uid)
        return
    life.note("start", uid, claim.job.attempt, os.getpid())
    witness.enter(life.folder, uid, list(claim.job.gpus), shared=False)
    helper = _fork_helper(life) if life.dice.random() < 0.4 else None
    # Long enough for others to come where the child has opened the door to them.
    time.sleep(life.dice.uniform(*((0.01, 0.25) if helper is None else (0.2, 0.8))))
    if helper is not None:
        os.waitpid(helper, 0)
    life.note("end", uid)
    witness.leave()
    if scheduler.finish(claim, state=JobState.COMPLETED) is None:
        life.note("buried-alive", uid)


def _fork_helper(life: Life) -> int:
    """A child by fork, as a data loader has them."""
    rest_s = life.dice.uniform(0, 0.02)
    helper = os.fork()
    if helper == 0:
        time.sleep(rest_s)
        os._exit(0)
    return helper


MEMBERS: dict[str, Callable[[Life], None]] = {
    "submitter": submitter,
    "commander": commander,
    "kernel": kernel,
}
