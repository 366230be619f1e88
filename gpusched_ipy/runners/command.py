"""Starts a shim for each command; the shim owns the job from then on and outlives this process.

Two shims are kept started and parked: each has imported what it needs and waits for its order, so
that the next command begins at once, and one that follows close behind it as well. The order goes
through an unnamed socket pair, together with the descriptors of the log and of the GPU locks. The
same way the shim tells how its job ended, so that the end and what starts next are one write.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from gpusched_ipy import interpreter, leftovers
from gpusched_ipy.errors import DamagedJobError, JobNotFoundError, StoreError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.locks import is_alive
from gpusched_ipy.orders import encoded
from gpusched_ipy.outcome import RECORDED, End, Outcome
from gpusched_ipy.output import create_log
from gpusched_ipy.process import python_argv, spawn_detached

if TYPE_CHECKING:
    from gpusched_ipy.lookup import Event
    from gpusched_ipy.scheduler import Claim, Scheduler
    from gpusched_ipy.store import Store

_log = logging.getLogger(__name__)

# A job whose shim ends this often in a row before the job began is not tried again.
MAX_STARTS_IN_VAIN = 3
_IN_VAIN = "its shim ended"
# What happened to a job after which it is counted anew.
_FRESH = frozenset({"started", "requeued", "retried"})
# First pause before the end of a shim that could not be recorded is recorded again.
_RETRY_S = 0.2
# So many shims are kept parked: the second is there while another one starts for the first.
PARKED = 2
# Seconds after a dispatch until the next shim is parked.
PARK_AFTER_S = 0.1
# So long after a call or an isolated cell has begun an interpreter may wait for the next although
# none is in line.
KEEP_S = 10.0


class ParkedShim:
    """A started shim that waits for its order; it leaves by itself when nobody can send one."""

    def __init__(self, store: Store, log_cap: int) -> None:
        self._store = store
        self._log_cap = log_cap
        self._claim: Claim | None = None
        self._said = b""
        self._mutex = threading.Lock()
        self._status: int | None = None
        self.recipe: Mapping[str, Any] | None = None  # of the interpreter that it keeps
        self._deaf = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            argv = python_argv("shim", "--state-dir", str(store.state.root))
            spawn_detached(argv, stdin=theirs.fileno(), on_exit=self._ended)

    def prepare(self, recipe: Mapping[str, Any] | None) -> None:
        """Have it keep an interpreter of that recipe parked, or none."""
        if recipe == self.recipe or self._deaf:
            return
        self.recipe, line = recipe, encoded({"park": recipe})
        try:
            self._deaf = self._socket.send(line, socket.MSG_DONTWAIT) < len(line)
        except OSError:
            self._deaf = True
        if self._deaf:  # dead, or stopped: the next job takes another one
            self.dismiss()

    def order(self, claim: Claim, log: int) -> bool:
        """Send the order; False where the shim has died, so that another one is needed."""
        with self._mutex:
            if self._status is not None or self._deaf:
                return False
            self._claim = claim
        text = {
            "job": claim.job.id,
            "epoch": claim.job.epoch,
            "claimed_by": claim.job.member,
            "env": dict(claim.env),
            "log_cap": self._log_cap,
        }
        try:
            line = json.dumps(text).encode() + b"\n"
            socket.send_fds(self._socket, [line], [log, *claim.lock_fds])
        except (BrokenPipeError, ConnectionResetError):
            self._claim = None
            self._socket.close()
            return False
        return True

    def listen(self, scheduler: Scheduler) -> None:
        """From now on the loop hears how the job ended, and that the shim is gone."""
        if self._claim is not None:
            scheduler.ears.hear(
                self._socket.fileno(), self._claim.job, partial(self._heard, scheduler)
            )

    def _heard(self, scheduler: Scheduler) -> None:
        """It has told the end of its job, in one line, or it is gone without."""
        try:
            more = self._socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            more = b""
        self._said += more
        if more and not self._said.endswith(b"\n"):
            return
        scheduler.ears.hear_no_more(self._socket.fileno())
        end = self._end()
        if end is None:
            self._socket.close()
            scheduler.wake()
        else:
            scheduler.ended(end)

    def _end(self) -> End | None:
        """What the shim has told; None where that is not an end."""
        if not self._said or self._claim is None:
            return None
        try:
            said = json.loads(self._said)
            member, state = said.pop("member"), JobState(said.pop("state"))
            outcome = Outcome(state=state, **said)
        except (ValueError, KeyError, TypeError) as exc:
            _log.error("job %d: its shim tells what is no end: %s", self._claim.job.id, exc)
            return None
        return End(job=self._claim.job, member=member, outcome=outcome, answer=self._answer)

    def _answer(self, recorded: bool) -> None:
        """Tell the shim whether the end is recorded; who hears no word of it records it itself."""
        with self._socket, suppress(OSError):
            if recorded:
                self._socket.sendall(RECORDED)

    def dismiss(self) -> None:
        """Let a parked shim go."""
        self._socket.close()

    def _ended(self, status: int) -> None:
        """The shim is gone: if its job never began, give it back or give it up."""
        with self._mutex:
            self._status = status
            claim = self._claim
        if claim is None:
            return
        pause_s = _RETRY_S
        while self._store.state.database.exists():
            try:
                _settle(self._store, claim.job, status)
                return
            except (DamagedJobError, JobNotFoundError) as exc:
                _log.error("job %d: the end of its shim is not recorded: %s", claim.job.id, exc)
                return
            except StoreError as exc:
                # This process lives, so nobody else will give the job back (a full disk).
                _log.error("job %d: the end of its shim is not recorded: %s", claim.job.id, exc)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 10.0)


class CommandRunner:
    """Begins commands, each under a shim of its own.

    Args:
        log_cap: bytes of a log of which the shim keeps the head and the tail.
        park_python: have the Python of the next call or isolated cell started before its turn.
    """

    def __init__(self, store: Store, *, log_cap: int, park_python: bool = False) -> None:
        self._store = store
        self._log_cap = log_cap
        self._park_python = park_python
        self._recipe: Mapping[str, Any] | None = None  # of the interpreter that is to wait
        self._begun_mono = -KEEP_S  # when the last job that has such a recipe began
        self._parked: deque[ParkedShim] = deque()  # that has waited longest first
        self._closed = False
        self._mutex = threading.Lock()
        self.scheduler: Scheduler | None = None

    def ready(self, job: Job) -> bool:
        """A command needs nobody's main thread."""
        return True

    def start(self, claim: Claim) -> None:
        """Order a shim to take the claim over; it does, or finds itself fenced and leaves."""
        assert self.scheduler is not None
        assert claim.job.attempt is not None
        recipe = self._recipe_of(claim.job)
        log = create_log(self._store.state.log(claim.job.attempt))
        try:
            shim = self._take_parked(recipe)
            while not shim.order(claim, log):
                _log.warning("a parked shim had died; another one takes job %d", claim.job.id)
                shim = self._take_parked(recipe)
        finally:
            os.close(log)
        self.scheduler.hand_over(claim)
        shim.listen(self.scheduler)
        if recipe is not None:
            with self._mutex:
                self._recipe, self._begun_mono = recipe, time.monotonic()
        self._park_soon()

    def expect(self, job: Job | None) -> None:
        """That job is the first in line for a GPU, or none is: if it needs a Python that can be
        started in advance, have it wait."""
        with self._mutex:
            if job is None and time.monotonic() - self._begun_mono < KEEP_S:
                return
            self._recipe = None if job is None else self._recipe_of(job)
            self._prepare()

    def _prepare(self) -> None:
        """Have one of the parked shims, and no more, keep the interpreter that may be needed."""
        keeps = [shim for shim in self._parked if shim.recipe is not None]
        for shim in keeps or list(self._parked)[:1]:
            shim.prepare(self._recipe)

    def _recipe_of(self, job: Job) -> dict[str, Any] | None:
        if not self._park_python:
            return None
        spec = job.spec
        return interpreter.recipe(spec.kind, spec.argv, spec.env, spec.env_names)

    def cancel(self, job: Job) -> None:
        """End what a dead shim has left; one that lives hears of a cancel by itself."""
        if job.attempt is None or (job.member and is_alive(self._store.state, job.member)):
            return
        log = self._store.state.log(job.attempt)
        ending = threading.Thread(target=leftovers.end, args=(log,), daemon=True)
        ending.start()

    def park(self) -> None:
        """Have shims ready for the next commands, started one after the other."""
        with self._mutex:
            if len(self._parked) < PARKED and not self._closed:
                self._parked.append(ParkedShim(self._store, self._log_cap))
            self._prepare()
            lacking = len(self._parked) < PARKED and not self._closed
        if lacking:
            self._park_soon()

    def close(self) -> None:
        """Dismiss the parked shims; those with a job go on."""
        with self._mutex:
            self._closed = True
            while self._parked:
                self._parked.pop().dismiss()

    def _park_soon(self) -> None:
        """Not at once: the new job's own beginning comes first."""
        again = threading.Timer(PARK_AFTER_S, self.park)
        again.daemon = True
        try:
            again.start()
        except RuntimeError as exc:
            # The job has its shim already: that it has no successor is no fault of the job.
            _log.warning("no shim is parked for the next command: %s", exc)

    def _take_parked(self, recipe: Mapping[str, Any] | None) -> ParkedShim:
        """The shim with the interpreter of that recipe; else one without, rather than with."""
        with self._mutex:
            if self._parked:
                fit = min(self._parked, key=lambda it: (it.recipe != recipe, it.recipe is not None))
                self._parked.remove(fit)
                return fit
        return ParkedShim(self._store, self._log_cap)


def _settle(store: Store, claimed: Job, status: int) -> None:
    """Return a job that its shim never began; give it up when that happens again and again."""
    with store.writing():
        job = store.job(claimed.id)
        if (job.state, job.epoch) != (JobState.STARTING, claimed.epoch):
            return
        why = f"{_IN_VAIN} with status {status} before the job began"
        if starts_in_vain(store.events(job.id)) + 1 < MAX_STARTS_IN_VAIN:
            store.unclaim(job, why)
        else:
            store.finish_if_active(job.id, epoch=job.epoch, state=JobState.FAILED, error=why)


def starts_in_vain(events: Iterable[Event]) -> int:
    """How often in a row its shim has ended before the job began.

    A claim that fell because the member that had made it died is no fault of the job.
    """
    count = 0
    for event in events:
        if event.what in _FRESH:
            count = 0
        elif event.what == "returned" and str(event.data.get("why", "")).startswith(_IN_VAIN):
            count += 1
    return count
