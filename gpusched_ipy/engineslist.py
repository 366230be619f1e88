"""``gpusched engines``: where jobs can run, which of it answers now, and what it has."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpusched_ipy.config import LOCAL, Settings
from gpusched_ipy.desks import engine_root
from gpusched_ipy.engines.kept import kept_folders
from gpusched_ipy.engines.registry import engine_names, make_engine
from gpusched_ipy.errors import UserError
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.text import format_duration

COLUMNS = ("engine", "ready", "version", "GPUs", "about")
_PING_S = 5.0


def listed(settings: Settings) -> list[dict[str, Any]]:
    """Each engine that can be named, asked at the same time as the others."""
    names, root = engine_names(), engine_root(settings, open_state_dir(settings))
    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda name: _look(name, settings), names))
    for one in found:
        one["kept"] = _kept(root / one["name"])
    return found


def row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of its line in the table."""
    gpus = "?" if one["gpus"] is None else str(one["gpus"])
    ready = "yes" if one["ready"] else "no"
    name = f"{one['name']} (default)" if one["default"] else str(one["name"])
    about = "; ".join([str(one["about"]), *(_keeps(kept) for kept in one["kept"])])
    return (name, ready, one["version"] or "-", gpus if one["ready"] else "-", about)


def _keeps(kept: Mapping[str, Any]) -> str:
    what = f"keeps {kept['gpus']} GPU{'' if kept['gpus'] == 1 else 's'}"
    if kept["idle_s"] is None:
        return f"{what}, in use"
    idle, longest = format_duration(kept["idle_s"]), format_duration(kept["keep_s"])
    return f"{what} on {kept['host']}, idle for {idle} of {longest}"


def _kept(root: Path) -> list[dict[str, Any]]:
    """What of jobs of ours is kept there, as its folders say: no engine is asked."""
    found = []
    for folder in kept_folders(root):
        about, uses = folder.about(), folder.uses()
        if about is None or None in uses:
            continue  # it is being given back
        idle = folder.idle()
        waits = idle is not None and idle.turn > len(uses)
        found.append(
            {
                "gpus": about["gpus"],
                "gpu_type": about["gpu_type"],
                "host": None if idle is None else idle.host,
                "idle_s": max(0.0, time.time() - idle.since_wall) if idle and waits else None,
                "keep_s": about["idle_s"],
            }
        )
    return found


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
