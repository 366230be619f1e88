"""One loop in each agent and kernel: reap → decide → claim → dispatch → collect.

The loop sleeps until something happens: the bell, a new reading, the end of a process. It decides
with the pure policy and writes the outcome in one transaction; it never runs a job itself and never
knows what a runner does. One bad job never stops it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from gpusched_ipy import environment, policy
from gpusched_ipy.arrears import Arrears
from gpusched_ipy.config import LOCAL, Clock, Settings, SystemClock
from gpusched_ipy.departures import Departures
from gpusched_ipy.ears import Ears
from gpusched_ipy.errors import DamagedJobError, GpuSchedError, JobNotFoundError, StateDirError
from gpusched_ipy.holders import Holders
from gpusched_ipy.job import (
    BOUND_KINDS,
    Job,
    JobKind,
    JobState,
    WaitCode,
    WaitReason,
)
from gpusched_ipy.locks import GpuLocks, Membership, alive_pid, is_alive
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.outcome import End, record
from gpusched_ipy.outlook import Outlook
from gpusched_ipy.reap import forget_dead_members, orphans, reap
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.statedir import shared_locks
from gpusched_ipy.store import Store
from gpusched_ipy.turns import Turns

_log = logging.getLogger(__name__)

# Seconds between two looks at a queue in which nothing is open.
REST_S = 30.0
# After a hand-off the rest of the round waits so long: the next job begins first.
HURRY_S = 0.02
MOST_IN_A_ROW = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job that is ours to begin, and what goes with it. Whoever has it must finish it."""

    job: Job
    gpus: tuple[Gpu, ...]  # as read under their locks
    lock_fds: tuple[int, ...]  # hold the GPUs while any copy of them is open
    env: Mapping[str, str] = field(default_factory=dict)  # shows the job its GPUs and no other


class Runner(Protocol):
    """Begins and ends jobs of some kinds, and tells the scheduler how they went."""

    def ready(self, job: Job) -> bool:
        """Whether the job may be claimed right now, from this thread.

        If not, the runner sees to it that ``Scheduler.tick`` is called when it may.
        """
        ...

    def start(self, claim: Claim) -> None:
        """Begin the job without waiting for it; from now on the claim is the runner's."""
        ...

    def cancel(self, job: Job) -> None:
        """End this active job of ours: its user wants it or, without a wish, its time is over."""
        ...


