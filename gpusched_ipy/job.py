"""What a job asks for, its states and its moves, as plain data. It reads and decides nothing.

The life of a job is the table :data:`TRANSITIONS`; the diagram in the docs is generated from it.
``held`` and ``cancel_requested`` are columns, never states. Higher priority runs first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from gpusched_ipy.pretty import Shown

PRIORITY_RANGE = (-1000, 1000)
MAX_NAME_BYTES = 256
MAX_SPEC_BYTES = 64 * 1024
MAX_ENVIRONMENT_BYTES = 2 * 1024 * 1024
MAX_QUEUED = 100_000


class JobState(StrEnum):
    """Where a job is in its life."""

    PENDING = "pending"  # waits for its turn; its wait reason says for what
    STARTING = "starting"  # claimed by a member, not yet begun
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"  # it ran and ended badly, or could not be started
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"  # its walltime ran out
    LOST = "lost"  # nobody can know how it ended


FINAL = frozenset(
    {JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMEOUT, JobState.LOST}
)
ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING})

# From each state the states it may move to. A job goes back to pending only when it provably never
# began, or when its user asked for a requeue.
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.PENDING: frozenset(
            {JobState.STARTING, JobState.CANCELLED, JobState.LOST, JobState.FAILED}
        ),
        JobState.STARTING: frozenset(
            {JobState.RUNNING, JobState.PENDING, JobState.FAILED, JobState.CANCELLED, JobState.LOST}
        ),
        JobState.RUNNING: frozenset({*FINAL, JobState.PENDING}),
        JobState.COMPLETED: frozenset({JobState.PENDING}),
        JobState.FAILED: frozenset({JobState.PENDING}),
        JobState.CANCELLED: frozenset({JobState.PENDING}),
        JobState.TIMEOUT: frozenset({JobState.PENDING}),
        JobState.LOST: frozenset({JobState.PENDING}),
    }
)


class JobKind(StrEnum):
    """What a job runs."""

    CELL = "cell"  # in its own kernel, live namespace
    ISOLATED = "isolated"  # a cell in a fresh Python
    COMMAND = "command"  # an argument vector in a process tree of its own
    CALLABLE = "callable"  # a Python function of an executor
    ALLOCATION = "allocation"  # only the GPUs: `with gpuqueue():`


# Only the member that submitted such a job can run it, and it ends with that member.
BOUND_KINDS = frozenset({JobKind.CELL, JobKind.ALLOCATION})


class WaitCode(StrEnum):
    """Why a pending job waits, for programs; the text beside it is for people."""

    HELD = "held"
    DRAINED = "drained"
    BEGIN_TIME = "begin_time"
    DEPENDENCY = "dependency"
    KERNEL_BUSY = "kernel_busy"
    NO_READING = "no_reading"
    PRIORITY = "priority"  # jobs ahead of it
    GPU_BUSY = "gpu_busy"  # a stranger
    GPU_ALLOCATED = "gpu_allocated"  # jobs of ours
    QUIET = "quiet"  # the quiet window runs
    MEMORY = "memory"
    TOO_BIG = "too_big"
    PINNED = "pinned"
    MAX_RUNNING = "max_running"
    RESERVATION = "reservation"
    ENGINE = "engine"
    STARTING_SOON = "starting_soon"  # it fits; the member that starts it has not come round yet


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitReason:
    """Why a job waits: the code, and a sentence that a person understands."""

    code: WaitCode
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job needs before it may start, and what it may do at its end."""

    gpus: int = 1
    mem_bytes: int | None = None  # declared memory per GPU: the job shares its GPUs
    on_gpu: str | None = None  # UUID, index, part of a name, or MIG profile
    after: tuple[int, ...] = ()  # jobs that must have completed
    after_any: tuple[int, ...] = ()  # jobs that must have ended, however
    begin_at: float | None = None  # wall clock, s
    time_s: float | None = None  # walltime
    retries: int = 0  # run again when it has failed, at most so often
    retry_delay_s: float = 10.0  # before the first retry; each further one waits twice as long
    requeue: bool = False  # run again when it was lost
    retry_oom: bool = False  # run again once, with more memory, when it ran out of GPU memory
    max_running: int | None = None  # of its array, at once

    @property
    def shared(self) -> bool:
        """Whether the job shares its GPUs: it declared its memory."""
        return self.mem_bytes is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPlace:
    """The place of a job in a sweep."""

    id: str
    index: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A job as it is submitted. The submitter makes ``uid``: so a retry is no second job."""

    uid: str
    kind: JobKind
    name: str
    priority: int = 0
    request: Request = Request()
    held: bool = False
    argv: tuple[str, ...] | None = None
    shell: bool = False  # argv is one line for /bin/sh, asked for by the user and shown as such
    code: str | None = None  # the body of a cell
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    env_names: tuple[str, ...] = ()  # of --env; their values lie in a file until the job starts
    labels: Mapping[str, str] = field(default_factory=dict)
    array: ArrayPlace | None = None
    sweep: Mapping[str, str] = field(default_factory=dict)  # this member's values
    key: str | None = None
    engine: str = "local"
    owner: str = ""  # the notebook or terminal, for people
    home: str | None = None  # the member that alone can run it (BOUND_KINDS)
    cell_id: str | None = None
    in_place: bool = False  # the cell holds its kernel's main thread while it waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the last attempt of a job of an engine ran. Its GPUs are none of this machine's."""

    engine: str
    count: int  # GPUs, as asked for
    host: str | None = None
    gpus: str | None = None  # as the node calls them: "0,1", or UUIDs

    @property
    def uuids(self) -> tuple[str, ...]:
        """Its GPUs, where the engine names them by their UUIDs."""
        names = tuple((self.gpus or "").split(","))
        return names if all(name.startswith(("GPU-", "MIG-")) for name in names) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Shown):
    """A job as the record has it. Times in ``*_at`` are wall clock (s); ``*_mono`` decide."""

    id: int
    spec: JobSpec
    state: JobState
    priority: int  # as it stands now; the spec keeps what was asked at submit
    held: bool = False
    cancel_requested: bool = False
    member: str | None = None  # the key of the member that has claimed or runs it
    epoch: int = 0  # rises with every claim
    attempt: str | None = None  # uuid of the running attempt; names its log
    attempts: int = 0  # how often it has been started
    retried: int = 0  # of these: after a failure
    requeued: int = 0  # … and after a loss
    oom: bool = False  # its last attempt ran out of GPU memory
    oom_retried: bool = False  # it has had the one more try for that
    not_before_mono: float | None = None  # it waits until then, on the monotonic clock
    hold_reason: str | None = None  # why the queue itself has held it; None: its user has
    gpus: tuple[str, ...] = ()  # UUIDs allocated here, or of its last allocation
    place: Place | None = None  # of a job of an engine, once it has begun
    reason: WaitReason | None = None
    reason_since: float | None = None  # wall clock, s
    submitted_at: float = 0.0
    queued_mono: float = 0.0  # since when it has waited, on the monotonic clock of this boot
    started_at: float | None = None
    started_mono: float | None = None
    ended_at: float | None = None
    run_s: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    peak_mem_bytes: int | None = None
    mean_utilization: float | None = None
    energy_j: float | None = None

    _repr_pretty_ = Shown._repr_pretty_  # IPython would take the dataclass's own repr

    @property
    def name(self) -> str:
        """The name given at submit, or made there."""
        return self.spec.name

    @property
    def kind(self) -> JobKind:
        """What the job runs."""
        return self.spec.kind

    @property
    def request(self) -> Request:
        """What the job needs."""
        return self.spec.request

    @property
    def ended(self) -> bool:
        """Whether the job is over."""
        return self.state in FINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayState:
    """How a sweep stands. Where a member was submitted again only its newest job counts."""

    id: str
    name: str
    first: int  # the lowest id of a job
    last: int
    jobs: int  # how many there are, those that were submitted again included
    size: int  # how many members there are
    priority: int  # of the first that waits, else of the last job
    submitted_at: float  # of the first; wall clock, s
    ended_at: float | None = None  # of the last, where every member is over
    states: Mapping[JobState, int] = field(default_factory=dict)
    held: int = 0  # of the pending ones
    reason: str | None = None  # why the first that waits does
    gpus: tuple[str, ...] = ()  # that its members have now, by UUID

    @property
    def ended(self) -> bool:
        """Whether every member is over."""
        return not any(self.states.get(state) for state in JobState if state not in FINAL)

    @property
    def reference(self) -> str:
        """What names all its jobs: their numbers, where no other job stands between them."""
        together = self.last - self.first + 1 == self.jobs
        return f"{self.first}-{self.last}" if together else f"array:{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """GPUs that a job of ours has now, or had until a moment ago (then ``ended_mono`` is set)."""

    job_id: int
    gpus: tuple[str, ...]
    shared: bool = False
    mem_bytes: int | None = None  # declared, per GPU
    started_mono: float = 0.0
    expected_end_mono: float | None = None  # by walltime or learned duration
    ended_mono: float | None = None
    label: str = ""  # for wait reasons: "job 12 (train)"
    owner: str = ""  # the notebook or terminal of its job, for turns between them
    array: str | None = None  # the sweep of its job, for max_running


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process that uses the queue, as decisions see it."""

    key: str
    label: str  # "notebook train.ipynb", for people
    busy: bool = False  # its main thread runs something: its cells cannot start
    pinned_gpus: tuple[str, ...] | None = None  # the only GPUs its cells can use
    idle_s: float | None = None  # since when it has run nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedStart:
    """When a pending job is expected to start, on the wall clock (s)."""

    at: float
    low: float  # eight of ten times it is not earlier …
    high: float  # … and not later
    # The fewest past runs behind a duration that it rests on; 0: walltimes alone, None: on nothing,
    # its GPUs are free.
    runs: int | None = None


def may_move(start: JobState, end: JobState) -> bool:
    """Whether the table allows that move."""
    return end in TRANSITIONS[start]


def effective_priority(job: Job, aging_s: float, mono: float) -> float:
    """The priority of a job after aging: one step more per ``aging_s`` of waiting."""
    return job.priority + max(0.0, mono - job.queued_mono) / aging_s
