"""What the panel says: the messages for its page, built from readings and jobs. Plain data.

It sends nothing and owns no thread. Every message stands on its own, so that one that is lost is
healed by the next: a *state* is complete, a *tick* repeats the last readings and the answers of the
last seconds, a *past* is the whole history.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpusched_ipy.entries import Entry
from gpusched_ipy.folding import counts
from gpusched_ipy.job import ACTIVE, FINAL, ArrayState, Job, JobState
from gpusched_ipy.snapshot import Gpu, Health, Snapshot
from gpusched_ipy.text import clean
from gpusched_ipy.view import process_line, titled

WINDOW_S = 600.0  # what the plots show
PAGE = 200  # rows of the queue in one state
MAX_POINTS = 600  # of one GPU in a past
MAX_SPANS = 60  # of one GPU in a state
REPEATED = 3  # readings in a tick: two lost ticks in a row leave no hole
NAME_LIMIT, REASON_LIMIT, PROBLEM_LIMIT = 80, 240, 700
_GIB = 2**30
_NAN = math.nan
_UNWELL = {
    Health.LOST: "this GPU has fallen off the bus",
    Health.RESET_REQUIRED: "this GPU must be reset",
    Health.DRIVER_MISMATCH: "driver and library do not match",
    Health.ASLEEP: "asleep",
    Health.UNKNOWN: "its health is unknown",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """The part of the queue that is shown, and what the whole holds."""

    rows: tuple[Entry, ...] = ()  # in the order in which they are shown
    offset: int = 0
    total: int = 0  # rows in all
    running: int = 0
    waiting: int = 0
    held: int = 0
    starts: Mapping[int, str] = field(default_factory=dict)  # "about 14:05 (13:50-14:40)", by id
    spans: tuple[Job, ...] = ()  # every job that had a GPU in the last minutes
    drained: bool = False
    trouble: str | None = None  # why the queue cannot be read


def state_message(
    snapshot: Snapshot | None,
    gpus: Sequence[Gpu],
    page: JobPage,
    *,
    source: str,
    members: Mapping[str, str],
    now: float,
    absent: bool = False,
) -> dict[str, Any]:
    """Everything but the readings; without ``now`` in it, so that equal states are equal.

    Args:
        snapshot: the newest reading, None before the first one.
        gpus: the GPUs shown, those of ``snapshot`` or, where it failed, those last known.
        page: the queue.
        source: what is read, for people.
        members: what each member of the queue is called, by its key.
        now: wall clock, s; only decides which spans are still in the window.
        absent: the problem is that this machine has no GPU that can be read.
    """
    places = {gpu.uuid: place for place, gpu in enumerate(gpus)}
    names = {gpu.uuid: _short(gpu, place) for place, gpu in enumerate(gpus)}
    return {
        "t": "state",
        "source": clean(source, REASON_LIMIT),
        "absent": absent,
        "problem": problem_of(snapshot),
        "gpus": [_gpu_entry(gpu, page, members) for gpu in gpus],
        "jobs": [row_entry(row, page, names) for row in page.rows],
        "spans": _spans(page.spans, places, now),
        "offset": page.offset,
        "limit": PAGE,
        "total": page.total,
        "counts": {"running": page.running, "waiting": page.waiting, "held": page.held},
        "drained": page.drained,
        "trouble": page.trouble,
    }


def problem_of(snapshot: Snapshot | None) -> str | None:
    """Why the last reading failed, as the page may show it."""
    return clean(snapshot.problem, PROBLEM_LIMIT) if snapshot and snapshot.problem else None


def row_entry(row: Entry, page: JobPage, names: Mapping[str, str]) -> dict[str, Any]:
    """One row of the queue.

    Args:
        names: how people call the GPUs.
    """
    entry = _job_entry(row.job, names, page.starts.get(row.job.id))
    ahead = row.ahead - page.running
    if row.job.state is JobState.PENDING and entry["reason"] is None and ahead > 0:
        # Reasons are recorded for the first in line only; others are told their place.
        entry["reason"] = f"{ahead} ahead of it in line"
    if row.sweep is not None:
        entry |= _sweep_entry(row, row.sweep, entry, names)
    return entry | ({"member": True} if row.member else {})


def _sweep_entry(
    row: Entry, sweep: ArrayState, first: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    """What a row says that stands for a whole sweep, where ``first`` is its first job's."""
    waiting = sweep.states.get(JobState.PENDING, 0)
    running = any(sweep.states.get(state) for state in ACTIVE)
    where = "on " + ", ".join(names.get(gpu, gpu) for gpu in sweep.gpus) if sweep.gpus else None
    why = clean(sweep.reason, REASON_LIMIT) if sweep.reason else None
    told = (counts(sweep), where or first["reason"], why if where else None)
    return {
        "sweep": True,
        "key": row.key,
        "label": f"#{sweep.reference}" if sweep.reference[0].isdigit() else f"#{row.job.id} …",
        "name": clean(f"{sweep.name} \u00d7{sweep.size}", NAME_LIMIT),
        "state": "running" if running else "pending",
        "held": bool(waiting) and sweep.held == waiting,
        "waits": waiting > 0,
        "cancel": False,
        "priority": sweep.priority,
        "reason": " · ".join(part for part in told if part),
        "since": sweep.submitted_at,
        "unfolded": row.unfolded,
    }