class Scheduler:
    """The loop of one member.

    Args:
        membership: proves that this member lives; its key marks the claims.
        runners: who begins which kind of job here; other kinds are left to other members.
        gpu_locks: the locks of the GPUs.
    """

    def __init__(
        self,
        store: Store,
        monitor: Monitor,
        membership: Membership,
        runners: Mapping[JobKind, Runner],
        settings: Settings,
        clock: Clock | None = None,
    ) -> None:
        self.store = store
        self.monitor = monitor
        self.key = membership.key
        self._runners = runners
        self._settings = settings
        self._clock = clock or SystemClock()
        self._gpu_locks = GpuLocks.of(store.state, settings.lock_dir)
        shared = shared_locks(settings.lock_dir)
        self._turns = Turns(
            None if shared is None else shared / "tickets",
            membership.key,
            self._clock,
            # So long another user's member may need until it finds the GPU idle and starts.
            patience_s=settings.quiet_s + 3 * settings.sample_interval_s,
        )
        self._outlook = Outlook(
            store, monitor, membership.key, self._runners.keys(), settings, self._clock
        )
        self._open = self._outlook.open
        self._holders = Holders(store, membership.key, settings, self._clock)
        self._mutex = threading.RLock()
        self._arrears = Arrears()
        self._cancelling: set[tuple[int, int, str | None]] = set()
        self.ears = Ears(store)
        # Is told of the job that will be started next, as far as that can be told; None: of none.
        self.expect: Callable[[Job | None], None] = lambda _job: None
        self._told: list[End] = []
        self._hurried = False  # the last round was left half done
        self._in_a_row = 0  # hand-offs since the last whole round
        self._strangers: set[int] = set()  # watched processes on the GPUs that are no job of ours
        self._departures = Departures()
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._unlisten = monitor.listen(lambda _snapshot: self.wake(), to_changes=True)

    # -- the loop

    def start(self) -> None:
        """Run the loop in a daemon thread; starting twice changes nothing."""
        if self._thread is None:
            self.ears.open()
            self._thread = threading.Thread(target=self.run, name="gpusched-loop", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the loop; what runs goes on."""
        self._stopping.set()
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        self._unlisten()
        self._outlook.leave()
        self._turns.close()
        self.ears.close()

    def wake(self) -> None:
        """Look at the queue now; callable from any thread, at any time."""
        self.ears.call()

    def run(self) -> None:
        """Tick whenever something happens, until stopped."""
        while not self._stopping.is_set():
            try:
                self.tick()
            except GpuSchedError as exc:
                _log.error("the queue cannot be worked on: %s", exc)
            except Exception:  # noqa: BLE001 - a loop that has ended would hold up every job; logged
                _log.exception("a round of the queue failed")
            self._sleep()

    def _sleep(self) -> None:
        if self._hurried:
            # What has just been handed off begins now; meanwhile only another end is as urgent.
            self._hurried = False
            self.ears.wait_for_ends(HURRY_S)
            return
        # With nothing open only the bell or a call wakes us (or, where somebody died before he
        # rang, the rest is over); else begin times and faults do too.
        rest_s = self._settings.sample_interval_s if self._open.jobs else REST_S
        ended = self.ears.wait(self._departures.within(rest_s))
        self._departures.begin(ended & self._strangers)
        if self._departures.open:
            with self._mutex:  # the newest reading still shows him
                self._departures.seen(_strangers(self._outlook.read_now().gpus))

    # -- one round

    def tick(self) -> None:
        """Look once, and start what can start; safe from any thread."""
        self.store.changed_by_others()  # whatever is written from here on is news
        if self._told and self._hand_off():
            return  # the rest of the round comes soon
        claims: list[Claim] = []
        with self._mutex:
            self._in_a_row = 0
            self._arrears.settle()
            self._open.refresh()
            if not self._open.jobs:
                self._outlook.record_usage()
                self._rest()
                return
            self._pass_on_cancels()
            snapshot = self._outlook.look()
            decision = self._outlook.decide(snapshot)
            self._outlook.offer(decision)
            in_line = self._outlook.in_line(decision)
            self._turns.announce(in_line)
            self.expect(next(iter(in_line), None))
            self._holders.ask(snapshot, self._outlook.own(decision.reasons))
            starts = [start for start in decision.starts if self._ready(start.job_id)]
            reasons = self._outlook.news(decision.reasons)
            never = [(job, why) for job, why in decision.never.items() if self._outlook.mine(job)]
            if starts or reasons or never or orphans(self.store, self._open.depend_on_members):
                claims = self._write(starts)
            self._watch(snapshot)
        for claim in claims:
            self._dispatch(claim)
        with self._mutex:
            self._outlook.record_usage()

    def _hand_off(self) -> bool:
        """Record what shims have told, and start at once what can start now; whether any does.

        Why others wait, and whatever else a round does, has time until after that.
        """
        claims: list[Claim] = []
        with self._mutex:
            ends, self._told = self._told, []
            if not ends:
                return False
            try:
                self._record_and_claim(ends, claims)
            except BaseException:
                for end in ends:
                    end.answer(False)
                raise
        for claim in claims:
            self._dispatch(claim)
        # Only now: whoever hears of it competes with the job that begins.
        self.store.ring()
        for end in ends:
            end.answer(True)
        # Where one end follows the other the rest of the round must have its turn as well.
        self._in_a_row += 1
        self._hurried = bool(claims) and self._in_a_row <= MOST_IN_A_ROW
        return self._hurried

    def _record_and_claim(self, ends: Sequence[End], claims: list[Claim]) -> None:
        with self._all_or_none(claims), self.store.writing(durable=False, rings=False):
            for end in ends:
                # Nobody can record the end of a job that cannot be read.
                with suppress(DamagedJobError, JobNotFoundError):
                    record(self.store, end.job, end.outcome)
                self.store.leave(end.member)
            self._open.refresh()
            if self._open.any_waits:
                # Nobody asks yet why the others wait.
                self._claim_next(claims, set(), limit=0)

    def _write(self, wanted: Sequence[policy.Start]) -> list[Claim]:
        """Reap, decide anew on what is true now, claim and note the reasons, all in one write."""
        claims: list[Claim] = []
        with self._all_or_none(claims):
            self._write_into(claims, {start.job_id for start in wanted})
        return claims

    @contextmanager
    def _all_or_none(self, claims: list[Claim]) -> Iterator[None]:
        """Where the write fails nothing of it has happened: nobody has these GPUs."""
        try:
            yield
        except BaseException:
            for claim in claims:
                self._gpu_locks.close(claim.lock_fds)
            self._open.forget()
            raise

    def _write_into(self, claims: list[Claim], ready: set[int]) -> None:
        # A claim need not reach the disk by itself: no job begins before its ``take_over`` has.
        with self.store.writing(durable=False):
            reap(self.store, self._open.depend_on_members)
            self._open.refresh()
            decision, refused = self._claim_next(claims, ready)
            self._end_hopeless(decision)
            news = self._outlook.news({**decision.reasons, **refused})
            self.store.set_reasons(news)
            forget_dead_members(self.store, self._open.depend_on_members)
            self._open.refresh()
        self._outlook.told(news)

    def _claim_next(
        self, claims: list[Claim], ready: set[int], *, limit: int = policy.REASONS
    ) -> tuple[policy.Decision, dict[int, WaitReason]]:
        """Decide, and add what can be claimed to ``claims``; why the rest of it cannot.

        Args:
            limit: for how many jobs to say why they wait.
        """
        snapshot, held = self._outlook.look(), frozenset[str]()
        decision = self._outlook.decide(snapshot, limit=limit)
        refused, found = self._claim_each(decision.starts, claims, ready)
        while found - held:
            # A lock was refused that the record knows nothing of: perhaps another GPU is free.
            held |= found
            decision = self._outlook.decide(snapshot, held=held, limit=limit)
            refused, found = self._claim_each(decision.starts, claims, ready)
        return decision, refused

    def _end_hopeless(self, decision: policy.Decision) -> None:
        for job_id, why in decision.never.items():
            if self._outlook.mine(job_id):
                job = self._open.jobs[job_id]
                self.store.end_pending(job, JobState.CANCELLED, why.text)
                environment.drop(self.store.state, job.spec.uid)

    def _claim_each(
        self, starts: Sequence[policy.Start], claims: list[Claim], ready: set[int]
    ) -> tuple[dict[int, WaitReason], frozenset[str]]:
        """Add what can be claimed to ``claims``; why the others wait, and the GPUs that are held
        by processes of which the record knows nothing."""
        refused: dict[int, WaitReason] = {}
        held: set[str] = set()
        for start in starts:
            if start.job_id not in ready and not self._ready(start.job_id):
                continue
            outcome = self._claim(start)
            if isinstance(outcome, Claim):
                claims.append(outcome)
                continue
            refused[start.job_id] = outcome
            if outcome.code is WaitCode.GPU_ALLOCATED:
                shared = self._open.jobs[start.job_id].request.shared
                held |= {gpu for gpu in start.gpus if self._gpu_locks.refuses(gpu, shared=shared)}
        return refused, frozenset(held)

    def _claim(self, start: policy.Start) -> Claim | WaitReason:
        """Take the GPUs' locks, read the GPUs again, and only then make the job ours."""
        job = self._open.jobs[start.job_id]
        ahead = self._turns.ahead_of(job)
        if ahead is not None:
            return WaitReason(code=WaitCode.PRIORITY, text=ahead)
        try:
            fds = self._gpu_locks.try_lock_all(start.gpus, shared=job.request.shared)
        except StateDirError as exc:
            return WaitReason(code=WaitCode.GPU_ALLOCATED, text=str(exc))
        if fds is None:
            text = "another job, or a process left by one, still holds its GPU"
            return WaitReason(code=WaitCode.GPU_ALLOCATED, text=text)
        try:
            snapshot = self._outlook.read_now()
            why = self._outlook.confirm(start, snapshot)
            if why is not None:
                self._gpu_locks.close(fds)
                return why
            gpus = tuple(gpu for uuid in start.gpus if (gpu := snapshot.gpu(uuid)) is not None)
            claimed = self.store.claim(
                job,
                start.gpus,
                member=self.key,
                mem_bytes=job.request.mem_bytes,
                card_bytes=_smallest(gpus),
            )
        except BaseException:
            self._gpu_locks.close(fds)
            raise
        self._open.put(claimed)
        vendor = gpus[0].vendor if gpus else ""
        return Claim(
            job=claimed, gpus=gpus, lock_fds=fds, env=environment.for_gpus(start.gpus, vendor)
        )

    def _dispatch(self, claim: Claim) -> None:
        try:
            self._runners[claim.job.kind].start(claim)
        except Exception as exc:  # noqa: BLE001 - the loop must go on, and the job says why
            # Whatever one job does to its runner, the others go on.
            _log.exception("job %d could not be started", claim.job.id)
            try:
                self.finish(claim, state=JobState.FAILED, error=f"could not be started: {exc}")
            except GpuSchedError:
                _log.exception("that job %d could not be started cannot be recorded", claim.job.id)

    # -- what runners call

    def begin(self, claim: Claim) -> Job | None:
        """starting → running in this process; None: the claim no longer stands, do not run it."""
        job = self.store.take_over(
            claim.job.id, epoch=claim.job.epoch, claimed_by=self.key, member=self.key
        )
        if job is None:
            self._gpu_locks.close(claim.lock_fds)
        return job

    def finish(
        self,
        claim: Claim,
        *,
        state: JobState,
        error: str | None = None,
        exit_code: int | None = None,
        oom: bool = False,
        retry: bool = True,
    ) -> Job | None:
        """Record the end of a claimed job, give its GPUs back, and wake the next at once.

        Args:
            oom: it ran out of GPU memory.
            retry: False: its user has ended it, so it is not tried again.

        Raises:
            StoreError: it cannot be recorded now; it is as soon as it can be.
        """
        write = partial(
            self.store.finish_if_active,
            claim.job.id,
            epoch=claim.job.epoch,
            state=state,
            error=error,
            exit_code=exit_code,
            oom=oom,
            retry=retry,
        )
        try:
            return self._arrears.record(claim.job, write)
        finally:
            # The lock is the truth: it falls even where the record cannot be written.
            self._gpu_locks.close(claim.lock_fds)
            self.wake()

    def give_back(self, claim: Claim, why: str) -> None:
        """starting → pending: it has not begun after all, and another job may have its GPUs."""
        try:
            self._arrears.record(claim.job, partial(self._return, claim.job, why))
        finally:
            self._gpu_locks.close(claim.lock_fds)
            self.wake()

    def hand_over(self, claim: Claim) -> None:
        """Close our copies of the GPU locks: the job's own processes hold them now."""
        self._gpu_locks.close(claim.lock_fds)

    def ended(self, end: End) -> None:
        """A job is over: the next round, which comes at once, begins with that."""
        self._told.append(end)

    @property
    def idle(self) -> bool:
        """Whether no job is open that this member could have to start or watch."""
        with self._mutex:
            self._open.refresh()
            return not any(job.kind in self._runners for job in self._open.jobs.values())

    def away(self) -> tuple[list[Job], Mapping[int, JobState]]:
        """The open jobs of engines, and the states of all jobs that pending ones come after."""
        with self._mutex:
            self._open.refresh()
            jobs = self._open.away
            return jobs, self._open.states_of_dependencies() if jobs else {}

    def if_idle(self, leave: Callable[[], None]) -> bool:
        """Call ``leave`` under the queue lock if nothing is open here; whether it was called."""
        # In the order in which a round takes them: the other way about two threads wait for ever.
        with self._mutex, self.store.writing():
            if not self.idle:
                return False
            leave()
            return True

    # -- inside

    def _return(self, claimed: Job, why: str) -> None:
        with self.store.writing():
            job = self.store.job(claimed.id)
            if (job.state, job.epoch) == (JobState.STARTING, claimed.epoch):
                self.store.unclaim(job, why)

    def _ready(self, job_id: int) -> bool:
        if not self._outlook.mine(job_id):
            return False
        job = self._open.jobs[job_id]
        return self._runners[job.kind].ready(job)

    def _pass_on_cancels(self) -> None:
        for job in self._open.active:
            # What was told while it began is told again where the shim that then had it has died.
            wish = (job.id, job.epoch, job.member)
            wanted = job.cancel_requested or self._overdue(job)
            if wanted and wish not in self._cancelling and self._ends(job):
                self._cancelling.add(wish)
                self._runners[job.kind].cancel(job)

    def _ends(self, job: Job) -> bool:
        """Whether ending the job is this member's business: it is its own, or its shim is dead."""
        if job.spec.engine != LOCAL:
            return False
        if job.member == self.key:
            return True
        left = job.state is JobState.RUNNING and job.kind not in BOUND_KINDS
        alive = job.member is not None and is_alive(self.store.state, job.member)
        return left and not alive and job.kind in self._runners

    def _overdue(self, job: Job) -> bool:
        """Whether its walltime is over; of a command that counts where its shim is dead."""
        limit_s, began = job.request.time_s, job.started_mono
        if job.kind is JobKind.ALLOCATION or limit_s is None or began is None:
            return False
        return self._clock.now().mono - began >= limit_s

    def _watch(self, snapshot: Snapshot | None) -> None:
        """Be woken by the end of whatever others wait for: members with jobs, strangers on GPUs."""
        unheard = [job for job in self._open.active if not self.ears.tells(job)]
        pids = {alive_pid(self.store.state, job.member) for job in unheard if job.member}
        leaders = self._open.leaders()
        self._strangers = set()
        if snapshot is not None and self._open.any_waits and snapshot.backend != "fake":
            self._strangers = set(_strangers(snapshot.gpus))
        self.ears.watch({*pids, *leaders, *self._strangers}, leaders)

    def _rest(self) -> None:
        self._turns.close()
        self._outlook.rest()
        self.expect(None)
        self.ears.watch((), {})
        self._cancelling.clear()


def _strangers(gpus: Iterable[Gpu]) -> Iterable[int]:
    processes = (found for gpu in gpus for found in gpu.processes or ())
    return (found.pid for found in processes if found.visible and found.job is None)


def _smallest(gpus: Iterable[Gpu]) -> int | None:
    """The memory of the smallest of these GPUs; None where one's is not known."""
    sizes = [gpu.mem_total_bytes for gpu in gpus]
    known = [size for size in sizes if size is not None]
    return min(known) if known and len(known) == len(sizes) else None
