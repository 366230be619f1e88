"""The record and the locks against a model of a few lines, in any order of events and deaths.

Real store, real locks, real reap; the clock is moved by hand. A member is a real membership in this
process: ending it is what the kernel does when a process dies. The processes of a job are the
descriptors that they would hold: copies of the GPU locks and of the locked log.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import (
    ACTIVE,
    FINAL,
    TRANSITIONS,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Request,
)
from gpusched_ipy.locks import GpuLocks, Membership
from gpusched_ipy.output import create_log
from gpusched_ipy.reap import forget_dead_members, reap
from gpusched_ipy.retry import MAX_REQUEUES
from gpusched_ipy.runners.command import MAX_STARTS_IN_VAIN, _settle
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "1500"))
GPUS = ("GPU-0", "GPU-1", "GPU-2")
PICK = st.integers(0, 10**6)
# What may happen, some of it more often.
STEPS = (
    *("claim", "claim", "claim", "go_on", "go_on", "go_on", "go_on", "die", "die", "reap"),
    *("submit", "cancel", "hold", "requeue", "late"),
)
DAY_S = 86400.0


class HandClock:
    """Both clocks; only the wall clock may go back."""

    def __init__(self) -> None:
        self.mono, self.wall = 1000.0, 1.7e9

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=self.wall)


@dataclass(eq=False)
class Expected:
    """How a job must stand, and how often its processes have begun."""

    id: int
    spec: JobSpec
    state: JobState = JobState.PENDING
    epoch: int = 0
    attempts: int = 0
    in_vain: int = 0  # its shim died before it began, so often in a row
    held: bool = False
    cancel: bool = False
    member: Membership | None = None
    may_start: int = 1
    retried: int = 0
    lost: int = 0
    begun: int = 0
    processes: Processes | None = None  # of its current attempt


@dataclass(eq=False)
class Processes:
    """What the processes of one attempt hold. An order is a shim that has not begun the job."""

    job: Expected
    claim: Job
    gpu_fds: tuple[int, ...]
    log_fd: int | None = None
    shim: Membership | None = None

    def die(self) -> None:
        """All of them are gone."""
        for fd in (*self.gpu_fds, *(() if self.log_fd is None else (self.log_fd,))):
            os.close(fd)
        self.gpu_fds, self.log_fd = (), None


@dataclass(eq=False)
class Peer:
    """A member that dispatches: it runs its own cells, and orders shims for commands."""

    membership: Membership
    claims: list[tuple[Expected, Job, tuple[int, ...]]] = field(default_factory=list)
    cells: list[tuple[Expected, Job, tuple[int, ...]]] = field(default_factory=list)


class World(RuleBasedStateMachine):
    """One box, with a record of its own."""

    played: ClassVar[int] = 0  # how many there have been

    def __init__(self) -> None:
        super().__init__()
        # On a fast disk, if there is one: the model is about order, not about disks.
        fast = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="model-", dir=fast if fast.is_dir() else None))
        self.state = open_state_dir(Settings(state_dir=self.root / "state"))
        self.clock = HandClock()
        self.store = Store(self.state, self.clock)
        self.locks = GpuLocks(self.state.root / "gpu")
        self.jobs: list[Expected] = []
        self.peers: list[Peer] = []
        self.dead: list[Membership] = []
        self.orders: list[Processes] = []
        self.running: list[Processes] = []
        self.found: dict[int, Job] = {}  # the record, as it was last read
        self.rev: int | None = 0
        self.looks = 0

    # One rule, which picks among what is possible: hypothesis leaves rules out of each example, and
    # what is looked for needs all of them.

    @initialize(cells=st.integers(0, 2), requeue=st.booleans())
    def begin(self, cells: int, requeue: bool) -> None:
        """Two members and four jobs."""
        for _ in range(2):
            self._join()
        for place in range(4):
            self._submit(cell=place < cells, requeue=requeue, gpus=1 + place % 2)

    @rule(what=st.sampled_from(STEPS), pick=PICK, yes=st.booleans())
    def step(self, what: str, pick: int, yes: bool) -> None:
        """Something happens that is possible now."""
        getattr(self, f"_step_{what}")(pick, yes)

    def _step_submit(self, pick: int, yes: bool) -> None:
        if len(self.jobs) < 8:
            self._submit(cell=pick % 4 == 0, requeue=yes, gpus=1 + pick % 2, held=pick % 5 == 0)

    def _step_claim(self, pick: int, ordered: bool) -> None:
        """Any pending job for any GPUs that the record calls free: the locks may still refuse."""
        startable = self._startable()
        if not startable:
            return
        job = startable[pick % len(startable)]
        by = self._peer_of(job.spec.home) or self.peers[pick // 7 % len(self.peers)]
        with self.store.writing():
            reap(self.store, self.store.jobs())
            self._expect_reaped()
            leased = {lease.gpu for lease in self.store.leases()}
            first = pick // 3 % len(GPUS)
            free = [gpu for gpu in (*GPUS[first:], *GPUS[:first]) if gpu not in leased]
            gpus = tuple(free[: job.spec.request.gpus])
            if job.state is not JobState.PENDING or len(gpus) < job.spec.request.gpus:
                return
            fds = self.locks.try_lock_all(gpus, shared=False)
            if fds is None:
                return
            claimed = self.store.claim(self.store.job(job.id), gpus, member=by.membership.key)
        job.state, job.member = JobState.STARTING, by.membership
        job.epoch += 1
        job.attempts += 1
        job.processes = None
        (by.cells if job.spec.home else by.claims).append((job, claimed, fds))
        if ordered and by.claims:
            self._order_shim(by)

    def _step_go_on(self, pick: int, failed: bool) -> None:
        """Some member, shim or job takes its next step."""
        steps: list[Callable[[], None]] = [
            *(partial(self._order_shim, peer) for peer in self.peers if peer.claims),
            *(partial(self._run_cell, peer) for peer in self.peers if peer.cells),
            *(partial(self._shim_begins, order) for order in self.orders),
            *(partial(self._redirect, run) for run in self.running if run.log_fd is not None),
            *(partial(self._shim_records, run, failed) for run in self._supervised()),
            *(partial(self._orphans_end, run) for run in self.running if run.shim in self.dead),
        ]
        if steps:
            steps[pick % len(steps)]()

    def _step_die(self, pick: int, peer: bool) -> None:
        """Some member or shim dies."""
        deaths: list[Callable[[], None]] = [
            *(partial(self._shim_dies_with_its_order, order) for order in self.orders),
            *(partial(self._shim_dies, run) for run in self._supervised()),
        ]
        if peer:
            deaths = [partial(self._replace_peer, found) for found in self.peers]
        if deaths:
            deaths[pick % len(deaths)]()

    def _step_reap(self, _: int, forget: bool) -> None:
        reap(self.store, self.store.jobs())
        self._expect_reaped()
        if forget:
            forget_dead_members(self.store, self.store.jobs())

    def _step_cancel(self, pick: int, _: bool) -> None:
        job = self.jobs[pick % len(self.jobs)]
        self.store.request_cancel(job.id)
        job.cancel = job.cancel or job.state not in FINAL
        if job.state is JobState.PENDING:
            job.state = JobState.CANCELLED

    def _step_hold(self, pick: int, held: bool) -> None:
        job = self.jobs[pick % len(self.jobs)]
        if job.state is JobState.PENDING:
            job.held = self.store.set_held(job.id, held).held
        else:
            with pytest.raises(UserError, match="only a pending job"):
                self.store.set_held(job.id, held)

    def _step_requeue(self, pick: int, _: bool) -> None:
        job = self.jobs[pick % len(self.jobs)]
        if job.state not in FINAL:
            with pytest.raises(UserError, match="only an ended job"):
                self.store.requeue(self.store.job(job.id))
        elif job.spec.home is None or self._peer_of(job.spec.home):
            self.store.requeue(self.store.job(job.id))
            job.state, job.cancel, job.in_vain = JobState.PENDING, False, 0
            job.retried = job.lost = 0
            job.may_start += 1

    def _step_late(self, pick: int, back: bool) -> None:
        """Time passes, the clock is set back or not; then somebody reports of an old claim."""
        self.clock.mono += pick % 1000
        self.clock.wall += pick % 1000 - (DAY_S if back else 0)
        job = self.jobs[pick % len(self.jobs)]
        late = self.store.finish_if_active(job.id, epoch=job.epoch - 1, state=JobState.FAILED)
        assert late is None

    # -- what must hold

    @invariant()
    def the_record_is_as_expected(self) -> None:
        if not self.jobs:
            return
        # As members follow it: what has changed is read again, and nothing else may have.
        self.rev, changed = self.store.changed_since(self.rev)
        self.found |= {job.id: job for job in changed}
        self.looks += 1
        if self.looks % 10 == 0:
            assert {job.id: job for job in self.store.jobs(ended=True)} == self.found
        for job in self.jobs:
            real = self.found[job.id]
            assert (real.state, real.epoch, real.attempts, real.held, real.cancel_requested) == (
                job.state, job.epoch, job.attempts, job.held, job.cancel,
            ), job.spec  # fmt: skip
            assert (real.retried, real.requeued) == (job.retried, job.lost)
            if job.state in ACTIVE:
                assert job.member is not None
                assert real.member == job.member.key
        leases = {(lease.job_id, lease.epoch) for lease in self.store.leases()}
        assert leases == {(job.id, job.epoch) for job in self.jobs if job.state in ACTIVE}

    def teardown(self) -> None:
        """Everybody dies; then everything ends, and the events tell the same story."""
        try:
            self._end()
            World.played += 1
        finally:
            self.store.close()
            shutil.rmtree(self.root)

    def _end(self) -> None:
        for job in self.jobs:
            self._replay(job)
        for order in (*self.orders, *self.running):
            order.die()
            if order.shim is not None:
                order.shim.leave()
        for peer in tuple(self.peers):
            self._kill_peer(peer)
        reap(self.store, self.store.jobs())
        for job in self.store.jobs():
            assert job.state is JobState.PENDING, "the dead leave nothing behind"
            self.store.request_cancel(job.id)
        assert self.store.leases() == []
        assert not [gpu for gpu in GPUS if self.locks.occupied(gpu)]

    # -- steps and deaths

    def _order_shim(self, peer: Peer) -> None:
        """The log is made and the order sent: from now on the shim has it, whoever dies."""
        job, claimed, fds = peer.claims.pop()
        assert claimed.attempt is not None
        order = Processes(
            job,
            claimed,
            gpu_fds=tuple(os.dup(fd) for fd in fds),
            log_fd=create_log(self.state.log(claimed.attempt)),
        )
        self.locks.close(fds)
        self.orders.append(order)

    def _shim_begins(self, order: Processes) -> None:
        self.orders.remove(order)
        job, claim = order.job, order.claim
        order.shim = Membership(self.state)
        assert claim.member is not None
        begun = self.store.take_over(
            job.id, epoch=claim.epoch, claimed_by=claim.member, member=order.shim.key
        )
        stands = job.state is JobState.STARTING and job.epoch == claim.epoch
        if begun is None:
            assert not stands
            order.shim.leave()
            order.die()
            return
        self._begins(order)
        assert stands, "a stale order was obeyed"
        job.state, job.member, job.processes = JobState.RUNNING, order.shim, order
        job.in_vain = 0
        self.running.append(order)

    def _run_cell(self, peer: Peer) -> None:
        job, claimed, fds = peer.cells.pop()
        key = peer.membership.key
        found = self.store.take_over(job.id, epoch=claimed.epoch, claimed_by=key, member=key)
        assert found is not None, "a living kernel was taken for dead"
        self._begins(Processes(job, claimed, ()))
        self._ends(job, claimed, JobState.COMPLETED)
        self.locks.close(fds)

    def _redirect(self, run: Processes) -> None:
        """The job sends its output elsewhere: its GPU locks alone tell that it lives."""
        assert run.log_fd is not None
        os.close(run.log_fd)
        run.log_fd = None

    def _shim_records(self, run: Processes, failed: bool) -> None:
        self._ends(run.job, run.claim, JobState.FAILED if failed else JobState.COMPLETED)
        assert run.shim is not None
        run.shim.leave()
        self._orphans_end(run)

    def _orphans_end(self, run: Processes) -> None:
        run.die()
        self.running.remove(run)

    def _shim_dies(self, run: Processes) -> None:
        """The job's own processes go on without it."""
        assert run.shim is not None
        run.shim.leave()
        self.dead.append(run.shim)

    def _shim_dies_with_its_order(self, order: Processes) -> None:
        """Whoever has ordered it, and lives, gives the job back, or gives it up."""
        self.orders.remove(order)
        order.die()
        if self._peer_of(order.claim.member) is None:
            return
        _settle(self.store, order.claim, -9)
        job = order.job
        if job.state is JobState.STARTING and job.epoch == order.claim.epoch:
            job.in_vain += 1
            given_up = job.in_vain >= MAX_STARTS_IN_VAIN
            job.state = JobState.FAILED if given_up else self._returned(job)
            self._expect_retry(job)

    def _replace_peer(self, peer: Peer) -> None:
        self._kill_peer(peer)
        self._join()

    def _kill_peer(self, peer: Peer) -> None:
        self.peers.remove(peer)
        peer.membership.leave()
        self.dead.append(peer.membership)
        for _, _, fds in (*peer.claims, *peer.cells):
            self.locks.close(fds)

    # -- inside

    def _join(self) -> None:
        membership = Membership(self.state)
        self.store.join(membership.key, "kernel", "model")
        self.peers.append(Peer(membership))

    def _submit(self, *, cell: bool, requeue: bool, gpus: int, held: bool = False) -> None:
        spec = JobSpec(
            uid=uuid.uuid4().hex,
            kind=JobKind.CELL if cell else JobKind.COMMAND,
            name="job",
            request=Request(
                gpus=1 if cell else gpus, requeue=requeue and not cell, retries=len(self.jobs) % 3
            ),
            argv=("true",),
            held=held,
            home=self.peers[0].membership.key if cell else None,
        )
        job = self.store.submit(spec)
        assert self.store.submit(spec) == job
        self.jobs.append(Expected(job.id, spec, held=held))

    def _startable(self) -> list[Expected]:
        """Pending jobs that some living member may claim."""
        return [
            job
            for job in self.jobs
            if job.state is JobState.PENDING
            and not job.held
            and (job.spec.home is None or self._peer_of(job.spec.home))
        ]

    def _peer_of(self, key: str | None) -> Peer | None:
        return next((peer for peer in self.peers if peer.membership.key == key), None)

    def _supervised(self) -> list[Processes]:
        return [run for run in self.running if run.shim not in self.dead]

    def _begins(self, run: Processes) -> None:
        """The job's own process starts to work on its GPUs."""
        job = run.job
        job.begun += 1
        if not job.spec.request.requeue:
            assert job.begun <= job.may_start, "an at-most-once job was started twice"
        for other in self.running:
            shared = set(other.claim.gpus) & set(run.claim.gpus)
            assert not shared, f"{shared} given twice"

    def _ends(self, job: Expected, claimed: Job, state: JobState) -> None:
        ended = self.store.finish_if_active(job.id, epoch=claimed.epoch, state=state)
        assert ended is not None, "a living supervisor's report was refused"
        job.state, job.member, job.processes = state, None, None
        self._expect_retry(job)

    def _expect_retry(self, job: Expected) -> None:
        """A failed job is tried again as often as it was asked, by the write that ends it."""
        if (
            job.state is JobState.FAILED
            and job.retried < job.spec.request.retries
            and not job.cancel
        ):
            job.state, job.retried, job.in_vain = JobState.PENDING, job.retried + 1, 0
            job.may_start += 1

    def _returned(self, job: Expected) -> JobState:
        return JobState.CANCELLED if job.cancel else JobState.PENDING

    def _expect_reaped(self) -> None:
        """What reap must have done, by the definition of each state."""
        for job in self.jobs:
            if job.state is JobState.PENDING and job.spec.home and not self._peer_of(job.spec.home):
                job.state = JobState.LOST
            elif job.state in ACTIVE and job.member in self.dead:
                self._expect_orphan_reaped(job)

    def _expect_orphan_reaped(self, job: Expected) -> None:
        if job.spec.home is not None:
            job.state = JobState.LOST
        elif job.state is JobState.STARTING:
            job.state = self._returned(job)
        elif job.processes not in self.running or job.processes.log_fd is None:
            again = job.spec.request.requeue and job.lost < MAX_REQUEUES
            job.state = self._returned(job) if again else JobState.LOST
            job.lost += again
            job.processes = None

    def _replay(self, job: Expected) -> None:
        state, claims = JobState.PENDING, 0
        for event in self.store.events(job.id):
            moved = JobState(event.data.get("state", state))
            assert moved == state or moved in TRANSITIONS[state], event
            state, claims = moved, claims + (event.what == "claimed")
        assert (state, claims) == (job.state, job.epoch)


