"""``gpusched gpus``: the GPUs in the terminal, once or again and again."""

from __future__ import annotations

import json
import sys
import time

from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.look import Look
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.terminal import DONE, FAILED, is_terminal, note, show_table
from gpusched_ipy.view import GPU_COLUMNS, gpu_rows, gpus_json, gpus_note

_CLEAR = "\x1b[H\x1b[2J"
_WATCHER = "gpusched gpus --watch"


def show_gpus(queue: Queue, *, as_json: bool) -> int:
    """Read the GPUs once and show them; a reading that failed is shown, and is a failure."""
    monitor = Monitor(queue.settings, queue.clock, queue.state.root)
    try:
        look = Look(queue, monitor)
        snapshot = look.now()
        if as_json:
            print(json.dumps(gpus_json(snapshot, queue.clock.now()), indent=2))
        else:
            _show(queue, look, snapshot, monitor.explanation)
    finally:
        monitor.stop()
    return DONE if snapshot.problem is None else FAILED


def watch_gpus(queue: Queue, interval_s: float | None, *, as_json: bool) -> int:
    """Show the GPUs again and again until interrupted; JSON is one object a line."""
    monitor = Monitor(queue.settings, queue.clock, queue.state.root)
    interval = queue.settings.sample_interval_s if interval_s is None else interval_s
    try:
        look = Look(queue, monitor)
        monitor.want(_WATCHER, interval, Detail.FULL)
        look.now()
        while True:
            snapshot = look.latest()
            if snapshot is not None:
                _show_again(queue, look, snapshot, monitor, as_json=as_json)
            time.sleep(interval)
    except KeyboardInterrupt:
        return DONE
    finally:
        monitor.stop()


def _show_again(
    queue: Queue, look: Look, snapshot: Snapshot, monitor: Monitor, *, as_json: bool
) -> None:
    if as_json:
        print(json.dumps(gpus_json(snapshot, queue.clock.now())), flush=True)
        return
    if is_terminal(sys.stdout):
        sys.stdout.write(_CLEAR)
    _show(queue, look, snapshot, monitor.explanation)
    print(flush=True)


def _show(queue: Queue, look: Look, snapshot: Snapshot, explanation: str | None) -> None:
    now = queue.clock.now()
    rows = gpu_rows(snapshot, now, jobs=look.jobs, members=look.members)
    if rows:
        show_table(GPU_COLUMNS, rows)
    line = gpus_note(snapshot, now, explanation)
    if is_terminal(sys.stdout) and rows:
        print(line)
    else:
        sys.stdout.flush()
        note(line)
