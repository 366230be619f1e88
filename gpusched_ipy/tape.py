"""What the process of an isolated cell shows, written into its transcript as it appears.

It stands for ``sys.stdout``, ``sys.stderr`` and the display system of that process. A line is
written at once, the next a twentieth of a second later with all that came meanwhile: a loop that
prints does not fill the disk with tiny records.
"""

from __future__ import annotations

import base64
import io
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from gpusched_ipy.transcript import Recorder

_EVERY_S = 0.05
_AT_ONCE = 64 * 1024  # characters that are not held back
_LOG_FD = 1  # the job's log is the standard output of its process


class Tape:
    """Records streams and messages in the order in which they came; from any thread."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._mutex = threading.RLock()
        self._name = ""
        self._pieces: list[str] = []
        self._length = 0
        self._log_at = 0
        self._written_mono = 0.0
        self._waits = threading.Event()
        self._pid = os.getpid()
        threading.Thread(target=self._write_late, name="gpusched-tape", daemon=True).start()

    def text(self, name: str, text: str) -> None:
        """Something was written to a stream."""
        if os.getpid() != self._pid:
            # A forked child has no thread of ours, and the lock may never open: the raw log.
            os.write(_LOG_FD, text.encode("utf-8", "backslashreplace"))
            return
        with self._mutex:
            if name != self._name:
                self._write()
            if not self._pieces:
                self._name, self._log_at = name, _log_size()
            self._pieces.append(text)
            self._length += len(text)
            rested = time.monotonic() - self._written_mono >= _EVERY_S
            if (rested and text.endswith("\n")) or self._length >= _AT_ONCE:
                self._write()
            else:
                self._waits.set()

    def message(self, kind: str, content: Mapping[str, Any]) -> None:
        """Something else was shown."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            self._write()
            self._recorder.record(kind, content, _log_size())

    def flush(self) -> None:
        """Hold nothing back."""
        if os.getpid() == self._pid:
            with self._mutex:
                self._write()

    def _write(self) -> None:
        if self._pieces:
            content = {"name": self._name, "text": "".join(self._pieces)}
            self._pieces.clear()
            self._length = 0
            self._recorder.record("stream", content, self._log_at)
            self._written_mono = time.monotonic()

    def _write_late(self) -> None:
        while True:
            self._waits.wait()
            self._waits.clear()
            time.sleep(_EVERY_S)
            self.flush()


class TapeStream(io.TextIOBase):
    """One of the two standard streams of the process.

    Args:
        fd: the stream's own descriptor, for those who ask for it.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, tape: Tape, name: str, fd: int) -> None:
        self._tape = tape
        self.name = f"<{name}>"
        self._which = name
        self._fd = fd

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Show that."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            self._tape.text(self._which, text)
        return len(text)

    def flush(self) -> None:
        """Hold nothing back."""
        self._tape.flush()

    def fileno(self) -> int:
        """Of the raw stream: what is written there is shown as well."""
        return self._fd

    def close(self) -> None:
        """It stays open: whatever ends this process may still write."""


def plain(value: Any) -> Any:
    """``value`` as JSON takes it: bytes in base64, what else is unknown as its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _log_size() -> int:
    return os.fstat(_LOG_FD).st_size
