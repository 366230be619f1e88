"""What a queued cell has shown, kept so that it can be shown again: JSON lines, one message each.

Recorded from the kernel's own output channel, or by the process of an isolated cell; replayed into
any cell, followed while it grows, or read as plain text. Only what a notebook would save is kept:
streams, displays, results, errors, and what clears them. What an isolated cell's processes write
past Python lies in the job's log: each message says how long that was before it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpusched_ipy.output import LogReader
from gpusched_ipy.statedir import open_existing, open_private

KINDS = frozenset(
    {"stream", "display_data", "update_display_data", "execute_result", "error", "clear_output"}
)
# The kind of a message and its content.
Message = tuple[str, dict[str, Any]]
_CHUNK = 64 * 1024
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Recorder:
    """Appends the messages of one cell to its file, up to a size.

    Args:
        path: the transcript; what an earlier attempt has left there is cut off.
        cap: bytes; what comes later is left out, and the file says so.
    """

    def __init__(self, path: Path, cap: int) -> None:
        self._fd = open_private(path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._fd, 0)
        self._left = cap
        self._cut = False  # the last line, by a full disk
        self._mutex = threading.Lock()

    def record(self, kind: str, content: Mapping[str, Any], log_at: int | None = None) -> None:
        """Keep a message if it is one that a notebook would save.

        Args:
            log_at: bytes of the job's log that were written before it.
        """
        if kind not in KINDS or self._left < 0:
            return
        entry: dict[str, Any] = {"type": kind, "content": dict(content)}
        if log_at is not None:
            entry["log_at"] = log_at
        line = (json.dumps(entry) + "\n").encode()
        with self._mutex:
            self._left -= len(line)
            if self._left < 0:
                text = "… what followed was larger than the setting log_cap\n"
                last = {"type": "stream", "content": {"name": "stderr", "text": text}}
                line = (json.dumps(last) + "\n").encode()
            if self._fd >= 0:
                begin = b"\n" if self._cut else b""
                self._cut = os.write(self._fd, begin + line) < len(begin + line)

    def close(self) -> None:
        """Nothing more is recorded; closing twice changes nothing."""
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


class Follower:
    """The messages of a transcript as they come; between them what stands in the job's log.

    Args:
        path: the transcript, which may not be there yet; another attempt begins a new one.
        log: the log of the job's attempt, where it has one.
    """

    def __init__(self, path: Path, log: Path | None = None) -> None:
        self._path = path
        self._fd: int | None = None
        self._begun = b""  # of a line that is still being written
        self._log_path: Path | None = None
        self._log: LogReader | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.follow_log(log)

    def follow_log(self, path: Path | None) -> None:
        """The log is that one; the same one again changes nothing."""
        if path is None or path == self._log_path or not path.exists():
            return
        if self._log is not None:
            self._log.close()
        self._log, self._log_path = LogReader(path), path
        self._decoder.reset()

    def news(self) -> Iterator[Message]:
        """What has come since it was last asked for."""
        # First: what stands in the log now was written before anything that comes after this.
        end = self._log_path.stat().st_size if self._log_path and self._log_path.exists() else 0
        for line in self._lines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a full disk, or a kill, has cut it off
            yield from self._raw(entry.get("log_at", 0))
            yield entry["type"], entry["content"]
        yield from self._raw(end)

    def close(self) -> None:
        """Read no more; closing twice changes nothing."""
        if self._fd is not None:
            os.close(self._fd)
        if self._log is not None:
            self._log.close()
        self._fd = self._log = self._log_path = None

    def _lines(self) -> Iterator[bytes]:
        if not self._open():
            return
        assert self._fd is not None
        while chunk := os.read(self._fd, _CHUNK):
            *lines, self._begun = (self._begun + chunk).split(b"\n")
            yield from lines

    def _open(self) -> bool:
        """Whether there is a transcript; where a new one has taken its place, that is read."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return self._fd is not None
        if self._fd is not None and os.fstat(self._fd).st_ino == there.st_ino:
            return True
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._begun = open_existing(self._path), b""
        return True

    def _raw(self, end: int) -> Iterator[Message]:
        """What the log holds up to there, as text."""
        while self._log is not None and self._log.place < end:
            chunk = self._log.read(min(_CHUNK, end - self._log.place))
            if not chunk:
                return
            yield "stream", {"name": "stdout", "text": self._decoder.decode(chunk)}


