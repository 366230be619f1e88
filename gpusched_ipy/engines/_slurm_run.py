"""Runs the commands of Slurm. Every call has a time limit of ours: a command blocks for nine
seconds where the controller is dead.
"""

from __future__ import annotations

import os
import subprocess

from gpusched_ipy.engines import UnreachableError, _slurm_text
from gpusched_ipy.text import clean

# What the commands themselves need; the job's own variables travel in its folder.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "SLURM_CONF", "MUNGE_SOCKET")


class TooLateError(UnreachableError):
    """A command did not end in time."""


def cancel_named(name: str, limit_s: float, native: str | None = None) -> None:
    """End the jobs of that name, by name: an id may be another job's after a controller has died.

    Args:
        native: of these only the one with that id.

    Raises:
        UnreachableError: Slurm does not answer.
    """
    which = [f"--name={name}", *([] if native is None else [native])]
    done = run("scancel", "--quiet", *which, limit_s=limit_s)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UnreachableError(f"scancel: {_slurm_text.words(done.stderr)}")


def asked(*argv: str, limit_s: float) -> str:
    """What a command prints.

    Raises:
        UnreachableError: it fails.
    """
    done = run(*argv, limit_s=limit_s)
    if done.returncode:
        raise UnreachableError(f"{argv[0]}: {clean(_slurm_text.words(done.stderr), 300)}")
    return done.stdout


def run(*argv: str, limit_s: float, script: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of Slurm.

    Raises:
        UnreachableError: it is not installed, or does not end in time.
    """
    try:
        return subprocess.run(
            argv,
            input=script or "",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
            env=_environment(),
            check=False,
        )
    except FileNotFoundError:
        raise UnreachableError(f"there is no {argv[0]} on this machine") from None
    except OSError as exc:
        raise UnreachableError(f"{argv[0]} cannot be run: {exc}") from exc
    except subprocess.TimeoutExpired:
        raise TooLateError(f"{argv[0]} has not answered within {limit_s:g} s") from None


def _environment() -> dict[str, str]:
    """No variable of ours goes to the node by sbatch, which exports all that it has."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(("LC_", "SBATCH_"))
    }
