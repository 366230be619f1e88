"""The figures of all programs side by side, each beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from _peers.measures import Crash, Line, Rest, Strangers

Value = float | str | None
TIMES = "×"  # noqa: RUF001 - the sign is meant


@dataclass(slots=True)
class Found:
    """What was measured of one program; None where something kept it from being measured."""

    handoff: Line | None = None
    many: dict[int, Line] = field(default_factory=dict)
    idle: Rest | None = None
    waiting: Rest | None = None
    crash: Crash | None = None
    strangers: Strangers | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Args:
        of: the value; a number is shown with how many times ours it is.
        digits: behind the point.
        less: whether less is better; None where neither is, or it is no number.
        aside: what is said behind the number.
    """

    label: str
    of: Callable[[Found], Value]
    digits: int = 1
    less: bool | None = None
    aside: Callable[[Found], str] = lambda _: ""

    def number(self, found: Found) -> float | None:
        """The value where it is a number that can be compared."""
        value = self.of(found)
        return value if isinstance(value, float) and self.less is not None else None

    def cell(self, found: Found, ours: Found) -> str:
        """The value as it is shown."""
        value = self.of(found)
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        own, times = self.number(ours), ""
        if found is not ours and own and self.less is not None:
            times = f" ({_times(value / own)})"
        return f"{value:,.{self.digits}f}{times}{self.aside(found)}"


def rows(many: list[int]) -> list[Row]:
    """All rows, for those numbers of queued short jobs."""
    found = [
        Row("hand-off, median ms", lambda at: _middle(_gaps(at)), 1, True, _of_how_many),
        Row("hand-off, p95 ms", lambda at: _p95(_gaps(at)), 1, True),
        Row("submit at a terminal, median ms", lambda at: _middle(_submits(at)), 2, True),
    ]
    for jobs in many:
        found += _many(jobs)
    return [
        *found,
        *_rest("nothing queued", "idle"),
        *_rest("1 runs, 50 wait", "waiting"),
        *_lost(),
    ]


def _many(jobs: int) -> list[Row]:
    def of(pick: Callable[[Line], float]) -> Callable[[Found], Value]:
        return lambda at: pick(at.many[jobs]) if jobs in at.many else None

    def stuck(at: Found) -> str:
        took = at.many[jobs]
        if took.stuck:
            return f", takes no more after {took.accepted}"
        return "" if took.accepted == jobs else f", {took.accepted:,} in the time"

    def short(at: Found) -> str:
        return "" if at.many[jobs].drained >= jobs else f", {at.many[jobs].drained:,} in the time"

    return [
        Row(f"queueing {jobs:,}, jobs/s", of(lambda at: at.accept_rate), 1, False, stuck),
        Row(f"running {jobs:,}, jobs/s", of(lambda at: at.drain_rate), 1, False, short),
    ]


def _rest(label: str, which: str) -> list[Row]:
    def of(pick: Callable[[Rest], float]) -> Callable[[Found], Value]:
        def value(at: Found) -> Value:
            rest: Rest | None = getattr(at, which)
            return None if rest is None else pick(rest)

        return value

    def processes(at: Found) -> str:
        rest: Rest | None = getattr(at, which)
        return "" if rest is None else f" in {rest.processes}"

    return [
        Row(f"{label}: CPU, % of a core", of(lambda at: 100 * at.cpu), 2, True),
        Row(f"{label}: MiB, in processes", of(lambda at: at.mem_mib), 1, True, processes),
    ]


def _lost() -> list[Row]:
    def crash(pick: Callable[[Crash], str]) -> Callable[[Found], Value]:
        return lambda at: None if at.crash is None else pick(at.crash)

    def strangers(pick: Callable[[Strangers], Value]) -> Callable[[Found], Value]:
        return lambda at: None if at.strangers is None else pick(at.strangers)

    return [
        Row("kill -9: the running job", crash(lambda at: "lives" if at.lives else "**ends**")),
        Row("kill -9: of 3 waiting, kept", crash(lambda at: _bad(f"{at.kept}", at.kept < 3))),
        Row("kill -9: said of the running job, which ended well", crash(_said)),
        Row("kill -9: two jobs on one card", crash(lambda at: "**yes**" if at.shared else "no")),
        Row("kill -9: its log", crash(lambda at: "kept" if at.logged else "**none**")),
        Row("kill -9: goes on by itself", crash(lambda at: "yes" if at.alone else "**no**")),
        Row(
            "starts on a card that a stranger has",
            strangers(lambda at: _bad(f"{at.on_busy} of {at.trials}", at.on_busy > 0)),
        ),
        Row("he leaves, we start: median s", strangers(lambda at: _middle(at.after_s)), 2, True),
        Row("he leaves, we start: longest s", strangers(_longest), 2, True),
    ]


def _said(at: Crash) -> str:
    well = at.fate.lower() in ("completed", "finished", "done", "succeeded")
    return _bad(at.fate or "nothing", not well)


def _longest(at: Strangers) -> Value:
    if at.never:
        return f"**never, {at.never} of {at.trials}**"
    return max(at.after_s, default=None)


def _bad(text: str, bad: bool) -> str:
    return f"**{text}**" if bad else text


def _gaps(at: Found) -> list[float]:
    return at.handoff.gaps if at.handoff else []


def _submits(at: Found) -> list[float]:
    return at.handoff.submits if at.handoff else []


def _of_how_many(at: Found) -> str:
    return f", n {len(_gaps(at))}"


def _middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _p95(values: list[float]) -> float | None:
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else None


def _times(ratio: float) -> str:
    return f"{ratio:.2g} {TIMES}" if ratio < 100 else f"{ratio:,.0f} {TIMES}"


def as_markdown(table: list[list[str]]) -> str:
    """The table for a page."""
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_text(table: list[list[str]]) -> str:
    """The table for a terminal."""
    plain = [[cell.replace("**", "") for cell in cells] for cells in table]
    widths = [max(len(cells[place]) for cells in plain) for place in range(len(plain[0]))]
    lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in plain)
    return "\n".join(lines)


def where_better(found: Mapping[str, Found], ours: Found, lines: list[Row]) -> list[str]:
    """In which of the figures each other program is better than ours, and how many times."""
    said = []
    for name, at in found.items():
        better = [
            f"{row.label} {_times(max(own, value) / min(own, value))}"
            for row in lines
            if (own := row.number(ours)) and (value := row.number(at)) and own != value
            if (value < own) == row.less
        ]
        if at is not ours and better:
            said.append(f"{name} is better than ours in: {'; '.join(better)}.")
    return said
