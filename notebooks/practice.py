"""A GPU to practise on where there is none: a scripted one, with a stranger who comes and goes.

On a machine with a GPU nothing is scripted: a job of the queue that only waits then plays the
stranger.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from gpusched_ipy import Queue
from gpusched_ipy.backends import detect
from gpusched_ipy.config import Settings

_CARD = {
    "uuid": "GPU-fake-0",
    "name": "Fake A100 40GB",
    "memory_total": "40GiB",
    # What a running job of the queue adds to the card.
    "job_load": {"utilization": 0.6, "memory": "8GiB"},
}
_NOBODY = {"memory_used": 0, "utilization": 0.0, "temperature": 34, "power": 52, "processes": []}
_STRANGER = {
    "memory_used": "30GiB",
    "utilization": 0.97,
    "temperature": 71,
    "power": 263,
    "processes": [{"pid": 4242, "user": "user1", "name": "python", "memory": "30GiB"}],
}


class Practice:
    """The GPU of these notebooks; make it before ``%load_ext gpusched_ipy``."""

    def __init__(self) -> None:
        self.scripted = os.environ.get("GPUSCHED_BACKEND") == "fake" or _real_gpus() == 0
        self._folder = Path(tempfile.mkdtemp(prefix="gpusched-practice-"))
        if self.scripted:
            self._write(_NOBODY)
            # A queue of its own: jobs for a scripted GPU have no business in the real one.
            os.environ.setdefault("GPUSCHED_STATE_DIR", str(self._folder / "queue"))
            os.environ["GPUSCHED_FAKE"] = str(self._script)

    def __repr__(self) -> str:
        if self.scripted:
            return "This machine shows no GPU: we practise on a scripted one, in its own queue."
        return "This machine has a GPU: we use it."

    def stranger_comes(self) -> None:
        """Somebody else takes the card; a real one is taken by a job of ours that only waits."""
        if self.scripted:
            self._write(_STRANGER)
            return
        self._occupied.touch()
        code = f"import os, time\nwhile os.path.exists({str(self._occupied)!r}): time.sleep(0.1)"
        argv = [sys.executable, "-c", code]
        queue = Queue(owner="practice")
        job = queue.submit(argv, name="somebody-else", priority=1000, gpus=_real_gpus())
        deadline = time.monotonic() + 15
        while queue.show(job.id).state == "pending" and time.monotonic() < deadline:
            time.sleep(0.1)

    def kernel_keeps(self, pid: int, memory: str) -> None:
        """An idle kernel holds memory, by its pid; a real card shows what it does hold."""
        if self.scripted:
            held = [{"pid": pid, "user": "you", "name": "python", "memory": memory}]
            self._write(_NOBODY | {"memory_used": memory, "processes": held})

    def stranger_leaves(self) -> None:
        """The card is free again."""
        if self.scripted:
            self._write(_NOBODY)
        else:
            self._occupied.unlink(missing_ok=True)

    def stranger_leaves_once_queued(self, *names: str) -> None:
        """The card becomes free a moment after jobs of these names are in the queue.

        A notebook that is run without a person holds each queued cell until its turn has come. So
        the stranger also leaves when such a cell waits.
        """
        watcher = threading.Thread(target=self._leave_later, args=(set(names),), daemon=True)
        watcher.start()

    def _leave_later(self, names: set[str]) -> None:
        queue = Queue(owner="practice")
        while True:
            jobs = queue.list()
            if names <= {job.name for job in jobs} or any(job.spec.in_place for job in jobs):
                time.sleep(2)
                self.stranger_leaves()
                return
            time.sleep(0.1)

    @property
    def _script(self) -> Path:
        return self._folder / "fake.json"

    @property
    def _occupied(self) -> Path:
        return self._folder / "occupied"

    def _write(self, state: dict[str, object]) -> None:
        draft = self._script.with_suffix(".new")
        draft.write_text(json.dumps({"gpus": [_CARD | state]}), encoding="utf-8")
        draft.replace(self._script)


def _real_gpus() -> int:
    """How many GPUs of this machine can be read."""
    found = detect(Settings.load()).backend
    if found is None or found.name == "fake":
        return 0
    try:
        return len(found.read().gpus)
    finally:
        found.close()
