"""Members, agents, shims and jobs are killed at random and at every failpoint; nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(sys.platform != "linux", reason="it looks for its processes in /proc"),
]
ROOT = Path(__file__).resolve().parents[2]


def chaos(folder: Path, *options: str, timeout: float = 600) -> dict[str, Any]:
    """The report of a run in a process of its own, which must have one thread only."""
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--json", str(report), *options],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    assert done.returncode == bool(found["violations"]), done.stdout + done.stderr
    return found


@pytest.mark.timeout(620)
def test_500_kills_and_every_failpoint(tmp_path: Path) -> None:
    report = chaos(
        tmp_path,
        *("--kills", "500", "--seed", "1", "--rate", "25", "--sweep", "100", "--patience", "60"),
    )
    assert report["violations"] == []
    assert report["kills"] >= 500
    # What a run does must be worth surviving.
    assert report["starts"] > 200
    assert report["outcomes"]["completed"] > 50
    assert report["outcomes"]["lost"] > 10
    assert report["failpoint_deaths"] > 40
    assert len(report["failpoints_never_reached"]) < 20
