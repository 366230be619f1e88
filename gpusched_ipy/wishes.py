"""Wishes about jobs in the record: cancel, hold and release, another priority; for one or many.

For many the rows are changed as they stand, without making jobs of them: checksums, events and
revisions come out as if each had been wished for by itself. So many are changed in one write that
nobody waits long; a caller who wants all or none opens a write around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpusched_ipy.errors import UserError
from gpusched_ipy.job import FINAL, Job, JobState, WaitCode
from gpusched_ipy.lookup import OPEN_STATES
from gpusched_ipy.moves import Moves
from gpusched_ipy.rowsum import checksum

AT_ONCE = 250  # jobs changed in one write

_PENDING = "('pending')"
_NO_REASON = {"reason": None, "reason_code": None, "reason_since": None}
Changes = dict[str, Any]


class Wishes(Moves):
    """What people want of jobs."""

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
            job = replace(job, held=held, hold_reason=None)
            return self._put(job, "held" if held else "released", {})

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

    def cancel_many(self, ids: Sequence[int]) -> None:
        """As :meth:`request_cancel` for each of these jobs."""

        def changes(row: Mapping[str, Any], wall: float) -> tuple[Changes, Changes]:
            ended = {
                "state": str(JobState.CANCELLED),
                "cancel_requested": 1,
                "ended_at": wall,
                "run_s": None,
                **_NO_REASON,
            }
            told = {name: row[name] for name in ("exit_code", "signal", "error")}
            return ended, told | {"state": str(JobState.CANCELLED)}

        for part in _parts(ids):
            with self.writing():
                for number, state in self.states(part).items():
                    if state not in FINAL and state is not JobState.PENDING:
                        self.request_cancel(number)
                self._change(self._rows_of(part, _PENDING), "ended", changes)

    def hold_many(self, ids: Sequence[int], held: bool) -> None:
        """As :meth:`set_held` for each of these jobs that is pending."""
        what = "held" if held else "released"
        for part in _parts(ids):
            with self.writing():
                self._change(
                    self._rows_of(part, _PENDING),
                    what,
                    lambda _row, _wall: ({"held": int(held), "hold_reason": None}, {}),
                )

    def prioritize_many(self, ids: Sequence[int], priority: int) -> None:
        """As :meth:`set_priority` for each of these jobs that has not ended."""
        for part in _parts(ids):
            with self.writing():
                self._change(
                    self._rows_of(part, OPEN_STATES),
                    "priority",
                    lambda _row, _wall: ({"priority": priority}, {"priority": priority}),
                )

    def hold_rest(self, array_id: str, why: str) -> None:
        """Hold the pending jobs of a sweep that are not held, all in one write."""

        def changes(row: Mapping[str, Any], wall: float) -> tuple[Changes, Changes]:
            same = row["reason_code"] == WaitCode.HELD
            held = {
                "held": 1,
                "hold_reason": why,
                "reason_code": str(WaitCode.HELD),
                "reason": f"held: {why}",
                "reason_since": row["reason_since"] if same else wall,
            }
            return held, {"why": why}

        with self.writing():
            rows = self._query(
                "SELECT * FROM jobs WHERE array_id = ? AND state = 'pending' AND NOT held"
                " ORDER BY id",
                (array_id,),
            )
            self._change(rows, "held", changes)

    def _rows_of(self, ids: Sequence[int], states: str) -> list[Any]:
        return self._query(
            "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(?))"
            f" AND state IN {states} ORDER BY id",
            (json.dumps(ids),),
        )

    def _change(
        self,
        rows: Sequence[Any],
        what: str,
        changes: Callable[[Mapping[str, Any], float], tuple[Changes, Changes]],
    ) -> None:
        """Change these rows and append an event for each; a damaged one is left as it is.

        Args:
            changes: the columns to change, always the same ones, and what the event tells.
        """
        wall = self._clock.now().wall
        rev = self._last("events")
        updates: list[Changes] = []
        events: list[tuple[Any, ...]] = []
        for row in self._undamaged(rows):
            new, told = changes(row, wall)
            rev += 1
            crc = checksum({**dict(row), **new})
            updates.append({**new, "crc": crc, "rev": rev, "id": row["id"]})
            events.append((rev, wall, row["id"], row["attempt"], what, json.dumps(told)))
        if updates:
            names = [name for name in updates[0] if name != "id"]
            places = ", ".join(f"{name} = :{name}" for name in names)
            self._db.executemany(f"UPDATE jobs SET {places} WHERE id = :id", updates)
            self._db.executemany(
                "INSERT INTO events (id, at, job_id, attempt, what, data)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                events,
            )
            self._rang = True


def _parts(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
