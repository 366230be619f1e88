"""How plain data shows itself in a notebook: whoever can draw it registers here. It draws nothing.

So that the data itself need not know of tables, clocks and pages.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple


class Drawn(NamedTuple):
    """A value for people."""

    text: str  # cleaned for a terminal
    html: str  # escaped for a page


@singledispatch
def drawn(value: object) -> Drawn | None:
    """``value`` for people; None where nobody has said how to draw its kind."""
    return None


class Shown:
    """A value that front ends show as :func:`drawn` says."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        found = drawn(self)
        return None if found is None else found.html

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        found = drawn(self)
        printer.text(repr(self) if found is None else found.text)
