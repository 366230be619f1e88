"""The badge: one line under a queued cell that says how its job stands. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from gpusched_ipy.folding import counts
from gpusched_ipy.job import ArrayState, Job, JobState
from gpusched_ipy.records import signal_name
from gpusched_ipy.sweep import label
from gpusched_ipy.text import clean, escape, format_duration

_WORD = {
    JobState.PENDING: "queued",
    JobState.STARTING: "starting",
    JobState.RUNNING: "running",
    JobState.COMPLETED: "done",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.TIMEOUT: "timed out",
    JobState.LOST: "lost",
}
_SIGN = {
    JobState.PENDING: "◷",
    JobState.STARTING: "▷",
    JobState.RUNNING: "▶",
    JobState.COMPLETED: "✓",
    JobState.FAILED: "✗",
    JobState.CANCELLED: "⊘",
    JobState.TIMEOUT: "✗",
    JobState.LOST: "?",
}
_TEXT_LIMIT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What a badge says besides the job itself."""

    gpus: Sequence[str] = ()  # what people call the job's GPUs: "GPU 0"
    pinned: Sequence[str] = ()  # the GPUs that this kernel is bound to
    replaced: Sequence[int] = ()  # older jobs of the same cell
    note: str | None = None  # one more thing to say
    expected: str | None = None  # when it is expected to start


def bundle(job: Job, around: Around) -> dict[str, str]:
    """The badge for any front end: HTML in the page's own colours, and plain text."""
    first, rest = _words(job, around)
    return _dressed(f"{_SIGN[job.state]} {first}", rest, job.state, job.spec.uid)


def _dressed(head: str, rest: Sequence[str], state: JobState, of: str) -> dict[str, str]:
    plain = " · ".join([head, *rest])
    more = "".join(f" · {escape(part, _TEXT_LIMIT)}" for part in rest)
    style = "font-size:90%;border-left:3px solid currentColor;padding:1px 8px;opacity:.85"
    html = (
        f'<div class="gpusched-badge gpusched-{state} gpusched-of-{escape(of, _TEXT_LIMIT)} '
        'mathjax_ignore tex2jax_ignore" '
        f'role="status" style="{style}"><b>{escape(head, _TEXT_LIMIT)}</b>{more}</div>'
    )
    return {"text/plain": clean(plain, 4 * _TEXT_LIMIT), "text/html": html}


def sweep_bundle(array: ArrayState, around: Around) -> dict[str, str]:
    """The one badge of a sweep."""
    rest = [counts(array)]
    if array.reason and not array.ended:
        rest.append(array.reason)
    if array.ended and array.ended_at is not None:
        rest.append(f"took {_span(array.ended_at - array.submitted_at)}")
    elif not array.ended:
        rest.append(f"since {_clock(array.submitted_at)}")
    if around.replaced:
        rest.append(f"replaces {len(around.replaced)} jobs")
    if around.note:
        rest.append(around.note)
    state = next(state for state in _SWEEP_STATES if array.states.get(state))
    name = "" if array.name in ("", "cell") else f" {array.name}"
    head = f"{_SIGN[state]} {_WORD[state]} #{array.reference}{name} \u00d7{array.size}"
    return _dressed(head, rest, state, array.id)


# A sweep is called by what the first of these that has a member says.
_SWEEP_STATES = (
    JobState.RUNNING,
    JobState.STARTING,
    JobState.PENDING,
    JobState.FAILED,
    JobState.LOST,
    JobState.TIMEOUT,
    JobState.CANCELLED,
    JobState.COMPLETED,
)


def heading(job: Job) -> dict[str, str]:
    """What stands above the output of a member of a sweep: its values."""
    text = f"#{job.id} {label(job.spec.sweep)}"
    style = "font-weight:bold;border-bottom:1px solid currentColor;margin-top:.6em"
    html = f'<div class="gpusched-heading" style="{style}">{escape(text, _TEXT_LIMIT)}</div>'
    return {"text/plain": clean(f"--- {text}", _TEXT_LIMIT), "text/html": html}


def _words(job: Job, around: Around) -> tuple[str, list[str]]:
    """What stands in front, and the parts that follow."""
    name = "" if job.name in ("", "cell") else f" {job.name}"
    word = "held" if job.held and job.state is JobState.PENDING else _WORD[job.state]
    rest = {
        JobState.PENDING: _waiting,
        JobState.STARTING: _running,
        JobState.RUNNING: _running,
    }.get(job.state, _ended)(job, around)
    if around.replaced:
        rest.append("replaces " + ", ".join(f"#{number}" for number in around.replaced))
    if around.note:
        rest.append(around.note)
    return f"{word} #{job.id}{name}", rest


def _waiting(job: Job, around: Around) -> list[str]:
    parts = [f"priority {job.priority}"]
    if job.reason is not None and not job.held:
        parts.append(job.reason.text)
    if around.expected is not None and not job.held:
        parts.append(f"starts {around.expected}")
    if around.pinned:
        parts.append(f"pinned to {', '.join(around.pinned)}")
    return [*parts, f"since {_clock(job.submitted_at)}"]


def _running(job: Job, around: Around) -> list[str]:
    parts = []
    if around.gpus:
        parts.append(", ".join(around.gpus))
    if job.cancel_requested:
        parts.append("being cancelled")
    if job.started_at is not None:
        parts += [f"since {_clock(job.started_at)}", _waited(job)]
    return parts


def _ended(job: Job, around: Around) -> list[str]:
    parts = []
    if job.error:
        parts.append(job.error)
    elif job.signal is not None and job.state is JobState.FAILED:
        parts.append(f"ended by {signal_name(job.signal)}")
    if job.started_at is None:
        return parts
    if around.gpus:
        parts.append(", ".join(around.gpus))
    parts.append(_waited(job))
    if job.run_s is not None:
        parts.append(f"ran {_span(job.run_s)}")
    if around.pinned:
        parts.append(f"kernel pinned to {', '.join(around.pinned)}")
    return parts


def _waited(job: Job) -> str:
    assert job.started_at is not None
    return f"waited {_span(job.started_at - job.submitted_at)}"


def _span(seconds: float) -> str:
    """Short spans to a tenth: a cell often takes less than a second."""
    return f"{max(0.0, seconds):.1f} s" if seconds < 10 else format_duration(seconds)


def _clock(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).astimezone().strftime("%H:%M:%S")
