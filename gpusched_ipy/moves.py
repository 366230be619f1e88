"""How a job moves in the record: along its table, each time with an event. It decides nothing.

Only :mod:`gpusched_ipy.store` builds on it; every call stands inside one of its writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpusched_ipy.archive import Archive
from gpusched_ipy.arrays import Arrays
from gpusched_ipy.errors import InvalidTransitionError
from gpusched_ipy.job import Job, JobState, WaitCode, WaitReason, may_move
from gpusched_ipy.process import boot_id
from gpusched_ipy.retry import Again
from gpusched_ipy.roster import Roster
from gpusched_ipy.rows import to_row


class Moves(Archive, Arrays, Roster):
    """The moves, and what goes with each: leases, attempts, reasons."""

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
        row = to_row(job, boot_id()) | {"rev": self._event(job.id, job.attempt, what, data)}
        if job.state is not JobState.PENDING or job.reason is None:
            row |= {"reason": None, "reason_code": None, "reason_since": None}
        assignments = ", ".join(f"{name} = :{name}" for name in row)
        self._db.execute(f"UPDATE jobs SET {assignments} WHERE id = :id", row | {"id": job.id})
        return job

    def _touch(self, job: Job, what: str, data: Mapping[str, Any]) -> None:
        rev = self._event(job.id, job.attempt, what, data)
        self._db.execute("UPDATE jobs SET rev = ? WHERE id = ?", (rev, job.id))

    def _try_again(self, again: Again) -> Job:
        """An ended job → pending; how its last attempt ended stands in it until the next begins."""
        waits = replace(
            again.job,
            member=None,
            queued_mono=self._clock.now().mono,
            started_at=None,
            started_mono=None,
            ended_at=None,
            run_s=None,
        )
        waits = self._move(waits, JobState.PENDING, "retried", {"why": again.why})
        reason = WaitReason(code=WaitCode.BEGIN_TIME, text=again.why)
        self.set_reasons({waits.id: reason})
        return replace(waits, reason=reason)
