"""The record: one SQLite file per user and machine. Only this module speaks SQL.

Every write happens under the queue lock, in one transaction, and appends events; ``rev`` tells what
is new. The record says what was decided; who lives and whose GPU it is, the locks say.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpusched_ipy import __version__
from gpusched_ipy.config import Clock, SystemClock
from gpusched_ipy.errors import (
    InvalidTransitionError,
    JobNotFoundError,
    StateDirError,
    StoreError,
    UserError,
)
from gpusched_ipy.job import (
    ACTIVE,
    BOUND_KINDS,
    FINAL,
    MAX_QUEUED,
    Job,
    JobSpec,
    JobState,
    Member,
    WaitReason,
    may_move,
)
from gpusched_ipy.locks import FileLock
from gpusched_ipy.process import ProcessId, boot_id
from gpusched_ipy.rows import in_this_boot, to_job, to_row
from gpusched_ipy.statedir import StateDir, create_private, is_ours_alone, open_private

SCHEMA_VERSION = 1
_OPEN_STATES = "('pending','starting','running')"


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


class Store:
    """The queue's record. One object per process; its methods may be called from any thread.

    Raises:
        StoreError: the file cannot be opened, is damaged, or a newer version has written it.
    """

    def __init__(self, state: StateDir, clock: Clock | None = None) -> None:
        self.state = state
        self._clock = clock or SystemClock()
        self._mutex = threading.RLock()
        self._queue_lock = FileLock(state.queue_lock)
        self._depth = 0
        self._rang = False
        self._pid = os.getpid()
        with self._mutex, self._queue_lock:
            self._db = self._open()

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        with self._mutex, self._queue_lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """One write transaction under the queue lock; blocks inside it join it.

        Raises:
            StoreError: the record cannot be written (full disk, damage); nothing has changed.
        """
        with self._mutex:
            if self._depth:
                yield self
                return
            self._check_process()
            with self._queue_lock:
                self._depth, self._rang = 1, False
                try:
                    with _readable_errors(self.state):
                        self._db.execute("BEGIN IMMEDIATE")
                        try:
                            yield self
                            self._db.execute("COMMIT")
                        except BaseException:
                            if self._db.in_transaction:
                                self._db.execute("ROLLBACK")
                            raise
                finally:
                    self._depth = 0
            if self._rang:
                os.utime(self.state.bell)

    # -- jobs: submit and look

    def submit(self, spec: JobSpec) -> Job:
        """Record a new job; submitting the same ``uid`` again returns the job that stands.

        Raises:
            UserError: the queue is full or the job is too large.
        """
        now = self._clock.now()
        job = Job(
            id=0,
            spec=spec,
            state=JobState.PENDING,
            priority=spec.priority,
            held=spec.held,
            submitted_at=now.wall,
            queued_mono=now.mono,
        )
        with self.writing():
            known = self._one("SELECT * FROM jobs WHERE uid = ?", (spec.uid,))
            if known is not None:
                return known
            queued = self._db.execute(
                f"SELECT count(*) FROM (SELECT 1 FROM jobs WHERE state IN {_OPEN_STATES} LIMIT ?)",
                (MAX_QUEUED,),
            ).fetchone()[0]
            if queued >= MAX_QUEUED:
                raise UserError(
                    f"the queue holds {queued} jobs, the most it takes; cancel some first"
                )
            row = to_row(job, boot_id()) | {"rev": 0}
            names = ", ".join(row)
            marks = ", ".join(f":{name}" for name in row)
            job_id = self._db.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", row).lastrowid
            job = replace(job, id=int(job_id or 0))
            self._touch(job, "submitted", {"held": spec.held, "priority": spec.priority})
        return job

    def job(self, job_id: int) -> Job:
        """The job of that id.

        Raises:
            JobNotFoundError: there is none.
        """
        found = self._one("SELECT * FROM jobs WHERE id = ?", (job_id,))
        if found is None:
            raise JobNotFoundError(job_id)
        return found

    def jobs(self, *, ended: bool = False, limit: int | None = None) -> list[Job]:
        """Jobs in order of id: those not yet ended, or all; with ``limit`` only the newest ones."""
        where = "" if ended else f"WHERE state IN {_OPEN_STATES}"
        tail = "" if limit is None else f"LIMIT {int(limit)}"
        found = self._many(f"SELECT * FROM jobs {where} ORDER BY id DESC {tail}")
        return found[::-1]

    def named(self, pattern: str) -> list[Job]:
        """Jobs whose name matches a pattern with ``*`` and ``?``, oldest first."""
        return self._many("SELECT * FROM jobs WHERE name GLOB ? ORDER BY id", (_glob(pattern),))

    def changed_since(self, rev: int | None) -> tuple[int, list[Job]]:
        """The newest revision, and every job changed after ``rev`` (None: the open ones)."""
        with self._mutex:
            newest = self._query("SELECT max(rev) FROM jobs").fetchone()[0] or 0
            if rev is None:
                return newest, self.jobs()
            if newest <= rev:
                return rev, []
            # What came between the two queries is found again next time: harmless.
            return newest, self._many("SELECT * FROM jobs WHERE rev > ? ORDER BY id", (rev,))

    def page(self, offset: int, limit: int, aging_s: float) -> list[Job]:
        """A part of the jobs not yet ended: who runs, who waits in order of its (aged) priority,
        then who is held."""
        return self._many(
            f"SELECT * FROM jobs WHERE state IN {_OPEN_STATES} ORDER BY state = 'pending', held,"
            " priority - submitted_at / ? DESC, id LIMIT ? OFFSET ?",
            (aging_s, limit, offset),
        )

    def counts(self) -> dict[str, int]:
        """How many jobs are ``running`` (or starting), ``waiting`` and ``held``."""
        row = self._query(
            "SELECT sum(state != 'pending') AS running,"
            " sum(state = 'pending' AND NOT held) AS waiting,"
            " sum(state = 'pending' AND held) AS held"
            f" FROM jobs WHERE state IN {_OPEN_STATES}"
        ).fetchone()
        return {name: row[name] or 0 for name in ("running", "waiting", "held")}

    def ran_since(self, wall: float, limit: int = 500) -> list[Job]:
        """Jobs that ran at ``wall`` (s since the epoch) or later, the newest ones, by start."""
        found = self._many(
            "SELECT * FROM (SELECT * FROM jobs WHERE started_at IS NOT NULL AND state IN"
            f" {_OPEN_STATES} UNION ALL SELECT * FROM jobs WHERE started_at IS NOT NULL"
            " AND ended_at >= ?) ORDER BY started_at DESC LIMIT ?",
            (wall, limit),
        )
        return found[::-1]

    def states(self, ids: Iterable[int]) -> dict[int, JobState]:
        """The states of these jobs; unknown ids are absent."""
        wanted = json.dumps(list(ids))
        rows = self._query(
            "SELECT id, state FROM jobs WHERE id IN (SELECT value FROM json_each(?))", (wanted,)
        )
        return {row["id"]: JobState(row["state"]) for row in rows}

    def events(self, job_id: int) -> list[Event]:
        """What happened to that job, in order."""
        rows = self._query("SELECT * FROM events WHERE job_id = ? ORDER BY id", (job_id,))
        return [Event(**{**dict(row), "data": json.loads(row["data"] or "{}")}) for row in rows]

    # -- jobs: moves

    def claim(
        self, job: Job, gpus: tuple[str, ...], *, member: str, mem_bytes: int | None = None
    ) -> Job:
        """pending → starting: the job is ``member``'s, on these GPUs, as a new attempt."""
        attempt = os.urandom(16).hex()
        claimed = replace(
            job,
            member=member,
            epoch=job.epoch + 1,
            attempt=attempt,
            attempts=job.attempts + 1,
            gpus=gpus,
            reason=None,
            error=None,
            exit_code=None,
            signal=None,
        )
        with self.writing():
            claimed = self._move(claimed, JobState.STARTING, "claimed", {"gpus": gpus})
            self._db.executemany(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?)",
                [(gpu, job.id, claimed.epoch, job.request.shared, mem_bytes) for gpu in gpus],
            )
            self._db.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, NULL, NULL, NULL)",
                (attempt, job.id, member, json.dumps(gpus), self._clock.now().wall),
            )
        return claimed

    def take_over(self, job_id: int, *, epoch: int, claimed_by: str, member: str) -> Job | None:
        """starting → running by ``member``, or None when that claim no longer stands (fenced)."""
        with self.writing():
            job = self.job(job_id)
            if (job.state, job.epoch, job.member) != (JobState.STARTING, epoch, claimed_by):
                return None
            now = self._clock.now()
            running = replace(job, member=member, started_at=now.wall, started_mono=now.mono)
            return self._move(running, JobState.RUNNING, "started", {"member": member})

    def set_process(self, attempt: str, process: ProcessId) -> None:
        """Record which process leads the attempt: for people, and for whoever must end it."""
        with self.writing():
            self._db.execute(
                "UPDATE attempts SET pid = ?, start_ticks = ? WHERE attempt = ?",
                (process.pid, process.start_ticks, attempt),
            )
            self._rang = True

    def process_of(self, job: Job) -> ProcessId | None:
        """The process that leads the job's last attempt, if one was recorded."""
        row = self._query(
            "SELECT pid, start_ticks FROM attempts WHERE attempt = ?", (job.attempt,)
        ).fetchone()
        if row is None or row["pid"] is None:
            return None
        return ProcessId(row["pid"], row["start_ticks"], boot_id())

    def finish_if_active(
        self,
        job_id: int,
        *,
        epoch: int,
        state: JobState,
        exit_code: int | None = None,
        signal: int | None = None,
        error: str | None = None,
        peak_mem_bytes: int | None = None,
        mean_utilization: float | None = None,
        energy_j: float | None = None,
    ) -> Job | None:
        """End the job if that attempt is still the current one; None when it is not.

        A recorded result never changes: a late report finds another epoch or an ended job.
        """
        with self.writing():
            job = self.job(job_id)
            if job.state not in ACTIVE or job.epoch != epoch:
                return None
            return self._end(
                replace(
                    job,
                    exit_code=exit_code,
                    signal=signal,
                    error=error,
                    peak_mem_bytes=peak_mem_bytes,
                    mean_utilization=mean_utilization,
                    energy_j=energy_j,
                ),
                state,
            )

    def end_pending(self, job: Job, state: JobState, error: str | None) -> Job:
        """Pending → cancelled, failed or lost: it never began."""
        with self.writing():
            return self._end(replace(self.job(job.id), error=error), state)

    def unclaim(self, job: Job, why: str) -> Job:
        """starting or running → pending: it provably never began, or asked to be run again."""
        with self.writing():
            back = replace(self.job(job.id), member=None, reason=None)
            self._drop_leases(job.id)
            return self._move(back, JobState.PENDING, "returned", {"why": why})

    def requeue(self, job: Job, *, home: str | None = None) -> Job:
        """An ended job → pending, behind those that wait already; a cell gets a new home."""
        now = self._clock.now()
        with self.writing():
            job = self.job(job.id)
            again = replace(
                job,
                spec=replace(job.spec, home=home) if home else job.spec,
                member=None,
                cancel_requested=False,
                queued_mono=now.mono,
                started_at=None,
                started_mono=None,
                ended_at=None,
                run_s=None,
                exit_code=None,
                signal=None,
                error=None,
            )
            return self._move(again, JobState.PENDING, "requeued", {})

    # -- wishes

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
            return self._put(replace(job, held=held), "held" if held else "released", {})

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

    def set_reasons(self, reasons: Mapping[int, WaitReason]) -> None:
        """Record why pending jobs wait; ``reason_since`` is kept while the code stays the same."""
        wall = self._clock.now().wall
        with self.writing():
            self._db.executemany(
                "UPDATE jobs SET reason_since = CASE WHEN reason_code IS ?2 THEN reason_since"
                " ELSE ?4 END, reason_code = ?2, reason = ?3 WHERE id = ?1 AND state = 'pending'",
                [(job, str(why.code), why.text, wall) for job, why in reasons.items()],
            )

    # -- leases, members, the queue as a whole

    def leases(self) -> list[Lease]:
        """Every recorded lease."""
        rows = self._query("SELECT * FROM leases ORDER BY gpu, job_id")
        return [Lease(**{**dict(row), "shared": bool(row["shared"])}) for row in rows]

    def join(self, key: str, kind: str, label: str) -> None:
        """Describe a new member; its alive lock is what counts."""
        me = ProcessId.of(os.getpid())
        with self.writing():
            self._db.execute(
                "INSERT INTO members (key, kind, pid, start_ticks, boot, label, version, joined_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(key, kind, os.getpid(), me.start_ticks if me else None, boot_id()),
                    *(label, __version__, self._clock.now().wall),
                ),
            )

    def leave(self, key: str) -> None:
        """Forget a member that has left or died."""
        with self.writing():
            self._db.execute("DELETE FROM members WHERE key = ?", (key,))
            self._rang = True

    def set_busy(self, key: str, busy: bool) -> None:
        """Whether the member's main thread runs something: then its cells cannot start."""
        idle = None if busy else self._clock.now().mono
        with self.writing():
            self._db.execute(
                "UPDATE members SET busy = ?, idle_mono = ? WHERE key = ?", (busy, idle, key)
            )
            self._rang = True

    def set_pinned(self, key: str, gpus: tuple[str, ...]) -> None:
        """The GPUs that the member's cells are bound to from now on."""
        with self.writing():
            self._db.execute("UPDATE members SET pinned = ? WHERE key = ?", (json.dumps(gpus), key))
            self._rang = True

    def members(self) -> dict[str, Member]:
        """The recorded members by key, dead ones included."""
        mono = self._clock.now().mono
        return {
            row["key"]: Member(
                key=row["key"],
                label=row["label"],
                busy=bool(row["busy"]),
                pinned_gpus=None if row["pinned"] is None else tuple(json.loads(row["pinned"])),
                idle_s=None if row["idle_mono"] is None else max(0.0, mono - row["idle_mono"]),
            )
            for row in self._query("SELECT * FROM members")
        }

    def member_pids(self) -> dict[int, str]:
        """The pid of each member of this boot, and its key."""
        rows = self._query("SELECT pid, key FROM members WHERE boot = ?", (boot_id(),))
        return {row["pid"]: row["key"] for row in rows}

    def member_kinds(self) -> dict[str, str]:
        """The key of each recorded member, and what it is: kernel, agent, shim, terminal."""
        return {row["key"]: row["kind"] for row in self._query("SELECT key, kind FROM members")}

    @property
    def drained(self) -> str | None:
        """Why the queue starts nothing at present, or None when it does."""
        row = self._query("SELECT value FROM meta WHERE key = 'drained'").fetchone()
        return row["value"] if row else None

    def set_drained(self, why: str | None) -> None:
        """Drain the queue (running jobs go on, none starts) or, with None, resume it."""
        with self.writing():
            if why is None:
                self._db.execute("DELETE FROM meta WHERE key = 'drained'")
            else:
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('drained', ?)", (why,))
            self._event(None, None, "resumed" if why is None else "drained", {"why": why})

    # -- inside

    def _end(self, job: Job, state: JobState) -> Job:
        now = self._clock.now()
        run_s = None if job.started_mono is None else max(0.0, now.mono - job.started_mono)
        self._drop_leases(job.id)
        ended = replace(job, ended_at=now.wall, run_s=run_s, reason=None)
        data = {"exit_code": job.exit_code, "signal": job.signal, "error": job.error}
        return self._move(ended, state, "ended", data)

    def _drop_leases(self, job_id: int) -> None:
        self._db.execute("DELETE FROM leases WHERE job_id = ?", (job_id,))

    def _move(self, job: Job, state: JobState, what: str, data: Mapping[str, Any]) -> Job:
        if not may_move(job.state, state):
            raise InvalidTransitionError(job.id, job.state, state)
        return self._put(replace(job, state=state), what, {**data, "state": str(state)})

    def _put(self, job: Job, what: str, data: Mapping[str, Any]) -> Job:
        """Write the job as it now is; the wait reason stays only while it waits."""
        row = to_row(job, boot_id())
        if job.state is not JobState.PENDING or job.reason is None:
            row |= {"reason": None, "reason_code": None, "reason_since": None}
        assignments = ", ".join(f"{name} = :{name}" for name in row)
        self._db.execute(f"UPDATE jobs SET {assignments} WHERE id = :id", row | {"id": job.id})
        self._touch(job, what, data)
        return job

    def _touch(self, job: Job, what: str, data: Mapping[str, Any]) -> None:
        rev = self._event(job.id, job.attempt, what, data)
        self._db.execute("UPDATE jobs SET rev = ? WHERE id = ?", (rev, job.id))

    def _event(
        self, job_id: int | None, attempt: str | None, what: str, data: Mapping[str, Any]
    ) -> int:
        self._rang = True
        done = self._db.execute(
            "INSERT INTO events (at, job_id, attempt, what, data) VALUES (?, ?, ?, ?, ?)",
            (self._clock.now().wall, job_id, attempt, what, json.dumps(data)),
        )
        return int(done.lastrowid or 0)

    def _one(self, query: str, values: Sequence[Any] = ()) -> Job | None:
        found = self._many(query, values)
        return found[0] if found else None

    def _many(self, query: str, values: Sequence[Any] = ()) -> list[Job]:
        now = self._clock.now()
        boot = boot_id()
        return [
            in_this_boot(to_job(row), row["boot"], boot, wall=now.wall, mono=now.mono)
            for row in self._query(query, values).fetchall()
        ]

    def _query(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        with self._mutex, _readable_errors(self.state):
            self._check_process()
            return self._db.execute(query, values)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            # The connection belongs to the parent: closing it here would drop the parent's locks.
            self._pid = os.getpid()
            _ABANDONED.append(self._db)
            self._mutex = threading.RLock()
            self._queue_lock = FileLock(self.state.queue_lock)
            with self._queue_lock:
                self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        os.close(open_private(self.state.bell))
        _make_private(self.state)
        with _readable_errors(self.state):
            db = sqlite3.connect(self.state.database, isolation_level=None, check_same_thread=False)
            db.row_factory = sqlite3.Row
            # FULL: after a power cut a running job must not be pending again.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                db.execute(f"PRAGMA {pragma}")
            for pragma in (
                "trusted_schema = OFF",
                "cell_size_check = ON",
                "journal_size_limit = 2097152",
            ):
                db.execute(f"PRAGMA {pragma}")
            _migrate(db)
        return db


_ABANDONED: list[sqlite3.Connection] = []


def _make_private(state: StateDir) -> None:
    """Make the file 0600 before SQLite does; its companions take over the mode.

    An existing one is only looked at: closing a descriptor of it would drop SQLite's locks in this
    process.
    """
    with suppress(FileExistsError):
        os.close(create_private(state.database))
    status = os.lstat(state.database)
    if not is_ours_alone(status):
        raise StateDirError(f"{state.database} is not a plain file of yours; remove what is there")


def _migrate(db: sqlite3.Connection) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"the queue was written by a newer gpusched_ipy (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); upgrade this environment"
        )
    for number in range(version + 1, SCHEMA_VERSION + 1):
        (script,) = (Path(__file__).parent / "migrations").glob(f"{number:04d}_*.sql")
        text = script.read_text(encoding="utf-8")
        db.executescript(f"BEGIN;\n{text}\nPRAGMA user_version = {number};\nCOMMIT;")


def _glob(pattern: str) -> str:
    """GLOB knows sets in brackets, our patterns do not: a bracket stands for itself."""
    return pattern.replace("[", "[[]")


@contextmanager
def _readable_errors(state: StateDir) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise StoreError(f"the queue in {state.root} cannot be used now: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise StoreError(
            f"the queue in {state.root} is damaged ({exc}); `gpusched doctor` says what can be done"
        ) from exc


def is_bound(job: Job) -> bool:
    """Whether only the member that submitted the job can run it."""
    return job.kind in BOUND_KINDS
