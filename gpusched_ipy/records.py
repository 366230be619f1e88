"""A job and a reading as JSON for other programs: the promise of ``docs/schemas``. Pure.

Every key is always present, what is unknown is null, times are ISO 8601 with their zone, ratios are
0-1.
"""

from __future__ import annotations

import signal
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from gpusched_ipy.config import Instant
from gpusched_ipy.job import ExpectedStart, Job, JobState, effective_priority
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.text import END_OF_TIME, clean, format_bytes

# A start within so many seconds is said to be now, or told to the second.
_NOW_S, _SOON_S = 3.0, 180.0


def iso(wall: float | None) -> str | None:
    """A wall clock time (s since the epoch) as ISO 8601 with its zone (UTC)."""
    if wall is None or not 0 <= wall < END_OF_TIME:
        return None
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")


def job_json(
    job: Job,
    now: Instant,
    *,
    aging_s: float = 600.0,
    effective: float | None = None,
    expected: ExpectedStart | None = None,
    log: str | None = None,
) -> dict[str, Any]:
    """A job as other programs get it; every key is always present.

    Args:
        job: the job.
        now: for spans that still run.
        aging_s: the setting, for the effective priority.
        effective: the effective priority where the caller knows it better.
        expected: when it is expected to start, where that is known.
        log: the path of its log.
    """
    spec, request = job.spec, asdict(job.request)
    request["begin_at"] = iso(job.request.begin_at)
    request |= {"sweep": dict(spec.sweep), "key": spec.key}
    if effective is None:
        waits = job.state is JobState.PENDING
        effective = effective_priority(job, aging_s, now.mono) if waits else float(job.priority)
    return {
        "id": job.id,
        "uid": spec.uid,
        "name": job.name,
        "kind": str(job.kind),
        "engine": spec.engine,
        "array": asdict(spec.array) if spec.array else None,
        "labels": dict(spec.labels),
        "after": [*job.request.after, *job.request.after_any],
        "state": str(job.state),
        "held": job.held,
        "priority": job.priority,
        "effective_priority": round(effective, 3),
        "reason": why_it_waits(job),
        "gpus": list(job.gpus or (job.place.uuids if job.place else ())),
        "place": {"host": job.place.host, "gpus": job.place.gpus} if job.place else None,
        "request": {key: _plain(value) for key, value in request.items()},
        "argv": None if spec.argv is None else list(spec.argv),
        "cwd": spec.cwd,
        "owner": spec.owner,
        "submitted_at": iso(job.submitted_at),
        "started_at": iso(job.started_at),
        "ended_at": iso(job.ended_at),
        "wait_s": _wait_s(job, now),
        "run_s": _run_s(job, now),
        "gpu_s": _gpu_s(job, now),
        "exit_code": job.exit_code,
        "signal": signal_name(job.signal),
        "error": job.error,
        "attempts": job.attempts,
        "retried": job.retried,
        "requeued": job.requeued,
        "oom": job.oom,
        "log": log,
        **_expected(expected),
        "usage": _usage(job),
    }


def _expected(expected: ExpectedStart | None) -> dict[str, Any]:
    if expected is None:
        return dict.fromkeys(("expected_start", "expected_start_range", "expected_start_runs"))
    return {
        "expected_start": iso(expected.at),
        "expected_start_range": [iso(expected.low), iso(expected.high)],
        "expected_start_runs": expected.runs,
    }


def expected_text(expected: ExpectedStart, now: Instant) -> str:
    """An expected start for people: ``about 14:05 (13:50-14:40; 6 past runs)``."""
    if expected.high - now.wall < _NOW_S:
        return "about now"
    low, at, high = (_clock(wall, now.wall) for wall in (expected.low, expected.at, expected.high))
    if expected.runs is None:
        rests_on = ""
    elif expected.runs == 0:
        rests_on = "; by walltimes"
    else:
        rests_on = f"; {expected.runs} past run{'s' if expected.runs > 1 else ''}"
    return f"about {at} ({low}\u2013{high}{rests_on})"


