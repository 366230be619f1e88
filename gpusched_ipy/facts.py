"""What is known of one job as lines for people: with units, and nothing that says nothing.

Made of the record that programs get (``--json``), so that both say the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from gpusched_ipy.text import clean, format_bytes, format_duration, format_energy, format_percent

# What is the rule is not said: a fact with this value is left out, as null and empty ones are.
_RULE: dict[str, object] = {
    **dict.fromkeys(("held", "requeue", "retry_oom", "oom"), False),
    **dict.fromkeys(("attempts", "retries", "retried", "requeued"), 0),
    "engine": "local",
}


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each fact, in the order of the record; both are safe for a terminal.

    Args:
        record: of :func:`gpusched_ipy.records.job_json`.
    """
    told = {**record, **(record["usage"] or {})}
    del told["usage"], told["after"]  # the request tells --after from --after-any
    if told["effective_priority"] == told["priority"]:
        del told["effective_priority"]
    return [
        (_title(name), clean(text))
        for name, value in told.items()
        if _tells(name, value) and (text := _text(name, value))
    ]


def _title(name: str) -> str:
    plain = name.removesuffix("_at").removesuffix("_s").removesuffix("_bytes").removesuffix("_j")
    return "GPU time" if name == "gpu_s" else plain.replace("_", " ")


def _tells(name: str, value: Any) -> bool:
    return value not in (None, "", [], {}) and value != _RULE.get(name, ...)


def _text(name: str, value: Any) -> str:
    return _TEXTS.get(name, str)(value)


def _asked(request: Mapping[str, Any]) -> str:
    given = {name: value for name, value in request.items() if _tells(name, value)}
    if "retries" not in given:
        del given["retry_delay_s"]
    return ", ".join(f"{_title(name)} {_text(name, value)}" for name, value in given.items())


def _moment(text: str) -> str:
    """A time on this machine's own clock."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _listed(values: Sequence[Any] | int) -> str:
    return str(values) if isinstance(values, int) else ", ".join(map(str, values))


def _place(place: Mapping[str, Any]) -> str:
    gpus = f"GPUs {place['gpus']}" if place["gpus"] else None
    return ", ".join(part for part in (place["host"], gpus) if part)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


_TEXTS: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(("gpus", "after", "after_any"), _listed),
    **dict.fromkeys(("labels", "sweep"), _pairs),
    **dict.fromkeys(
        ("submitted_at", "started_at", "ended_at", "begin_at", "expected_start"), _moment
    ),
    **dict.fromkeys(("wait_s", "run_s", "gpu_s", "time_s", "retry_delay_s"), format_duration),
    **dict.fromkeys(("mem_bytes", "peak_mem_bytes"), format_bytes),
    **dict.fromkeys(("held", "requeue", "retry_oom", "oom"), lambda _: "yes"),
    "array": lambda array: f"{array['id']}, {array['index'] + 1} of {array['size']}",
    "request": _asked,
    "place": _place,
    "argv": shlex.join,
    "expected_start_range": lambda ends: "\u2013".join(map(_moment, ends)),
    "mean_utilization": format_percent,
    "energy_j": format_energy,
}
