"""Two files change names in one step, so that a file is replaced again and again by the same two.

A file made anew and renamed over another costs ext4 300 µs and a write to the disk each time; an
exchange costs a third of that and leaves the disk alone. It knows nothing of what is in the files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from functools import cache

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def put_in_place(spare: os.PathLike[str], target: os.PathLike[str]) -> None:
    """Let ``target`` show what ``spare`` holds, in one step; ``spare`` may hold the old one then.

    Args:
        spare: a file in the folder of ``target``.
        target: need not exist.

    Raises:
        OSError: the folder cannot be changed.
    """
    call = _renameat2()
    if call is not None:
        names = os.fsencode(spare), os.fsencode(target)
        if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.ENOENT and code not in _UNABLE:
            raise OSError(code, os.strerror(code), os.fspath(spare))
    os.replace(spare, target)  # the first time, and on systems and disks that cannot exchange


@cache
def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library older than glibc 2.28
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
