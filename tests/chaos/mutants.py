"""The product with one protection taken out each. A harness that does not notice is worth nothing.

A mutant is put in place in every process of a run, by replacing functions; no product code knows
that there are mutants.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

# A stopped or busy process misses this quickly; that is what is wrong with heartbeats.
_LEASE_S = 0.25
_BEAT_S = 0.05


def no_gpu_lock() -> None:
    """The record alone says whose a GPU is."""
    from gpusched_ipy import locks

    def opened(self: Any, gpu: str, *, shared: bool) -> int:
        fd: int = self._open(gpu)
        locks._INHERITED.add(fd)
        return fd

    locks.GpuLocks.try_lock = opened  # type: ignore[method-assign]


def no_epoch() -> None:
    """A shim begins whatever it was once told to begin, and its report always counts."""
    from gpusched_ipy.job import ACTIVE, Job
    from gpusched_ipy.store import Store
    from gpusched_ipy.takeover import TakeOver

    begins, ends = TakeOver.begin, Store.finish_if_active

    def begin(
        self: TakeOver, job_id: int, *, epoch: int, claimed_by: str, member: str
    ) -> dict[str, Any] | None:
        with self.writing():
            row = self._first("SELECT * FROM jobs WHERE id = ?", (job_id,))
            if row is not None and (row["state"] != "starting" or row["member"] is None):
                return dict(row) | {"member": member}
            standing = {} if row is None else {"epoch": row["epoch"], "claimed_by": row["member"]}
            told = {"epoch": epoch, "claimed_by": claimed_by, **standing}
            return begins(self, job_id, **told, member=member)

    def finish_if_active(self: Store, job_id: int, *, epoch: int, **values: Any) -> Job | None:
        with self.writing():
            job = self.job(job_id)
            return ends(self, job_id, epoch=job.epoch, **values) if job.state in ACTIVE else None

    TakeOver.begin = begin  # type: ignore[method-assign]
    Store.finish_if_active = finish_if_active  # type: ignore[method-assign,assignment]


def heartbeat() -> None:
    """A member is alive while its file is touched often enough."""
    from gpusched_ipy import agent, locks, reap, scheduler

    joins = locks.Membership.__init__

    def join(self: Any, state: Any) -> None:
        joins(self, state)

        def beat() -> None:
            while self._fd is not None:
                with suppress(FileNotFoundError):
                    os.utime(str(self._path))
                time.sleep(_BEAT_S)

        threading.Thread(target=beat, daemon=True).start()

    def alive_pid(state: Any, key: str) -> int | None:
        try:
            age = time.time() - os.stat(state.alive(key)).st_mtime
        except FileNotFoundError:
            return None
        return 0 if age < _LEASE_S else None

    locks.Membership.__init__ = join  # type: ignore[method-assign]
    for module in (locks, scheduler, agent):
        module.alive_pid = alive_pid  # type: ignore[attr-defined]
    for module in (locks, reap):
        module.is_alive = lambda state, key: alive_pid(state, key) is not None  # type: ignore[attr-defined]


def no_log_lock() -> None:
    """A job without its shim counts as gone."""
    from gpusched_ipy import reap

    reap.log_is_held = lambda path: False


def no_input_lock() -> None:
    """What a launcher has started keeps nothing that another container could see."""
    from gpusched_ipy import shim

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "stdin": subprocess.DEVNULL})

    shim.subprocess = SimpleNamespace(Popen=Popen, DEVNULL=subprocess.DEVNULL)  # type: ignore[attr-defined,assignment]


def no_reap() -> None:
    """What the dead have left stays as it is."""
    from gpusched_ipy import scheduler

    scheduler.reap = lambda store, jobs: []
    scheduler.orphans = lambda store, jobs: []


def unlock_in_fork() -> None:
    """A forked child gives back what it has inherited, instead of only closing it."""

    def unlock() -> None:
        locks = sys.modules.get("gpusched_ipy.locks")
        for fd in locks._INHERITED if locks else ():
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)

    # Hooks run in the order of their registration: this one comes before the product's own.
    assert "gpusched_ipy.locks" not in sys.modules
    os.register_at_fork(after_in_child=unlock)


MUTANTS: dict[str, Callable[[], None]] = {
    "no-gpu-lock": no_gpu_lock,
    "no-epoch": no_epoch,
    "heartbeat": heartbeat,
    "no-log-lock": no_log_lock,
    "no-input-lock": no_input_lock,
    "no-reap": no_reap,
    "unlock-in-fork": unlock_in_fork,
}
