"""How an order goes to a process that waits parked: a line of JSON through a socket, and with it
the descriptors that the process is to hold."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_FDS = 253  # that one message carries (unix(7))
_CHUNK = 65536


class Orders:
    """The lines that come through a socket, one after the other."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._read = b""
        self.fds: list[int] = []  # that have come and that nobody has taken

    @property
    def there(self) -> bool:
        """Whether something has come already."""
        return bool(self._read or select.select([self._channel], [], [], 0)[0])

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next line; None once nobody can send a whole one any more."""
        while b"\n" not in self._read:
            try:
                more, fds, _, _ = socket.recv_fds(self._channel, _CHUNK, _MOST_FDS)
            except ConnectionResetError:
                return None
            self.fds += fds
            if not more:
                return None
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said


def send(channel: socket.socket, said: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Send one line, and the descriptors with it.

    Raises:
        OSError: it did not arrive whole: nobody reads it, or not in the time of the socket.
    """
    line = encoded(said)
    sent = socket.send_fds(channel, [line], fds)
    # Who has it whole may have obeyed and closed already: sending nothing more would fail then.
    if sent < len(line):
        channel.sendall(line[sent:])


def encoded(said: Mapping[str, Any] | None) -> bytes:
    """The line that says that."""
    return json.dumps(said).encode() + b"\n"
