"""The rows of the queue: jobs, and sweeps that their members unfold from. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpusched_ipy.job import ArrayState, Job


class Place(NamedTuple):
    """One row of the queue by numbers alone."""

    job_id: int  # of a sweep the first of its members in line
    ahead: int  # how many open jobs stand before it, those that run included
    array_id: str | None = None  # the row is one for all of this sweep
    member: bool = False  # it stands below the row of its sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of the queue: a job, or a sweep with the first of its members in line.

    Attributes:
        ahead: how many open jobs stand before it, those that run included.
        sweep: how the sweep stands that the row is for.
        unfolded: its open members follow, each in a row of its own.
        member: it is one of these.
    """

    job: Job
    ahead: int = 0
    sweep: ArrayState | None = None
    unfolded: bool = False
    member: bool = False

    @property
    def key(self) -> str:
        """What tells it from all other rows, whatever else changes."""
        return str(self.job.id) if self.sweep is None else f"sweep {self.sweep.id}"


def fold(
    line: Sequence[int],
    sweeps: Mapping[int, str],
    unfolded: Collection[str],
    offset: int,
    limit: int,
) -> tuple[list[Place], int]:
    """A part of the queue with one row for each sweep, where its first job stands; and the number
    of rows in all.

    Args:
        line: the ids of all jobs, in order.
        sweeps: the sweep of each job that is a member of one.
        unfolded: the sweeps whose members have a row each, below that of the sweep.
    """
    # Rows are numbers until they are shown: where their job stands in line.
    rows: list[int] = []
    below: dict[str, list[int]] = {}
    for ahead, job_id in enumerate(line):
        array_id = sweeps.get(job_id)
        if array_id is None:
            rows.append(ahead)
            continue
        if array_id not in below:
            below[array_id] = []
            rows.append(ahead)
        if array_id in unfolded:
            below[array_id].append(~ahead)  # a member's, told apart by its sign
    if unfolded:
        rows = [
            row for first in rows for row in (first, *below.get(sweeps.get(line[first], ""), ()))
        ]
    shown = (
        Place(line[row], row, sweeps.get(line[row]))
        if row >= 0
        else Place(line[~row], ~row, member=True)
        for row in rows[offset : offset + limit]
    )
    return list(shown), len(rows)
