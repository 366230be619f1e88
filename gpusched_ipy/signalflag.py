"""A flag that a signal handler may set: what ``threading.Event`` is between threads.

A handler runs in the main thread, perhaps in the middle of that thread's own wait for the event,
whose lock it holds just then; ``Event.set`` would wait for that lock for ever.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress


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
        return bool(waiting.poll(None if timeout_s is None else 1000 * timeout_s))

    def __del__(self) -> None:
        os.close(self._read)
        os.close(self._write)
