"""The record of the queue: jobs are submitted, moved along their table, and wished about here.

Every write happens under the queue lock, in one transaction, and appends events; ``rev`` tells what
is new. The record says what was decided; who lives and whose GPU it is, the locks say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpusched_ipy.archive import Archive
from gpusched_ipy.dbfile import check_room
from gpusched_ipy.errors import InvalidTransitionError, UserError
from gpusched_ipy.job import (
    ACTIVE,
    FINAL,
    MAX_QUEUED,
    Job,
    JobSpec,
    JobState,
    WaitReason,
    may_move,
)
from gpusched_ipy.lookup import OPEN_STATES, Event, Lease
from gpusched_ipy.process import ProcessId, boot_id
from gpusched_ipy.roster import Roster
from gpusched_ipy.rows import to_row

__all__ = ["Event", "Lease", "Store"]


class Store(Archive, Roster):
    """The one record of a user on a machine."""

    def submit(self, spec: JobSpec) -> Job:
        """Record a new job; submitting the same ``uid`` again returns the job that stands.

        Raises:
            UserError: the queue is full or the job is too large.
            StoreError: the disk is full.
        """
        check_room(self.state)
        now = self._clock.now()
        job = Job(
            id=0,
            spec=spec,
            state=JobState.PENDING,
            priority=spec.priority,
            held=spec.held,
            submitted_at=now.wall,
            queued_mono=now.mono,
        )
        with self.writing():
            known = self._one("SELECT * FROM jobs WHERE uid = ?", (spec.uid,))
            if known is not None:
                return known
            self._check_queue_has_room()
            row = to_row(job, boot_id()) | {"rev": 0}
            names = ", ".join(row)
            marks = ", ".join(f":{name}" for name in row)
            job_id = self._db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", row).lastrowid
            job = replace(job, id=int(job_id or 0))
            self._touch(job, "submitted", {"held": spec.held, "priority": spec.priority})
        return job

    def _check_queue_has_room(self) -> None:
        """Refuse a job beyond the cap; counted only where there could be so many."""
        first = self._first(
            "SELECT id FROM jobs INDEXED BY jobs_open"
            f" WHERE state IN {OPEN_STATES} ORDER BY id LIMIT 1"
        )
        last = self._first("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'")
        if first is None or last is None or last["seq"] - first["id"] + 1 < MAX_QUEUED:
            return
        counted = self._first(
            "SELECT count(*) AS jobs FROM"
            f" (SELECT 1 FROM jobs WHERE state IN {OPEN_STATES} LIMIT ?)",
            (MAX_QUEUED,),
        )
        if counted is not None and counted["jobs"] >= MAX_QUEUED:
            raise UserError(
                f"the queue holds {counted['jobs']} jobs, the most it takes; cancel some first"
            )

    def claim(
        self, job: Job, gpus: tuple[str, ...], *, member: str, mem_bytes: int | None = None
    ) -> Job:
        """pending → starting: the job is ``member``'s, on these GPUs, as a new attempt."""
        attempt = os.urandom(16).hex()
        claimed = replace(
            job,
            member=member,
            epoch=job.epoch + 1,
            attempt=attempt,
            attempts=job.attempts + 1,
            gpus=gpus,
            reason=None,
            error=None,
            exit_code=None,
            signal=None,
        )
        with self.writing():
            claimed = self._move(claimed, JobState.STARTING, "claimed", {"gpus": gpus})
            self._db.executemany(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?)",
                [(gpu, job.id, claimed.epoch, job.request.shared, mem_bytes) for gpu in gpus],
            )
            self._db.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, NULL, NULL, NULL)",
                (attempt, job.id, member, json.dumps(gpus), self._clock.now().wall),
            )
        return claimed

    def take_over(self, job_id: int, *, epoch: int, claimed_by: str, member: str) -> Job | None:
        """starting → running by ``member``, or None when that claim no longer stands (fenced)."""
        with self.writing():
            job = self.job(job_id)
            if (job.state, job.epoch, job.member) != (JobState.STARTING, epoch, claimed_by):
                return None
            now = self._clock.now()
            running = replace(job, member=member, started_at=now.wall, started_mono=now.mono)
            return self._move(running, JobState.RUNNING, "started", {"member": member})

    def set_process(self, attempt: str, process: ProcessId) -> None:
        """Record which process leads the attempt: for people, and for whoever must end it."""
        with self.writing():
            self._db.execute(
                "UPDATE attempts SET pid = ?, start_ticks = ? WHERE attempt = ?",
                (process.pid, process.start_ticks, attempt),
            )
            self._rang = True

    def finish_if_active(
        self,
        job_id: int,
        *,
        epoch: int,
        state: JobState,
        exit_code: int | None = None,
        signal: int | None = None,
        error: str | None = None,
    ) -> Job | None:
        """End the job if that attempt is still the current one; None when it is not.

        A recorded result never changes: a late report finds another epoch or an ended job.
        """
        with self.writing():
            job = self.job(job_id)
            if job.state not in ACTIVE or job.epoch != epoch:
                return None
            return self._end(replace(job, exit_code=exit_code, signal=signal, error=error), state)

    def end_pending(self, job: Job, state: JobState, error: str | None) -> Job:
        """Pending → cancelled, failed or lost: it never began."""
        with self.writing():
            return self._end(replace(self.job(job.id), error=error), state)

    def unclaim(self, job: Job, why: str) -> Job:
        """starting or running → pending: it provably never began, or asked to be run again.

        A job that is to be cancelled ends here instead: in the line it would wait for ever.
        """
        with self.writing():
            back = replace(self.job(job.id), member=None, reason=None)
            if back.cancel_requested:
                return self._end(replace(back, error=why), JobState.CANCELLED)
            self._drop_leases(job.id)
            return self._move(back, JobState.PENDING, "returned", {"why": why})

    def requeue(self, job: Job, *, home: str | None = None) -> Job:
        """An ended job → pending, behind those that wait already; a cell gets a new home.

        Raises:
            UserError: it has not ended; somebody else may have requeued it just now.
        """
        now = self._clock.now()
        with self.writing():
            job = self.job(job.id)
            if job.state not in FINAL:
                raise UserError(f"job {job.id} is {job.state}; only an ended job can be requeued")
            again = replace(
                job,
                spec=replace(job.spec, home=home) if home else job.spec,
                member=None,
                cancel_requested=False,
                queued_mono=now.mono,
                started_at=None,
                started_mono=None,
                ended_at=None,
                run_s=None,
                exit_code=None,
                signal=None,
                error=None,
            )
            return self._move(again, JobState.PENDING, "requeued", {})

    def set_usage(
        self,
        job: Job,
        *,
        peak_mem_bytes: int | None,
        mean_utilization: float | None,
        energy_j: float | None,
    ) -> None:
        """Add to an ended job what it had drawn of its GPUs."""
        with self.writing():
            current = self.job(job.id)
            if (current.state, current.epoch) == (job.state, job.epoch):
                used = replace(
                    current,
                    peak_mem_bytes=peak_mem_bytes,
                    mean_utilization=mean_utilization,
                    energy_j=energy_j,
                )
                self._put(used, "usage", {})

    def request_cancel(self, job_id: int) -> Job:
        """Record the wish; a pending job is cancelled at once, an ended one stays as it is."""
        with self.writing():
            job = self.job(job_id)
            if job.state in FINAL:
                return job
            if job.state is JobState.PENDING:
                return self._end(replace(job, cancel_requested=True), JobState.CANCELLED)
            return self._put(replace(job, cancel_requested=True), "cancel requested", {})

    def set_held(self, job_id: int, held: bool) -> Job:
        """Hold or release a pending job.

        Raises:
            UserError: it is no longer pending.
        """
        with self.writing():
            job = self.job(job_id)
            if job.state is not JobState.PENDING:
                verb = "held" if held else "released"
                raise UserError(f"job {job_id} is {job.state}; only a pending job can be {verb}")
            return self._put(replace(job, held=held), "held" if held else "released", {})

    def set_priority(self, job_id: int, priority: int) -> Job:
        """Give a job another priority (higher first).

        Raises:
            UserError: it has ended.
        """
        with self.writing():
            job = self.job(job_id)
            if job.state in FINAL:
                raise UserError(f"job {job_id} is {job.state}; its priority cannot change any more")
            return self._put(replace(job, priority=priority), "priority", {"priority": priority})

    def set_reasons(self, reasons: Mapping[int, WaitReason]) -> None:
        """Record why pending jobs wait; ``reason_since`` is kept while the code stays the same."""
        wall = self._clock.now().wall
        with self.writing():
            self._db.executemany(
                "UPDATE jobs SET reason_since = CASE WHEN reason_code IS ?2 THEN reason_since"
                " ELSE ?4 END, reason_code = ?2, reason = ?3 WHERE id = ?1 AND state = 'pending'",
                [(job, str(why.code), why.text, wall) for job, why in reasons.items()],
            )

    def _end(self, job: Job, state: JobState) -> Job:
        now = self._clock.now()
        run_s = None if job.started_mono is None else max(0.0, now.mono - job.started_mono)
        self._drop_leases(job.id)
        ended = replace(job, ended_at=now.wall, run_s=run_s, reason=None)
        data = {"exit_code": job.exit_code, "signal": job.signal, "error": job.error}
        return self._move(ended, state, "ended", data)

    def _drop_leases(self, job_id: int) -> None:
        self._db.execute("DELETE FROM leases WHERE job_id = ?", (job_id,))

    def _move(self, job: Job, state: JobState, what: str, data: Mapping[str, Any]) -> Job:
        if not may_move(job.state, state):
            raise InvalidTransitionError(job.id, job.state, state)
        return self._put(replace(job, state=state), what, {**data, "state": str(state)})

    def _put(self, job: Job, what: str, data: Mapping[str, Any]) -> Job:
        """Write the job as it now is; the wait reason stays only while it waits."""
        row = to_row(job, boot_id())
        if job.state is not JobState.PENDING or job.reason is None:
            row |= {"reason": None, "reason_code": None, "reason_since": None}
        assignments = ", ".join(f"{name} = :{name}" for name in row)
        self._db.execute(f"UPDATE jobs SET {assignments} WHERE id = :id", row | {"id": job.id})
        self._touch(job, what, data)
        return job

    def _touch(self, job: Job, what: str, data: Mapping[str, Any]) -> None:
        rev = self._event(job.id, job.attempt, what, data)
        self._db.execute("UPDATE jobs SET rev = ? WHERE id = ?", (rev, job.id))
