"""Which engines there are: ``local``, those of this package, and those that other packages bring
under the entry point group ``gpusched.engines``. It loads one only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from gpusched_ipy.config import ENGINE_GROUP, LOCAL
from gpusched_ipy.errors import UserError

if TYPE_CHECKING:
    from gpusched_ipy.config import Settings
    from gpusched_ipy.engines import Engine

# Those of this package: the module that has a function ``make(settings)``.
_OWN = {
    "slurm": "gpusched_ipy.engines.slurm",
    "ray": "gpusched_ipy.engines.ray",
}


def engine_names() -> tuple[str, ...]:
    """Every engine that can be named, ``local`` first."""
    others = sorted({point.name for point in entry_points(group=ENGINE_GROUP)} - _OWN.keys())
    return (LOCAL, *_OWN, *(name for name in others if name != LOCAL))


def make_engine(name: str, settings: Settings) -> Engine:
    """The engine of that name; not ``local``, whose jobs the queue starts by itself.

    Raises:
        UserError: there is none, or its package cannot be loaded.
    """
    return _factory(name)(settings)


def _factory(name: str) -> Callable[[Settings], Engine]:
    if name in _OWN:
        return cast("Callable[[Settings], Engine]", import_module(_OWN[name]).make)
    for point in entry_points(group=ENGINE_GROUP, name=name):
        try:
            return cast("Callable[[Settings], Engine]", point.load())
        except Exception as exc:  # its package is somebody else's code
            raise UserError(f"the engine {name} ({point.value}) cannot be loaded: {exc}") from exc
    raise UserError(f"there is no engine {name!r}; `gpusched engines` lists them")
