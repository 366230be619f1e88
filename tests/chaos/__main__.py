"""``python -m tests.chaos --kills N``: exit status 0 when nothing that must not happen happened.

SIGTERM ends it early: what it has reached is drained, checked and reported as the full number is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.chaos.mutants import MUTANTS


def main(argv: list[str]) -> int:
    """Run, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--gpus", type=int, default=3)
    parser.add_argument("--rate", type=float, default=12.0, help="bad things a second")
    parser.add_argument("--failpoints", type=float, default=0.2, help="share of armed processes")
    parser.add_argument("--sweep", type=float, default=60, help="seconds for all failpoints first")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="take this protection out")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds until it is stuck")
    parser.add_argument("--round", type=int, default=0, help="drain and check after so many kills")
    parser.add_argument("--until", help="the violation to wait for, whatever else is found")
    parser.add_argument("--limit", type=float, default=0, help="seconds after which to drain")
    parser.add_argument("--json", type=Path, help="write the whole report there")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the run")
    asked = parser.parse_args(argv)
    if asked.mutant:
        # Before any product module is loaded; the members are forked from this process.
        MUTANTS[asked.mutant]()
    from tests.chaos.run import Plan, Run, report_text

    plan = Plan(
        kills=asked.kills, seed=asked.seed, members=asked.members, gpus=asked.gpus,
        rate=asked.rate, failpoints=asked.failpoints, mutant=asked.mutant,
        patience_s=asked.patience, sweep_s=asked.sweep, round_kills=asked.round,
        until=asked.until, limit_s=asked.limit,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    run = Run(plan, folder, _say, lambda report: _checked(report, asked.json))

    def end(*_: object) -> None:
        run.enough = True

    signal.signal(signal.SIGTERM, end)
    try:
        report = run.go()
    finally:
        if asked.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    report_text(report, print)
    return 1 if report["violations"] else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _checked(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1))
    _say(
        f"checked: {report['kills']} kills, {report['jobs']} jobs, "
        f"{report['gpus_given_twice']} GPUs given twice, {report['acknowledged_lost']} lost, "
        f"{report['started_twice']} started twice, {len(report['violations'])} violations"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
