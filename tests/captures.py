"""Recorded outputs of GPU tools, and what a right parser reads from each.

They are other people's and no part of this package: GPUSCHED_CAPTURES names their folder, whose
``expected.json`` lists them. No file is treated in a way of its own: each format has one view, a
recording that is added is read without a change here, and one whose format is not known fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

Entry = dict[str, Any]
# What is said about a recording and is no value of it.
_REMARKS = ("note",)


def folder() -> Path:
    """The folder of the recordings; skips where there is none."""
    named = os.environ.get("GPUSCHED_CAPTURES")
    if named is None:
        pytest.skip("GPUSCHED_CAPTURES does not name the folder of the recordings")
    return Path(named)


def entries() -> list[Entry]:
    """All that ``expected.json`` lists; nothing where there is no folder."""
    named = os.environ.get("GPUSCHED_CAPTURES")
    if named is None:
        return []
    listed: list[Entry] = json.loads((Path(named) / "expected.json").read_text(encoding="utf-8"))
    return listed


def of_formats(formats: Collection[str]) -> list[Any]:
    """The recordings for ``parametrize``; a lone None, which skips, where there are none."""
    found = [entry for entry in entries() if entry["format"] in formats]
    return [pytest.param(entry, id=entry["file"]) for entry in found] or [None]


def need(entry: Entry | None) -> Entry:
    """The recording of a parametrized test; skips where there is none."""
    folder()
    if entry is None:
        pytest.skip("there is no recording of this kind in the folder")
    return entry


def path_of(entry: Entry) -> Path:
    """Where the recording lies."""
    return folder() / str(entry["file"])


def agree(expected: Any, found: Any, where: str) -> None:
    """Every expected value is there, to the digits that it was written with."""
    if isinstance(expected, Mapping):
        assert isinstance(found, Mapping), where
        for key, value in expected.items():
            if key in _REMARKS:
                continue
            assert key in found, f"{where}: the view has no {key}"
            agree(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), where
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(expected, found, strict=True)):
            agree(*pair, f"{where}[{number}]")
    elif isinstance(expected, (int, float)) and not isinstance(expected, bool):
        assert found is not None, f"{where}: {expected} is not known"
        digits = len(repr(expected).partition(".")[2]) if isinstance(expected, float) else 0
        rounded = 0.51 * 10.0**-digits if isinstance(expected, float) else 0.0
        assert found == pytest.approx(expected, rel=1e-9, abs=rounded), where
    else:
        assert found == expected, where
