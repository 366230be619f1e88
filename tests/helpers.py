"""What several tests need: a fake GPU that is scripted live, and waiting on conditions."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

GIB = 2**30
T = TypeVar("T")


class FakeScript:
    """The script of the fake GPUs, replaced atomically: no reader ever sees half of it.

    It starts with one free card; ``busy`` and ``free`` speak of all cards unless one is named.
    """

    def __init__(self, path: Path, gpus: int = 1, *, total: str = "40GiB") -> None:
        self.path = path
        self._gpus: list[dict[str, Any]] = [_card(place, total) for place in range(gpus)]
        self._problem: str | None = None
        self.write()

    def busy(
        self,
        gpu: int | None = None,
        *,
        utilization: float | None = 0.97,
        memory: str = "30GiB",
        pid: int = 4242,
    ) -> None:
        """A stranger works on the card."""
        process = {"pid": pid, "user": "user1", "name": "python", "memory": memory}
        self.change(gpu, utilization=utilization, memory_used=memory, processes=[process])

    def free(self, gpu: int | None = None) -> None:
        """Nobody is on the card."""
        self.change(gpu, utilization=0.0, memory_used=0, processes=[])

    def change(self, gpu: int | None = None, **keys: Any) -> None:
        """Set keys of a card (None: of all) and write; the value None takes a key out: unknown."""
        for place, card in enumerate(self._gpus):
            if gpu in (None, place):
                card.update(keys)
                for key in [name for name, value in card.items() if value is None]:
                    del card[key]
        self.write()

    def problem(self, text: str | None) -> None:
        """The reading fails as a whole, or with None works again."""
        self._problem = text
        self.write()

    def write(self) -> None:
        """Put the script in its place."""
        self.raw(json.dumps({"gpus": self._gpus, "problem": self._problem}))

    def raw(self, text: str) -> None:
        """Put any text in its place."""
        beside = self.path.with_name(f".{self.path.name}.new")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)


def _card(place: int, total: str) -> dict[str, Any]:
    return {
        "uuid": f"GPU-fake-{place}",
        "name": "Fake A100",
        "memory_total": total,
        "memory_used": 0,
        "utilization": 0.0,
        "temperature": 40,
        "power": 50,
        "processes": [],
    }


def wait_until(condition: Callable[[], T], timeout: float = 60.0, what: str = "") -> T:
    """The first true value of ``condition``; fails when there is none in time."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            named = what or getattr(condition, "__name__", "the condition")
            raise AssertionError(f"not within {timeout:g} s: {named}; last value {value!r}")
        time.sleep(0.01)


def files_with(folder: Path, text: str) -> list[Path]:
    """The files below ``folder`` that hold ``text``; one that goes while we look holds nothing."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError, IsADirectoryError):
            if text.encode() in path.read_bytes():
                found.append(path)
    return found
