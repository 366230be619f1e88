"""A parked interpreter: the Python of an isolated cell or a call, started before its GPU is free.

It has imported what each such job needs, knows nothing of the job and holds nothing. The shim whose
child it is gives it the job's variables, folder and descriptors once the job is durably its own. A
job whose Python would start in another way gets an ordinary start, as does one whose parked
interpreter has died.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpusched_ipy import orders

# What stands between the begin of a Python and the code of its user, by the kind of job.
MODULES = {"callable": "callmain", "isolated": "isolatedmain"}
# Seconds that a parked interpreter may take to begin; it may still be importing.
PATIENCE_S = 10.0
BEGUN = b"+"

# What a Python looks at before any code of its user runs, the loader and the C library included.
_EARLY = ("PYTHON", "IPYTHON", "LD_", "DYLD_", "LC_", "GLIBC_", "MALLOC_", "OPENSSL_", "XDG_")
_EARLY_NAMES = frozenset(
    {
        *("LANG", "LANGUAGE", "LOCPATH", "GCONV_PATH", "TZ", "TERM", "HOME", "PATH", "TMPDIR"),
        *("TEMP", "TMP", "VIRTUAL_ENV", "IN_SPHINX_RUN"),
        "TRAITLETS_APPLICATION_RAISE_CONFIG_FILE_ERROR",
    }
)
# The job's own: told at its begin, whatever they were when the interpreter started.
_OWN = "GPUSCHED_"
_MOST_ENV = 32 * 1024  # characters; a larger one is not sent ahead


def matters_early(name: str) -> bool:
    """Whether a Python may have looked at that variable before any code of its user runs."""
    return name.startswith(_EARLY) or name in _EARLY_NAMES


def recipe(
    kind: str, argv: Sequence[str] | None, env: Mapping[str, str], named: Iterable[str]
) -> dict[str, Any] | None:
    """How to start, without knowing more of it, the Python of a job: the same for all jobs whose
    Python starts alike. None: it starts only with its job.

    Args:
        kind: of the job.
        env: what the job was submitted with.
        named: the variables whose values come at the job's begin.
    """
    module = MODULES.get(kind)
    if module is None or argv is None or len(argv) != 6 or list(argv[1:3]) != ["-P", "-c"]:
        return None
    begin = f"from gpusched_ipy.{module} import main;"
    if begin not in argv[3] or any(map(matters_early, named)):
        return None
    # Modules of a project could stand in for those of Python: code of the user's, before its time.
    if env.get("PYTHONPATH"):
        return None
    if sum(len(name) + len(value) for name, value in env.items()) > _MOST_ENV:
        return None
    parked = argv[3].replace(begin, "from gpusched_ipy.parkedmain import main;")
    return {
        "argv": [argv[0], "-P", "-c", parked, module],
        "env": {name: value for name, value in env.items() if not name.startswith(_OWN)},
    }


class ParkedInterpreter:
    """The interpreter that a shim keeps for its job; at first there is none."""

    def __init__(self) -> None:
        self._recipe: Mapping[str, Any] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def park(self, recipe: Mapping[str, Any] | None) -> None:
        """Have one that was started by that recipe and no other; None: have none."""
        if recipe == self._recipe:
            return
        self.dismiss()
        if recipe is None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = subprocess.Popen(
                    [*recipe["argv"], str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=recipe["env"],
                    start_new_session=True,
                    pass_fds=[theirs.fileno()],
                )
            except OSError:  # the job's own start says what is wrong, in its record
                ours.close()
                return
        self._recipe, self._child, self._channel = recipe, child, ours

    def begin(
        self, recipe: Mapping[str, Any] | None, said: Mapping[str, Any], fds: Sequence[int]
    ) -> subprocess.Popen[bytes] | None:
        """Make it the process of a job; None: the job has not begun and needs an ordinary start.

        Args:
            recipe: of the job; an interpreter of another one is dismissed.
            said: the ``arguments``, ``env`` and ``cwd`` of the job.
            fds: its log, and the locks of its GPUs.
        """
        child, channel = self._child, self._channel
        if child is None or channel is None or recipe is None or recipe != self._recipe:
            self.dismiss()
            return None
        channel.settimeout(PATIENCE_S)
        if not _told(channel, said, fds):
            # Nothing of the job has run: it says so before that, and now it never will.
            self.dismiss()
            return None
        channel.close()
        self._recipe = self._child = self._channel = None
        return child

    def dismiss(self) -> None:
        """Have none any more."""
        if self._child is not None and self._channel is not None:
            self._channel.close()
            self._child.kill()
            self._child.wait()
        self._recipe = self._child = self._channel = None


def _told(channel: socket.socket, said: Mapping[str, Any], fds: Sequence[int]) -> bool:
    """Give an interpreter its order; whether it has begun, or still may."""
    try:
        orders.send(channel, said, fds)
    except OSError:
        return False  # it has not all of it
    try:
        return channel.recv(1) == BEGUN
    except TimeoutError:
        # Stopped, or very slow, and it may begin at any time: it is the process of the job, which
        # a cancel ends.
        return True
    except ConnectionResetError:
        return False
