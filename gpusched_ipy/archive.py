"""The record's past: jobs that have ended page by page, what is forgotten, what a repair saves."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence

from gpusched_ipy.chronicle import Chronicle
from gpusched_ipy.job import ACTIVE, FINAL, Job
from gpusched_ipy.lookup import OPEN_STATES
from gpusched_ipy.rows import to_job

# So many rows go in one transaction: nobody waits long for the queue lock.
_PAGE = 500
_PURGED = "purged"  # the key of the remark that tells members of it


class Archive(Chronicle):
    """Everything about jobs that are over."""

    def ended(self) -> Iterator[Job]:
        """Every ended job, oldest first; one page at a time."""
        at = 0
        while True:
            rows = self._query(
                f"SELECT * FROM jobs WHERE id > ? AND state NOT IN {OPEN_STATES} ORDER BY id"
                " LIMIT ?",
                (at, _PAGE),
            )
            if not rows:
                return
            yield from self._sound(rows)
            at = rows[-1]["id"]

    def attempts(self) -> dict[str, int]:
        """The job of each attempt that was ever made and is not forgotten."""
        rows = self._query("SELECT attempt, job_id FROM attempts")
        return {row["attempt"]: row["job_id"] for row in rows}

    def forget(self, jobs: Iterable[Job]) -> int:
        """Delete ended jobs with all that is recorded of them; how many were still ended."""
        forgotten = 0
        ids = [job.id for job in jobs if job.state in FINAL]
        for start in range(0, len(ids), _PAGE):
            with self.writing():
                page = self._still_ended(ids[start : start + _PAGE])
                for table, key in (("events", "job_id"), ("attempts", "job_id"), ("jobs", "id")):
                    self._db.executemany(
                        f"DELETE FROM {table} WHERE {key} = ?", [(number,) for number in page]
                    )
                if page:
                    event = self._event(None, None, "purged", {"jobs": len(page)})
                    self.set_value(_PURGED, str(event))
                forgotten += len(page)
        return forgotten

    @property
    def last_purge(self) -> str | None:
        """What is another word after every purge: a job that is gone has no revision."""
        return self.value(_PURGED)

    def _still_ended(self, ids: Sequence[int]) -> list[int]:
        states = self.states(ids)
        return [number for number in ids if states.get(number) in FINAL]

    def value(self, key: str) -> str | None:
        """A remark kept beside the jobs."""
        rows = self._query("SELECT value FROM meta WHERE key = ?", (key,))
        return next((str(row["value"]) for row in rows), None)

    def set_value(self, key: str, value: str) -> None:
        """Keep a remark."""
        with self.writing():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def adopt(
        self, jobs: Sequence[sqlite3.Row], events: Sequence[sqlite3.Row], *, last_id: int
    ) -> None:
        """Take over rows of a damaged record as they stand; ids up to ``last_id`` stay taken."""
        with self.writing():
            self._insert("jobs", jobs)
            self._insert("events", events)
            for row in jobs:
                job = to_job(dict(row))
                if job.state in ACTIVE:
                    request = job.request
                    self._db.executemany(
                        "INSERT INTO leases VALUES (?, ?, ?, ?, ?)",
                        [(gpu, job.id, job.epoch, request.shared, request.mem_bytes)
                         for gpu in json.loads(row["gpus"])],
                    )  # fmt: skip
            self._db.execute("INSERT INTO sqlite_sequence VALUES ('jobs', ?)", (last_id,))

    def _insert(self, table: str, rows: Sequence[sqlite3.Row]) -> None:
        if rows:
            names = rows[0].keys()
            marks = ", ".join("?" * len(names))
            self._db.executemany(
                f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({marks})",
                [tuple(row) for row in rows],
            )
