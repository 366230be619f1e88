"""What the processes of a run have noted, read as it grows; some violations show here already."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class Ledger:
    """The ledger of one run.

    Attributes:
        violations: what must never be seen, one line each.
    """

    def __init__(self, folder: Path) -> None:
        self._stream = (folder / "ledger").open("rb")
        self.tried: set[str] = set()
        self.acknowledged: set[str] = set()
        self.again: Counter[str] = Counter()
        self.starts: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.ended: set[str] = set()
        self.died: Counter[str] = Counter()
        self.overlaps: list[str] = []
        self.buried: list[str] = []
        self.repeated: set[str] = set()

    def read(self) -> None:
        """Take in what is new."""
        for line in self._stream.readlines():
            what, subject, *rest = line.decode().split()
            getattr(self, f"_{what.replace('-', '_')}")(subject, *rest)

    @property
    def violations(self) -> list[str]:
        """What must never be seen."""
        found = [f"GPU given twice: {text}" for text in self.overlaps]
        found += [f"taken for dead while it lived: job {uid}" for uid in self.buried]
        found += [f"started twice: {text}" for text in sorted(self.repeated)]
        return found

    def _try(self, uid: str) -> None:
        self.tried.add(uid)

    def _ack(self, uid: str) -> None:
        self.acknowledged.add(uid)

    def _again(self, uid: str) -> None:
        self.again[uid] += 1

    def _start(self, uid: str, attempt: str, pid: str) -> None:
        self.starts[uid] += 1
        self.attempts[attempt] += 1
        if uid.startswith("once-") and self.starts[uid] > 1 + self.again[uid]:
            self.repeated.add(f"at-most-once job {uid}")
        if self.attempts[attempt] > 1:
            self.repeated.add(f"attempt {attempt} of job {uid} (pid {pid})")

    def _end(self, uid: str) -> None:
        self.ended.add(uid)

    def _died(self, point: str) -> None:
        self.died[point] += 1

    def _overlap(self, uid: str, gpu: str) -> None:
        self.overlaps.append(f"{gpu} to job {uid}")

    def _buried_alive(self, uid: str) -> None:
        self.buried.append(uid)
