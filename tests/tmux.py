"""A real terminal: a program in tmux, its keys and what its screen shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from helpers import wait_until
from requires import require

PATIENCE_S = 200.0  # every wait is for something on the screen; a loaded machine may need long


class Terminal:
    """One terminal of a tmux server of its own, with a shell in it.

    Args:
        folder: where the shell starts.
        environment: what it has beyond that of this process.
    """

    def __init__(
        self, folder: Path, environment: Mapping[str, str], width: int = 120, height: int = 30
    ) -> None:
        self._socket = f"gpusched-test-{uuid.uuid4().hex[:8]}"
        given = {"TERM": "xterm-256color", "PS1": "$ ", "LC_ALL": "C.UTF-8", **environment}
        self._tmux(
            *("-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height)),
            *("-c", str(folder), "env", "-u", "TMUX", "sh"),
            environment={**os.environ, **given},
        )

    def _tmux(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            ["tmux", "-L", self._socket, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout

    def type(self, line: str) -> None:
        """Type a line and Enter."""
        if line:
            self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def keys(self, *names: str) -> None:
        """Press keys by tmux's names: ``q``, ``Down``, ``C-c``."""
        self._tmux("send-keys", *names)

    def resize(self, width: int, height: int) -> None:
        """Give the terminal another size."""
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    @property
    def lines(self) -> list[str]:
        """What the screen shows."""
        return self._tmux("capture-pane", "-p").split("\n")

    @property
    def text(self) -> str:
        """What the screen shows, as one string."""
        return "\n".join(self.lines)

    def wait(self, *texts: str, timeout: float = PATIENCE_S) -> str:
        """Wait until the screen shows all these texts; the screen."""
        try:
            wait_until(lambda: all(text in self.text for text in texts), timeout, f"{texts} shown")
        except AssertionError as exc:
            raise AssertionError(f"{exc}; the screen:\n{self.text}") from None
        return self.text

    def wait_gone(self, text: str, timeout: float = PATIENCE_S) -> None:
        """Wait until the screen does not show that text any more."""
        wait_until(lambda: text not in self.text, timeout, f"{text} gone from {self.text}")

    def close(self) -> None:
        """End the server and what runs in it."""
        self._tmux("kill-server")


@contextmanager
def terminal(
    folder: Path, environment: Mapping[str, str], size: Sequence[int] = (120, 30)
) -> Iterator[Terminal]:
    """A terminal for a test; skips where there is no tmux."""
    require("tmux", shutil.which("tmux"), "tmux is not installed")
    opened = Terminal(folder, environment, *size)
    try:
        yield opened
    finally:
        opened.close()
