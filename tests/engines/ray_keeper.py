"""Keeps one Ray head for as long as its standard input is open, and ends all of it then.

It adopts every orphan below it, so that neither a raylet nor a job can outlive the test process,
however that ends: its end of the pipe closes with it. A line of standard input is answered when it
has been obeyed: ``start [NAME=VALUE …]`` or ``kill``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

from gpusched_ipy.process import become_subreaper, end_tree

_COLLECT_S = 0.5


class Keeper:
    """All that is below this process."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._spared: int | None = None  # whose exit status is still wanted
        threading.Thread(target=self._collect, daemon=True).start()

    def start(self, environment: dict[str, str]) -> int:
        """Run the argv, which starts a head in the background; its exit status."""
        started = subprocess.Popen(
            self._argv, stdin=subprocess.DEVNULL, stdout=2, env={**os.environ, **environment}
        )
        self._spared = started.pid
        return started.wait()

    def end(self, first: signal.Signals) -> None:
        """End everything."""
        end_tree(os.getpid(), first=first, grace_s=3.0)

    def _collect(self) -> None:
        """As the first process of a machine does: a zombie still counts as alive to many."""
        while True:
            for child in psutil.Process().children():
                with suppress(psutil.Error, ChildProcessError):
                    if child.pid != self._spared and child.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(child.pid, os.WNOHANG)
            time.sleep(_COLLECT_S)


def main(argv: list[str]) -> int:
    """Obey until the pipe closes."""
    become_subreaper()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    keeper = Keeper(argv)
    for line in sys.stdin:
        what, *words = line.split()
        if what == "start":
            print(keeper.start(dict(word.split("=", 1) for word in words)), flush=True)
        else:
            keeper.end(signal.SIGKILL)
            print(0, flush=True)
    keeper.end(signal.SIGTERM)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
