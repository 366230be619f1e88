"""A reading as text for other processes: what seldom changes is written, and parsed, only once.

Five lines: whose readings these are; the moment and the numbers; the GPUs without their numbers;
the process lists; the moment again, so that half a text is known as such. A writer keeps the text
of the third and fourth while they stay the same, a reader what it has made of them: in steady state
a reading costs both of them a short line of numbers. It touches no file and no clock, and trusts no
line: what does not parse is the caller's to judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from gpusched_ipy.backends import DETAILS, Detail
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind, Snapshot

NEVER = math.inf
JobLoad = tuple[float | None, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One reading with what others need to judge it."""

    snapshot: Snapshot
    detail: Detail
    explanation: str  # which backend, and why not the better ones
    loads: Mapping[str, JobLoad] = field(default_factory=dict)  # what a job of ours adds (the fake)
    # For each detail the monotonic time at which its reader means to read again; NEVER: no promise.
    promises: tuple[float, ...] = (NEVER,) * len(DETAILS)
    by: str = ""  # the publisher: its pid and a number of its own
    # Until then (monotonic) the publisher tells of whatever counts: see ``News``. 0: it does not.
    calm_until: float = 0.0


_MOVING = (
    *("utilization", "utilization_window_s", "mem_used_bytes", "mem_reserved_bytes"),
    *("temperature_c", "power_w", "power_limit_w", "sm_clock_mhz", "throttled"),
)
_STEADY = tuple(item.name for item in fields(Gpu) if item.name not in {*_MOVING, "processes"})
_OF_ALL = ("backend", "source", "driver", "problem")
_PROCESS = tuple(item.name for item in fields(GpuProcess))
_moving, _steady, _of_all, _process = (
    attrgetter(*names) for names in (_MOVING, _STEADY, _OF_ALL, _PROCESS)
)
_dumps = json.JSONEncoder(separators=(",", ":")).encode


class Writer:
    """Makes the text of one process's readings.

    Args:
        mark: one line that says for whom the readings are true.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._frame: tuple[Any, str] = (None, "")
        self._lists: tuple[Any, str] = (None, "")

    def text(self, reading: Reading) -> str:
        """``reading``, to be read back without loss by :meth:`Reader.reading`."""
        snapshot = reading.snapshot
        gpus = snapshot.gpus
        frame = [
            _of_all(snapshot),
            reading.explanation,
            dict(reading.loads),
            [_steady(gpu) for gpu in gpus],
        ]
        if frame != self._frame[0]:
            self._frame = (frame, _dumps(frame))
        lists = [gpu.processes for gpu in gpus]
        if lists != self._lists[0]:
            self._lists = (
                lists,
                _dumps([listed and list(map(_process, listed)) for listed in lists]),
            )
        now = [
            snapshot.taken_at,
            snapshot.taken_mono,
            snapshot.read_s,
            int(reading.detail),
            reading.by,
            [None if at == NEVER else at for at in reading.promises],
            reading.calm_until,
            [_moving(gpu) for gpu in gpus],
        ]
        moment = repr(snapshot.taken_mono)
        return "\n".join((self._mark, _dumps(now), self._frame[1], self._lists[1], moment))


class Reader:
    """Reads the text of any process; knows again what it has read before."""

    def __init__(self) -> None:
        self._frame_text = self._lists_text = ""
        self._frame: Any = None
        self._steady: list[dict[str, Any]] = []
        self._lists: list[tuple[GpuProcess, ...] | None] = []
        self._made: list[tuple[Any, Any, Gpu]] = []  # numbers, list, and the GPU made of them

    def reading(self, text: str) -> tuple[str, Reading]:
        """The mark, and the reading.

        Raises:
            ValueError, KeyError, TypeError, IndexError, AttributeError: it is not such a text.
        """
        mark, now_text, frame_text, lists_text, moment = text.split("\n")
        at, mono, cost, detail, by, planned, calm_until, numbers = json.loads(now_text)
        if moment != repr(mono):
            raise ValueError("the text was overwritten while it was read")
        self._recall(frame_text, lists_text)
        promises = tuple(NEVER if when is None else float(when) for when in planned)
        of_all, explanation, loads, _ = self._frame
        snapshot = Snapshot(
            taken_at=float(at),
            taken_mono=float(mono),
            read_s=cost,
            gpus=self._gpus(numbers),
            **dict(zip(_OF_ALL, of_all, strict=True)),
        )
        return mark, Reading(
            snapshot=snapshot,
            detail=Detail(detail),
            explanation=str(explanation),
            loads={uuid: (load[0], load[1]) for uuid, load in loads.items()},
            promises=promises if len(promises) == len(DETAILS) else (NEVER,) * len(DETAILS),
            by=str(by),
            calm_until=float(calm_until),
        )

    def _recall(self, frame_text: str, lists_text: str) -> None:
        """Parse the lines that are not those of the last time."""
        if frame_text != self._frame_text:
            frame = json.loads(frame_text)
            steady = [_gpu_values(values) for values in frame[3]]
            self._frame_text, self._frame, self._steady = frame_text, frame, steady
            self._made = []
        if lists_text != self._lists_text:
            lists = [_processes(listed) for listed in json.loads(lists_text)]
            self._lists_text, self._lists = lists_text, lists

    def _gpus(self, numbers: list[Any]) -> tuple[Gpu, ...]:
        made: list[Any] = [*self._made] or [(None, None, None)] * len(numbers)
        self._made = [
            last
            if last[0] == values and last[1] is listed
            else (
                values,
                listed,
                Gpu(**steady, **dict(zip(_MOVING, values, strict=True)), processes=listed),
            )
            for values, steady, listed, last in zip(
                numbers, self._steady, self._lists, made, strict=True
            )
        ]
        return tuple([entry[2] for entry in self._made])


def _gpu_values(values: list[Any]) -> dict[str, Any]:
    steady = dict(zip(_STEADY, values, strict=True))
    steady["health"] = Health(steady["health"])
    steady["mem_kind"] = MemoryKind(steady["mem_kind"])
    return steady


def _processes(listed: list[list[Any]] | None) -> tuple[GpuProcess, ...] | None:
    if listed is None:
        return None
    return tuple(GpuProcess(**dict(zip(_PROCESS, values, strict=True))) for values in listed)
