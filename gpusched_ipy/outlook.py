"""All that one member knows when it decides: the open jobs, the newest reading, who reacts.

It puts the question to the pure policy and gives its answer; it claims and starts nothing, and
writes nothing but what ended jobs have drawn of their GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from gpusched_ipy import backlog, policy
from gpusched_ipy.attribution import Owners, attribute
from gpusched_ipy.backends import Detail
from gpusched_ipy.config import LOCAL, Clock, Settings
from gpusched_ipy.excess import Excess
from gpusched_ipy.job import BOUND_KINDS, Allocation, Job, JobKind, Member, WaitCode, WaitReason
from gpusched_ipy.learned import Learned
from gpusched_ipy.offers import Offers
from gpusched_ipy.openjobs import OpenJobs
from gpusched_ipy.policy.standing import Known
from gpusched_ipy.usage import UsageTracker

if TYPE_CHECKING:
    from gpusched_ipy.monitor import Monitor
    from gpusched_ipy.snapshot import Snapshot
    from gpusched_ipy.store import Store

# How long the reading under the lock may take: a driver that hangs must not hold up other members.
CONFIRM_S = 1.0
# What waits is summed up at most so often: it takes as long as there are jobs.
BACKLOG_S = 5.0
# What keeps a job waiting that other users should know of.
_FOR_A_GPU = frozenset({WaitCode.GPU_BUSY, WaitCode.GPU_ALLOCATED, WaitCode.QUIET, WaitCode.MEMORY})


class Outlook:
    """What the member ``key`` sees. Not safe from several threads at once: the caller locks.

    Args:
        key: the member; cells and allocations of others are not its business.
        kinds: the kinds of job that it can start.
    """

    def __init__(
        self,
        store: Store,
        monitor: Monitor,
        key: str,
        kinds: Collection[JobKind],
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._store = store
        self._monitor = monitor
        self._key = key
        self._kinds = kinds
        self._settings = settings
        self._clock = clock
        self._learned = Learned(store)
        self.open = OpenJobs(
            store,
            clock,
            keep_s=settings.quiet_s + settings.sample_interval_s,
            ended=self._learned.saw,
        )
        self._offers = Offers()
        self._owners = Owners()
        self._backlog_s, self._summed_mono = 0.0, -BACKLOG_S
        self._usage = UsageTracker()
        self._excess = Excess(store, settings)
        self._once: Snapshot | None = None
        self._told: dict[int, WaitReason] = {}

    def mine(self, job_id: int) -> bool:
        """Whether that job is open, and starting and watching it is this member's business."""
        job = self.open.jobs.get(job_id)
        return job is not None and self.responsible(job)

    def responsible(self, job: Job) -> bool:
        """Whether starting and watching the job is this member's business."""
        if job.spec.engine != LOCAL:
            return False
        return job.kind in self._kinds and (
            job.kind not in BOUND_KINDS or job.spec.home == self._key
        )

    def look(self) -> Snapshot | None:
        """The newest reading; readings are taken while something waits or a job of ours runs."""
        interval_s = self._settings.sample_interval_s
        runs = any(self.mine(job.id) for job in self.open.active)
        if self.open.any_waits:
            # What a job of ours draws is summed up from each reading.
            self._monitor.want(self._name, interval_s, Detail.PROCESSES, patient=not runs)
        elif runs:
            self._monitor.want(self._name, interval_s, Detail.LOAD)
        else:
            self._monitor.unwant(self._name)
        self._monitor.set_allocated(self.open.pids_by_gpu())
        newest = self._monitor.latest(Detail.LOAD)
        marked = None if newest is None else self.attributed(newest)
        if marked is not None:
            self._usage.observe(marked, self.open.allocations())
        latest = self._inventory() or self._monitor.latest(Detail.PROCESSES)
        if latest is newest:
            return marked
        return None if latest is None else self.attributed(latest)

    def read_now(self) -> Snapshot:
        """A reading that begins now, for a start that is about to be made."""
        return self.attributed(self._inventory() or self._monitor.read_now(CONFIRM_S))

    def attributed(self, snapshot: Snapshot) -> Snapshot:
        """``snapshot`` with the job and the member of each process filled in."""
        return attribute(
            snapshot,
            self.open.active,
            leaders=self.open.leaders(),
            members=self._store.member_pids(),
            owners=self._owners,
        )

    def rest(self) -> None:
        """Nothing is open: no reading is wanted, nothing has been told."""
        self._monitor.unwant(self._name)
        self._monitor.set_allocated({})
        self._told.clear()

    def leave(self) -> None:
        """Want no more readings."""
        self._monitor.unwant(self._name)

    def decide(
        self,
        snapshot: Snapshot | None,
        *,
        held: Collection[str] = (),
        limit: int = policy.REASONS,
        record: bool = True,
    ) -> policy.Decision:
        """What to do now, as far as this member knows.

        Args:
            held: GPUs that have just been refused: processes hold their locks that the record does
                not know.
            limit: for how many jobs to say why they wait.
            record: False: it is only a question, and leaves no trace.
        """
        now, jobs = self._clock.now(), self.open.jobs
        shortest = self._settings.order == "shortest"
        known = self._known()
        known["ended"] = self.open.states_of_dependencies()
        known["drained"] = self._store.drained is not None
        known["worst_backlog_s"] = backlog.worst_s(self._store, now.wall) if shortest else 0.0
        taken = [
            *self._learned.with_ends(self.open.allocations(), jobs, now.mono),
            *(_left_behind(gpu) for gpu in held),
        ]
        if self._settings.aging_backlog and now.mono - self._summed_mono >= BACKLOG_S:
            self._summed_mono = now.mono
            self._backlog_s = policy.backlog_s(
                self.open.line, snapshot, taken, self._settings, now, **known
            )
        known["backlog_s"] = self._backlog_s
        decision = policy.decide(
            self.open.line, snapshot, taken, self._settings, now, limit=limit, **known
        )
        if shortest and record:
            backlog.note(self._store, decision.backlog_s, now.wall)
        return decision

    def confirm(self, start: policy.Start, snapshot: Snapshot) -> WaitReason | None:
        """Whether that start still stands on this reading; None when it does."""
        return policy.confirm(
            self.open.jobs[start.job_id],
            start.gpus,
            snapshot,
            self.open.allocations(),
            self._settings,
            self._clock.now(),
            **self._known(),
        )

    def offer(self, decision: policy.Decision) -> None:
        """Remember which starts are other members' to make, and since when."""
        starts = (start.job_id for start in decision.starts)
        others = [self.open.jobs[job_id] for job_id in starts if not self.mine(job_id)]
        self._offers.made(others, self._clock.now().mono)

    def in_line(self, decision: policy.Decision) -> list[Job]:
        """Those of this member's jobs that a GPU alone keeps from starting, in their order."""
        waiting = [start.job_id for start in decision.starts]
        waiting += [job for job, why in decision.reasons.items() if why.code in _FOR_A_GPU]
        return [self.open.jobs[job] for job in waiting if self.mine(job)]

    def own(self, reasons: Mapping[int, WaitReason]) -> list[WaitReason]:
        """Why this member's own jobs wait."""
        return [why for job_id, why in reasons.items() if self.mine(job_id)]

    def news(self, reasons: Mapping[int, WaitReason]) -> dict[int, WaitReason]:
        """The reasons of this member's jobs that are not yet recorded as they are now."""
        self._told = {job: why for job, why in self._told.items() if job in self.open.jobs}
        return {
            job: why
            for job, why in reasons.items()
            if self.mine(job) and self._told.get(job) != why
        }

    def told(self, news: Mapping[int, WaitReason]) -> None:
        """These reasons have been recorded."""
        self._told |= news

    def record_usage(self) -> None:
        """Write down what the jobs that have ended meanwhile had drawn of their GPUs, and which
        of those that run use far more memory than they declared."""
        self._excess.look(
            (job, self._usage.peak_mem_bytes(job.id))
            for job in self.open.active
            if self.responsible(job)
        )
        for job in self.open.take_ended():
            used = self._usage.take(job.id)
            if used is not None and self.responsible(job):
                self._store.set_usage(
                    job,
                    peak_mem_bytes=used.peak_mem_bytes,
                    mean_utilization=used.mean_utilization,
                    energy_j=used.energy_j,
                    peak_utilization=used.peak_utilization,
                )

    @property
    def _name(self) -> str:
        return f"scheduler {self._key}"

    def _known(self) -> Known:
        known = self._learned.known(self.open.jobs)
        known["members"] = self._members()
        return known

    def _members(self) -> Mapping[str, Member]:
        return self._offers.as_they_react(self._store.members(), self._clock.now().mono)

    def _inventory(self) -> Snapshot | None:
        """Where sampling is off: the one reading that tells which GPUs there are."""
        if self._settings.sampling:
            return None
        if self._once is None or self._once.problem is not None:
            self._once = self._monitor.read_now(CONFIRM_S)
        return self._once


def _left_behind(gpu: str) -> Allocation:
    """A GPU of which only its lock tells that it is in use."""
    return Allocation(job_id=0, gpus=(gpu,), label="another job, or a process left by one,")
