"""What the commands of Slurm print, in our words. Pure; it runs nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from gpusched_ipy.engines import (
    NAME_PREFIX,
    AmbiguousError,
    EngineState,
    RejectedError,
    Status,
    UnreachableError,
    member_key,
    parted,
)
from gpusched_ipy.engines._slurm_script import NICE_STEP
from gpusched_ipy.errors import GpuSchedError

# What squeue is asked for: the same on every version, while its JSON is not.
ROW = "%i|%j|%T|%r|%N"
# A job's id, and that of the record which holds it: that of an array holds those that wait.
RECORD_ROW = "%i|%j|%A"
NODE_ROW = "%N|%G|%T"
_NATIVE = re.compile(r"(\d+)(?:_(\d+))?")
LEFT_ROW = "%i|%j|%L|%l"
_GPUS = re.compile(r"(?:^|,)gpu(?::[^,:()]+)?:(\d+)")

_QUEUED = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
)
_RUNNING = frozenset(
    {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING", "SUSPENDED"}
)
_BADLY = {
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "a job of higher priority has taken its place",
    "OUT_OF_MEMORY": "it used more memory than Slurm gave it",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline at Slurm was over",
    "FAILED": "it failed at Slurm",
    "SPECIAL_EXIT": "it failed at Slurm",
}
_NOT_LAUNCHED = "JobLaunchFailure"  # as where its node does not see its folder
_WAITS = {
    "Priority": "other jobs are ahead",
    "Resources": "no GPU or node is idle",
    "Dependency": "it depends on another job",
    "BeginTime": "its begin time has not come",
    "JobHeldUser": "held there by its user",
    "JobHeldAdmin": "held there by an administrator",
    "JobHoldMaxRequeue": "held there: it was requeued too often",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "PartitionTimeLimit": "its time is more than the partition allows",
    "PartitionNodeLimit": "the partition has too few nodes for it",
    "ReqNodeNotAvail": "a node that it needs is not available",
    "Reservation": "it waits for a reservation",
    "Licenses": "it waits for a licence",
    "NodeDown": "a node that it needs is down",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its quality of service is not valid",
    "Nodes required for job are DOWN": "its nodes are down, drained or reserved",
    "Cleaning": "an earlier run is being cleaned up",
}
_LIMIT = re.compile(r"^(QOS|Assoc|MaxGRES|MaxJobs|MaxCpu|MaxNode|MaxMem)")
# What sbatch says where nobody knows whether the job was taken …
_AMBIGUOUS = ("socket timed out", "zero bytes were transmitted", "connection reset")
# … where it surely was not, and a later try may do …
_LATER = (
    *("unable to contact slurm controller", "connection refused", "temporarily unable"),
    *("maxsubmit", "max submit", "job submit limit", "resource temporarily unavailable"),
    *("unable to process configuration file", "address already in use"),
)


def rows(text: str) -> dict[str, Status]:
    """How each job stands that squeue lists, by its name, or that of its array and its place.

    One may be listed twice (a restarted controller): the one that is most alive counts, of equals
    the newest. Those of an array that were cancelled together are listed by its name alone.
    """
    found: dict[str, tuple[tuple[int, int], Status]] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 5:
            continue
        native, name, state, reason, nodes = (part.strip() for part in parts)
        state = state.partition(" ")[0]  # sacct says "CANCELLED by 1000"
        nodes = "" if nodes == "None assigned" else nodes
        status = _status(native, state, reason, nodes)
        number, place = _id_parts(native)
        name = name if place is None else member_key(name, place)
        rank = (_ALIVE.get(status.state, 0), number)
        if name not in found or rank > found[name][0]:
            found[name] = (rank, status)
    return {name: status for name, (_, status) in found.items()}


def of_key(listed: Mapping[str, Status], name: str) -> Status | None:
    """How the job of that name, or that member of an array, stands among :func:`rows`."""
    return listed.get(name, listed.get(parted(name)[0]))


def names(keys: Iterable[str]) -> str:
    """The names of these jobs at Slurm, as its commands take them."""
    return ",".join(dict.fromkeys(NAME_PREFIX + parted(key)[0] for key in keys))


def _id_parts(native: str) -> tuple[int, int | None]:
    """The number of a job at Slurm, and its place in an array."""
    found = _NATIVE.match(native)
    if found is None:
        return 0, None
    return int(found[1]), None if found[2] is None else int(found[2])


def shares(text: str) -> dict[str, list[tuple[str, bool]]]:
    """The ids of each job that squeue lists by :data:`RECORD_ROW`, by its key as in :func:`rows`,
    and whether it shares a record with others: what is told one of these is told all."""
    listed = [parts for line in text.splitlines() if len(parts := line.split("|")) == 3]
    held = Counter(record for _, _, record in listed)
    found: dict[str, list[tuple[str, bool]]] = {}
    for native, name, record in listed:
        _, place = _id_parts(native)
        key = name if place is None else member_key(name, place)
        found.setdefault(key, []).append((native, held[record] > 1))
    return found


_ALIVE = {EngineState.RUNNING: 2, EngineState.QUEUED: 1}


def _status(native: str, state: str, reason: str, nodes: str) -> Status:
    where = nodes or None
    if state in _QUEUED:
        if "launch failed" in reason.lower():
            # It is held for ever then: it never ends by itself.
            text = "its node could not start it (launch failed)"
            return Status(state=EngineState.FAILED, text=text, native=native, where=where)
        return Status(state=EngineState.QUEUED, text=waiting(reason), native=native)
    if state in _RUNNING:
        text = "suspended by Slurm" if state == "SUSPENDED" else ""
        return Status(state=EngineState.RUNNING, text=text, native=native, where=where)
    if state == "COMPLETED":
        return Status(state=EngineState.ENDED, native=native, where=where)
    if state in ("CANCELLED", "REVOKED"):
        text = "cancelled in Slurm"
        return Status(state=EngineState.CANCELLED, text=text, native=native, where=where)
    if state == "TIMEOUT":
        text = "its time limit at Slurm was over"
        return Status(state=EngineState.TIMEOUT, text=text, native=native, where=where)
    if reason == _NOT_LAUNCHED:
        text = f"its node could not start it ({reason})"
        return Status(state=EngineState.FAILED, text=text, native=native, where=where)
    text = _BADLY.get(state, "it ended badly at Slurm")
    return Status(state=EngineState.FAILED, text=f"{text} ({state})", native=native, where=where)


def left(text: str) -> dict[str, tuple[str, float | None, float | None]]:
    """Of each running job that ``squeue`` lists, by its name: the id, the seconds that are left to
    it, and its whole time limit; None: there is no limit."""
    found = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 4:
            native, name, rest, limit = parts
            found[name] = (native, _span_s(rest), _span_s(limit))
    return found


def _span_s(text: str) -> float | None:
    """Seconds of ``1-02:03:04``, ``2:03:04``, ``3:04`` or ``4``."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        return 0.0 if text == "INVALID" else None
    days, _, clock = text.rpartition("-")
    seconds = 86400 * int(days or 0)
    for place, part in zip((1, 60, 3600), reversed(clock.split(":")), strict=False):
        seconds += place * int(part)
    return float(seconds)


