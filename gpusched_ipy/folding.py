"""A sweep as one row of the queue, which its members unfold from. Pure: state in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpusched_ipy.config import Instant
from gpusched_ipy.entries import Entry
from gpusched_ipy.job import ArrayState, ExpectedStart, Job, JobState
from gpusched_ipy.text import UNKNOWN, clean, format_duration
from gpusched_ipy.view import NAME_LIMIT, REASON_LIMIT, JobRow, gpu_label, job_rows

_PLURAL = {"has": "have", "is": "are", "waits": "wait"}
_MANY = 3  # more jobs than this are told in one line
# In this order a summary counts the members.
_ORDER = (
    JobState.RUNNING,
    JobState.STARTING,
    JobState.PENDING,
    JobState.COMPLETED,
    JobState.FAILED,
    JobState.TIMEOUT,
    JobState.LOST,
    JobState.CANCELLED,
)


def entry_rows(
    entries: Iterable[Entry],
    now: Instant,
    *,
    numbers: Mapping[str, str | None] | None = None,
    starts: Mapping[int, ExpectedStart] | None = None,
) -> list[JobRow]:
    """Rows of the queue as a table; see :func:`~gpusched_ipy.view.job_rows`."""
    found: list[JobRow] = []
    for entry in entries:
        if entry.sweep is not None:
            found.append(_row(entry.sweep, entry.job, now, numbers or {}))
        else:
            found += job_rows([entry.job], now, numbers=numbers, starts=starts)
    return found


def folded_rows(
    jobs: Iterable[Job],
    arrays: Mapping[str, ArrayState],
    now: Instant,
    *,
    numbers: Mapping[str, str | None] | None = None,
    starts: Mapping[int, ExpectedStart] | None = None,
) -> list[JobRow]:
    """The queue as a table with one row for each sweep, where its first job would stand.

    Args:
        jobs: what is shown.
        arrays: how each sweep stands as a whole, by its id; members of others are shown singly.
        now: for how long each has been so.
        numbers: the number of each GPU's UUID, where known.
        starts: when pending jobs are expected to start, where known.
    """
    groups: dict[object, list[Job]] = {}
    for job in jobs:
        array = job.spec.array
        known = array is not None and array.id in arrays
        groups.setdefault(array.id if array is not None and known else job.id, []).append(job)
    rows: list[JobRow] = []
    for key, members in groups.items():
        if isinstance(key, str):
            rows.append(_row(arrays[key], members[0], now, numbers or {}))
        else:
            rows += job_rows(members, now, numbers=numbers, starts=starts)
    return rows


def counts(array: ArrayState) -> str:
    """How many members are in which state: ``1 running, 4 pending (2 held), 5 completed``."""
    parts = []
    for state in _ORDER:
        count = array.states.get(state, 0)
        held = f" ({array.held} held)" if state is JobState.PENDING and array.held else ""
        if count:
            parts.append(f"{count} {state}{held}")
    return ", ".join(parts)


def ranges(ids: Iterable[int]) -> str:
    """Numbers for people: ``12-16, 20``."""
    found: list[list[int]] = []
    for number in sorted(ids):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def told(what: str, ids: Sequence[int]) -> list[str]:
    """What has happened to jobs, in a line each; one line for many."""
    if len(ids) > _MANY:
        first, _, rest = what.partition(" ")
        return [f"jobs {ranges(ids)} {_PLURAL.get(first, first)} {rest}".rstrip()]
    return [f"job {number} {what}" for number in ids]


def _row(array: ArrayState, member: Job, now: Instant, numbers: Mapping[str, str | None]) -> JobRow:
    since = array.submitted_at if array.ended_at is None else array.ended_at
    return JobRow(
        id=array.reference,
        name=clean(f"{array.name} \u00d7{array.size}", NAME_LIMIT),
        state=counts(array),
        priority=str(array.priority),
        gpus=", ".join(gpu_label(uuid, numbers) for uuid in array.gpus) or UNKNOWN,
        since=format_duration(now.wall - since),
        why=clean(array.reason or "", REASON_LIMIT),
        owner=clean(member.spec.owner, NAME_LIMIT),
    )
