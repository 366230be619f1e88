"""The mutation gate: each protection taken out must be noticed by the very run that CI trusts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.mutants import MUTANTS
from tests.chaos.run import kind_of
from tests.chaos.test_chaos import chaos, pytestmark  # noqa: F401 - the marks count here too

# What each of them must be caught by, and not by chance by something else.
CAUGHT_BY = {
    "no-gpu-lock": "GPU given twice",
    "no-epoch": "started twice",
    "heartbeat": "taken for dead while it lived",
    "no-log-lock": "GPU given twice",
    "no-input-lock": "GPU given twice",
    "no-reap": "I10 nothing moves any more",
    "unlock-in-fork": "GPU given twice",
}


@pytest.mark.timeout(720)
@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_each_protection_is_missed(mutant: str, tmp_path: Path) -> None:
    """The run ends as soon as the mutant is caught; how soon depends on how busy the machine is."""
    check = CAUGHT_BY[mutant]
    # Without reaping nothing is wrong at once; a few deaths, and the queue stands still for ever.
    kills = "25" if mutant == "no-reap" else "1000000"
    report = chaos(
        tmp_path,
        *("--mutant", mutant, "--until", check, "--kills", kills, "--limit", "500"),
        *("--seed", "2", "--rate", "25", "--sweep", "0", "--failpoints", "0.1", "--patience", "8"),
        timeout=700,
    )
    assert check in set(map(kind_of, report["violations"]))
