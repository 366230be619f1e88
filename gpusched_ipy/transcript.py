"""What a deferred cell has shown, kept so that it can be shown again: JSON lines, one message each.

Recorded from the kernel's own output channel; replayed into any cell, or read as plain text. Only
what a notebook would save is kept: streams, displays, results, errors, and what clears them.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpusched_ipy.statedir import open_private

KINDS = frozenset(
    {"stream", "display_data", "update_display_data", "execute_result", "error", "clear_output"}
)
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
        self._mutex = threading.Lock()

    def record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Keep a message if it is one that a notebook would save."""
        if kind not in KINDS or self._left < 0:
            return
        line = (json.dumps({"type": kind, "content": dict(content)}) + "\n").encode()
        with self._mutex:
            self._left -= len(line)
            if self._left < 0:
                text = "… what followed was larger than the setting log_cap\n"
                last = {"type": "stream", "content": {"name": "stderr", "text": text}}
                line = (json.dumps(last) + "\n").encode()
            if self._fd >= 0:
                os.write(self._fd, line)

    def close(self) -> None:
        """Nothing more is recorded; closing twice changes nothing."""
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


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


def read(path: Path) -> list[Output]:
    """The outputs as they stood after the last message of the file."""
    outputs: list[Output] = []
    clear_next = False
    for kind, content in _messages(path):
        if kind == "clear_output":
            clear_next = bool(content.get("wait"))
            if not clear_next:
                outputs.clear()
            continue
        if clear_next:
            outputs.clear()
            clear_next = False
        _apply(outputs, kind, content)
    return outputs


def read_text(path: Path) -> str:
    """The transcript as plain text: streams, the text of results and figures, tracebacks."""
    return "".join(output.text for output in read(path))


def _apply(outputs: list[Output], kind: str, content: dict[str, Any]) -> None:
    if kind == "stream":
        _add_text(outputs, content)
        return
    display_id = (content.get("transient") or {}).get("display_id")
    if display_id is not None:
        for output in outputs:
            if (output.content.get("transient") or {}).get("display_id") == display_id:
                output.content |= {key: content[key] for key in ("data", "metadata")}
    if kind != "update_display_data":
        outputs.append(Output(kind, dict(content)))


def _add_text(outputs: list[Output], content: Mapping[str, Any]) -> None:
    last = outputs[-1] if outputs else None
    if last is None or last.kind != "stream" or last.content["name"] != content["name"]:
        outputs.append(Output("stream", {"name": content["name"], "text": ""}))
        last = outputs[-1]
    last.content["text"] = rewritten(last.content["text"] + str(content["text"]))


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


def _messages(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if not line.endswith("\n"):
                return  # still being written
            entry = json.loads(line)
            yield entry["type"], entry["content"]
