"""Start the agent where none lives. Nothing depends on it being up; something must start it.

Whether one is there, its lock says. Who holds it stands in the lock's file, because one that has
been killed still holds its lock for a moment: what is submitted then is not its business any more.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from gpusched_ipy.locks import FileLock
from gpusched_ipy.process import ProcessId, is_dying, python_argv, spawn_detached
from gpusched_ipy.statedir import StateDir

# What stands in the file of the lock where an agent has left with a word: it had nothing to do, was
# told to, or could not go on.
IDLE, STOPPED, FAILED = "idle", "stopped", "failed"
_WIDTH = 128  # characters of the file, whatever is said
_UNKNOWN = "-"  # where the system does not tell: whoever holds the lock is taken to live


class AgentLock(FileLock):
    """Held by the agent while it lives; its file says who that is, or how the last one left."""

    def __init__(self, state: StateDir) -> None:
        super().__init__(state.agent_lock)

    def take(self) -> bool:
        """Take the lock if it is free, and say whose it is."""
        if not self.try_acquire():
            return False
        own = ProcessId.of(os.getpid())
        assert own is not None
        self._write(f"{own.pid} {own.start_ticks} {own.boot} {_pid_namespace()}")
        return True

    def leave_word(self, how: str) -> None:
        """Say that the holder goes on no more, and how; what is committed from now on is for the
        next agent."""
        self._write(how)

    @property
    def word(self) -> str:
        """How the last agent left; the name of a process where one has the lock, or died."""
        try:
            return self.path.read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            return IDLE

    @property
    def holder(self) -> int | None:
        """The pid of whoever has it; None: nobody, or one that is about to go; 0: one in another
        pid namespace, of which nothing more can be known."""
        if not self.held_by_anybody():
            return None
        words = self.word.split()
        if len(words) != 4 or not words[0].isdecimal():
            return None
        pid, ticks, boot, namespace = words
        if namespace == _UNKNOWN:
            return int(pid)
        if namespace != _pid_namespace():
            return 0
        known = ProcessId(int(pid), int(ticks), boot)
        lives = known == ProcessId.of(known.pid) and not is_dying(known.pid)
        return known.pid if lives else None

    def _write(self, text: str) -> None:
        if self._fd is not None:
            # In one write, over all that stood there: nobody reads half of it.
            os.pwrite(self._fd, text.ljust(_WIDTH).encode("ascii"), 0)


def ensure_agent(state: StateDir) -> None:
    """Start the agent unless one lives; call it after the commit that gives it something to do.

    An agent decides to leave under the queue lock and gives its own lock back before that one: so
    whoever commits and then finds no agent lock has not been overlooked. Where the lock is held by
    one that dies, the new agent waits until it is free.
    """
    if AgentLock(state).holder is None:
        spawn_detached(python_argv("agent", "--state-dir", str(state.root)))


def _pid_namespace() -> str:
    """What the pids here mean; containers that share a state directory have others."""
    if not sys.platform.startswith("linux"):
        return _UNKNOWN
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return _UNKNOWN
