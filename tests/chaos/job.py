"""A job of a chaos run, and the outside witness of who is on which GPU. It imports no product code.

Run as ``python -I -S job.py FOLDER UID STYLE SECONDS ORPHAN_SECONDS``; a worker whose leader has
died works on for the latter. The styles:

- ``plain`` works by itself;
- ``redirect`` gives its output to another file, so that it holds its GPU locks but not its log;
- ``workers`` leaves the work to a child that has its input and its log, but no other descriptor, as
  launchers do;
- ``quiet`` gives that child no input either.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time

# The lowest descriptor is closed first when a process dies: the witness falls before any lock of
# the queue does, so that a successor which the queue rightly lets in never meets it.
_WITNESS_FD = 0


def note(folder: str, *words: object) -> None:
    """Append one line to the ledger of the run."""
    fd = os.open(f"{folder}/ledger", os.O_WRONLY | os.O_APPEND)
    os.write(fd, (" ".join(map(str, words)) + "\n").encode())
    os.close(fd)


def open_witness(folder: str) -> None:
    """Have the witness file at hand, at the lowest descriptor."""
    fd = os.open(f"{folder}/witness", os.O_RDWR)
    os.dup2(fd, _WITNESS_FD)
    if fd != _WITNESS_FD:
        os.close(fd)
    os.set_inheritable(_WITNESS_FD, False)


def enter(folder: str, uid: str, gpus: list[str], *, shared: bool) -> None:
    """Say that this process is on these GPUs; whoever is there already is an overlap."""
    for gpu in gpus:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(_WITNESS_FD, kind | fcntl.LOCK_NB, 1, int(gpu.rpartition("-")[2]))
        except (BlockingIOError, PermissionError):
            note(folder, "overlap", uid, gpu)


def leave() -> None:
    """This process is on no GPU any more."""
    fcntl.lockf(_WITNESS_FD, fcntl.LOCK_UN)


def main(argv: list[str]) -> int:
    """Start, work, end; each is noted."""
    folder, uid, style, seconds, orphan_seconds = argv
    if style != "worker":
        attempt = os.path.basename(os.readlink("/proc/self/fd/1"))
        note(folder, "start", uid, attempt, os.getpid())
    if style in ("workers", "quiet"):
        return _delegate(argv)
    if style == "redirect":
        nowhere = os.open("/dev/null", os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    leader = os.getppid()
    if style == "worker":
        fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 10)  # it keeps its input, though not at 0
    open_witness(folder)
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    enter(folder, uid, gpus, shared="-shared-" in uid)
    time.sleep(float(seconds))
    if style == "worker" and os.getppid() != leader:
        time.sleep(float(orphan_seconds))
    note(folder, "end", uid)
    leave()
    return 0


def _delegate(argv: list[str]) -> int:
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                continue  # the descriptor of the listing itself
    folder, uid, style, *seconds = argv
    nothing = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
    command = [sys.executable, "-I", "-S", __file__, folder, uid, "worker", *seconds]
    worker = os.posix_spawn(
        sys.executable, command, os.environ, file_actions=[nothing] if style == "quiet" else []
    )
    return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) & 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