def _clock(wall: float, now: float) -> str:
    """A time of this machine's clock: with its day where that is another, seconds where soon."""
    at, today = (datetime.fromtimestamp(value, UTC).astimezone() for value in (wall, now))
    if wall - now < _SOON_S:
        return at.strftime("%H:%M:%S")
    if at.date() == today.date():
        return at.strftime("%H:%M")
    return at.strftime("%a %H:%M" if wall - now < 6 * 86400 else "%d %b %H:%M")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def why_it_waits(job: Job) -> str | None:
    """The text of the wait reason, of a job that waits."""
    return job.reason.text if job.reason and job.state is JobState.PENDING else None


def _wait_s(job: Job, now: Instant) -> float:
    """Seconds from submit to start, to its end without a start, or until now."""
    known = (job.started_at, job.ended_at) if job.state is not JobState.PENDING else ()
    until = next((at for at in known if at is not None), now.wall)
    return round(max(0.0, until - job.submitted_at), 3)


def _run_s(job: Job, now: Instant) -> float | None:
    if job.run_s is not None:
        return round(job.run_s, 3)
    if job.started_at is None or job.state is JobState.PENDING:
        return None
    until = now.wall if job.ended_at is None else job.ended_at
    return round(max(0.0, until - job.started_at), 3)


def _gpu_s(job: Job, now: Instant) -> float | None:
    run_s = _run_s(job, now)
    count = len(job.gpus) if job.place is None else job.place.count
    return None if run_s is None else round(run_s * count, 3)


def over_memory(job: Job) -> str | None:
    """What is said of a job that used far more GPU memory than it declared; None of others."""
    declared, peak = job.request.mem_bytes, job.peak_mem_bytes
    if declared is None or peak is None or not job.gpus or job.state is JobState.PENDING:
        return None
    if not far_over(peak, declared * len(job.gpus)):
        return None
    return f"used {format_bytes(peak)} of GPU memory, declared {format_bytes(declared)}"


def far_over(used_bytes: int, declared_bytes: int) -> bool:
    """Whether a job uses far more memory than it declared: a quarter more, and 512 MiB at least.

    A driver's context alone takes some hundred MiB, which nobody declares.
    """
    return used_bytes - declared_bytes > max(declared_bytes // 4, 512 << 20)


def signal_name(number: int | None) -> str | None:
    """``SIGKILL`` for 9."""
    if number is None:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return f"signal {number}"


def _usage(job: Job) -> dict[str, Any] | None:
    values = (job.peak_mem_bytes, job.mean_utilization, job.energy_j)
    if values == (None, None, None):
        return None
    return dict(zip(("peak_mem_bytes", "mean_utilization", "energy_j"), values, strict=True))


def gpus_json(snapshot: Snapshot, now: Instant) -> dict[str, Any]:
    """A reading as other programs get it; every key is always present, unknown is null."""
    return {
        "backend": snapshot.backend,
        "source": snapshot.source,
        "driver": snapshot.driver,
        "taken_at": iso(snapshot.taken_at),
        "age_s": round(snapshot.age_s(now.mono), 3),
        "problem": snapshot.problem,
        "gpus": [_gpu_json(gpu) for gpu in snapshot.gpus],
    }


_GPU_KEYS = (
    *("uuid", "index", "name", "vendor", "utilization", "mem_used_bytes", "mem_total_bytes"),
    *("mem_kind", "temperature_c", "power_w", "health", "parent"),
)
_PROCESS_KEYS = ("pid", "user", "name", "mem_bytes", "job")


def _gpu_json(gpu: Gpu) -> dict[str, Any]:
    values: dict[str, Any] = {key: getattr(gpu, key) for key in _GPU_KEYS}
    values |= {"mem_kind": str(gpu.mem_kind), "health": str(gpu.health)}
    if gpu.processes is None:
        return values | {"processes": None}
    listed = [{key: getattr(item, key) for key in _PROCESS_KEYS} for item in gpu.processes]
    return values | {"processes": listed}


def how_it_stands(job: Job) -> str:
    """The state of a job in one line, with its reason or how it ended."""
    why = job.error
    if job.state is JobState.PENDING:
        why = job.reason.text if job.reason else None
    elif why is None and job.signal is not None:
        why = f"ended by {signal_name(job.signal)}"
    elif why is None and job.exit_code:
        why = f"exit status {job.exit_code}"
    return f"{job.state}, {clean(why)}" if why else str(job.state)
