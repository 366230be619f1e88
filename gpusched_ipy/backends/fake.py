"""Scripted GPUs: for tests, demonstrations and machines that have none. It never reads hardware.

The script is a small JSON file (``GPUSCHED_FAKE``) that is read again whenever it changes, or a
mapping of the same form given by calls to :meth:`FakeBackend.script`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpusched_ipy.backends import Detail
from gpusched_ipy.config import Clock, Settings, SystemClock, parse_bytes
from gpusched_ipy.errors import BackendUnavailableError, UserError
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind, Snapshot

_NUMBERS = {
    "temperature": "temperature_c",
    "power": "power_w",
    "power_limit": "power_limit_w",
    "sm_clock": "sm_clock_mhz",
}
_TEXTS = ("parent", "bus_id", "mem_pressure", "compute_mode", "health_text")


class FakeBackend:
    """GPUs as a script tells them.

    Args:
        path: the JSON file; None when the script is given by calls.
        clock: stamps the readings.
    """

    name = "fake"
    authoritative_pids = True

    def __init__(self, path: Path | None = None, clock: Clock | None = None) -> None:
        self.path = path
        self.source = f"script {path}" if path else "script given by calls"
        self._clock = clock or SystemClock()
        self._script: Mapping[str, Any] = {"gpus": []}
        self._stamp: tuple[int, int, int] | None = None

    def script(self, script: Mapping[str, Any]) -> None:
        """Replace the script; the next reading shows it."""
        self._script = script

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        """The GPUs as the script has them now; an unreadable script is a problem, not old data."""
        try:
            self._reload()
            problem = self._script.get("problem")
            gpus = () if problem else parse_script(self._script)
        except (UserError, OSError, ValueError, TypeError, AttributeError) as exc:
            problem, gpus = f"the fake's script {self.path or ''} is not readable: {exc}", ()
        if not problem and not gpus:
            problem = f"the fake's script {self.path or ''} lists no GPU"
        now = self._clock.now()
        return Snapshot(
            backend=self.name,
            source=self.source,
            taken_at=now.wall,
            taken_mono=now.mono,
            problem=str(problem) if problem else None,
            gpus=gpus,
        )

    def job_load(self, uuid: str) -> tuple[float | None, int | None]:
        """Utilization (0-1) and memory (bytes) that a running job of ours adds to that GPU."""
        for position, entry in enumerate(self._script.get("gpus") or []):
            if _uuid(entry, position) == uuid:
                load = entry.get("job_load") or {}
                return _ratio(load.get("utilization")), _bytes(load.get("memory"))
        return None, None

    def close(self) -> None:
        """Nothing is held open."""

    def _reload(self) -> None:
        if self.path is None:
            return
        status = os.stat(self.path)
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._script = json.loads(self.path.read_text(encoding="utf-8"))
            self._stamp = stamp


def parse_script(script: Mapping[str, Any]) -> tuple[Gpu, ...]:
    """The GPUs of a script; missing keys are unknown.

    Raises:
        UserError, TypeError, ValueError, AttributeError: it is not a script.
    """
    return tuple(_gpu(entry, position) for position, entry in enumerate(script.get("gpus") or []))


def add_job_load(gpu: Gpu, utilization: float | None, memory: int | None) -> Gpu:
    """``gpu`` with what a job of ours adds to it; what the script leaves unknown stays unknown."""
    if utilization is not None and gpu.utilization is not None:
        gpu = replace(gpu, utilization=min(1.0, gpu.utilization + utilization))
    if memory is not None and gpu.mem_used_bytes is not None:
        used = gpu.mem_used_bytes + memory
        gpu = replace(gpu, mem_used_bytes=min(used, gpu.mem_total_bytes or used))
    return gpu


def _gpu(entry: Mapping[str, Any], position: int) -> Gpu:
    listed = entry.get("processes")
    values: dict[str, Any] = {
        field: None if entry.get(key) is None else float(entry[key])
        for key, field in _NUMBERS.items()
    }
    values |= {key: entry[key] for key in _TEXTS if entry.get(key) is not None}
    return Gpu(
        uuid=_uuid(entry, position),
        index=int(entry.get("index", position)),
        instance=None if entry.get("instance") is None else int(entry["instance"]),
        name=str(entry.get("name", "Fake GPU")),
        vendor="fake",
        health=Health(entry.get("health", "ok")),
        utilization=_ratio(entry.get("utilization")),
        mem_used_bytes=_bytes(entry.get("memory_used")),
        mem_total_bytes=_bytes(entry.get("memory_total")),
        mem_kind=MemoryKind(entry.get("memory_kind", "dedicated")),
        processes=None if listed is None else tuple(_process(item) for item in listed),
        **values,
    )


def _process(item: Mapping[str, Any]) -> GpuProcess:
    return GpuProcess(
        pid=int(item["pid"]),
        user=item.get("user"),
        name=item.get("name"),
        mem_bytes=_bytes(item.get("memory")),
        kind=item.get("kind", "compute"),
        idle_s=None if item.get("idle_s") is None else float(item["idle_s"]),
    )


def _uuid(entry: Mapping[str, Any], position: int) -> str:
    return str(entry.get("uuid", f"GPU-fake-{position}"))


def _ratio(value: object) -> float | None:
    if value is None:
        return None
    ratio = float(str(value))
    if not 0 <= ratio <= 1:
        raise UserError(f"utilization {value!s} is not a ratio from 0 to 1")
    return ratio


def _bytes(value: object) -> int | None:
    return None if value is None else parse_bytes(value)


def open_fake(settings: Settings, clock: Clock) -> FakeBackend:
    """The fake of the settings.

    Raises:
        BackendUnavailableError: no script is named.
    """
    if settings.fake is None:
        raise BackendUnavailableError("GPUSCHED_FAKE does not name a script")
    return FakeBackend(settings.fake, clock)
