"""``history`` and ``stats`` for the terminal and the notebook: tables, and JSON for programs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from gpusched_ipy.accounting import (
    OUTCOME_COLUMNS,
    USE_COLUMNS,
    account_columns,
    account_json,
    account_row,
    accounts,
    box_use,
    by_day,
    by_name,
    outcome_row,
    use_json,
    use_row,
)
from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.look import job_records
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.text import format_duration

_KEYS = {"name": by_name, "day": by_day}
_READING_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What is shown; ``numeric`` columns are set flush right."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    caption: str
    numeric: tuple[str, ...] = ("id", "jobs", "wait", "run", "GPU time", "peak memory", "energy")


def history_json(queue: Queue, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The jobs that have ended, or with ``--by`` their sums."""
    since = _since(queue, asked)
    if asked.by is None:
        return job_records(queue, queue.store.ended_since(since, asked.limit))
    found = accounts(queue.store.outcomes(since), _KEYS[asked.by])
    return [account_json(account, asked.by) for account in found]


def history_table(queue: Queue, asked: argparse.Namespace) -> Table:
    """The same as a table."""
    outcomes = [one for one in queue.store.outcomes(_since(queue, asked)) if one.ended_at]
    if asked.by is None:
        shown = outcomes[-asked.limit :]
        more = len(outcomes) - len(shown)
        caption = "all that are kept" if asked.since is None else "all of that time"
        if more:
            caption = f"{more} older ones are not shown: --limit N shows the newest N"
        return Table(
            columns=OUTCOME_COLUMNS, rows=[outcome_row(one) for one in shown], caption=caption
        )
    return Table(
        columns=account_columns(asked.by),
        rows=[account_row(account) for account in accounts(outcomes, _KEYS[asked.by])],
        caption=f"by {asked.by}; waits and runs are medians",
    )


def stats_json(
    queue: Queue, asked: argparse.Namespace, monitor: Monitor | None = None
) -> dict[str, Any]:
    """How much of the box the jobs of this user have used."""
    return use_json(_use(queue, asked, monitor))


def stats_table(queue: Queue, asked: argparse.Namespace, monitor: Monitor | None = None) -> Table:
    """The same as a table."""
    use = _use(queue, asked, monitor)
    caption = (
        f"your jobs within the last {format_duration(asked.since)}; utilization counts GPU time "
        "without a job, or without a reading, as 0"
    )
    return Table(columns=USE_COLUMNS, rows=[use_row(use)], caption=caption)


def _use(queue: Queue, asked: argparse.Namespace, monitor: Monitor | None) -> Any:
    now = queue.clock.now().wall
    since = now - asked.since
    outcomes = queue.store.outcomes(since, running=True)
    monitor = monitor or Monitor(queue.settings, queue.clock, queue.state.root)
    snapshot = monitor.latest() or monitor.read_now(_READING_S, Detail.LOAD)
    parents = {gpu.parent for gpu in snapshot.gpus}
    listed = {gpu.uuid for gpu in snapshot.gpus if gpu.uuid not in parents}
    # Where the GPUs cannot be read now, those that jobs have had are known at least.
    return box_use(
        outcomes, len(listed) or len({gpu for one in outcomes for gpu in one.gpus}), since, now
    )


def _since(queue: Queue, asked: argparse.Namespace) -> float:
    return 0.0 if asked.since is None else queue.clock.now().wall - asked.since
