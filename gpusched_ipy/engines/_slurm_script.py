"""The batch script that hands jobs to Slurm. Pure; it runs nothing."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence

from gpusched_ipy.engines import EngineJob, RejectedError
from gpusched_ipy.engines.kept import KeptFolder

# One step of our own order. Nice only puts a job later; an ordinary user cannot have more.
NICE_STEP = 1000
# Our own timer ends a job; Slurm's, in whole minutes, comes a minute later at least.
_MARGIN_S = 60.0
_TYPE = re.compile(r"[A-Za-z0-9_.-]+")
# Places in an array of ours say nothing about the sweep: a job is not to take them for its own.
_PLACES = tuple(
    f"SLURM_ARRAY_{word}"
    for word in ("JOB_ID", "TASK_ID", "TASK_COUNT", "TASK_MIN", "TASK_MAX", "TASK_STEP")
)


def minutes(time_s: float) -> int:
    """The time limit of a job that ends by itself after so long."""
    return math.ceil((time_s + _MARGIN_S) / 60)


def script(
    jobs: Sequence[EngineJob],
    python: str = sys.executable,
    *,
    kept: KeptFolder | None = None,
    idle_s: float = 0.0,
) -> str:
    """The batch script that hands one job, or those of an array, to their runners.

    Args:
        kept: what a single job has is kept afterwards …
        idle_s: … for so long at most, on top of its own time.

    Raises:
        RejectedError: what was asked for cannot be said to Slurm.
    """
    job = jobs[0]
    if job.place is None:
        log = str(job.folder.path / "engine.log").replace("%", "%%")
        program = (job.folder.runner,) if kept is None else (kept.program, kept.path)
        start = [shlex.join(["exec", python, "-I", *map(str, program), str(job.folder.path)])]
        options = _options(job, log, 0.0 if kept is None else idle_s)
    else:
        places = {one.place: one for one in jobs if one.place is not None}
        # Slurm's own log cannot be in folders that have each their own name.
        options = [*_options(job, "/dev/null"), f"--array={_range(list(places))}"]
        cases = [f"{at}) folder={shlex.quote(str(places[at].folder.path))} ;;" for at in places]
        start = [
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
            f"unset {' '.join(_PLACES)}",
            'exec >>"$folder/engine.log" 2>&1',
            f'exec {shlex.join([python, "-I"])} "$folder/{job.folder.runner.name}" "$folder"',
        ]
    lines = [f"#SBATCH {_quoted(option)}" for option in options]
    return "\n".join(["#!/bin/sh", *lines, *start, ""])


def _range(places: list[int]) -> str:
    """Places of an array as sbatch reads them."""
    first, last = places[0], places[-1]
    if len(places) > 1 and places == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, places))


def _options(job: EngineJob, output: str, more_s: float = 0.0) -> list[str]:
    wanted = [
        f"--job-name={job.engine_name}",
        f"--output={output}",
        "--open-mode=append",
        "--chdir=/",
        "--nodes=1",
        "--ntasks=1",
        f"--gres={_gres(job)}",
        f"--nice={NICE_STEP * job.rank}",
        "--no-requeue",
    ]
    if job.time_s is not None:
        wanted.append(f"--time={minutes(job.time_s + more_s)}")
    return wanted


def _gres(job: EngineJob) -> str:
    if job.gpu_type is None:
        return f"gpu:{job.gpus}"
    if not _TYPE.fullmatch(job.gpu_type):
        raise RejectedError(
            f"--gpu-type {job.gpu_type}: Slurm knows GPUs by the type of its gres.conf, one word"
        )
    return f"gpu:{job.gpu_type}:{job.gpus}"


def _quoted(option: str) -> str:
    if "\n" in option or '"' in option:
        raise RejectedError(f"{option!r} cannot be written in a batch script; set engine_dir")
    name, _, value = option.partition("=")
    return f'{name}="{value}"' if re.search(r"[\s#'\\]", value) else option
