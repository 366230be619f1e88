"""Start the agent where none lives. Nothing depends on it being up; something must start it."""

from __future__ import annotations

from gpusched_ipy.locks import FileLock
from gpusched_ipy.process import python_argv, spawn_detached
from gpusched_ipy.statedir import StateDir


def ensure_agent(state: StateDir) -> None:
    """Start the agent unless one lives; call it after the commit that gives it something to do.

    An agent decides to leave under the queue lock and gives its own lock back before that one: so
    whoever commits and then finds no agent lock has not been overlooked.
    """
    if not FileLock(state.agent_lock).held_by_anybody():
        spawn_detached(python_argv("agent", "--state-dir", str(state.root)))
