"""The record of the queue: jobs are submitted, moved along their table, and wished about here.

Every write happens under the queue lock, in one transaction, and appends events; ``rev`` tells what
is new. The record says what was decided; who lives and whose GPU it is, the locks say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpusched_ipy.dbfile import check_room
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import (
    ACTIVE,
    FINAL,
    MAX_QUEUED,
    Job,
    JobSpec,
    JobState,
    Place,
)
from gpusched_ipy.lookup import OPEN_STATES, Event, Lease
from gpusched_ipy.process import boot_id
from gpusched_ipy.retry import after_failure
from gpusched_ipy.rows import key_of, to_row
from gpusched_ipy.wishes import Wishes

__all__ = ["Event", "Lease", "Store"]


class Store(Wishes):
    """The one record of a user on a machine."""

    def submit(self, spec: JobSpec) -> Job:
        """Record a new job; submitting the same ``uid`` again returns the job that stands.

        Raises:
            UserError: the queue is full or the job is too large.
            StoreError: the disk is full.
        """
        return self.submit_all([spec])[0]

    def submit_all(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Record new jobs in one write, all or none. For each the job that stands for it: the one
        of the same ``uid`` or, with a key, of the same key (and values) that has not ended badly.

        What the queue has held because its sweep failed counts as failed: it is cancelled.

        Raises:
            UserError, StoreError: as :meth:`submit`.
        """
        check_room(self.state)
        jobs: list[Job] = []
        if 1 < len(specs) == len({spec.uid for spec in specs if spec.key is None}):
            jobs = [self._new(spec) for spec in specs]
        # What takes long is done before anybody is kept waiting for us.
        rows = [to_row(job, boot_id()) for job in jobs]
        with self.writing():
            if rows and not self._any_known(specs):
                first = self._insert_new(rows)
                return [replace(job, id=number) for number, job in enumerate(jobs, first)]
            again = self._arrays_by_key(specs)
            return [self._submit_one(spec, again) for spec in specs]

    def _new(self, spec: JobSpec) -> Job:
        now = self._clock.now()
        return Job(
            id=0,
            spec=spec,
            state=JobState.PENDING,
            priority=spec.priority,
            held=spec.held,
            submitted_at=now.wall,
            queued_mono=now.mono,
        )

    def _any_known(self, specs: Sequence[JobSpec]) -> bool:
        uids = json.dumps([spec.uid for spec in specs])
        query = "SELECT 1 FROM jobs WHERE uid IN (SELECT value FROM json_each(?)) LIMIT 1"
        return self._first(query, (uids,)) is not None

    def _insert_new(self, rows: Sequence[dict[str, Any]]) -> int:
        """Insert new jobs with their events; the id of the first, the others follow."""
        self._check_queue_has_room(len(rows))
        first, rev = self._last("jobs") + 1, self._last("events") + 1
        wall = self._clock.now().wall
        names = [*rows[0], "id", "rev"]
        marks = ", ".join(f":{name}" for name in names)
        new = [{**row, "id": first + n, "rev": rev + n} for n, row in enumerate(rows)]
        self._db.executemany(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks})", new)
        for row in new:
            told = {"held": bool(row["held"]), "priority": row["priority"]}
            row |= {"at": wall, "told": json.dumps(told)}
        self._db.executemany(
            "INSERT INTO events (id, at, job_id, what, data)"
            " VALUES (:rev, :at, :id, 'submitted', :told)",
            new,
        )
        self._rang = True
        return first

    def _submit_one(self, spec: JobSpec, again: Mapping[str, str]) -> Job:
        known = self._one("SELECT * FROM jobs WHERE uid = ?", (spec.uid,))
        if known is not None:
            return known
        key = key_of(spec)
        stands = None if key is None else self.standing(key)
        if stands is not None and stands.hold_reason is None:
            return stands
        if stands is not None:
            self._end(replace(stands, error="submitted again", held=False), JobState.CANCELLED)
        if spec.array is not None and spec.array.id in again:
            array = replace(spec.array, id=again[spec.array.id])
            env = {**spec.env, "GPUSCHED_ARRAY_ID": array.id} if spec.env else spec.env
            spec = replace(spec, array=array, env=env)
        self._check_queue_has_room()
        job = self._new(spec)
        row = to_row(job, boot_id()) | {"rev": 0}
        names = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        job_id = self._db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", row).lastrowid
        job = replace(job, id=int(job_id or 0))
        self._touch(job, "submitted", {"held": spec.held, "priority": spec.priority})
        return job

    def _arrays_by_key(self, specs: Sequence[JobSpec]) -> dict[str, str]:
        """For a sweep that is submitted again under its key: the array that it goes on in.

        Only where it is the same sweep: another size has other places.
        """
        found: dict[str, str] = {}
        for spec in specs:
            key, array = key_of(spec), spec.array
            if key is None or array is None or array.id in found:
                continue
            older = self._one(
                "SELECT * FROM jobs WHERE job_key = ? ORDER BY id DESC LIMIT 1", (key,)
            )
            place = None if older is None else older.spec.array
            if place is not None and (place.index, place.size) == (array.index, array.size):
                found[array.id] = place.id
        return found

    def _check_queue_has_room(self, more: int = 1) -> None:
        """Refuse jobs beyond the cap; counted only where there could be so many."""
        first = self._first(
            "SELECT id FROM jobs INDEXED BY jobs_open"
            f" WHERE state IN {OPEN_STATES} ORDER BY id LIMIT 1"
        )
        if first is None or self._last("jobs") - first["id"] + 1 + more <= MAX_QUEUED:
            return
        counted = self._first(
            "SELECT count(*) AS jobs FROM"
            f" (SELECT 1 FROM jobs WHERE state IN {OPEN_STATES} LIMIT ?)",
            (MAX_QUEUED,),
        )
        held = 0 if counted is None else int(counted["jobs"])
        if held + more > MAX_QUEUED:
            full = f"the queue holds {held} jobs"
            raise UserError(
                f"{full}, the most it takes; cancel some first"
                if more == 1
                else f"{full} and takes {MAX_QUEUED}: {more} more are too many; cancel some first"
            )

    def claim(
        self,
        job: Job,
        gpus: tuple[str, ...],
        *,
        member: str,
        mem_bytes: int | None = None,
        card_bytes: int | None = None,
        place: Place | None = None,
    ) -> Job:
        """pending → starting: the job is ``member``'s, on these GPUs, as a new attempt.

        Args:
            mem_bytes: what it has declared.
            card_bytes: the memory of the smallest of these GPUs, where it is known.
            place: where it runs, of a job of an engine.
        """
        attempt = os.urandom(16).hex()
        claimed = replace(
            job,
            member=member,
            epoch=job.epoch + 1,
            attempt=attempt,
            attempts=job.attempts + 1,
            gpus=gpus,
            place=place,
            reason=None,
            error=None,
            exit_code=None,
            signal=None,
            oom=False,
            not_before_mono=None,
            peak_mem_bytes=None,
            mean_utilization=None,
            energy_j=None,
        )
        with self.writing():
            claimed = self._move(claimed, JobState.STARTING, "claimed", {"gpus": gpus})
            self._db.executemany(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?)",
                [(gpu, job.id, claimed.epoch, job.request.shared, mem_bytes) for gpu in gpus],
            )
            self._db.execute(
                "INSERT INTO attempts (attempt, job_id, member, gpus, claimed_at, card_bytes)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (attempt, job.id, member, json.dumps(gpus), self._clock.now().wall, card_bytes),
            )
        return claimed

    def take_over(self, job_id: int, *, epoch: int, claimed_by: str, member: str) -> Job | None:
        """starting → running by ``member``, or None when that claim no longer stands (fenced)."""
        with self.writing():
            begun = self.begin(job_id, epoch=epoch, claimed_by=claimed_by, member=member)
            return None if begun is None else self.job(job_id)

    def finish_if_active(
        self,
        job_id: int,
        *,
        epoch: int,
        state: JobState,
        exit_code: int | None = None,
        signal: int | None = None,
        error: str | None = None,
        oom: bool = False,
        retry: bool = True,
    ) -> Job | None:
        """End the job if that attempt is still the current one; None when it is not.

        A recorded result never changes: a late report finds another epoch or an ended job. Where
        one more try is due (``--retries``, ``--retry-oom``) the job waits again, in the same write.

        Args:
            oom: it ran out of GPU memory.
            retry: False: its user has ended it, so it is not tried again.
        """
        with self.writing():
            job = self.job(job_id)
            if job.state not in ACTIVE or job.epoch != epoch:
                return None
            job = replace(job, exit_code=exit_code, signal=signal, error=error, oom=oom)
            self._db.execute(
                "UPDATE attempts SET outcome = ? WHERE attempt = ?",
                ("oom" if oom else str(state), job.attempt),
            )
            ended = self._end(job, state)
            row = self._first("SELECT card_bytes FROM attempts WHERE attempt = ?", (job.attempt,))
            card_bytes = row["card_bytes"] if row is not None else None
            again = after_failure(ended, self._clock.now(), card_bytes=card_bytes)
            if again is not None and retry:
                return self._try_again(again)
            self._hold_if_failing(ended)
            return ended

    def _hold_if_failing(self, job: Job) -> None:
        """Hold the rest of a sweep whose members fail one after the other."""
        why = self.failing_fast(job)
        if why is not None and job.spec.array is not None:
            self.hold_rest(job.spec.array.id, why)

    def end_pending(self, job: Job, state: JobState, error: str | None) -> Job:
        """Pending → cancelled, failed or lost: it never began."""
        with self.writing():
            return self._end(replace(self.job(job.id), error=error), state)

    def unclaim(self, job: Job, why: str, *, lost: bool = False) -> Job:
        """starting or running → pending: it provably never began, or asked to be run again.

        A job that is to be cancelled ends here instead: in the line it would wait for ever.

        Args:
            lost: it had begun, and asked for that; it is counted.
        """
        with self.writing():
            back = replace(self.job(job.id), member=None, reason=None)
            if lost:
                self._db.execute(
                    "UPDATE attempts SET outcome = 'lost' WHERE attempt = ?", (back.attempt,)
                )
                back = replace(back, requeued=back.requeued + 1, started_at=None, started_mono=None)
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
            self._check_key_is_free(job)
            again = replace(
                job,
                spec=replace(job.spec, home=home, in_place=False) if home else job.spec,
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
                retried=0,
                requeued=0,
                oom=False,
                oom_retried=False,
                not_before_mono=None,
            )
            return self._move(again, JobState.PENDING, "requeued", {})

    def _check_key_is_free(self, job: Job) -> None:
        key = key_of(job.spec)
        stands = None if key is None else self.standing(key)
        if stands is not None and stands.id != job.id:
            raise UserError(
                f"job {job.id} has been submitted again under its key, as job {stands.id}"
            )

    def set_usage(
        self,
        job: Job,
        *,
        peak_mem_bytes: int | None,
        mean_utilization: float | None,
        energy_j: float | None,
        peak_utilization: float | None = None,
    ) -> None:
        """Add to an ended job what it had drawn of its GPUs; the peak stands in the event."""
        with self.writing():
            current = self.job(job.id)
            if (current.state, current.epoch) == (job.state, job.epoch):
                used = replace(
                    current,
                    peak_mem_bytes=peak_mem_bytes,
                    mean_utilization=mean_utilization,
                    energy_j=energy_j,
                )
                peak = None if peak_utilization is None else round(peak_utilization, 4)
                self._put(used, "usage", {} if peak is None else {"peak_utilization": peak})

    def tell_excess(self, job: Job, *, ends: bool) -> bool:
        """Note that a running job uses far more memory than it declared; whether it is news."""
        with self.writing():
            current = self.job(job.id)
            if current.epoch != job.epoch or current.state not in ACTIVE:
                return False
            if current.peak_mem_bytes is not None:
                return False
            data = {"used": job.peak_mem_bytes, "declared": job.request.mem_bytes, "ends": ends}
            self._put(replace(current, peak_mem_bytes=job.peak_mem_bytes), "over memory", data)
        return True
