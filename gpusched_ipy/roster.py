"""Who uses the queue, and whether it starts anything: the members and the drain, as recorded.

Descriptive only: who lives, the alive locks say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from gpusched_ipy.job import Member
from gpusched_ipy.process import boot_id
from gpusched_ipy.takeover import TakeOver


class Roster(TakeOver):
    """The members of the queue and its drain."""

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

    def ask_to_release(self, keys: Iterable[str], *, again_s: float) -> None:
        """Ask these members to give cached GPU memory back; not those asked within ``again_s``."""
        mono = self._clock.now().mono
        wanted = json.dumps(list(keys))
        due = "key IN (SELECT value FROM json_each(?)) AND (asked IS NULL OR asked < ?)"
        if not self._query(f"SELECT 1 FROM members WHERE {due}", (wanted, mono - again_s)):
            return
        with self.writing():
            self._db.execute(
                f"UPDATE members SET asked = ? WHERE {due}", (mono, wanted, mono - again_s)
            )
            self._rang = True

    def asked_to_release(self, key: str) -> float | None:
        """When a member was last asked to give cached GPU memory back (monotonic s), or None."""
        row = self._first("SELECT asked FROM members WHERE key = ?", (key,))
        return None if row is None else row["asked"]

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
        row = self._first("SELECT value FROM meta WHERE key = 'drained'")
        return row["value"] if row else None

    def set_drained(self, why: str | None) -> None:
        """Drain the queue (running jobs go on, none starts) or, with None, resume it."""
        with self.writing():
            if why is None:
                self._db.execute("DELETE FROM meta WHERE key = 'drained'")
            else:
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('drained', ?)", (why,))
            self._event(None, None, "resumed" if why is None else "drained", {"why": why})
