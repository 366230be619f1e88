"""The record's past as figures: earlier runs of a name, who had which GPU when. It only reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gpusched_ipy.job import Job
from gpusched_ipy.lookup import OPEN_STATES, Lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """For how long a job had its GPUs; times are wall clock (s)."""

    job_id: int
    gpus: tuple[str, ...]
    start: float
    end: float | None  # None: it still has them
    mean_utilization: float | None


class Chronicle(Lookup):
    """Everything that is asked about many jobs that are over."""

    def past(self, name: str, limit: int) -> list[Job]:
        """The newest jobs of that name that have run and ended, newest first."""
        return self._many(
            "SELECT * FROM jobs INDEXED BY jobs_past"
            " WHERE name = ? AND run_s IS NOT NULL ORDER BY ended_at DESC LIMIT ?",
            (name, limit),
        )

    def ended_since(self, wall: float, limit: int | None = None) -> list[Job]:
        """Jobs that ended at ``wall`` (s since the epoch) or later, in the order in which they
        ended; ``limit`` keeps the newest."""
        found = self._many(
            "SELECT * FROM jobs INDEXED BY jobs_by_end WHERE ended_at >= ?"
            f" AND state NOT IN {OPEN_STATES} ORDER BY ended_at DESC, id DESC LIMIT ?",
            (wall, -1 if limit is None else limit),
        )
        return found[::-1]

    def held_since(self, wall: float) -> Iterator[Held]:
        """Who had which GPUs at ``wall`` (s since the epoch) or later, as far as recorded."""
        columns = "id, gpus, started_at, ended_at, run_s, mean_utilization"
        for row in self._query(
            f"SELECT {columns} FROM jobs INDEXED BY jobs_by_end WHERE ended_at >= ?"
            " AND started_at IS NOT NULL UNION ALL"
            f" SELECT {columns} FROM jobs INDEXED BY jobs_open WHERE state IN {OPEN_STATES}"
            " AND state != 'pending' AND started_at IS NOT NULL",
            (wall,),
        ):
            yield Held(
                job_id=row["id"],
                gpus=tuple(json.loads(row["gpus"])),
                start=row["started_at"],
                end=row["ended_at"],
                mean_utilization=row["mean_utilization"],
            )
