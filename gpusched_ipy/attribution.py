"""Whose the processes on the GPUs are: jobs of ours, members of the queue, or strangers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gpusched_ipy.job import ACTIVE, BOUND_KINDS, Job
from gpusched_ipy.process import owner_among
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot


def attribute(
    snapshot: Snapshot,
    jobs: Iterable[Job],
    *,
    leaders: Mapping[int, int],
    members: Mapping[int, str],
) -> Snapshot:
    """``snapshot`` with the job and the member of each process filled in.

    Args:
        jobs: the open jobs.
        leaders: pid of the process that leads a job → the job's id.
        members: pid of a member → its key.
    """
    cells = {job.member: job.id for job in jobs if job.state in ACTIVE and job.kind in BOUND_KINDS}
    # The fake's pids need not exist: looking at our own process table would ask about strangers.
    walk = snapshot.backend != "fake"
    roots: dict[int, int | str] = {**members, **leaders}

    def whose(process: GpuProcess) -> GpuProcess:
        if process.job is not None or not process.visible:
            return process
        owner = owner_among(process.pid, roots) if walk else roots.get(process.pid)
        if isinstance(owner, int):
            return replace(process, job=owner)
        if owner is None:
            return process
        return replace(process, member=owner, job=cells.get(owner))

    def of(gpu: Gpu) -> Gpu:
        if not gpu.processes:
            return gpu
        return replace(gpu, processes=tuple(whose(process) for process in gpu.processes))

    return snapshot.with_gpus(tuple(of(gpu) for gpu in snapshot.gpus))
