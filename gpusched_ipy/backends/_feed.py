"""A stream that is kept alive: the newest reading of a tool that goes on printing.

It starts on the first question, starts again after an end (each time a little later), and never
gives a reading that is older than its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from gpusched_ipy.backends._child import Stream
from gpusched_ipy.config import Clock

T = TypeVar("T")

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 300.0
_HEADERS = 3  # lines before the first reading (a header, a greeting) are no fault


class Feed(Generic[T]):
    """Readings of type ``T`` from one looping tool.

    Args:
        argv: the fixed argument vector.
        parse: one document as a reading, or None where it is none (garbage, a header).
        separator, end: see :class:`Stream`.
        fresh_s: after so long a reading is old, and silence is a hang.
    """

    def __init__(
        self,
        argv: Sequence[str],
        parse: Callable[[bytes], T | None],
        clock: Clock,
        *,
        separator: bytes,
        end: bytes | None = None,
        fresh_s: float = 4.0,
    ) -> None:
        self.argv = tuple(argv)
        self._parse = parse
        self._clock = clock
        self._separator = separator
        self._end = end
        self._fresh_s = fresh_s
        self._stream: Stream | None = None
        self._newest: tuple[float, T] | None = None
        self._unreadable = 0  # documents in a row that were no reading
        self._failure: str | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._retry_at = 0.0

    @property
    def problem(self) -> str | None:
        """Why there is no reading now; None while there is one, or the first is still due."""
        if self._failure is not None:
            return self._failure
        nonsense = self._unreadable > _HEADERS
        return f"{self.argv[0]} prints what is not a reading" if nonsense else None

    def latest(self) -> T | None:
        """The newest reading, or None; starts the tool where it does not run."""
        now = self._clock.now().mono
        stream = self._running(now)
        if stream is None:
            return None
        for arrived, document in stream.drain():
            reading = self._parse(document)
            self._unreadable = self._unreadable + 1 if reading is None else 0
            if reading is not None:
                self._newest = (arrived, reading)
                self._failure, self._pause_s = None, _FIRST_PAUSE_S
        if (failure := stream.problem) is not None:
            self._give_up(failure, now)
        if self._newest is None or now - self._newest[0] > self._fresh_s:
            self._newest = None
            return None
        return self._newest[1]

    def wait_first(self, timeout_s: float) -> T | None:
        """Like :meth:`latest`, but waits for the first document or the end of the tool."""
        stream = self._running(self._clock.now().mono)
        if stream is not None and not stream.wait_first(timeout_s) and stream.problem is None:
            self._give_up(
                f"{self.argv[0]} printed nothing within {timeout_s:g} s", self._clock.now().mono
            )
        return self.latest()

    def close(self) -> None:
        """End the tool; a later question starts it again."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._newest = self._failure = None
        self._unreadable = 0
        self._retry_at = 0.0

    def _running(self, now: float) -> Stream | None:
        if self._stream is None and now >= self._retry_at:
            self._stream = Stream(
                self.argv,
                separator=self._separator,
                end=self._end,
                clock=self._clock,
                fresh_s=self._fresh_s,
            )
        return self._stream

    def _give_up(self, failure: str, now: float) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._failure = failure
        self._retry_at = now + self._pause_s
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
