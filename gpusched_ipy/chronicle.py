"""The record's past as figures: earlier runs of a name, what came of jobs. It only reads."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING

from gpusched_ipy.job import Job, JobState
from gpusched_ipy.lookup import OPEN_STATES, Lookup
from gpusched_ipy.rows import parse_place

if TYPE_CHECKING:
    from gpusched_ipy.accounting import Outcome


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
        """Jobs that ended at ``wall`` (s since the epoch) or later, in the order of their ids;
        ``limit`` keeps the newest."""
        found = self._many(
            f"SELECT * FROM jobs WHERE ended_at >= ? AND state NOT IN {OPEN_STATES}"
            " ORDER BY id DESC LIMIT ?",
            (wall, -1 if limit is None else limit),
        )
        return found[::-1]

    def outcomes(self, wall: float, *, running: bool = False) -> list[Outcome]:
        """What came of the jobs that ended at ``wall`` (s since the epoch) or later, by id.

        Args:
            running: those that have GPUs now as well, last.
        """
        # Imported on use: a shim, whose start delays a job, never asks.
        from gpusched_ipy.accounting import Outcome

        # The columns of an outcome bear its names.
        columns = ", ".join(item.name for item in fields(Outcome))
        rows = self._query(
            f"SELECT {columns} FROM jobs INDEXED BY jobs_by_end WHERE ended_at >= ? ORDER BY id",
            (wall,),
        )
        if running:
            rows += self._query(
                f"SELECT {columns} FROM jobs INDEXED BY jobs_open WHERE state IN {OPEN_STATES}"
                " AND state = 'running'"
            )
        return [
            Outcome(
                **dict(row)
                | {
                    "state": JobState(row["state"]),
                    "gpus": _uuids(row["gpus"]),
                    "place": parse_place(row["place"]),
                }
            )
            for row in rows
        ]


def _uuids(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))
