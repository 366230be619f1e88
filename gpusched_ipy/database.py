"""The file of the record: opened private, written under the queue lock, safe across forks.

It knows no job; :mod:`~gpusched_ipy.takeover`, :mod:`~gpusched_ipy.lookup`,
:mod:`~gpusched_ipy.roster` and :mod:`~gpusched_ipy.store` build on it and, with it, are all that
speaks SQL.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

from gpusched_ipy.clock import Clock, SystemClock
from gpusched_ipy.dbfile import (
    SCHEMA_VERSION,
    newer,
    prepare,
    refuse_empty,
    reserve,
    schema_version,
)
from gpusched_ipy.errors import StateDirError, StoreError
from gpusched_ipy.forks import let_forks_pass, meet_forks, refuse_torn
from gpusched_ipy.statedir import StateDir, create_private, is_ours_alone, open_private
from gpusched_ipy.writelock import WriteLock


class Database:
    """One SQLite file. One object per process; its methods may be called from any thread.

    Args:
        patience_s: so long the main thread waits for others to write before it gives up; None: for
            as long as they take.

    Raises:
        StateDirError: something that is not ours stands where the file should be.
        StoreError: the file cannot be opened, is damaged, or older members must leave it first.

    A record that a newer version has written can be read; ``read_only`` says why no more.
    """

    def __init__(
        self, state: StateDir, clock: Clock | None = None, *, patience_s: float | None = None
    ) -> None:
        self.state = state
        self._clock = clock or SystemClock()
        self._mutex = threading.RLock()
        self._queue_lock = WriteLock(state.queue_lock, patience_s)
        self._writer: int | None = None  # the thread that is in a write
        self._rang = False
        self._pid = os.getpid()
        self.read_only: str | None = None  # why, where a newer version has written the record
        self._reserved = False
        self._durable: bool | None = True  # None: it is to be set
        self._rings = 0  # writes of this object that others should know of
        self._rings_by: dict[int, int] = {}  # the same of each thread
        self._seen: dict[int, tuple[int, int]] = {}  # by each thread
        self._damaged: set[int] = set()  # the jobs that were found so
        meet_forks(self)
        refuse_torn()
        with self._mutex, self._queue_lock:
            self._db = self._open()

    @classmethod
    def over(cls, opened: Database) -> Self:
        """``opened`` as one of this class: the same file, not opened again. It alone is used on."""
        found = cls.__new__(cls)
        vars(found).update(vars(opened))
        meet_forks(found, instead_of=opened)
        return found

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        with self._mutex, self._queue_lock:
            self._db.close()

    @contextmanager
    def writing(self, *, durable: bool = True, rings: bool = True) -> Iterator[Self]:
        """One write transaction under the queue lock; blocks inside it join it.

        Args:
            durable: it survives a power cut from now on; otherwise from the next durable one of
                any member on, or from ``sync``. The death of a process takes neither away.
            rings: False: whoever writes calls ``ring`` as soon as what is more urgent is done.

        Raises:
            StoreError: the record cannot be written (full disk, damage, somebody who is stopped in
                a write of his own for longer than our patience); nothing has changed.
        """
        if self._writer == threading.get_ident():
            yield self
            return
        let_forks_pass()
        with self._mutex:
            self._check_process()
            with self._queue_lock:
                self._writer, self._rang = threading.get_ident(), False
                try:
                    with _readable_errors(self.state):
                        self._begin(durable)
                        try:
                            yield self
                            self._db.execute("COMMIT")
                        except BaseException:
                            if self._db.in_transaction:
                                self._db.execute("ROLLBACK")
                            raise
                finally:
                    self._writer = None
            if self._rang:
                self._rings += 1
                me = threading.get_ident()
                self._rings_by[me] = self._rings_by.get(me, 0) + 1
                if rings:
                    self.ring()

    def ring(self) -> None:
        """Wake whoever waits for a change of the record."""
        # What is written stands, whether or not somebody can hear of it at once.
        with suppress(OSError):
            os.utime(self.state.bell)

    def wait_for_ever(self) -> None:
        """From now on no write of this process gives up: a job depends on it."""
        self._queue_lock.patience_s = None

    def changed_by_others(self) -> bool:
        """Whether any other process or thread has written since this was last asked (µs)."""
        (version,) = self._query("PRAGMA data_version")[0]
        with self._mutex:
            me = threading.get_ident()
            now = (version, self._rings - self._rings_by.get(me, 0))
            before, self._seen[me] = self._seen.get(me), now
            return before != now

    def sync(self) -> None:
        """Make durable what was written without being so.

        Raises:
            OSError: the disk fails.
        """
        log = self.state.database.with_name(self.state.database.name + "-wal")
        # SQLite keeps no lock on this file: closing a descriptor of it drops none.
        with suppress(FileNotFoundError):
            fd = os.open(log, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def checkpoint(self) -> None:
        """Move what was written from SQLite's log into its file: where nobody does so in a calm
        moment, every few writes one does that somebody waits for.

        Raises:
            StoreError: the disk fails or is full; nothing is lost.
        """
        self._query("PRAGMA wal_checkpoint(PASSIVE)")

    def _begin(self, durable: bool) -> None:
        """Open a transaction, unless this version may not write (any more)."""
        if not self._reserved and self.read_only is None:
            self._durable = None
            reserve(self._db, self.state)
            self._reserved = True
        if durable is not self._durable:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        self._db.execute("BEGIN IMMEDIATE")
        version = schema_version(self._db)
        if version > SCHEMA_VERSION:
            self._db.execute("ROLLBACK")
            self.read_only = newer(version)
            raise StoreError(self.read_only)

    @property
    def mutex(self) -> threading.RLock:
        """Held by whichever thread is inside SQLite."""
        return self._mutex

    def after_fork(self) -> None:
        """In the child: the mutex was that of the parent's threads."""
        self._mutex = threading.RLock()
        self._writer = None

    def _event(
        self, job_id: int | None, attempt: str | None, what: str, data: Mapping[str, Any]
    ) -> int:
        self._rang = True
        done = self._db.execute(
            "INSERT INTO events (at, job_id, attempt, what, data) VALUES (?, ?, ?, ?, ?)",
            (self._clock.now().wall, job_id, attempt, what, json.dumps(data)),
        )
        return int(done.lastrowid or 0)

    def _last(self, table: str) -> int:
        """The largest number that a row of this table has ever had."""
        row = self._first("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
        return 0 if row is None else int(row["seq"])

    def _query(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        if self._writer != threading.get_ident():
            let_forks_pass()
        with self._mutex, _readable_errors(self.state):
            self._check_process()
            # All at once: a statement half read keeps an old snapshot, from which none can write.
            return self._db.execute(query, values).fetchall()

    def _first(self, query: str, values: Sequence[Any] = ()) -> Any | None:
        return next(iter(self._query(query, values)), None)

    def _check_process(self) -> None:
        refuse_torn()
        if self._pid != os.getpid():
            # The connection belongs to the parent: closing it here would drop the parent's locks.
            self._pid = os.getpid()
            _ABANDONED.append(self._db)
            self._queue_lock = WriteLock(self.state.queue_lock, self._queue_lock.patience_s)
            with self._queue_lock:
                self._db, self._durable = self._open(), True

    def _open(self) -> sqlite3.Connection:
        os.close(open_private(self.state.bell))
        _make_private(self.state)
        refuse_empty(self.state)
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
            self.read_only = prepare(db, self.state)
        return db


_ABANDONED: list[sqlite3.Connection] = []


def _make_private(state: StateDir) -> None:
    """Make the file 0600 before SQLite does; its companions take over the mode.

    An existing one is only looked at: closing a descriptor of it would drop SQLite's locks in this
    process.
    """
    with suppress(FileExistsError):
        os.close(create_private(state.database))
    for companion in ("", "-wal", "-shm", "-journal"):
        path = state.database.with_name(state.database.name + companion)
        with suppress(FileNotFoundError):
            if not is_ours_alone(os.lstat(path)):
                raise StateDirError(f"{path} is not a plain file of yours; remove what is there")


@contextmanager
def _readable_errors(state: StateDir) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise StoreError(f"the queue in {state.root} cannot be used now: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise StoreError(
            f"the queue in {state.root} is damaged ({exc}); `gpusched doctor --fix` saves what "
            "is sound"
        ) from exc
