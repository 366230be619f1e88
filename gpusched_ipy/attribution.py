"""Whose the processes on the GPUs are: jobs of ours, members of the queue, or strangers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gpusched_ipy.job import ACTIVE, BOUND_KINDS, Job
from gpusched_ipy.process import owner_among
from gpusched_ipy.snapshot import Gpu, GpuProcess, Snapshot


class Owners:
    """Remembers whose each process was found to be, so that only new ones are looked up.

    What was found stands while the roots do: a process whose parent dies goes to init or to one
    that was an ancestor of it already.
    """

    def __init__(self) -> None:
        self._roots: dict[int, int | str] = {}
        self._known: dict[tuple[int, float], int | str | None] = {}
        self._before: dict[tuple[int, float], int | str | None] = {}

    def begin(self, roots: dict[int, int | str]) -> None:
        """Another reading is looked at; who is not in it is forgotten."""
        same = roots == self._roots
        self._before, self._known = self._known if same else {}, {}
        self._roots = roots

    def of(self, process: GpuProcess) -> int | str | None:
        """The root that the process descends from."""
        if process.started_at is None:  # the next one of this pid may be another
            return owner_among(process.pid, self._roots)
        key = (process.pid, process.started_at)
        if key not in self._known:
            known = key in self._before
            found = self._before[key] if known else owner_among(process.pid, self._roots)
            self._known[key] = found
        return self._known[key]


def attribute(
    snapshot: Snapshot,
    jobs: Iterable[Job],
    *,
    leaders: Mapping[int, int],
    members: Mapping[int, str],
    owners: Owners | None = None,
) -> Snapshot:
    """``snapshot`` with the job and the member of each process filled in.

    Args:
        jobs: the open jobs.
        leaders: pid of the process that leads a job → the job's id.
        members: pid of a member → its key.
        owners: what the caller remembers of its last reading.
    """
    if not any(gpu.processes for gpu in snapshot.gpus):
        return snapshot
    cells = {job.member: job.id for job in jobs if job.state in ACTIVE and job.kind in BOUND_KINDS}
    # The fake's pids need not exist: looking at our own process table would ask about strangers.
    walk = snapshot.backend != "fake"
    roots: dict[int, int | str] = {**members, **leaders}
    owners = owners or Owners()
    owners.begin(roots)

    def whose(process: GpuProcess) -> GpuProcess:
        if process.job is not None or not process.visible:
            return process
        owner = owners.of(process) if walk else roots.get(process.pid)
        if isinstance(owner, int):
            return replace(process, job=owner)
        if owner is None:
            return process
        return replace(process, member=owner, job=cells.get(owner))

    def of(gpu: Gpu) -> Gpu:
        if not gpu.processes:
            return gpu
        marked = tuple([whose(process) for process in gpu.processes])
        return gpu if marked == gpu.processes else replace(gpu, processes=marked)

    return snapshot.with_gpus(tuple(of(gpu) for gpu in snapshot.gpus))
