"""The record as a shim needs it before its job begins: a claim is taken over, a member joins.

It moves that one row by its columns and knows no more of jobs: what a job is takes longer to
import than to begin. Everything else of the record builds on it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from gpusched_ipy._version import __version__
from gpusched_ipy.database import Database
from gpusched_ipy.errors import DamagedJobError, StoreError
from gpusched_ipy.process import ProcessId, boot_id
from gpusched_ipy.rowsum import COLUMNS, checksum


class _Rehearsed(Exception):  # noqa: N818 - it is no error: it takes a write back
    pass


class TakeOver(Database):
    """One SQLite file, and the moves of a process that begins one job."""

    def begin(
        self, job_id: int, *, epoch: int, claimed_by: str, member: str
    ) -> dict[str, Any] | None:
        """starting → running by ``member``: the row as it then stands, or None when that claim no
        longer stands (fenced).

        Raises:
            DamagedJobError: the row is not as it was written.
        """
        with self.writing():
            row = self._first("SELECT * FROM jobs WHERE id = ?", (job_id,))
            if row is None:
                return None
            if checksum(row) != row["crc"]:
                raise DamagedJobError(job_id)
            claim = (row["state"], row["epoch"], row["member"], row["boot"])
            if claim != ("starting", epoch, claimed_by, boot_id()):
                return None
            now = self._clock.now()
            running = dict(row) | {
                "state": "running",
                "member": member,
                "started_at": now.wall,
                "started_mono": now.mono,
            }
            self._put_running(running)
            return running

    def _put_running(self, row: dict[str, Any]) -> None:
        """Write those of the columns of ``row`` that a begin changes."""
        data = {"member": row["member"], "state": row["state"]}
        row["rev"] = self._event(row["id"], row["attempt"], "started", data)
        row["crc"] = checksum(row)
        self._db.execute(
            "UPDATE jobs SET state = :state, member = :member, started_at = :started_at,"
            " started_mono = :started_mono, crc = :crc, rev = :rev WHERE id = :id",
            row,
        )

    def rehearse(self) -> None:
        """Go through all that a begin does, once, and take it back: the second time is quicker."""
        nobodys = dict.fromkeys((*COLUMNS, "started_at", "started_mono"), "")
        with suppress(_Rehearsed, StoreError), self.writing():
            self.begin(0, epoch=0, claimed_by="", member="")
            self._put_running({**nobodys, "id": 0})
            self.join("", "shim", "")
            raise _Rehearsed

    def set_process(self, attempt: str, process: ProcessId) -> None:
        """Record which process leads the attempt: for people, and for whoever must end it."""
        with self.writing(durable=False):
            self._db.execute(
                "UPDATE attempts SET pid = ?, start_ticks = ?, boot = ? WHERE attempt = ?",
                (process.pid, process.start_ticks, process.boot, attempt),
            )
            self._rang = True

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
