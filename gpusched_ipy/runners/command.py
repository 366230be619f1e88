"""Starts a shim for each command; the shim owns the job from then on and outlives this process."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.output import create_log
from gpusched_ipy.process import python_argv, spawn_detached

if TYPE_CHECKING:
    from gpusched_ipy.scheduler import Claim, Scheduler
    from gpusched_ipy.store import Store

_log = logging.getLogger(__name__)

# A job whose shim ends this often before the job began is not tried again.
MAX_ATTEMPTS = 3


class CommandRunner:
    """Begins commands, each under a shim of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.scheduler: Scheduler | None = None

    def ready(self, job: Job) -> bool:
        """A command needs nobody's main thread."""
        return True

    def start(self, claim: Claim) -> None:
        """Start the shim; it takes the claim over, or finds itself fenced and leaves."""
        assert self.scheduler is not None
        assert claim.job.attempt is not None
        log = create_log(self._store.state.log(claim.job.attempt))
        order = {
            "state_dir": str(self._store.state.root),
            "job": claim.job.id,
            "epoch": claim.job.epoch,
            "claimed_by": claim.job.member,
            "gpu_fds": list(claim.lock_fds),
            "env": dict(claim.env),
        }
        try:
            spawn_detached(
                python_argv("shim"),
                stdin=json.dumps(order).encode(),
                stdout=log,
                pass_fds=claim.lock_fds,
                on_exit=lambda status: self._ended(claim, status),
            )
        finally:
            os.close(log)
        self.scheduler.hand_over(claim)

    def cancel(self, job: Job) -> None:
        """Nothing to do: a shim hears of a cancel by itself, and fences what has not begun."""

    def _ended(self, claim: Claim, status: int) -> None:
        """The shim is gone: if the job never began, give it back or give it up."""
        try:
            with self._store.writing():
                job = self._store.job(claim.job.id)
                if (job.state, job.epoch) != (JobState.STARTING, claim.job.epoch):
                    return
                why = f"its shim ended with status {status} before the job began"
                if job.attempts < MAX_ATTEMPTS:
                    self._store.unclaim(job, why)
                else:
                    self._store.finish_if_active(
                        job.id, epoch=job.epoch, state=JobState.FAILED, error=f"{why}; see its log"
                    )
        except GpuSchedError as exc:
            _log.error("job %d: the end of its shim cannot be recorded: %s", claim.job.id, exc)
