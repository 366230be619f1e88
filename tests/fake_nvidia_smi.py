"""An nvidia-smi without a GPU: prints what a JSON file says, in the forms of the real one.

Run by a wrapper that :class:`FakeSmi` writes. The file is read again for every answer and for every
round of a loop: ``gpus`` and ``apps`` (cells by field), ``xml``, ``list``, ``raw`` (text in place
of data), ``status``, ``unknown`` (fields it does not know) and ``refusal`` (how it says so),
``extra`` (lines after the data), ``hang``.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UNITS = {"utilization.gpu": "%", "clocks.current.sm": "MHz"}
UNITS |= dict.fromkeys(("memory.total", "memory.used", "memory.reserved", "used_gpu_memory"), "MiB")
UNITS |= dict.fromkeys(("power.draw", "enforced.power.limit"), "W")


class FakeSmi:
    """One scripted nvidia-smi.

    Args:
        folder: where the command and its state lie.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "nvidia-smi"
        self.state_file = folder / "smi.json"
        self.calls_file = folder / "smi.calls"
        self.calls_file.touch()
        self.set({})
        script = Path(__file__).resolve()
        self.path.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -I -S "{script}" "{self.state_file}" "$@"\n'
        )
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    def set(self, state: dict[str, Any]) -> None:
        """Replace what it answers."""
        self.state = state
        fresh = self.state_file.with_suffix(".new")
        fresh.write_text(json.dumps(state), encoding="utf-8")
        os.replace(fresh, self.state_file)

    def change(self, **changes: Any) -> None:
        """Replace single keys of what it answers."""
        self.set({**self.state, **changes})

    def calls(self) -> list[tuple[int, str]]:
        """Pid and options of every call so far."""
        lines = self.calls_file.read_text(encoding="utf-8").splitlines()
        return [(int(pid), rest) for pid, _, rest in (line.partition(" ") for line in lines)]


def main() -> int:
    path, options = Path(sys.argv[1]), sys.argv[2:]
    line = f"{os.getpid()} {' '.join(options)}\n".encode()
    calls = os.open(path.with_name("smi.calls"), os.O_WRONLY | os.O_APPEND)
    os.write(calls, line)
    os.close(calls)
    named = dict(option.partition("=")[::2] for option in options)
    rounds = 0
    while True:
        state = json.loads(path.read_text(encoding="utf-8"))
        status = answer(state, options, named, rounds)
        sys.stdout.flush()
        rounds += 1
        if status or "--loop-ms" not in named:
            return status
        time.sleep(int(named["--loop-ms"]) / 1000)


def answer(state: dict[str, Any], options: list[str], named: dict[str, str], rounds: int) -> int:
    if state.get("hang"):
        subprocess.run(["sleep", "600"], check=False)  # a grandchild that holds the pipe
    if state.get("raw") is not None:
        sys.stdout.write(state["raw"])
        return int(state.get("status", 0))
    if "-L" in options or "-q" in options:
        sys.stdout.write(state.get("list" if "-L" in options else "xml", ""))
        return 0
    kind = "gpus" if "--query-gpu" in named else "apps"
    fields = named["--query-gpu" if kind == "gpus" else "--query-compute-apps"].split(",")
    for field in fields:
        if field in state.get("unknown", ()):
            said = state.get("refusal", f'Field "{field}" is not a valid field to query.\n\n')
            sys.stdout.write(said)
            return 2
    if rounds == 0 and "noheader" not in named.get("--format", ""):
        shown = (f"{field} [{UNITS[field]}]" if field in UNITS else field for field in fields)
        sys.stdout.write(", ".join(shown) + "\n")
    for entry in state.get(kind, ()):
        sys.stdout.write(", ".join(str(entry.get(field, "[N/A]")) for field in fields) + "\n")
    sys.stdout.write(state.get("extra", "") if kind == "gpus" else "")
    return int(state.get("status", 0))


if __name__ == "__main__":
    sys.exit(main())
