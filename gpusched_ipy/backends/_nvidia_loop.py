"""A looping nvidia-smi, and the newest complete round that it has printed.

The child is read by its own thread and can be killed at any time with what it started; nothing here
ever waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpusched_ipy.backends._child import Stream
from gpusched_ipy.backends._nvidia_faults import Fault, unknown_text
from gpusched_ipy.backends._nvidia_text import QueryReader, Row
from gpusched_ipy.config import Clock

# With persistence off the driver starts anew for each nvidia-smi: 6 s were seen, 24 s in some
# containers.
_FIRST_S = 30.0
_LEAST_SILENCE_S = 5.0
_SAID = 5


@dataclass(frozen=True, slots=True)
class Round:
    """All cards once."""

    mono: float  # when its first line arrived
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]


class Loop:
    """One looping nvidia-smi.

    Args:
        argv: how nvidia-smi is called.
        fields: what it is asked for; ``count`` among them tells where a round ends.
        interval_s: between two rounds.
        clock: dates the rounds.
    """

    def __init__(
        self, argv: Sequence[str], fields: Sequence[str], interval_s: float, clock: Clock
    ) -> None:
        asked = (
            f"--query-gpu={','.join(fields)}",
            "--format=csv",
            f"--loop-ms={max(1, round(interval_s * 1000))}",
        )
        self._silence_s = max(_LEAST_SILENCE_S, 4 * interval_s)
        self._stream = Stream(
            (*argv, *asked), separator=b"\n", clock=clock, fresh_s=max(_FIRST_S, self._silence_s)
        )
        self._reader = QueryReader()
        self._rows: list[Row] = []
        self._faults: list[Fault] = []
        self._began = 0.0
        self._said: list[str] = []
        self._newest: Round | None = None

    def newest(self) -> Round | None:
        """The newest complete round; None before the first."""
        for mono, line in self._stream.drain():
            self._take(mono, line.decode("utf-8", "replace"))
        return self._newest

    @property
    def problem(self) -> str | None:
        """Why no more rounds come (it ended, it hangs); None while they do."""
        problem = self._stream.problem
        if problem is None:
            return None
        self.newest()
        faults = self._faults or (self._newest.faults if self._newest and not self._rows else ())
        for fault in faults:
            return fault.text
        return unknown_text("\n".join(self._said)).text if self._said else problem

    def close(self) -> None:
        """End it, with everything it started."""
        self._stream.close()

    def _take(self, mono: float, text: str) -> None:
        item = self._reader.line(text)
        if item is None:
            if self._reader.columns is None:
                self._said = [*self._said, text][-_SAID:]
            return
        if isinstance(item, Fault):
            self._faults.append(item)
        else:
            if any(row.uuid == item.uuid and row.index == item.index for row in self._rows):
                self._finish()
            if not self._rows:
                self._began = mono
            self._rows.append(item)
        count = self._rows[0].count if self._rows else None
        if count is not None and len(self._rows) + len(self._faults) >= count:
            self._finish()

    def _finish(self) -> None:
        self._newest = Round(self._began, tuple(self._rows), tuple(self._faults))
        self._rows, self._faults = [], []
        self._stream.fresh_s = self._silence_s
