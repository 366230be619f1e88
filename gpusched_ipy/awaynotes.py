"""Which isolated cells a notebook has away: a word to the next kernel of the same notebook.

An empty file each: loading the extension looks for them, and opens no record for that.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from gpusched_ipy.statedir import StateDir, create_private

_FOLDER = "away"


def leave(state: StateDir, notebook: str, job_uid: str) -> None:
    """A cell of that notebook is away.

    Raises:
        OSError: the disk is full.
    """
    with suppress(FileExistsError):
        os.close(create_private(_path(state, notebook, job_uid)))


def remove(state: StateDir, notebook: str, job_uid: str) -> None:
    """It is no more: all that it has shown stands under it, or nobody wants that any longer."""
    _path(state, notebook, job_uid).unlink(missing_ok=True)


def found(root: Path, notebook: str) -> list[str]:
    """The uids of the jobs whose cells that notebook has away; ``root`` may not be there yet."""
    try:
        names = os.listdir(root / _FOLDER)
    except FileNotFoundError:
        return []
    return sorted(name.partition(".")[2] for name in names if name.startswith(f"{notebook}."))


def _path(state: StateDir, notebook: str, job_uid: str) -> Path:
    return state.away(f"{notebook}.{job_uid}")
