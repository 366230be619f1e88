"""Repair of a damaged record, when its user asks for it: set it aside, and save every sound job.

Nothing is thrown away: the damaged file stays as ``queue.db.corrupt-<time>``. The new record comes
back drained, because damage may have turned back the newest moves: its user looks and resumes.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from gpusched_ipy.dbfile import check, forget_made, schema_version
from gpusched_ipy.errors import StateDirError, StoreError, UserError
from gpusched_ipy.locks import alive_pid
from gpusched_ipy.rows import to_job
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store
from gpusched_ipy.writelock import GIVE_UP_S, WriteLock

_COMPANIONS = ("", "-wal", "-shm", "-journal")
# So many ids behind a page that cannot be read are tried where nothing tells the last one.
_STRIDE = 10_000
_DRAINED = "repaired; look at `gpusched list --all`, then `gpusched resume`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a repair has done."""

    wrong: tuple[str, ...]  # what was found; empty: nothing was wrong and nothing was changed
    kept: Path | None = None  # the damaged record
    saved: int = 0
    damaged: tuple[int, ...] = ()  # ids of jobs that are found in `kept` only


def repair(state: StateDir) -> Repair:
    """Check the record thoroughly; where it is damaged begin a new one with every sound job.

    Raises:
        UserError: members still use it.
        StateDirError: what stands there is not ours.
    """
    with WriteLock(state.queue_lock, GIVE_UP_S):
        wrong = faults(state)
        if not wrong:
            return Repair(wrong=())
        living = [pid for path in (state.root / "alive").iterdir()
                  if (pid := alive_pid(state, path.name)) is not None]  # fmt: skip
        if living:
            pids = ", ".join(str(pid) for pid in living)
            raise UserError(
                f"the record is damaged ({wrong[0]}), and members still use it (pids {pids}); end "
                "the notebooks and the agent (`gpusched agent stop`), then repair again"
            )
        kept = _set_aside(state)
        forget_made(state)
    store = Store(state)
    saved, damaged = _salvage(kept, store)
    store.close()
    return Repair(wrong=tuple(wrong), kept=kept, saved=saved, damaged=tuple(damaged))


def faults(state: StateDir) -> list[str]:
    """What is wrong with the record, by SQLite's own check and every job's checksum.

    Raises:
        StateDirError: something that is not ours stands in its place.
    """
    if not state.database.exists():
        return []
    try:
        with closing(_look(state.database)) as db:
            if schema_version(db) == 0:
                return ["it is empty, and it was not"]
            wrong = check(db, thorough=True)
            return wrong + [f"job {number} is damaged" for number in _rows(db)[1]]
    except sqlite3.DatabaseError as exc:
        return [str(exc)]


def _look(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _set_aside(state: StateDir) -> Path:
    """Rename the record and its companions, all or the first that matters first."""
    kept = state.database.with_name(
        f"{state.database.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    if kept.exists():
        raise StateDirError(f"{kept} exists already; try again in a second")
    for companion in _COMPANIONS[::-1]:
        with suppress(FileNotFoundError):
            os.rename(f"{state.database}{companion}", f"{kept}{companion}")
    return kept


def _rows(db: sqlite3.Connection) -> tuple[list[sqlite3.Row], list[int]]:
    """The sound rows of jobs, and the ids of those that are not."""
    sound: list[sqlite3.Row] = []
    damaged: list[int] = []
    for row in _read(db, "jobs", "id"):
        try:
            to_job(dict(row))
        except (StoreError, ValueError, TypeError, KeyError):
            damaged.append(int(row["id"]))
        else:
            sound.append(row)
    return sound, damaged


def _read(db: sqlite3.Connection, table: str, key: str) -> Iterator[sqlite3.Row]:
    """Every row of a table that can be read, past pages that cannot."""
    at = -1
    while True:
        try:
            for row in db.execute(
                f"SELECT * FROM {table} NOT INDEXED WHERE {key} > ? ORDER BY {key}", (at,)
            ):
                at = row[key]
                yield row
            return
        except sqlite3.DatabaseError:
            following = _next_readable(db, table, key, at)
            if following is None:
                return
            at = following[key]
            yield following


def _next_readable(db: sqlite3.Connection, table: str, key: str, at: int) -> sqlite3.Row | None:
    """The first row after ``at`` that can be read by itself."""
    last = at + _STRIDE
    with suppress(sqlite3.DatabaseError):
        for row in db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)):
            last = int(row["seq"])
    for candidate in range(at + 1, last + 1):
        with suppress(sqlite3.DatabaseError):
            found = db.execute(f"SELECT * FROM {table} WHERE {key} = ?", (candidate,)).fetchone()
            if isinstance(found, sqlite3.Row):
                return found
    return None


def _salvage(kept: Path, store: Store) -> tuple[int, list[int]]:
    jobs: list[sqlite3.Row] = []
    damaged: list[int] = []
    events: list[sqlite3.Row] = []
    # Where not even its first page can be read, nothing can be saved.
    with suppress(sqlite3.DatabaseError), closing(_look(kept)) as old:
        if schema_version(old) > 0:
            jobs, damaged = _rows(old)
            events = list(_read(old, "events", "id"))
    store.adopt(jobs, events, last_id=max([0, *damaged, *(row["id"] for row in jobs)]))
    store.set_drained(_DRAINED)
    return len(jobs), damaged


def summary(done: Repair) -> list[str]:
    """A repair in a few lines, for people."""
    if not done.wrong:
        return ["the record is sound; nothing was changed"]
    lines = [f"the record was damaged: {done.wrong[0]}", f"it is kept as {done.kept}"]
    lines.append(f"{done.saved} jobs were saved into a new record, which is drained")
    if done.damaged:
        ids = ", ".join(str(number) for number in done.damaged[:20])
        lines.append(f"{len(done.damaged)} jobs could not be saved: {ids}")
    return lines
