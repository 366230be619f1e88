"""Places in the protocols where a process can be made to die: around product functions, by name.

A process is armed with at most one point and dies there by SIGKILL, the n-th time it comes by. The
points follow the protocols' own order: submit, claim, take-over, finish, reap, agent exit.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.job import note

_COMMIT = ["store:COMMIT:before", "store:COMMIT:after", "store:bell:before", "store:bell:after"]
_CLAIM = [
    "scheduler:reap:before",
    "reap:_reap_one:after",
    "scheduler:reap:after",
    "locks:GpuLocks.try_lock_all:after",
    "monitor:Monitor.read_now:after",
    "store:Store.claim:before",
    "store:Store.claim:after",
    "scheduler:forget_dead_members:after",
    "scheduler:Scheduler._dispatch:before",
]
_HAND_OFF = [
    "scheduler:Scheduler.ended:after",
    "scheduler:record:after",
    "scheduler:Scheduler._record_and_claim:after",
    "scheduler:Scheduler._hand_off:after",
]
_ORDER = [
    "runners.command:create_log:before",
    "runners.command:create_log:after",
    "runners.command:ParkedShim.order:before",
    "runners.command:ParkedShim.order:after",
    "scheduler:Scheduler.hand_over:after",
    "runners.command:ParkedShim.__init__:after",
    "runners.command:_settle:before",
]
POINTS: dict[str, list[str]] = {
    "submitter": [
        "store:Store.submit:before",
        "store:Store._touch:after",
        *_COMMIT,
        "summon:ensure_agent:before",
        "summon:ensure_agent:after",
    ],
    "kernel": [
        *_CLAIM,
        *_COMMIT,
        "scheduler:Scheduler.begin:before",
        "scheduler:Scheduler.begin:after",
        "scheduler:Scheduler.finish:before",
        "scheduler:Scheduler.finish:after",
    ],
    "commander": [*_CLAIM, *_COMMIT, *_ORDER, *_HAND_OFF],
    "agent": [
        *_CLAIM,
        *_COMMIT,
        *_ORDER,
        *_HAND_OFF,
        "agent:Agent._leave:before",
        "agent:Agent._leave:after",
    ],
    "shim": [
        "shim:_receive:after",
        "locks:Membership.__init__:after",
        "takeover:TakeOver.begin:before",
        "takeover:TakeOver.begin:after",
        *_COMMIT,
        "environment:take:after",
        "shim:_start:after",
        "takeover:TakeOver.set_process:after",
        "supervision:end_tree:before",
        "supervision:end_tree:after",
        "supervision:Supervision._told:before",
        "supervision:Supervision._told:after",
        "supervision:record:before",
        "store:Store.leave:after",
        "locks:Membership.leave:before",
        "supervision:call_agent:before",
        "summon:ensure_agent:after",
    ],
}
# These are passed with every write: the first few are always the start of the process.
_FREQUENT = frozenset({*_COMMIT, "store:Store._touch:after", "scheduler:reap:before"})


def arm_next(folder: str, kind: str, share: float) -> None:
    """Arm this process with one point of its kind, first those where none has died yet; or not.

    Args:
        share: of the processes that is armed.
    """
    dice = random.Random(os.urandom(8))
    if dice.random() >= share:
        return
    seen = set(os.listdir(f"{folder}/died"))
    new = [point for point in POINTS[kind] if _mark(kind, point) not in seen]
    point = dice.choice(new or POINTS[kind])
    most = 4 if kind == "shim" else 12
    arm(folder, kind, point, dice.randint(1, most if point in _FREQUENT else 2))


def never_reached(folder: Path) -> list[str]:
    """The points at which no process of the run has died."""
    seen = set(os.listdir(folder / "died"))
    return [
        f"{kind}/{point}"
        for kind, points in POINTS.items()
        for point in points
        if _mark(kind, point) not in seen
    ]


def _mark(kind: str, point: str) -> str:
    return f"{kind} {point}"


def arm(folder: str, kind: str, point: str, nth: int) -> None:
    """Make this process die when it comes by ``point`` for the ``nth`` time."""
    left = nth

    def come_by() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.close(
                os.open(f"{folder}/died/{_mark(kind, point)}", os.O_CREAT | os.O_WRONLY, 0o600)
            )
            note(folder, "died", f"{kind}/{point}")
            os.kill(os.getpid(), signal.SIGKILL)

    module, name, when = point.split(":")
    if name == "COMMIT":
        _around_commit(come_by, when)
    elif name == "bell":
        _around_bell(come_by, when)
    else:
        owner: Any = importlib.import_module(f"gpusched_ipy.{module}")
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, _wrapped(getattr(owner, last), come_by, when))


def _wrapped(inner: Callable[..., Any], come_by: Callable[[], None], when: str) -> Any:
    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            come_by()
        result = inner(*args, **kwargs)
        if when == "after":
            come_by()
        return result

    return outer


def _around_commit(come_by: Callable[[], None], when: str) -> None:
    from gpusched_ipy import database, locks

    if when == "before":
        opens = database.Database._open

        def traced(self: Any) -> Any:
            db = opens(self)
            db.set_trace_callback(lambda text: come_by() if text == "COMMIT" else None)
            return db

        database.Database._open = traced  # type: ignore[method-assign]
        return
    releases = locks.FileLock.release

    def release(self: Any) -> None:
        if self.held and self.path.name == "q.lock":
            come_by()
        releases(self)

    locks.FileLock.release = release  # type: ignore[method-assign]


def _around_bell(come_by: Callable[[], None], when: str) -> None:
    touch = os.utime

    def utime(path: Any, *args: Any, **kwargs: Any) -> None:
        ours = isinstance(path, Path) and path.name == "bell"
        if ours and when == "before":
            come_by()
        touch(path, *args, **kwargs)
        if ours and when == "after":
            come_by()

    os.utime = utime
