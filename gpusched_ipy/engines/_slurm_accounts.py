"""What Slurm's accounting knows of jobs that the controller has forgotten. Never required."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from gpusched_ipy.engines import NAME_PREFIX, EngineState, Status, UnreachableError, _slurm_text
from gpusched_ipy.engines._slurm_run import asked

_log = logging.getLogger(__name__)

_CALL_S = 5.0
# After a call that has failed it is left alone for so long.
_REST_S = 60.0
# As far back as a job of ours can have ended while nobody looked.
_SINCE = "now-30days"
_FIELDS = "JobID,JobName,State,ExitCode,NodeList"  # in the order of squeue's own rows
# What the controller does not know is not open, whatever the database still says of it.
_OPEN = frozenset({EngineState.QUEUED, EngineState.RUNNING})


class Accounts:
    """The accounting of one cluster, as ``sacct`` tells it.

    Args:
        there: whether the site has slurmdbd.
    """

    def __init__(self, there: bool) -> None:
        self._from_mono = 0.0 if there else float("inf")

    def ended(self, keys: Sequence[str]) -> Mapping[str, Status]:
        """How those of these jobs have ended that it knows; nothing where it does not answer."""
        if not keys or time.monotonic() < self._from_mono:
            return {}
        names = _slurm_text.names(keys)
        argv = ("sacct", "-n", "-P", "-X", "-S", _SINCE, f"--name={names}", "-o", _FIELDS)
        try:
            listed = _slurm_text.rows(asked(*argv, limit_s=_CALL_S))
        except UnreachableError as exc:
            _log.warning("slurm's accounting is not asked for a while: %s", exc)
            self._from_mono = time.monotonic() + _REST_S
            return {}
        found = ((key, _slurm_text.of_key(listed, NAME_PREFIX + key)) for key in keys)
        return {
            key: status for key, status in found if status is not None and status.state not in _OPEN
        }
