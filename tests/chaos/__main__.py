"""``python -m tests.chaos --kills N``: exit status 0 when nothing that must not happen happened."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

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
        patience_s=asked.patience, sweep_s=asked.sweep,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        report = Run(plan, folder).go()
    finally:
        if asked.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))
    report_text(report, print)
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