def too_long(status: Status) -> bool:
    """Whether a job waits because it asks for more time than it may ever have."""
    return any(word in status.text for word in ("PartitionTimeLimit", "MaxWall"))


def waiting(reason: str) -> str:
    """Why a job waits in Slurm: in plain words, with Slurm's own word for a search."""
    bare = reason.strip("()").split(",")[0].strip()
    if bare in ("", "None"):
        return "not looked at yet"
    plain = _WAITS.get(bare)
    if plain is None and _LIMIT.match(bare):
        plain = "a limit of the site is reached"
    return f"{plain} ({bare})" if plain else bare


def gpus(text: str) -> int | None:
    """How many GPUs the nodes have that ``sinfo -N`` lists; None where it lists no node.

    A node stands there once for each of its partitions.
    """
    nodes: dict[str, int] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) == 3 and not parts[2].startswith(("down", "drained", "fail")):
            nodes[parts[0]] = sum(int(number) for number in _GPUS.findall(parts[1]))
    return sum(nodes.values()) if nodes else None


def has_accounts(text: str) -> bool:
    """Whether ``scontrol show config`` names slurmdbd as the place of accounts."""
    return bool(re.search(r"^AccountingStorageType\s*=\s*\S+/slurmdbd", text, re.MULTILINE))


def array_max(text: str) -> int:
    """MaxArraySize of ``scontrol show config``: the most jobs of an array; 1: it takes none."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return max(1, int(found[1])) if found else 1


def message_timeout_s(text: str) -> float:
    """MessageTimeout of ``scontrol show config``; Slurm's own default where it does not say."""
    found = re.search(r"^MessageTimeout\s*=\s*(\d+)", text, re.MULTILINE)
    return float(found[1]) if found else 10.0


def native_id(text: str) -> str:
    """The id that ``sbatch --parsable`` prints."""
    return text.strip().splitlines()[-1].partition(";")[0].strip() if text.strip() else ""


def refusal(stderr: str) -> GpuSchedError:
    """What sbatch's complaint means."""
    said, low = words(stderr), stderr.lower()
    if any(part in low for part in _AMBIGUOUS):
        return AmbiguousError(said)
    if any(part in low for part in _LATER):
        return UnreachableError(said)
    return RejectedError(said)


def words(stderr: str) -> str:
    """A command's complaint in one line, without its name in front of each."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line)[:400] or "no word of why"


def ranks_of(ranks: Mapping[str, int], listed: Mapping[str, Status]) -> dict[str, int]:
    """For each waiting job that squeue lists its nice, by Slurm's id."""
    return {
        status.native: NICE_STEP * ranks[name]
        for name, status in listed.items()
        if name in ranks and status.state is EngineState.QUEUED and status.native
    }
