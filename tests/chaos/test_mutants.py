"""The mutation gate: each protection taken out must be noticed by the very run that CI trusts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.mutants import MUTANTS
from tests.chaos.test_chaos import chaos, pytestmark  # noqa: F401 - the marks count here too

# What each of them must be caught by, and not by chance by something else.
CAUGHT_BY = {
    "no-gpu-lock": "GPU given twice",
    "no-epoch": "started twice",
    "heartbeat": "taken for dead while it lived",
    "no-log-lock": "GPU given twice",
    "no-reap": "I10 nothing moves any more",
    "unlock-in-fork": "GPU given twice",
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_each_protection_is_missed(mutant: str, tmp_path: Path) -> None:
    # Without reaping nothing is wrong at once; a few deaths, and the queue stands still for ever.
    kills = "40" if mutant == "no-reap" else "1000"
    report = chaos(
        tmp_path,
        *("--mutant", mutant, "--kills", kills, "--seed", "2", "--rate", "25"),
        *("--sweep", "0", "--failpoints", "0.1", "--patience", "8"),
        timeout=180,
    )
    assert CAUGHT_BY[mutant] in {text.split(":")[0] for text in report["violations"]}