@dataclass(slots=True)
class Output:
    """One output as it stood at the end."""

    kind: str  # "stream", "display_data", "execute_result" or "error"
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """It as plain text."""
        if self.kind == "stream":
            return str(self.content.get("text", ""))
        if self.kind == "error":
            lines = self.content.get("traceback") or [
                f"{self.content.get('ename')}: {self.content.get('evalue')}"
            ]
            return _COLOUR.sub("", "\n".join(lines)) + "\n"
        return str(self.content.get("data", {}).get("text/plain", "")) + "\n"


def read(path: Path, log: Path | None = None) -> list[Output]:
    """The outputs as they stood after the last message of the file.

    Args:
        log: of the job's last attempt, where what it holds belongs to the outputs.
    """
    shown = Standing()
    follower = Follower(path, log)
    try:
        for kind, content in follower.news():
            shown.take(kind, content)
    finally:
        follower.close()
    return shown.outputs()


def read_text(path: Path, log: Path | None = None) -> str:
    """The transcript as plain text: streams, the text of results and figures, tracebacks."""
    return "".join(output.text for output in read(path, log))


class Standing:
    """The outputs of a cell as they stand, message by message."""

    def __init__(self) -> None:
        self._outputs: list[Output | _Stream] = []
        self._clear_next = False

    def take(self, kind: str, content: dict[str, Any]) -> None:
        """One message more."""
        if kind == "clear_output":
            self._clear_next = bool(content.get("wait"))
            if not self._clear_next:
                self._outputs.clear()
            return
        if self._clear_next:
            self._outputs.clear()
            self._clear_next = False
        if kind == "stream":
            self._stream(content["name"]).add(str(content["text"]))
            return
        self._update(content)
        if kind != "update_display_data":
            self._outputs.append(Output(kind, dict(content)))

    def outputs(self) -> list[Output]:
        """As they stand now."""
        return [item.output if isinstance(item, _Stream) else item for item in self._outputs]

    def _stream(self, name: str) -> _Stream:
        last = self._outputs[-1] if self._outputs else None
        if not isinstance(last, _Stream) or last.name != name:
            last = _Stream(name)
            self._outputs.append(last)
        return last

    def _update(self, content: Mapping[str, Any]) -> None:
        display_id = (content.get("transient") or {}).get("display_id")
        if display_id is None:
            return
        for output in self._outputs:
            if isinstance(output, _Stream):
                continue
            if (output.content.get("transient") or {}).get("display_id") == display_id:
                output.content |= {key: content[key] for key in ("data", "metadata")}


class _Stream:
    """The text of one stream; each piece costs what it is long, not what came before it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lines: list[str] = []  # over
        self._last: list[str] = []  # pieces of the line that is not over

    def add(self, text: str) -> None:
        """One piece more."""
        self._last.append(text)
        if "\n" in text or "\r" in text:
            *lines, last = rewritten("".join(self._last)).split("\n")
            self._lines += lines
            self._last = [last]

    @property
    def output(self) -> Output:
        """It as it stands now."""
        text = "\n".join([*self._lines, "".join(self._last)])
        return Output("stream", {"name": self.name, "text": text})


def rewritten(text: str) -> str:
    """Text as a terminal would have left it: a carriage return goes back to the line's begin."""
    if "\r" not in text:
        return text
    lines = text.replace("\r\n", "\n").split("\n")
    shown = [_overwritten(line) for line in lines[:-1]]
    # The last line is not over: a later piece may still write over it.
    head, back, tail = lines[-1].rpartition("\r")
    last = _overwritten(head) + back + tail if back else tail
    return "\n".join([*shown, last])


def _overwritten(line: str) -> str:
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown
