"""The log of a kernel: what goes wrong behind the user's back goes into a file, not into a cell."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from gpusched_ipy.statedir import open_private

_MAX_BYTES = 1_000_000


def log_to(path: Path) -> logging.Handler:
    """Have everything that this package logs appended to a private file.

    Raises:
        StateDirError: the file cannot be opened.
    """
    fd = open_private(path, os.O_WRONLY | os.O_APPEND)
    if os.fstat(fd).st_size > _MAX_BYTES:
        os.ftruncate(fd, 0)
    os.close(fd)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    logger = logging.getLogger(__package__)
    logger.addHandler(handler)
    logger.propagate = False
    return handler


def close_log(handler: logging.Handler) -> None:
    """Take it back."""
    logger = logging.getLogger(__package__)
    logger.removeHandler(handler)
    logger.propagate = True
    handler.close()
