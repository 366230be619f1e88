"""The agent's desks: one thread for each engine that has jobs. A slow engine holds up no other one,
and no job of this machine.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gpusched_ipy.bell import Bell
from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import JobState, WaitCode, WaitReason
from gpusched_ipy.statedir import StateDir, machine_id

if TYPE_CHECKING:
    from gpusched_ipy.enginedesk import EngineDesk
    from gpusched_ipy.scheduler import Scheduler
    from gpusched_ipy.store import Store

_log = logging.getLogger(__name__)
_REST_S = 5.0


def engine_root(settings: Settings, state: StateDir) -> Path:
    """The folder of this queue's jobs at engines; other queues of the user have others."""
    root = settings.engine_dir
    if root is None:
        from platformdirs import user_state_path

        root = user_state_path("gpusched_ipy", appauthor=False) / "engines"
    name = f"{machine_id()} {state.root.resolve()}"
    return root.absolute() / hashlib.sha256(name.encode()).hexdigest()[:12]


class Desks:
    """All engines of one agent.

    Args:
        key: the member that works here.
    """

    def __init__(self, store: Store, scheduler: Scheduler, settings: Settings, key: str) -> None:
        self._store = store
        self._scheduler = scheduler
        self._settings = settings
        self._key = key
        self._root = engine_root(settings, store.state)
        self._desks: dict[str, EngineDesk] = {}
        self._told: dict[int, WaitReason] = {}
        self._failed: dict[str, str] = {}  # engines that cannot be had here, and why
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._rang: dict[str, threading.Event] = {"": threading.Event()}
        self._bell: Bell | None = None

    def start(self) -> None:
        """Look for engines with work, from a thread of its own."""
        self._bell = Bell(self._store.state.bell, self._ring)
        self._spawn("", self._run)

    def stop(self) -> None:
        """End the threads; what runs at engines goes on, what is kept idle there is given back."""
        self._stop.set()
        self._ring()
        if self._bell is not None:
            self._bell.close()
        for thread in self._threads:
            thread.join(timeout=5.0)

    @property
    def busy(self) -> bool:
        """Whether an engine has, or may have, something of ours."""
        return any(desk.busy for desk in list(self._desks.values())) or any(self._left_behind())

    def _left_behind(self) -> list[str]:
        """Engines with folders of ours that no desk looks after yet."""
        try:
            return [
                path.name
                for path in self._root.iterdir()
                if path.name not in {*self._desks, *self._failed}
                and path.is_dir()
                and any(path.iterdir())
            ]
        except FileNotFoundError:
            return []
        except OSError as exc:
            _log.error("what was left at engines cannot be seen: %s", exc)
            return []

    def _ring(self) -> None:
        for event in list(self._rang.values()):
            event.set()

    def _spawn(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=f"gpusched-{name or 'engines'}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        """Open a desk for each engine that has work."""
        while not self._stop.is_set():
            try:
                self._look()
            except GpuSchedError as exc:
                _log.error("the jobs of engines cannot be looked at: %s", exc)
            except Exception:  # noqa: BLE001 - a thread that has ended would open no engine; logged
                _log.exception("a look at the jobs of engines failed")
            self._rest("", _REST_S)

    def _look(self) -> None:
        jobs, _ = self._scheduler.away()
        wanted = {*(job.spec.engine for job in jobs), *self._left_behind()}
        for name in sorted(wanted - self._desks.keys() - self._failed.keys()):
            self._open(name)
        reasons = {
            job.id: WaitReason(code=WaitCode.ENGINE, text=self._failed[job.spec.engine])
            for job in jobs
            if job.spec.engine in self._failed and job.state is JobState.PENDING
        }
        if reasons != self._told:
            self._store.set_reasons(reasons)
            self._told = reasons

    def _open(self, name: str) -> None:
        from gpusched_ipy.enginedesk import EngineDesk
        from gpusched_ipy.engines.registry import make_engine

        try:
            engine = make_engine(name, self._settings)
            root = self._root / name
            desk = EngineDesk(engine, root, self._store, self._settings, SystemClock(), self._key)
        except Exception as exc:  # noqa: BLE001 - a third party's engine may raise anything; shown
            _log.error("the jobs of %s wait", name, exc_info=exc)
            self._failed[name] = f"waits for {name}: {exc}"
            return
        self._desks[name] = desk
        self._rang[name] = threading.Event()
        self._spawn(name, lambda: self._serve(name, desk))

    def _serve(self, name: str, desk: EngineDesk) -> None:
        while not self._stop.is_set():
            pause_s = _REST_S
            try:
                jobs, outcomes = self._scheduler.away()
                mine = [job for job in jobs if job.spec.engine == name]
                if mine or desk.busy:
                    pause_s = desk.round(mine, outcomes)
            except GpuSchedError as exc:
                _log.error("%s cannot be worked with: %s", name, exc)
            except Exception:  # noqa: BLE001 - a thread that has ended would hold up every job; logged
                _log.exception("a round of %s failed", name)
            self._rest(name, pause_s)
        desk.leave()

    def _rest(self, name: str, pause_s: float) -> None:
        self._rang[name].wait(pause_s)
        self._rang[name].clear()