def check(examples: int, steps: int = 30, **options: Any) -> None:
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


@pytest.mark.timeout(1800)
def test_the_record_and_the_locks_agree_with_the_model() -> None:
    before = World.played
    check(EXAMPLES)
    assert World.played - before >= EXAMPLES


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["no-epoch", "no-log-lock", "no-reap", "no-gpu-lock"])
def test_the_model_sees_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that finds nothing in a broken record would prove nothing."""
    _break(fault, monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        check(3000, 60, phases=[Phase.generate], report_multiple_bugs=False)


def _break(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "no-epoch":
        takes = Store.take_over

        def unfenced(self: Store, job_id: int, **values: Any) -> Job | None:
            job = self.job(job_id)
            values |= {"epoch": job.epoch, "claimed_by": job.member}
            return takes(self, job_id, **values)

        monkeypatch.setattr(Store, "take_over", unfenced)
    elif fault == "no-log-lock":
        monkeypatch.setattr("gpusched_ipy.reap.log_is_held", lambda path: False)
    elif fault == "no-gpu-lock":
        monkeypatch.setattr(GpuLocks, "try_lock", lambda self, gpu, *, shared: self._open(gpu))
    else:
        monkeypatch.setattr(sys.modules[__name__], "reap", lambda store, jobs: [])
