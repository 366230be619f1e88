"""``gpusched engines``: where jobs can run, which of it answers now, and what it has."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpusched_ipy.config import LOCAL, Settings
from gpusched_ipy.engines.registry import engine_names, make_engine
from gpusched_ipy.errors import UserError

COLUMNS = ("engine", "ready", "version", "GPUs", "about")
_PING_S = 5.0


def listed(settings: Settings) -> list[dict[str, Any]]:
    """Each engine that can be named, asked at the same time as the others."""
    names = engine_names()
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: _look(name, settings), names))


def row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of its line in the table."""
    gpus = "?" if one["gpus"] is None else str(one["gpus"])
    ready = "yes" if one["ready"] else "no"
    name = f"{one['name']} (default)" if one["default"] else str(one["name"])
    return (name, ready, one["version"] or "-", gpus if one["ready"] else "-", str(one["about"]))


def _look(name: str, settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "default": settings.engine == name}
    if name == LOCAL:
        return found | _here(settings)
    try:
        health = make_engine(name, settings).ping(_PING_S)
    except UserError as exc:
        return found | {"ready": False, "version": None, "gpus": None, "about": str(exc)}
    return found | {
        "ready": health.up,
        "version": health.version,
        "gpus": health.gpus,
        "about": health.text,
    }


def _here(settings: Settings) -> dict[str, Any]:
    from gpusched_ipy._version import __version__
    from gpusched_ipy.monitor import Monitor

    monitor = Monitor(settings)
    try:
        snapshot = monitor.read_now(_PING_S)
    finally:
        monitor.stop()
    about = snapshot.problem or "this machine's own GPUs"
    gpus = len(snapshot.gpus) if snapshot.problem is None else None
    return {"ready": snapshot.problem is None, "version": __version__, "gpus": gpus, "about": about}
