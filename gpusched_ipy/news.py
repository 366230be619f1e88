"""Tells why a job waits, when that has changed: for whoever looks on while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpusched_ipy.job import Job, WaitCode

# A wait reason that only counts on is told again this often.
_TELL_AGAIN_S = 30.0


class News:
    """What there is to tell about one job that waits.

    Args:
        tell: is given one line at a time.
        after_s: seconds for which nothing is told: short waits are not worth a line.
    """

    def __init__(self, tell: Callable[[str], None], after_s: float = 0.0) -> None:
        self._tell = tell
        self._from = time.monotonic() + after_s
        self._code: WaitCode | None = None
        self._text = ""
        self._told_at = 0.0

    @property
    def told(self) -> bool:
        """Whether anything has been told."""
        return self._code is not None

    def about(self, job: Job) -> None:
        """Look at the job's reason."""
        reason = job.reason
        now = time.monotonic()
        if reason is None or reason.text == self._text or now < self._from:
            return
        if reason.code is not self._code or now - self._told_at >= _TELL_AGAIN_S:
            self._code, self._text, self._told_at = reason.code, reason.text, now
            self._tell(f"job {job.id} waits: {reason.text}")
