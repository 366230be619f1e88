"""Starts that are other members' to make, and members that do not make them.

The policy gives a GPU to the first in line, and only a cell's own kernel can start it. A kernel
that is stopped, or whose main thread is caught in a call that lets nobody in, would keep the GPU
idle for ever: after a while it counts as busy, and its cells block nobody until it is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gpusched_ipy.job import Job, Member

PATIENCE_S = 5.0  # an offer to a kernel that lives and is idle is taken within milliseconds
PASSED_S = 30.0  # how long a kernel that did not take one is passed over


class Offers:
    """What has been offered to whom, since when (monotonic s)."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, int], float] = {}
        self._passed_until: dict[str, float] = {}

    def made(self, jobs: Iterable[Job], mono: float) -> None:
        """These jobs could start now, and it is not for this member to start them."""
        offered = {(job.id, job.epoch): job for job in jobs}
        self._since = {key: self._since.get(key, mono) for key in offered}
        for key, since in self._since.items():
            home = offered[key].spec.home
            if home is not None and mono - since >= PATIENCE_S:
                self._passed_until[home] = mono + PASSED_S

    def as_they_react(self, members: Mapping[str, Member], mono: float) -> dict[str, Member]:
        """``members``, with those that took no offer lately counted as busy."""
        self._passed_until = {
            key: until for key, until in self._passed_until.items() if until > mono
        }
        return {
            key: replace(member, busy=True) if key in self._passed_until else member
            for key, member in members.items()
        }
