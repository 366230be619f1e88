"""The engine ``ray``: a job of ours is one submission to a Ray head, named ``gpuq-<key>``.

Ray knows no order among jobs and cannot take back one that waits: the order is the queue's, and
the claim in the job's folder keeps what Ray starts too late from running. How a job has ended, its
folder alone says; this only speaks with the head.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from gpusched_ipy.engines import (
    NAME_PREFIX,
    AmbiguousError,
    Capabilities,
    EngineJob,
    EngineState,
    Health,
    RejectedError,
    Status,
    UnreachableError,
)
from gpusched_ipy.engines.rayjobs import (
    DEFAULT_ADDRESS,
    AnswerError,
    RayJob,
    RayJobs,
    RefusedError,
    SilentError,
    Submission,
    dashboard_url,
    read_token,
)
from gpusched_ipy.errors import UserError
from gpusched_ipy.text import clean

if TYPE_CHECKING:
    from gpusched_ipy.config import Settings

# Seconds in which every call to the head ends. It asks its own parts for up to a minute.
CALL_S = 10.0
SUBMIT_S = 20.0  # the first one after its start has taken 0.9 s on an idle machine
# The head asks its own parts for so long (s) at most: an unanswered submit is known about then.
SETTLE_S = 65.0
# Seconds between Ray's SIGTERM and its SIGKILL: our program on the node needs them to end the job
# and to write how it ended. Ray's own default is 3.
STOP_WAIT_S = 20
_STATES = {
    "PENDING": EngineState.QUEUED,
    "RUNNING": EngineState.RUNNING,
    "SUCCEEDED": EngineState.ENDED,
    "STOPPED": EngineState.CANCELLED,
    "FAILED": EngineState.FAILED,
}
# Ray gives up on a job that has waited 15 minutes for its GPUs: as if it did not know it.
_WAITED_TOO_LONG = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
# Answers that mean: not now, and not taken.
_NOT_NOW = frozenset({401, 403, 404, 405, 429, 502, 503})
_NO_AGENT = ("No available agent", "Failed to get head node agent")
_CALLS = (RefusedError, SilentError, AnswerError)


def make(settings: Settings) -> RayEngine:
    """The engine with these settings."""
    return RayEngine(settings)


class RayEngine:
    """A Ray cluster, by the dashboard of its head.

    The address is ``ray_address``, or Ray's own ``RAY_API_SERVER_ADDRESS``; the token is
    ``ray_token_file``, or where Ray looks for it. Both are read again for every call.
    """

    name = "ray"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def capabilities(self) -> Capabilities:
        """It refuses a second submit of a key; and what no node can hold, we refuse for it."""
        return Capabilities(
            refuses_impossible=True, orders=False, refuses_twice=True, settle_s=SETTLE_S
        )

    def ping(self, timeout: float) -> Health:
        """Whether the cluster answers, and not only the web server in front of it."""
        until = monotonic() + timeout
        try:
            version = self._head(timeout).version()
            nodes = self._head(max(0.1, until - monotonic())).gpus_by_node()
        except (*_CALLS, UnreachableError) as exc:
            return Health(up=False, text=_down(exc))
        count = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
        return Health(up=True, text=f"Ray on {count}", version=version, gpus=sum(nodes))

    def submit(self, job: EngineJob) -> str:
        """Hand the job over, unless Ray has it already.

        Raises:
            RejectedError: no node has so many GPUs, or Ray refuses what is asked.
            UnreachableError: the head does not answer or takes nothing now.
            AmbiguousError: it was asked and has not answered.
        """
        if job.gpus:
            self._require(job.gpus)
        program = shlex.join(["python3", str(job.folder.runner), str(job.folder.path)])
        kind = job.gpu_type
        what = Submission(
            id=job.engine_name,
            entrypoint=f"exec {program}",
            gpus=job.gpus,
            # Ray marks each node that has such a card with this resource; any share of it will do.
            resources={f"accelerator_type:{kind}": 0.001} if kind else {},
            metadata={"name": clean(job.name)},
            env={"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        )
        self._hand_over(what)
        return job.engine_name

    def status(self, keys: Sequence[str]) -> Mapping[str, Status]:
        """How these jobs stand, by one list of all that Ray has.

        Raises:
            UnreachableError: the head does not answer.
        """
        jobs = self._jobs()
        return {key: self._status(jobs.get(NAME_PREFIX + key)) for key in keys}

    def rank(self, ranks: Mapping[str, int]) -> None:
        """Nothing: Ray starts what fits."""

    def cancel(self, keys: Sequence[str]) -> None:
        """Have these jobs ended; one that waits for its GPUs ends only when it has got them.

        Raises:
            UnreachableError: the head does not answer.
        """
        for key in keys:
            try:
                self._head(CALL_S).stop(NAME_PREFIX + key)
            except _CALLS as exc:
                raise UnreachableError(_down(exc)) from exc

    def reattach(self) -> Sequence[str]:
        """The keys of our jobs that are not over.

        Raises:
            UnreachableError: the head does not answer.
        """
        return [
            job.id.removeprefix(NAME_PREFIX)
            for job in self._jobs().values()
            if job.id.startswith(NAME_PREFIX)
            and self._status(job).state in (EngineState.QUEUED, EngineState.RUNNING)
        ]

    # -- what speaks with the head

    def _head(self, limit_s: float) -> RayJobs:
        settings = self._settings
        try:
            url = dashboard_url(settings.ray_address or _address_of_ray() or DEFAULT_ADDRESS)
            return RayJobs(url, read_token(settings.ray_token_file), limit_s=limit_s)
        except UserError as exc:
            raise UnreachableError(str(exc)) from exc

    def _jobs(self) -> dict[str, RayJob]:
        try:
            return self._head(CALL_S).jobs()
        except _CALLS as exc:
            raise UnreachableError(_down(exc)) from exc

    def _require(self, gpus: int) -> None:
        """Refuse what would wait for ever.

        A cluster in which no node has a GPU may be one that grows when it is asked to.
        """
        try:
            largest = max(self._head(CALL_S).gpus_by_node(), default=0)
        except _CALLS as exc:
            raise UnreachableError(_down(exc)) from exc
        if 0 < largest < gpus:
            raise RejectedError(f"{gpus} GPUs are asked for; the largest node of Ray has {largest}")

    def _hand_over(self, what: Submission) -> None:
        try:
            self._head(SUBMIT_S).submit(what)
        except RefusedError as exc:
            raise UnreachableError(_down(exc)) from exc
        except SilentError as exc:
            raise AmbiguousError(str(exc)) from exc
        except AnswerError as exc:
            if exc.exists_already:
                return
            if exc.status == 400:
                raise RejectedError(f"Ray refuses it: {exc}") from exc
            if exc.status in _NOT_NOW or any(words in str(exc) for words in _NO_AGENT):
                raise UnreachableError(_down(exc)) from exc
            raise AmbiguousError(f"Ray says: {exc}") from exc

    def _status(self, job: RayJob | None) -> Status:
        if job is None:
            return Status(state=EngineState.UNKNOWN, text="Ray does not know it")
        if job.error_type == _WAITED_TOO_LONG:
            return Status(state=EngineState.UNKNOWN, text=f"Ray: {job.words}", native=job.id)
        state = _STATES.get(job.status, EngineState.UNKNOWN)
        text = "" if state is EngineState.ENDED else f"Ray: {job.words}"
        return Status(state=state, text=text, native=job.id, where=job.where)


def _address_of_ray() -> str | None:
    """Where Ray's own tools look for the dashboard; other kinds of addresses are not meant here."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    return named if named.startswith(("http://", "https://")) else None


def _down(exc: Exception) -> str:
    if isinstance(exc, RefusedError):
        return f"{exc}; ray_address says where the head is"
    if isinstance(exc, AnswerError):
        hint = "; see ray_token_file" if exc.status in (401, 403) else ""
        return f"Ray says: {exc}{hint}"
    return str(exc)
