"""Engines: where a job can run beyond this machine. What each must be able to do, as plain types.

An engine only hands jobs over and tells how they stand; the order, the retries and the record stay
with the queue. How a job has ended, its folder alone says (:mod:`gpusched_ipy.engines.folder`);
what an engine says fills the time before. Engines know neither the record nor each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.errors import GpuSchedError

__all__ = [
    "AmbiguousError",
    "Capabilities",
    "Engine",
    "EngineJob",
    "EngineState",
    "Health",
    "RejectedError",
    "Status",
    "TakesArrays",
    "UnreachableError",
    "member_key",
    "parted",
]

# What a job of the key K is called at every engine: the one thing that can be looked for anywhere.
NAME_PREFIX = "gpuq-"
# Between the name of an array and a place in it; no key of a single job ends in it and a number.
_PLACE = "_"


def member_key(array: str, place: int) -> str:
    """The key of one job of an array: jobs that were handed over in one call, under one name."""
    return f"{array}{_PLACE}{place}"


def parted(key: str) -> tuple[str, int | None]:
    """The name of the array and the place in it; of a single job its key and None."""
    name, _, place = key.rpartition(_PLACE)
    return (name, int(place)) if name and place.isdecimal() else (key, None)


class RejectedError(GpuSchedError):
    """The engine will not take this job, now or later; the message holds its own words."""


class UnreachableError(GpuSchedError):
    """The engine does not answer, or takes nothing now; it has certainly not taken the job."""


class AmbiguousError(GpuSchedError):
    """Nobody knows whether the engine has taken the job: look by name before another try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do beyond the least."""

    time_limit: bool = False  # it ends a job by itself when its walltime is over
    refuses_impossible: bool = False  # at submit; else such a job would wait for ever
    # Our own jobs that wait there start by their rank; else it gets only those that fit its GPUs.
    orders: bool = True
    refuses_twice: bool = False  # a second submit of a key is refused
    array_max: int = 1  # jobs that it takes in one call (:class:`TakesArrays`)
    # After a submit of which nobody knows: for how long (s) it is looked for before another try.
    settle_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How an engine stands now."""

    up: bool
    text: str  # for people; where it is not up, why, in its own words
    version: str | None = None
    gpus: int | None = None  # that it has in all; None: not known


class EngineState(StrEnum):
    """Where a job is, as its engine says."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"  # how, the job's folder says
    CANCELLED = "cancelled"  # at the engine, by whomever
    TIMEOUT = "timeout"  # the engine's own time limit was over
    FAILED = "failed"  # the engine could not start it, or ended it
    UNKNOWN = "unknown"  # the engine does not know it, or not any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What an engine says of one job."""

    state: EngineState
    text: str = ""  # for people: why it waits, or what has become of it
    native: str | None = None  # the engine's own id
    where: str | None = None  # the node


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """One attempt of a job, as an engine gets it: how it is run, its folder says."""

    key: str
    folder: JobFolder
    name: str  # for people
    gpus: int = 1
    gpu_type: str | None = None  # what the user has asked for, in the engine's own words
    time_s: float | None = None
    rank: int = 0  # among our own jobs that wait there: 0 first

    @property
    def engine_name(self) -> str:
        """What it is called at the engine; the members of an array are called alike."""
        return NAME_PREFIX + parted(self.key)[0]

    @property
    def place(self) -> int | None:
        """Its place in an array; None: it is a single job."""
        return parted(self.key)[1]


class Engine(Protocol):
    """One engine. Every call may block for its own time limit, never longer; none is made from a
    notebook's main thread."""

    name: str

    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    def ping(self, timeout: float) -> Health:
        """How it stands; raises nothing. Everything else is left alone while it is down."""
        ...

    def submit(self, job: EngineJob) -> str:
        """Hand the job over and return the engine's own id.

        A second submit of the same key is harmless: whoever starts first on a node claims the
        folder, and the other one leaves.

        Raises:
            RejectedError: the engine will never take it.
            UnreachableError: it was not taken.
            AmbiguousError: nobody knows.
        """
        ...

    def status(self, keys: Sequence[str]) -> Mapping[str, Status]:
        """How these jobs stand, in one call for all; every key is in the answer.

        Raises:
            UnreachableError: the engine does not answer.
        """
        ...

    def rank(self, ranks: Mapping[str, int]) -> None:
        """Order our own jobs that wait there, 0 first; an engine without an order does nothing.

        Raises:
            UnreachableError: the engine does not answer.
        """
        ...

    def cancel(self, keys: Sequence[str]) -> None:
        """End these jobs; those that it does not know are over already.

        Raises:
            UnreachableError: the engine does not answer.
        """
        ...

    def reattach(self) -> Sequence[str]:
        """The keys of all jobs of ours that it knows and that are not over.

        Raises:
            UnreachableError: the engine does not answer.
        """
        ...


@runtime_checkable
class TakesArrays(Protocol):
    """What an engine may have beyond :class:`Engine`: several jobs in one call.

    They ask for the same, and their keys are those of one array (:func:`member_key`). Each is a job
    of its own from then on, by its own key. A single one of them, handed over again, goes to
    ``submit`` as every job does.
    """

    def submit_array(self, jobs: Sequence[EngineJob]) -> Sequence[str]:
        """Hand them over, all or none, and return the engine's own id of each.

        Raises:
            RejectedError, UnreachableError, AmbiguousError: as ``submit``, of all of them.
        """
        ...
