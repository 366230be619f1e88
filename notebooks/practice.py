"""A GPU to practise on where there is none: a scripted one, with a stranger who comes and goes.

On a machine with a GPU nothing is scripted: the notebooks then show that GPU, and nobody is sent
away from it.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path

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
        self.scripted = os.environ.get("GPUSCHED_BACKEND") == "fake" or not _real_gpu()
        if self.scripted:
            folder = Path(tempfile.mkdtemp(prefix="gpusched-practice-"))
            self._script = folder / "fake.json"
            self.stranger_leaves()
            # A queue of its own: jobs for a scripted GPU have no business in the real one.
            os.environ.setdefault("GPUSCHED_STATE_DIR", str(folder / "queue"))
            os.environ["GPUSCHED_FAKE"] = str(self._script)

    def __repr__(self) -> str:
        if self.scripted:
            return "This machine shows no GPU: we practise on a scripted one, in its own queue."
        return "This machine has a GPU: we use it, and send nobody away from it."

    def stranger_comes(self) -> None:
        """Somebody else's training run takes the card."""
        self._write(_STRANGER)

    def stranger_leaves(self) -> None:
        """The card is free again."""
        self._write(_NOBODY)

    def stranger_leaves_once_queued(self, *names: str) -> None:
        """The card becomes free a moment after jobs of these names are in the queue.

        A notebook that is run without a person holds each queued cell until its turn has come. So
        the stranger also leaves when such a cell waits.
        """
        watcher = threading.Thread(target=self._leave_later, args=(set(names),), daemon=True)
        watcher.start()

    def _leave_later(self, names: set[str]) -> None:
        from gpusched_ipy.api import Queue

        queue = Queue(owner="the tour")
        while self.scripted:
            jobs = queue.list()
            if names <= {job.name for job in jobs} or any(job.spec.in_place for job in jobs):
                time.sleep(2)
                self.stranger_leaves()
                return
            time.sleep(0.1)

    def _write(self, state: dict[str, object]) -> None:
        if self.scripted:
            draft = self._script.with_suffix(".new")
            draft.write_text(json.dumps({"gpus": [_CARD | state]}), encoding="utf-8")
            draft.replace(self._script)


def _real_gpu() -> bool:
    """Whether a GPU of this machine can be read."""
    found = detect(Settings.load()).backend
    if found is None:
        return False
    try:
        return bool(found.read().gpus) and found.name != "fake"
    finally:
        found.close()
