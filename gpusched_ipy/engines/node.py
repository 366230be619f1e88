"""Runs one job on a node of an engine: claims its folder, runs the command, writes how it ended.

It is copied into the folder of the job and started from there with the folder as its one argument.
It needs nothing but Python's own library, and asks no engine and no record anything. It runs a
folder once: who comes second finds the claim and leaves.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO, Any

HEARTBEAT_S = 5.0
GRACE_S = 3.0
LOOK_S = 0.5
TAIL_BYTES = 1 << 20
RETRY_S = 60.0


def main(folder: str) -> int:
    """Run the job of that folder; the exit status is the job's own where it has one."""
    wish = Wish(folder)
    if not claim(folder):
        print("gpusched: this job has been claimed already; nothing is run twice", flush=True)
        return 0
    guard = Guard()  # before there are threads: it forks
    threading.Thread(target=beat, args=(folder,), daemon=True).start()
    began = time.monotonic()
    result = run(folder, wish, guard)
    guard.tell(0)
    result["run_s"] = round(time.monotonic() - began, 3)
    write_result(folder, result)
    number: int | None = result["signal"]
    status: int | None = result["exit_code"]
    return 128 + number if number else status or 0


class Wish:
    """Whether, and why, the job is to end before its time."""

    def __init__(self, folder: str) -> None:
        self._cancel = os.path.join(folder, "cancel")
        self._told = False
        # Not an Event: a handler that sets one may have interrupted the wait that holds its lock.
        self._happened: queue.SimpleQueue[None] = queue.SimpleQueue()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._tell)

    def _tell(self, *_: object) -> None:
        self._told = True
        self.happened()

    def happened(self) -> None:
        """Something is to be looked at; called by threads and signals."""
        self._happened.put(None)

    def wait(self, timeout_s: float) -> None:
        """Until something has happened, but no longer."""
        with suppress(queue.Empty):
            self._happened.get(timeout=timeout_s)

    def why(self, deadline: float | None) -> str | None:
        """``cancel``, ``engine`` or ``timeout``; None: let it go on."""
        if os.path.exists(self._cancel):
            return "cancel"
        if self._told:
            return "engine"
        if deadline is not None and time.monotonic() >= deadline:
            return "timeout"
        return None


class Guard:
    """A small process beside us that ends the command's group should we be killed.

    Ray kills our own group when its worker on the node dies; the command has another one.
    """

    def __init__(self) -> None:
        mine, self._pipe = os.pipe()
        if os.fork() == 0:
            os.close(self._pipe)
            self._watch(mine)
        os.close(mine)

    def tell(self, leader: int) -> None:
        """This group is to end with us; 0: none is any more."""
        with suppress(BrokenPipeError):  # somebody has killed it, and not us
            os.write(self._pipe, b"%d\n" % leader)

    @staticmethod
    def _watch(pipe: int) -> None:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        told = b""
        while chunk := os.read(pipe, 64):
            told += chunk
        leader = int((told.split() or [b"0"])[-1])
        if leader:
            end_group(leader, (signal.SIGTERM, signal.SIGKILL), grace_s=GRACE_S)
        os._exit(0)


