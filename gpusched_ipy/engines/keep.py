"""Keeps on its node what a job has had, idle, for the next one: runs a job, waits, runs another.

It is copied into a folder of its own and started from there, with that folder and the folder of the
first job as its arguments. ``use-1``, ``use-2``, … in the first say in turn what is run next, or
that nothing is any more. Each is made once, by whoever comes first: the queue, or this program when
it has been idle for too long. So what ends here never ends a job that was just given to it, and
nobody has to come back for what is left idle.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess  # noqa: F401 - a job's own program needs it: what is here already costs it no time
import sys
import threading  # noqa: F401
import time
import traceback
from typing import Any

# Between two looks for what was given to us without a word, or taken from us.
LOOK_S = 2.0
# A mark that is begun is written by now, or never.
WRITTEN_S = 10.0
END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
HEARD = END | {signal.SIGCONT}


def main(kept: str, first: str) -> int:
    """Run the first job, and then those that are given to us, until there are no more."""
    # Blocked, a signal waits until we ask for it: none is lost, and none comes in between.
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    with open(os.path.join(kept, "keep.json"), encoding="utf-8") as stream:
        idle_s: float = json.load(stream)["idle_s"]
    folder: str | None = first
    turn = 0
    while folder is not None:
        if os.path.isdir(folder):  # else it was taken back meanwhile
            run(folder)
        turn += 1
        if not signal.sigpending() & END:
            tell_idle(kept, turn)
        folder = next_job(kept, turn, idle_s)
    return 0


def run(folder: str) -> None:
    """Run the job of that folder in a process of its own, and wait for its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = run_here(folder)
        except BaseException:  # noqa: BLE001 - nothing of it may go on in this process; shown
            traceback.print_exc()
        finally:
            os._exit(status)
    os.waitpid(pid, 0)


def run_here(folder: str) -> int:
    """Become the program that lies in the folder of the job; its exit status."""
    log = os.open(os.path.join(folder, "engine.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    for number in HEARD:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    program = os.path.join(folder, "node.py")
    sys.argv = [program, folder]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    finally:
        sys.stdout.flush()
    return 0


def next_job(kept: str, turn: int, idle_s: float) -> str | None:
    """The folder of the job whose turn it is; None: there is none any more."""
    path = os.path.join(kept, f"use-{turn}")
    until = time.monotonic() + idle_s
    while True:
        left = until - time.monotonic()
        heard = signal.sigtimedwait(HEARD, max(0.0, min(LOOK_S, left)))
        if heard is not None and heard.si_signo in END:
            leave(path)
            return None  # what was just given to us has not begun, and can run elsewhere
        if left <= 0:
            return leave(path)
        # Called, it is opened at once: a list of the folder may be an old one on a network.
        if heard is not None or f"use-{turn}" in listed(kept, path):
            use = read(path)
            if use is not None:
                return given(use)


def given(use: dict[str, Any]) -> str | None:
    """The folder that a mark names."""
    folder: str | None = use["folder"]
    return folder


def leave(path: str) -> str | None:
    """Have nothing given to us any more; what was given in this moment is run still."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        use = read(path)
        return None if use is None else given(use)
    except FileNotFoundError:
        return None  # the folder is gone: nobody knows of us any more
    with os.fdopen(fd, "w") as stream:
        json.dump({"folder": None, "left": True}, stream)
    return None


def listed(kept: str, path: str) -> list[str]:
    """What lies in our folder; without it our turn has come to leave."""
    try:
        return os.listdir(kept)
    except FileNotFoundError:
        raise SystemExit(f"gpusched: {path}: nobody knows of us any more") from None


def read(path: str) -> dict[str, Any] | None:
    """What stands in a mark that may still be written; None: nobody has made it."""
    until = time.monotonic() + WRITTEN_S
    while True:
        try:
            with open(path, encoding="utf-8") as stream:
                found: dict[str, Any] = json.load(stream)
                return found
        except FileNotFoundError:
            return None
        except ValueError:
            if time.monotonic() >= until:
                return {"folder": None}  # whoever made it has died over it
            time.sleep(0.02)


def tell_idle(kept: str, turn: int) -> None:
    """Say that the job before that turn is over, and who is to be called for the next one."""
    path = os.path.join(kept, "idle")
    mark = {"turn": turn, "pid": os.getpid(), "host": socket.gethostname()}
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as stream:
            json.dump(mark, stream)
        os.replace(f"{path}.new", path)
    except FileNotFoundError:
        raise SystemExit("gpusched: nobody knows of us any more") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
