"""What of the submitter's environment a job is given. Secrets are never stored by themselves.

An allow-list is captured into the record; what the user names with ``--env`` goes into a private
file beside it, which is deleted when the job starts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from gpusched_ipy.errors import StateDirError, UserError
from gpusched_ipy.statedir import StateDir, create_private, read_private
from gpusched_ipy.text import VARIABLE

_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TERM", "TZ", "TMPDIR"),
        *("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONHASHSEED", "VIRTUAL_ENV", "MPLBACKEND"),
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "HF_HOME", "TORCH_HOME"),
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    }
)
_PREFIXES = (
    *("LC_", "CUDA_", "CONDA_", "MAMBA_", "XDG_", "NCCL_", "PYTORCH_", "XLA_", "JAX_", "TF_"),
    *("HIP_", "ROCR_", "GPUSCHED_"),
)
_SECRET = re.compile(r"token|secret|passw|key|credential|auth|cookie", re.IGNORECASE)
# The job's own; what the submitter had set would point it at other GPUs.
_OWN = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES"})
_OF_A_SWEEP = ("GPUSCHED_SWEEP_", "GPUSCHED_ARRAY_")  # a job that submits passes none of these on


def allowed(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that every job is given."""
    return {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name.startswith(_PREFIXES))
        and name not in _OWN
        and not name.startswith(_OF_A_SWEEP)
        and not _SECRET.search(name)
    }


def named(wanted: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ``--env NAME`` and ``--env NAME=VALUE`` give.

    Raises:
        UserError: a name is no name, or it is not set here and has no value.
    """
    found: dict[str, str] = {}
    for text in wanted:
        name, given, value = text.partition("=")
        if not VARIABLE.fullmatch(name):
            raise UserError(f"--env: {name!r} is not the name of a variable")
        if not given and name not in environ:
            raise UserError(f"--env {name}: the variable is not set here; write --env {name}=VALUE")
        found[name] = value if given else environ[name]
    from gpusched_ipy.job import MAX_ENVIRONMENT_BYTES

    size = sum(len(name) + len(value) for name, value in found.items())
    if size > MAX_ENVIRONMENT_BYTES:
        raise UserError(f"--env gives {size} bytes; at most {MAX_ENVIRONMENT_BYTES} are taken")
    return found


def keep(state: StateDir, job_uid: str, variables: Mapping[str, str]) -> None:
    """Put named variables where only the starting job will read them.

    Raises:
        StateDirError: they cannot be written (a full disk).
    """
    path = state.environment(job_uid)
    try:
        if variables:
            with os.fdopen(create_private(path), "w", encoding="utf-8") as stream:
                json.dump(dict(variables), stream)
    except FileExistsError:
        return  # the same submit again
    except OSError as exc:
        path.unlink(missing_ok=True)
        raise StateDirError(f"{path} cannot be written ({exc.strerror}); make room") from exc


def take(
    state: StateDir, job_uid: str, names: Sequence[str], *, again: bool = False
) -> dict[str, str]:
    """The variables of :func:`keep`, which are gone from the disk afterwards.

    Args:
        names: of the variables that the job was submitted with.
        again: they stay there: the job may be tried again.

    Raises:
        StateDirError: they are not there, or something else stands where they should be.
    """
    path = state.environment(job_uid)
    try:
        text = read_private(path)
    except FileNotFoundError:
        if names:
            raise StateDirError(gone(names)) from None
        return {}
    if not again:
        path.unlink()
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise StateDirError(f"{path} is damaged; submit the job again") from None


def gone(names: Sequence[str]) -> str:
    """What is said of variables that an earlier start has used up."""
    listed = ", ".join(names)
    return f"what --env gave it ({listed}) was deleted when it first started; submit it again"


def drop(state: StateDir, job_uid: str) -> None:
    """Delete the variables of a job that will not start."""
    state.environment(job_uid).unlink(missing_ok=True)


def for_gpus(gpus: tuple[str, ...], vendor: str) -> dict[str, str]:
    """The variables that show a job its GPUs and no other: by UUID, in the driver's own order."""
    listed = ",".join(gpus)
    if vendor == "amd":
        # ROCm takes "GPU-<unique id>"; our UUIDs carry the vendor in front.
        listed = ",".join(f"GPU-{gpu.removeprefix('amd:')}" for gpu in gpus)
        return {"ROCR_VISIBLE_DEVICES": listed}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": listed}