def claim(folder: str) -> bool:
    """Make the folder ours; False: somebody has."""
    try:
        fd = os.open(os.path.join(folder, "claim"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "gpus": gpus})
    with os.fdopen(fd, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return True


def beat(folder: str) -> None:
    """Show every few seconds that we live."""
    path = os.path.join(folder, "heartbeat")
    while True:
        try:
            with open(path, "w") as stream:
                stream.write(str(time.time()))
        except OSError as exc:
            print(f"gpusched: no heartbeat: {exc}", flush=True)
        time.sleep(HEARTBEAT_S)


def run(folder: str, wish: Wish, guard: Guard) -> dict[str, Any]:
    """Run the command to its end."""
    try:
        with open(os.path.join(folder, "task.json"), encoding="utf-8") as stream:
            task = json.load(stream)
        child = start(folder, task)
    except FileNotFoundError as exc:
        return not_run(127, exc)
    except OSError as exc:
        return not_run(126, exc)
    guard.tell(child.pid)
    pump = threading.Thread(
        target=keep_log, args=(child.stdout, os.path.join(folder, "log"), task["log_cap"])
    )
    pump.daemon = True
    if child.stdout is not None:
        pump.start()
    ended = until_over(child, wish, task["time_s"])
    # What it has left in its group would keep the log open, and the node busy.
    end_group(child.pid, (signal.SIGTERM, signal.SIGKILL), grace_s=0.2)
    if child.stdout is not None:
        pump.join(GRACE_S)
    code = child.returncode
    return {
        "ended": ended,
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
    }


def not_run(status: int, why: OSError) -> dict[str, Any]:
    """The result of a command that could not be started."""
    error = f"cannot be run: {why}"
    return {"ended": "exit", "exit_code": status, "signal": None, "error": error}


def start(folder: str, task: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command with the variables of the task; those of the engine show it its GPUs."""
    env = {**os.environ, **environment(folder, task)}
    argv: list[str] = task["argv"]
    with open(os.path.join(folder, "log"), "ab", opener=private) as log:
        return subprocess.Popen(
            ["/bin/sh", "-c", argv[0]] if task["shell"] else argv,
            stdin=subprocess.DEVNULL,
            stdout=log if task["direct"] else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=task["cwd"],
            env=env,
            start_new_session=True,
        )


def environment(folder: str, task: dict[str, Any]) -> dict[str, str]:
    """The job's own variables; those that were given as secrets are gone from the disk then."""
    path = os.path.join(folder, "secret.json")
    try:
        with open(path, encoding="utf-8") as stream:
            secret = json.load(stream)
        os.unlink(path)
    except FileNotFoundError:
        secret = {}
    return {**task["env"], **secret}


def keep_log(source: IO[bytes], path: str, cap: int) -> None:
    """Write what the job writes as it comes; beyond the cap the head and the tail are kept."""
    tail_cap = min(cap // 2, TAIL_BYTES)
    left, tail, cut = cap - tail_cap, b"", 0
    with open(path, "ab", buffering=0, opener=private) as log:
        while True:
            chunk = os.read(source.fileno(), 1 << 16)
            if not chunk:
                break
            log.write(chunk[:left])
            rest = chunk[left:]
            left = max(0, left - len(chunk))
            if rest:
                tail += rest
                if len(tail) > 2 * tail_cap:
                    cut += len(tail) - tail_cap
                    tail = tail[-tail_cap:]
        if len(tail) > tail_cap:
            cut += len(tail) - tail_cap
            tail = tail[-tail_cap:]
        if cut:
            log.write(f"\n… {cut} bytes cut …\n".encode())
        log.write(tail)


def private(path: str, flags: int) -> int:
    """Open for the user alone."""
    return os.open(path, flags, 0o600)


def until_over(child: subprocess.Popen[bytes], wish: Wish, time_s: float | None) -> str:
    """Wait for the end of the command, or bring it about; ``exit``, or why it was ended."""
    deadline = None if time_s is None else time.monotonic() + time_s
    over = threading.Event()

    def await_end() -> None:
        child.wait()
        over.set()
        wish.happened()

    threading.Thread(target=await_end, daemon=True).start()
    while True:
        left = LOOK_S if deadline is None else min(LOOK_S, max(0.0, deadline - time.monotonic()))
        wish.wait(left)
        if over.is_set():
            return told_to_end(child.returncode, wish)
        why = wish.why(deadline)
        if why is not None:
            gentle = () if why == "engine" else (signal.SIGINT,)  # an engine does not wait long
            end_child(child, (*gentle, signal.SIGTERM, signal.SIGKILL))
            over.wait()
            return why


def told_to_end(code: int, wish: Wish) -> str:
    """Whether a command that has ended was told to: an engine tells it and us at the same time."""
    if code in (-signal.SIGTERM, -signal.SIGKILL):
        wish.wait(LOOK_S)
    return (wish.why(None) if code else None) or "exit"


def end_child(child: subprocess.Popen[bytes], numbers: tuple[signal.Signals, ...]) -> None:
    """Ask more and more firmly until the command is over."""
    for number in numbers:
        signal_group(child.pid, number)
        until = time.monotonic() + GRACE_S
        while child.returncode is None and time.monotonic() < until:
            time.sleep(0.02)
        if child.returncode is not None:
            return


def end_group(leader: int, numbers: tuple[signal.Signals, ...], grace_s: float) -> None:
    """End what the command has left behind in its group."""
    for number in numbers:
        until = time.monotonic() + grace_s
        if not signal_group(leader, number):
            return
        while time.monotonic() < until and signal_group(leader, 0):
            time.sleep(0.02)


def signal_group(leader: int, number: int) -> bool:
    """Signal the group of the command; False: nobody is left in it."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def write_result(folder: str, result: dict[str, Any]) -> None:
    """Put the result in its place at once or not at all; a full disk is waited out for a while."""
    path, beside = os.path.join(folder, "result.json"), os.path.join(folder, ".result.json.new")
    until = time.monotonic() + RETRY_S
    while True:
        try:
            with open(beside, "w", opener=private) as stream:
                json.dump(result, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, path)
            return
        except OSError as exc:
            print(f"gpusched: the result cannot be written: {exc}", flush=True)
            if time.monotonic() >= until:
                raise
            time.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
