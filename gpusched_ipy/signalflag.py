"""A flag that a signal handler may set: what ``threading.Event`` is between threads.

A handler runs in the main thread, perhaps in the middle of that thread's own wait for the event,
whose lock it holds just then; ``Event.set`` would wait for that lock for ever.
"""

from __future__ import annotations

import math
import os
import select
import time
from contextlib import suppress

# The handler of a signal that comes just ahead of a wait runs after it: no wait may be long.
_LOOK_S = 0.25


class SignalFlag:
    """Once set, for ever set. Set from handlers and threads; takes no lock."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def set(self) -> None:
        """Raise the flag."""
        with suppress(BlockingIOError):  # raised so often that the pipe is full
            os.write(self._write, b"x")

    def wait(self, timeout_s: float | None) -> bool:
        """Whether the flag is up, or has come up within ``timeout_s``; None waits for ever."""
        waiting = select.poll()
        waiting.register(self._read, select.POLLIN)
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not waiting.poll(1000 * min(_LOOK_S, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
        return True

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)
