"""Single keys of a terminal, without Enter; and the terminal as it was before, whatever happens.

It knows no queue and draws nothing.
"""

from __future__ import annotations

import os
import re
import select
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What terminals send for the keys that are no character (ECMA-48 and xterm's variants).
_NAMED = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "H": "home",
    "F": "end",
    "1~": "home",
    "4~": "end",
    "5~": "page up",
    "6~": "page down",
    "7~": "home",
    "8~": "end",
}
_TOKEN = re.compile(r"\x1b[\[O]([0-9;]*[A-Za-z~])|\x1b(?![\[O])|([^\x1b])", re.DOTALL)
_BEGUN = re.compile(r"\x1b(?:[\[O][0-9;]{0,16})?\Z")


class Keyboard:
    """The keys typed on the terminal behind a file descriptor.

    Args:
        fd: the terminal.
        wake: another descriptor; what arrives there ends a wait, and is thrown away.
    """

    def __init__(self, fd: int, wake: int) -> None:
        self._fd = fd
        self._wake = wake
        self._rest = ""
        self._before: list[Any] | None = None
        self.closed = False  # the terminal has gone

    def open(self) -> None:
        """Take keys one by one, and do not show them."""
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._before is not None:
            before, self._before = self._before, None
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, before)
            except termios.error:
                self.closed = True  # there is no terminal any more

    @contextmanager
    def opened(self) -> Iterator[None]:
        """:meth:`open`, and :meth:`close` however the block ends."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def wait(self, timeout_s: float) -> list[str]:
        """The keys typed within ``timeout_s``: characters, or names like ``page up``.

        Comes back early, with what there is, when a key or a byte at ``wake`` arrives.
        """
        ready, _, _ = select.select([self._fd, self._wake], [], [], max(0.0, timeout_s))
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._fd not in ready:
            return []
        try:
            read = os.read(self._fd, 1024)
        except OSError:
            read = b""
        if not read:
            self.closed = True
            return []
        return self._keys(read.decode("utf-8", "ignore"))

    def _keys(self, text: str) -> list[str]:
        text = self._rest + text
        cut = _BEGUN.search(text)
        # The rest of a sequence may still be on its way; a lone Escape means nothing here.
        self._rest = text[cut.start() :] if cut and cut[0] != "\x1b" else ""
        if self._rest:
            text = text[: -len(self._rest)]
        keys = (
            _NAMED.get(found[1], "") if found[1] else found[2] for found in _TOKEN.finditer(text)
        )
        return [key for key in keys if key]
