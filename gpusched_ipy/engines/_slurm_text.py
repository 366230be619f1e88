"""Slurm in words: the batch script of a job, and what its commands print. Pure; it runs nothing."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping

from gpusched_ipy.engines import (
    AmbiguousError,
    EngineJob,
    EngineState,
    RejectedError,
    Status,
    UnreachableError,
)
from gpusched_ipy.errors import GpuSchedError

# What squeue is asked for: the same on every version, while its JSON is not.
ROW = "%i|%j|%T|%r|%N"
NODE_ROW = "%N|%G|%T"
# One step of our own order. Nice only puts a job later; an ordinary user cannot have more.
NICE_STEP = 1000
# Our own timer ends a job; Slurm's, in whole minutes, comes a minute later at least.
_MARGIN_S = 60.0
_TYPE = re.compile(r"[A-Za-z0-9_.-]+")
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


def script(job: EngineJob, python: str = sys.executable) -> str:
    """The batch script that hands one job to its runner.

    Raises:
        RejectedError: what was asked for cannot be said to Slurm.
    """
    output = str(job.folder.path / "engine.log").replace("%", "%%")
    wanted = [
        f"--job-name={job.engine_name}",
        f"--output={output}",
        "--open-mode=append",
        "--chdir=/",
        "--nodes=1",
        "--ntasks=1",
        f"--gres={_gres(job)}",
        f"--nice={NICE_STEP * job.rank}",
        "--no-requeue",
    ]
    if job.time_s is not None:
        wanted.append(f"--time={math.ceil((job.time_s + _MARGIN_S) / 60)}")
    lines = [f"#SBATCH {_quoted(option)}" for option in wanted]
    start = shlex.join(["exec", python, "-I", str(job.folder.runner), str(job.folder.path)])
    return "\n".join(["#!/bin/sh", *lines, start, ""])


def _gres(job: EngineJob) -> str:
    if job.gpu_type is None:
        return f"gpu:{job.gpus}"
    if not _TYPE.fullmatch(job.gpu_type):
        raise RejectedError(
            f"--gpu-type {job.gpu_type}: Slurm knows GPUs by the type of its gres.conf, one word"
        )
    return f"gpu:{job.gpu_type}:{job.gpus}"


def _quoted(option: str) -> str:
    if "\n" in option or '"' in option:
        raise RejectedError(f"{option!r} cannot be written in a batch script; set engine_dir")
    name, _, value = option.partition("=")
    return f'{name}="{value}"' if re.search(r"[\s#'\\]", value) else option


def rows(text: str) -> dict[str, Status]:
    """How each job stands that squeue lists, by its name.

    A name may be listed twice (a restarted controller): the one that is most alive counts, of
    equals the newest.
    """
    found: dict[str, tuple[tuple[int, int], Status]] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 5:
            continue
        native, name, state, reason, nodes = (part.strip() for part in parts)
        status = _status(native, state, reason, nodes)
        number = int(re.sub(r"\D.*", "", native) or 0)
        rank = (_ALIVE.get(status.state, 0), number)
        if name not in found or rank > found[name][0]:
            found[name] = (rank, status)
    return {name: status for name, (_, status) in found.items()}


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
    text = _BADLY.get(state, "it ended badly at Slurm")
    return Status(state=EngineState.FAILED, text=f"{text} ({state})", native=native, where=where)


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
