"""Sweeps in the record: their members, how they stand, and whether they fail one after the other.

It reads; what follows from that, the store writes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable

from gpusched_ipy.entries import Entry, fold
from gpusched_ipy.job import ACTIVE, ArrayState, Job, JobState
from gpusched_ipy.lookup import Lookup

# So many members that failed one after the other, each so soon after its start (s), hold the rest.
FAST_FAILS = 3
FAST_FAIL_S = 30.0
STANDING = "('pending','starting','running','completed')"  # of a job that a key stands for


class Arrays(Lookup):
    """Everything that can be asked about sweeps."""

    def array(self, array_id: str) -> list[Job]:
        """The jobs of a sweep, oldest first; none where there is no such sweep."""
        return self._many("SELECT * FROM jobs WHERE array_id = ? ORDER BY id", (array_id,))

    def array_ids(self, array_id: str) -> list[int]:
        """The ids of the jobs of a sweep."""
        rows = self._query("SELECT id FROM jobs WHERE array_id = ? ORDER BY id", (array_id,))
        return [row["id"] for row in rows]

    def arrays_like(self, prefix: str) -> list[str]:
        """The sweeps whose id begins so."""
        rows = self._query(
            "SELECT DISTINCT array_id FROM jobs WHERE array_id >= ? AND array_id < ?",
            (prefix, f"{prefix}\uffff"),
        )
        return [row["array_id"] for row in rows]

    def array_states(self, array_ids: Iterable[str]) -> dict[str, ArrayState]:
        """How these sweeps stand; the specs of their members are not read."""
        return {
            array_id: found
            for array_id in dict.fromkeys(array_ids)
            if (found := self._array_state(array_id)) is not None
        }

    def folded_page(
        self, offset: int, limit: int, aging_s: float, unfolded: Collection[str] = ()
    ) -> tuple[list[Entry], int]:
        """A part of the queue with one row for each sweep, and how many rows there are.

        Args:
            unfolded: the sweeps whose open members have a row each, below that of the sweep.
        """
        # Two narrow indexes are read, and of the jobs themselves those of the page.
        sweeps = self._query("SELECT id, array_id FROM jobs WHERE array_id IS NOT NULL")
        line, known = self.line(aging_s), dict(map(tuple, sweeps))
        shown, total = fold(line, known, unfolded, offset, limit)
        jobs = {job.id: job for job in self.those([place.job_id for place in shown])}
        states = self.array_states(place.array_id for place in shown if place.array_id)
        entries = [
            Entry(
                job=jobs[place.job_id],
                ahead=place.ahead,
                sweep=states.get(place.array_id or ""),
                unfolded=place.array_id in unfolded,
                member=place.member,
            )
            for place in shown
            if place.job_id in jobs
        ]
        return entries, total

    def _array_state(self, array_id: str) -> ArrayState | None:
        rows = self._query(
            "SELECT id, name, state, held, priority, reason, submitted_at, ended_at, gpus,"
            " json_extract(spec, '$.array.index') AS place"
            " FROM jobs WHERE array_id = ? ORDER BY id",
            (array_id,),
        )
        if not rows:
            return None
        newest = {row["place"]: row for row in rows}
        states = Counter(JobState(row["state"]) for row in newest.values())
        waiting = [row for row in newest.values() if row["state"] == JobState.PENDING]
        over = all(row["ended_at"] is not None for row in newest.values())
        return ArrayState(
            id=array_id,
            name=rows[-1]["name"],
            first=rows[0]["id"],
            last=rows[-1]["id"],
            jobs=len(rows),
            size=len(newest),
            priority=(waiting or rows[-1:])[0]["priority"],
            submitted_at=rows[0]["submitted_at"],
            ended_at=max(row["ended_at"] for row in newest.values()) if over else None,
            states=states,
            held=sum(row["held"] for row in waiting),
            reason=next((row["reason"] for row in waiting if row["reason"]), None),
            gpus=tuple(
                dict.fromkeys(
                    gpu
                    for row in newest.values()
                    if row["state"] in ACTIVE
                    for gpu in json.loads(row["gpus"])
                )
            ),
        )

    def standing(self, job_key: str) -> Job | None:
        """The job that a key stands for: the newest that has not ended badly."""
        return self._one(
            f"SELECT * FROM jobs WHERE job_key = ? AND state IN {STANDING}"
            " ORDER BY id DESC LIMIT 1",
            (job_key,),
        )

    def failing_fast(self, job: Job) -> str | None:
        """Why the rest of the sweep of ``job``, which has just failed, should not start; or None.

        The last members that ended have all failed, each soon after it began, and since somebody
        has last released or submitted one of them.
        """
        array = job.spec.array
        if array is None or job.state is not JobState.FAILED:
            return None
        rows = self._query(
            "SELECT id, state, run_s, started_at FROM jobs INDEXED BY jobs_by_array"
            " WHERE array_id = ? AND ended_at IS NOT NULL AND state != 'cancelled'"
            " ORDER BY ended_at DESC, id DESC LIMIT ?",
            (array.id, FAST_FAILS),
        )
        fast = [row for row in rows if row["state"] == JobState.FAILED and _soon(row["run_s"])]
        if len(fast) < FAST_FAILS or min(row["started_at"] for row in fast) < self._taken_up(
            array.id
        ):
            return None
        ids = ", ".join(str(row["id"]) for row in sorted(fast, key=lambda row: int(row["id"])))
        return (
            f"{FAST_FAILS} of its sweep failed one after the other, each within {FAST_FAIL_S:.0f} s"
            f" (jobs {ids})"
        )

    def _taken_up(self, array_id: str) -> float:
        """When somebody has last released or submitted members of a sweep (wall clock, s)."""
        row = self._first(
            "SELECT max(at) AS at FROM events WHERE what IN ('released', 'submitted', 'requeued')"
            " AND job_id IN (SELECT id FROM jobs WHERE array_id = ?)",
            (array_id,),
        )
        return float(row["at"]) if row is not None and row["at"] is not None else 0.0


def _soon(run_s: float | None) -> bool:
    return run_s is not None and run_s < FAST_FAIL_S
