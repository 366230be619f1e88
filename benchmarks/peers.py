"""Ours beside what one would take instead of it, as ratios, in one run.

task-spooler, simple_gpu_scheduler, gpuqu, gq-local and runqd: each is installed for this run where
it can be (the Python ones in an environment of their own, task-spooler from the system or from its
Debian package), given the same jobs on the same card that plays (``libnvidia-ml.so.1`` and
``nvidia-smi`` of our own), and used as its manual says, with its settings as they come. Behind each
figure stands how many times ours it is. Needs Linux and cc; takes about twelve minutes.

    python benchmarks/peers.py [--markdown] [--only NAME ...] [--many 1000 10000] [--keep DIR]

A program that is slow is not waited for: the number of jobs that it did is said. The jobs are a
small program that notes its times and does not show on the card.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from _peers import measures
from _peers.gpuqu import Gpuqu
from _peers.gq_local import GqLocal
from _peers.ours import Ours
from _peers.peer import NotThereError, Peer
from _peers.runqd import Runqd
from _peers.simple_gpu import SimpleGpuScheduler
from _peers.table import Found, as_markdown, as_text, rows, where_better
from _peers.task_spooler import TaskSpooler

PEERS: tuple[type[Peer], ...] = (Ours, TaskSpooler, SimpleGpuScheduler, Gpuqu, GqLocal, Runqd)
HOLD_MS = 200  # of the jobs whose hand-off is measured: those of handoff.py are as long
SINGLY = 50  # submits at a terminal
T = TypeVar("T")


class Bench:
    """All measurements of some programs.

    Args:
        kinds: the programs, ours first.
        programs: where they are installed.
        folder: for everything else.
    """

    def __init__(self, kinds: Sequence[type[Peer]], programs: Path, folder: Path) -> None:
        self.kinds, self.programs, self.folder = kinds, programs, folder
        self.found = {kind.name: Found() for kind in kinds}

    def each(
        self,
        what: str,
        measure: Callable[[type[Peer], Path, Path], T],
        keep: Callable[[Found, T], None],
        *,
        kinds: Sequence[type[Peer]] | None = None,
        at_once: bool = False,
    ) -> None:
        """Measure that of some or all: one after the other or, where no ms count, at once."""
        wanted = self.kinds if kinds is None else kinds

        def one(kind: type[Peer]) -> None:
            began, at = time.monotonic(), self.found[kind.name]
            try:
                keep(at, measure(kind, self.programs, self.folder))
            except (NotThereError, OSError) as exc:
                at.problems.append(f"{what}: {exc}")
            took = time.monotonic() - began
            print(f"{what}, {kind.name}: {took:.0f} s", file=sys.stderr, flush=True)

        if at_once:
            with ThreadPoolExecutor(max(1, len(wanted))) as pool:
                list(pool.map(one, wanted))
        else:
            for kind in wanted:
                one(kind)


def install(kinds: Sequence[type[Peer]], programs: Path) -> tuple[list[type[Peer]], list[str]]:
    """Those that are there now, and why the others are not."""

    def one(kind: type[Peer]) -> str:
        try:
            kind.install(programs)
        except NotThereError as exc:
            return f"{kind.name} is left out: {exc}"
        return ""

    with ThreadPoolExecutor(len(kinds)) as pool:
        why = dict(zip(kinds, pool.map(one, kinds), strict=True))
    return [kind for kind in kinds if not why[kind]], [text for text in why.values() if text]


def measure(bench: Bench, given: argparse.Namespace) -> list[float]:
    """Everything; the gaps of bare Popen."""

    def keep_many(jobs: int, at: Found, found: measures.Line) -> None:
        at.many[jobs] = found

    def keep_rest(at: Found, found: tuple[measures.Rest, measures.Rest]) -> None:
        at.idle, at.waiting = found

    def keep_strangers(at: Found, found: measures.Strangers) -> None:
        at.strangers = found

    least = measures.bare(bench.programs, bench.folder, min(given.jobs, 100), HOLD_MS)
    line = partial(measures.line, limit_s=given.limit)
    bench.each(
        "hand-off",
        partial(line, jobs=given.jobs, ms=HOLD_MS, singly=SINGLY),
        lambda at, found: setattr(at, "handoff", found),
    )
    for jobs in given.many:
        bench.each(
            f"{jobs} jobs",
            partial(line, jobs=jobs, ms=0, singly=0),
            partial(keep_many, jobs),
        )
    rest = partial(measures.rest, seconds=given.rest)
    bench.each("rest", rest, keep_rest, at_once=True)
    bench.each(
        "kill -9", measures.crash, lambda at, found: setattr(at, "crash", found), at_once=True
    )
    stranger = partial(measures.strangers, trials=given.trials)
    ours, others = bench.kinds[:1], bench.kinds[1:]
    bench.each("a stranger", stranger, keep_strangers, kinds=ours)
    bench.each("a stranger", stranger, keep_strangers, kinds=others, at_once=True)
    return least


def machine() -> str:
    """The machine and its state, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def report(bench: Bench, given: argparse.Namespace, least: list[float]) -> list[str]:
    """The lines of the result."""
    ours = bench.found[Ours.name]
    lines = rows(given.many)
    head = ["", *bench.found]
    cells = [[row.label, *(row.cell(at, ours) for at in bench.found.values())] for row in lines]
    draw = as_markdown if given.markdown else as_text
    said = [draw([head, *cells]), ""]
    middle = statistics.median(least)
    said.append(f"Hand-off of the same jobs by pidfd and Popen alone: {middle:.1f} ms median.")
    said += where_better(bench.found, ours, lines)
    for name, at in bench.found.items():
        said += [f"{name}, not measured: {problem}." for problem in at.problems]
    return said


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [kind.name for kind in PEERS[1:]]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=200, help="of the hand-off")
    parser.add_argument("--many", type=int, nargs="+", default=[1000], help="queued short jobs")
    parser.add_argument("--trials", type=int, default=4, help="of a stranger's coming and leaving")
    parser.add_argument("--rest", type=float, default=8, help="seconds of watching it at rest")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds to queue; twice that to run"
    )
    parser.add_argument("--keep", type=Path, help="install them here, or find them here")
    parser.add_argument("--markdown", action="store_true", help="the table for a page")
    return parser.parse_args()


def main() -> int:
    """Install, measure, print."""
    given, state = arguments(), machine()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its daemons end with it
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        programs = given.keep.resolve() if given.keep else folder / "programs"
        programs.mkdir(parents=True, exist_ok=True)
        wanted = [kind for kind in PEERS if kind is Ours or kind.name in given.only]
        kinds, left_out = install(wanted, programs)
        bench = Bench(kinds, programs, folder)
        least = measure(bench, given)
    versions = ", ".join(kind.requirement or kind.name for kind in kinds[1:])
    print(f"{state} before, {os.getloadavg()[0]:.1f} after; beside {versions}.\n")
    print("\n".join([*report(bench, given, least), *left_out]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
