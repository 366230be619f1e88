"""Strangers that have just left while the driver still shows them on their cards.

A process has ended before its driver has taken its memory back, which takes milliseconds, or for
tens of GiB some tenths of a second: so the cards are looked at again soon, and then less often.
"""

from __future__ import annotations

from collections.abc import Iterable

# Seconds between one look and the next: about a second in all, then the sampler goes on as ever.
_LOOKS_S = tuple(0.001 * 2**step for step in range(10))


class Departures:
    """Those that one loop waits for."""

    def __init__(self) -> None:
        self._gone: set[int] = set()
        self._looks: list[float] = []

    def begin(self, pids: Iterable[int]) -> None:
        """These processes have ended."""
        if new := set(pids):
            self._gone |= new
            self._looks = list(_LOOKS_S)

    @property
    def open(self) -> bool:
        """Whether one of them may still be shown."""
        return bool(self._gone)

    def within(self, rest_s: float) -> float:
        """How long the loop may rest that would rest for so long."""
        if self._gone and self._looks:
            return min(rest_s, self._looks.pop(0))
        self._gone.clear()
        return rest_s

    def seen(self, shown: Iterable[int]) -> None:
        """A reading that has begun since then shows these processes."""
        self._gone.intersection_update(shown)
