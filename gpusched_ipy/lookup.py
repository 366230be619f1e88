"""Looking at the record: jobs by id, name, page or revision, their events and leases. No writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gpusched_ipy.clock import Instant
from gpusched_ipy.database import Database
from gpusched_ipy.errors import DamagedJobError, JobNotFoundError
from gpusched_ipy.job import Job, JobKind, JobState
from gpusched_ipy.process import ProcessId, boot_id
from gpusched_ipy.rows import in_this_boot, to_job
from gpusched_ipy.rowsum import checksum

OPEN_STATES = "('pending','starting','running')"
LARGEST_ID = 2**63 - 1  # SQLite takes no larger number
_PART = 2000  # rows of a long queue that are read at a time
# The jobs not yet ended as people read them, which is the policy's order; see ``_since``.
_IN_LINE = (
    f"state IN {OPEN_STATES} ORDER BY state = 'pending', held, priority - "
    "(CASE boot WHEN ? THEN queued_mono ELSE submitted_at - ? END) / ? DESC, id"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One GPU of one job, as recorded."""

    gpu: str
    job_id: int
    epoch: int
    shared: bool
    mem_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a job; ``data`` depends on ``what``."""

    id: int
    at: float
    job_id: int | None
    attempt: str | None
    what: str
    data: Mapping[str, Any]


class Lookup(Database):
    """Everything that can be asked about jobs."""

    def job(self, job_id: int) -> Job:
        """The job of that id.

        Raises:
            JobNotFoundError: there is none.
            DamagedJobError: there is, and it cannot be read.
        """
        found = None
        if job_id <= LARGEST_ID:
            found = self._one("SELECT * FROM jobs WHERE id = ?", (job_id,))
        if found is None:
            raise JobNotFoundError(job_id)
        return found

    def jobs(self, *, ended: bool = False, limit: int | None = None) -> list[Job]:
        """Jobs in order of id: those not yet ended, or all; with ``limit`` only the newest ones."""
        where = "" if ended else f"WHERE state IN {OPEN_STATES}"
        tail = "" if limit is None else f"LIMIT {int(limit)}"
        found = self._many(f"SELECT * FROM jobs {where} ORDER BY id DESC {tail}")
        return found[::-1]

    def by_uid(self, uid: str) -> Job:
        """The job that was submitted under that uid.

        Raises:
            JobNotFoundError: there is none.
        """
        found = self._one("SELECT * FROM jobs WHERE uid = ?", (uid,))
        if found is None:
            raise JobNotFoundError(uid)
        return found

    def named(self, pattern: str) -> list[Job]:
        """Jobs whose name matches a pattern with ``*`` and ``?``, oldest first."""
        return self._many("SELECT * FROM jobs WHERE name GLOB ? ORDER BY id", (_glob(pattern),))

    def changed_since(self, rev: int | None) -> tuple[int, list[Job]]:
        """The newest revision, and every job changed after ``rev`` (None: the open ones)."""
        newest = self._query("SELECT max(rev) FROM jobs")[0][0] or 0
        if rev is None:
            return newest, [job for part in self._open_in_parts() for job in part]
        if newest <= rev:
            return rev, []
        # What comes between the two queries is found again next time: harmless.
        return newest, self._many(
            # Left to itself SQLite goes through all jobs by id, which spares it a sort.
            "SELECT * FROM jobs INDEXED BY jobs_by_rev WHERE rev > ? ORDER BY id",
            (rev,),
        )

    def _open_in_parts(self) -> Iterator[list[Job]]:
        """The open jobs in order of id, so many at a time that their rows stay in the caches."""
        last = 0
        while True:
            rows = self._query(
                f"SELECT * FROM jobs INDEXED BY jobs_open WHERE state IN {OPEN_STATES}"
                " AND id > ? ORDER BY id LIMIT ?",
                (last, _PART),
            )
            if not rows:
                return
            yield self._sound(rows)
            last = rows[-1]["id"]

    def page(self, offset: int, limit: int, aging_s: float) -> list[Job]:
        """A part of the jobs not yet ended: who runs, who waits in order of its (aged) priority,
        then who is held."""
        # Sorted in the narrow index; only the jobs of the page are read.
        rows = self._query(
            f"SELECT id FROM jobs WHERE {_IN_LINE} LIMIT ? OFFSET ?",
            (*self._since(aging_s), limit, offset),
        )
        return self.those([row["id"] for row in rows])

    def line(self, aging_s: float) -> list[int]:
        """The ids of all jobs not yet ended, in the order of :meth:`page`."""
        query = f"SELECT id FROM jobs WHERE {_IN_LINE}"
        return [row[0] for row in self._query(query, self._since(aging_s))]

    def _since(self, aging_s: float) -> tuple[str, float, float]:
        """By what the line is sorted: a job of another boot has waited since it was submitted."""
        now = self._clock.now()
        return boot_id(), now.wall - now.mono, aging_s

    def those(self, ids: Sequence[int]) -> list[Job]:
        """The jobs of these ids, in that order; without those that cannot be read."""
        found = {
            job.id: job
            for job in self._many(
                "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(?))",
                (json.dumps(ids),),
            )
        }
        return [found[number] for number in ids if number in found]

    def counts(self) -> dict[str, int]:
        """How many jobs are ``running`` (or starting), ``waiting`` and ``held``."""
        found = {"running": 0, "waiting": 0, "held": 0}
        for row in self._query(
            "SELECT state, held, count(*) AS jobs FROM jobs"
            f" WHERE state IN {OPEN_STATES} GROUP BY state, held"
        ):
            pending = row["state"] == JobState.PENDING
            found["running" if not pending else "held" if row["held"] else "waiting"] += row["jobs"]
        return found

    def any_unheld(self, kinds: Iterable[JobKind]) -> bool:
        """Whether any job of these kinds is open and not held; no job is read for that."""
        wanted = json.dumps([str(kind) for kind in kinds])
        found = self._first(
            f"SELECT 1 FROM jobs WHERE state IN {OPEN_STATES} AND NOT held"
            " AND kind IN (SELECT value FROM json_each(?)) LIMIT 1",
            (wanted,),
        )
        return found is not None

    def ran_since(self, wall: float, limit: int = 500) -> list[Job]:
        """Jobs that ran at ``wall`` (s since the epoch) or later, the newest ones, by start."""
        found = self._many(
            # The states of the index, then those that are meant: so it looks at no job that waits.
            "SELECT * FROM (SELECT * FROM jobs INDEXED BY jobs_line"
            f" WHERE state IN {OPEN_STATES} AND state IN ('starting', 'running')"
            " AND started_at IS NOT NULL UNION ALL SELECT * FROM jobs"
            " WHERE started_at IS NOT NULL AND ended_at >= ?) ORDER BY started_at DESC LIMIT ?",
            (wall, limit),
        )
        return found[::-1]

    def lost_before_start(self, kind: JobKind, *, since: float) -> list[Job]:
        """Jobs of a kind that were lost at ``since`` (wall clock, s) or later, and never ran."""
        return self._many(
            "SELECT * FROM jobs WHERE ended_at >= ? AND state = 'lost' AND kind = ?"
            " AND started_at IS NULL ORDER BY id",
            (since, str(kind)),
        )

    def states(self, ids: Iterable[int]) -> dict[int, JobState]:
        """The states of these jobs; unknown ids are absent."""
        wanted = json.dumps(list(ids))
        rows = self._query(
            "SELECT id, state FROM jobs WHERE id IN (SELECT value FROM json_each(?))", (wanted,)
        )
        return {row["id"]: JobState(row["state"]) for row in rows}

    def ids_between(self, low: int, high: int) -> list[int]:
        """The ids of the jobs from ``low`` to ``high``, both included."""
        rows = self._query(
            "SELECT id FROM jobs WHERE id BETWEEN ? AND ? ORDER BY id",
            (min(low, LARGEST_ID), min(high, LARGEST_ID)),
        )
        return [row["id"] for row in rows]

    def events(self, job_id: int) -> list[Event]:
        """What happened to that job, in order."""
        rows = self._query("SELECT * FROM events WHERE job_id = ? ORDER BY id", (job_id,))
        return [Event(**{**dict(row), "data": json.loads(row["data"] or "{}")}) for row in rows]

    def process_of(self, job: Job) -> ProcessId | None:
        """The process that leads the job's last attempt, if one was recorded in this boot."""
        row = self._first(
            "SELECT pid, start_ticks, boot FROM attempts WHERE attempt = ?", (job.attempt,)
        )
        if row is None or row["pid"] is None or row["boot"] != boot_id():
            return None
        return ProcessId(row["pid"], row["start_ticks"], row["boot"])

    def leases(self) -> list[Lease]:
        """Every recorded lease."""
        rows = self._query("SELECT * FROM leases ORDER BY gpu, job_id")
        return [Lease(**{**dict(row), "shared": bool(row["shared"])}) for row in rows]

    @property
    def damaged(self) -> tuple[int, ...]:
        """The jobs that were found damaged: they are left out of every list, and never started."""
        return tuple(sorted(self._damaged))

    def _one(self, query: str, values: Sequence[Any] = ()) -> Job | None:
        row = self._first(query, values)
        return None if row is None else self._read(row, self._clock.now(), boot_id())

    def _many(self, query: str, values: Sequence[Any] = ()) -> list[Job]:
        return self._sound(self._query(query, values))

    def _sound(self, rows: Sequence[Any]) -> list[Job]:
        """The jobs of these rows; one that is damaged costs itself alone."""
        if not rows:
            return []
        names, found = rows[0].keys(), []
        now, boot = self._clock.now(), boot_id()
        for row in rows:
            # SQLite's own rows look for each column among all names.
            with suppress(DamagedJobError):
                found.append(self._read(dict(zip(names, row, strict=True)), now, boot))
        return found

    def _undamaged(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Those of these rows that are as they were written."""
        for row in rows:
            if self.read_only is None and checksum(row) != row["crc"]:
                self._damaged.add(row["id"])
            else:
                yield row

    def _read(self, row: Mapping[str, Any], now: Instant, boot: str) -> Job:
        try:
            job = to_job(row, newer=self.read_only is not None)
        except DamagedJobError as exc:
            self._damaged.add(exc.job_id)
            raise
        return in_this_boot(job, row["boot"], boot, wall=now.wall, mono=now.mono)


def _glob(pattern: str) -> str:
    """GLOB knows sets in brackets, our patterns do not: a bracket stands for itself."""
    return pattern.replace("[", "[[]")
