"""Tests of parts that a machine may lack: they skip with the reason, unless it is required."""

from __future__ import annotations

import os

import pytest


def require(part: str, condition: object, reason: str) -> None:
    """Skip this test when ``condition`` is false; fail it when GPUSCHED_REQUIRE names ``part``.

    Args:
        part: the word in ``GPUSCHED_REQUIRE`` (separated by commas): browser, torch, cc …
        condition: whether the part is there.
        reason: what is missing.
    """
    if condition:
        return
    if part in os.environ.get("GPUSCHED_REQUIRE", "").split(","):
        pytest.fail(f"GPUSCHED_REQUIRE names {part}, but {reason}")
    pytest.skip(reason)
