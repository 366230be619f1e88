"""The health of the record's file: its schema, its damage, its reserve on a full disk.

It is called with the queue lock held, right after SQLite has opened the file. A file that is not
what it was is never taken for an empty queue; what can be done about it, ``gpusched doctor --fix``
does (:mod:`gpusched_ipy.repair`).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from gpusched_ipy._version import __version__
from gpusched_ipy.errors import StoreError
from gpusched_ipy.locks import is_alive
from gpusched_ipy.process import boot_id
from gpusched_ipy.statedir import StateDir, open_private

SCHEMA_VERSION = 4
MIGRATIONS = Path(__file__).parent / "migrations"

# The write-ahead log and the free pages of the file are made so large in advance: on a full disk
# jobs can still be ended and cancelled, because nothing has to grow for that.
RESERVE_BYTES = 512 * 1024
# Pages after which SQLite starts the write-ahead log anew, so that it stays within the reserve.
CHECKPOINT_PAGES = 100
# With less room on the disk no job is accepted: the reserve is for those that are known.
LEAST_ROOM = 256 * 1024


def prepare(db: sqlite3.Connection, state: StateDir) -> str | None:
    """Bring the file up to this version; the reason why it may only be read, or None.

    Raises:
        StoreError: it is damaged, or older members still use its older form.
    """
    version = schema_version(db)
    if version > SCHEMA_VERSION:
        return newer(version)
    if version == 0 and _was_made(state):
        raise StoreError(_emptied(state))
    if 0 < version < SCHEMA_VERSION:
        _wait_for_older(db, state, version)
        _back_up(db, state, version)
    for number in range(version + 1, SCHEMA_VERSION + 1):
        (script,) = MIGRATIONS.glob(f"{number:04d}_*.sql")
        text = script.read_text(encoding="utf-8")
        db.executescript(f"BEGIN;\n{text}\nPRAGMA user_version = {number};\nCOMMIT;")
    if not _was_made(state):
        os.close(open_private(_mark(state)))
    _check_once_a_boot(db, state)
    return None


def refuse_empty(state: StateDir) -> None:
    """Before SQLite opens the file, which makes a record of an empty one.

    Raises:
        StoreError: the file is empty, and it was not.
    """
    if os.lstat(state.database).st_size == 0 and _was_made(state):
        raise StoreError(_emptied(state))


def _emptied(state: StateDir) -> str:
    return (
        f"the record {state.database} is damaged: it is empty, and it was not; "
        "`gpusched doctor --fix` sets it aside and begins a new one"
    )


def schema_version(db: sqlite3.Connection) -> int:
    """The schema that the file has; 0 where it has none."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def newer(version: int) -> str:
    """What the member of an older version is told."""
    return (
        f"the queue was written by a newer gpusched_ipy (schema {version}, this one knows "
        f"{SCHEMA_VERSION}): it can be looked at here, not changed; upgrade this environment"
    )


def forget_made(state: StateDir) -> None:
    """From now on an empty file is a new record."""
    _mark(state).unlink(missing_ok=True)


def check(db: sqlite3.Connection, *, thorough: bool = False) -> list[str]:
    """What SQLite finds wrong with the file; nothing where it is sound."""
    pragma = "integrity_check" if thorough else "quick_check"
    found = [" ".join(str(row[0]).split()) for row in db.execute(f"PRAGMA {pragma}(20)")]
    return [] if found == ["ok"] else found


def reserve(db: sqlite3.Connection, state: StateDir) -> None:
    """Make the write-ahead log and the free pages large enough for a full disk, if they are not.

    Where it does, ``synchronous`` is NORMAL afterwards: what it writes need not outlive a power
    cut, and everybody waits for us meanwhile.
    """
    db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    log = state.database.with_name(f"{state.database.name}-wal")
    with suppress(FileNotFoundError):
        # Only looked at: closing a descriptor of ours would drop SQLite's locks.
        if os.lstat(log).st_size >= RESERVE_BYTES:
            return
    try:
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT OR REPLACE INTO meta VALUES ('reserve', ?)", ("x" * RESERVE_BYTES,))
        db.execute("COMMIT")
        db.execute("DELETE FROM meta WHERE key = 'reserve'")
        db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    except sqlite3.OperationalError as exc:
        import logging

        # The disk is full already: the write that follows says so, if it needs room.
        logging.getLogger(__name__).warning("no reserve could be made for a full disk: %s", exc)
        if db.in_transaction:
            db.execute("ROLLBACK")


def check_room(state: StateDir) -> None:
    """Refuse to take a job when the disk is as good as full.

    Raises:
        StoreError: it is.
    """
    room = os.statvfs(state.root)
    free = room.f_bavail * room.f_frsize
    if free < LEAST_ROOM:
        raise StoreError(
            f"the job was not queued: the disk that holds {state.root} is full "
            f"({free // 1024} KiB left); make room and submit it again"
        )


def _mark(state: StateDir) -> Path:
    """Stands beside a record that has been made: an empty one is a damaged one then."""
    return state.root / "queue.made"


def _was_made(state: StateDir) -> bool:
    return os.path.lexists(_mark(state))


def _check_once_a_boot(db: sqlite3.Connection, state: StateDir) -> None:
    row = db.execute("SELECT value FROM meta WHERE key = 'checked_boot'").fetchone()
    if row is not None and row[0] == boot_id():
        return
    wrong = check(db)
    if wrong:
        raise StoreError(
            f"the record {state.database} is damaged ({wrong[0]}); `gpusched doctor --fix` sets it "
            "aside and saves every sound job"
        )
    _drain_what_is_of_another_boot(db)
    # On a full disk it is checked again next time.
    with suppress(sqlite3.OperationalError):
        db.execute("INSERT OR REPLACE INTO meta VALUES ('checked_boot', ?)", (boot_id(),))


def _drain_what_is_of_another_boot(db: sqlite3.Connection) -> None:
    """Jobs queued before a reboot start again only when their user says so."""
    (count,) = db.execute(
        "SELECT count(*) FROM jobs WHERE state IN ('pending', 'starting', 'running') AND boot != ?",
        (boot_id(),),
    ).fetchone()
    if count and db.execute("SELECT 1 FROM meta WHERE key = 'drained'").fetchone() is None:
        why = f"the machine was restarted with {count} jobs queued; `gpusched resume` starts them"
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO meta VALUES ('drained', ?)", (why,))
        db.execute(
            "INSERT INTO events (at, what, data) VALUES (?, 'drained', ?)",
            (time.time(), json.dumps({"why": why})),
        )
        db.execute("COMMIT")


def _wait_for_older(db: sqlite3.Connection, state: StateDir, version: int) -> None:
    rows = db.execute("SELECT key, label, pid, version FROM members").fetchall()
    living = [row for row in rows if row[3] != __version__ and is_alive(state, row[0])]
    if living:
        who = ", ".join(f"{label} (pid {pid})" for _, label, pid, _ in living[:5])
        raise StoreError(
            f"the queue (schema {version}) is in use by an older gpusched_ipy: {who}; it is "
            f"brought to schema {SCHEMA_VERSION} once these have ended"
        )


def _back_up(db: sqlite3.Connection, state: StateDir, version: int) -> None:
    kept = state.database.with_name(
        f"{state.database.name}.schema-{version}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    os.close(open_private(kept))
    with sqlite3.connect(kept) as copy:
        db.backup(copy)
    copy.close()