def _job_entry(job: Job, names: Mapping[str, str], expected: str | None) -> dict[str, Any]:
    since = job.started_at if job.state is JobState.RUNNING else job.submitted_at
    return {
        "id": job.id,
        "name": clean(titled(job), NAME_LIMIT),
        "kind": str(job.kind),
        "state": str(job.state),
        "held": job.held,
        "cancel": job.cancel_requested,
        "priority": job.priority,
        "owner": clean(job.spec.owner, NAME_LIMIT),
        "reason": _reason(job, names),
        "expected": expected if job.state is JobState.PENDING and not job.held else None,
        "since": since,
    }


def _reason(job: Job, names: Mapping[str, str]) -> str | None:
    """Why it waits, or where it runs."""
    if job.state in ACTIVE:
        return "on " + ", ".join(names.get(uuid, uuid) for uuid in job.gpus) if job.gpus else None
    return clean(job.reason.text, REASON_LIMIT) if job.reason else None


def _short(gpu: Gpu, place: int) -> str:
    return f"GPU {place if gpu.index is None else gpu.index}"


def _gpu_entry(gpu: Gpu, page: JobPage, members: Mapping[str, str]) -> dict[str, Any]:
    note = _UNWELL.get(gpu.health)
    if note and gpu.health_text:
        note = clean(f"{note}: {gpu.health_text}", REASON_LIMIT)
    return {
        "key": gpu.uuid,
        "index": gpu.number,
        "name": clean(gpu.name, NAME_LIMIT),
        "total": gpu.mem_total_bytes,
        "limit": gpu.power_limit_w,
        "kind": str(gpu.mem_kind),
        "health": str(gpu.health),
        "note": note,
        "who": _who(gpu, page, members),
    }


def _who(gpu: Gpu, page: JobPage, members: Mapping[str, str]) -> list[dict[str, Any]]:
    """Our jobs on that GPU, then its other processes with what each holds."""
    ours = [job for job in page.spans if job.state in ACTIVE and gpu.uuid in job.gpus]
    lines: list[dict[str, Any]] = [
        {"text": clean(f"#{job.id} {job.name}", NAME_LIMIT), "job": job.id} for job in ours
    ]
    if gpu.processes is None:
        return [*lines, {"text": "processes unknown", "job": None}]
    others = [item for item in gpu.processes if item.job is None]
    others.sort(key=lambda item: -(item.mem_bytes or 0))
    lines += [{"text": process_line(item, members=members), "job": None} for item in others[:4]]
    if len(others) > 4:
        lines.append({"text": f"and {len(others) - 4} more", "job": None})
    return lines or [{"text": "no process", "job": None}]


def _spans(jobs: Iterable[Job], places: Mapping[str, int], now: float) -> list[dict[str, Any]]:
    """Who ran when, on which of the shown GPUs; the newest ones where there are too many."""
    found: dict[int, list[dict[str, Any]]] = {}
    for job in sorted(jobs, key=lambda job: -(job.started_at or 0)):
        if not in_window(job, now):
            continue
        entry = {
            "id": job.id,
            "name": clean(job.name, NAME_LIMIT),
            "state": str(job.state),
            "start": job.started_at,
            "end": job.ended_at,
        }
        for place in (places[uuid] for uuid in job.gpus if uuid in places):
            listed = found.setdefault(place, [])
            if len(listed) < MAX_SPANS:
                listed.append({**entry, "gpu": place})
    return [entry for place in sorted(found) for entry in found[place]]


def in_window(job: Job, now: float) -> bool:
    """Whether the job had a GPU within the last minutes."""
    if job.started_at is None or (job.state not in FINAL and job.state not in ACTIVE):
        return False
    return job.ended_at is None or job.ended_at > now - WINDOW_S


def point(gpu: Gpu | None, at: float) -> tuple[float, ...]:
    """Time, utilization (0-1), GiB used, °C, W, throttled (0 or 1); NaN is unknown."""
    if gpu is None:
        return (at, _NAN, _NAN, _NAN, _NAN, _NAN)
    used = gpu.mem_used_bytes
    return (
        at,
        _number(gpu.utilization),
        _NAN if used is None else used / _GIB,
        _number(gpu.temperature_c),
        _number(gpu.power_w),
        _NAN if gpu.throttled is None else float(gpu.throttled),
    )


def _number(value: float | None) -> float:
    return _NAN if value is None else value


def pack(
    snapshots: Sequence[Snapshot], keys: Sequence[str], base: float
) -> tuple[list[int], bytes]:
    """24 bytes a point, GPU after GPU, times relative to ``base``; and how many points each has.

    A reading that failed has no point: the line is interrupted there.
    """
    good = [snapshot for snapshot in snapshots if not snapshot.problem]
    values = array("f")
    for key in keys:
        for snapshot in good:
            values.extend(point(snapshot.gpu(key), snapshot.taken_at - base))
    if sys.byteorder == "big":
        values.byteswap()
    return [len(good)] * len(keys), values.tobytes()


def thin(snapshots: Sequence[Snapshot], limit: int = MAX_POINTS) -> list[Snapshot]:
    """At most ``limit`` readings: in each stretch of time the one with the highest utilization.

    The peaks are what people look for; the picture of a busy GPU must not lose them.
    """
    if len(snapshots) <= limit:
        return list(snapshots)
    first = snapshots[0].taken_mono
    width = (snapshots[-1].taken_mono - first) / limit or 1.0
    best: dict[int, Snapshot] = {}
    for snapshot in snapshots:
        place = min(limit - 1, int((snapshot.taken_mono - first) / width))
        known = best.get(place)
        if known is None or _peak(snapshot) > _peak(known):
            best[place] = snapshot
    return [best[place] for place in sorted(best)]


def _peak(snapshot: Snapshot) -> float:
    return max((gpu.utilization or 0.0 for gpu in snapshot.gpus), default=-1.0)
