"""Every error that is raised on purpose, and never anything else.

Two families: :class:`UserError` is what somebody can mend at the keyboard, and shows as one line in
a cell and in a terminal; the rest are faults of the program and keep their traceback.
"""

from __future__ import annotations

from gpusched_ipy.text import clean


class GpuSchedError(Exception):
    """The root of all errors of this package."""


class UserError(GpuSchedError):
    """Something the user can put right; the message says what, with which thing, and how."""

    def __str__(self) -> str:
        # It may quote what a stranger has called his process; front ends and Python show it as is.
        return clean(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """One line in a cell: IPython shows this in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class JobNotFoundError(UserError):
    """No job has the id or name that was asked for."""

    def __init__(self, asked: object) -> None:
        super().__init__(
            f"there is no job {asked!s}; `%gpuq list --all` and `gpusched list --all` show all jobs"
        )
        self.asked = asked


class StateDirError(UserError):
    """The private state directory cannot be used: permissions, owner, disk, network file system."""


class StoreError(UserError):
    """The record cannot be read or written (full disk, damage, a newer schema)."""


class DamagedJobError(StoreError):
    """One job cannot be read in the record: its checksum does not match. The others go on."""

    def __init__(self, job_id: int) -> None:
        super().__init__(
            f"job {job_id} is damaged in the record (its checksum does not match); "
            "`gpusched doctor --fix` sets it aside and saves the others"
        )
        self.job_id = job_id


class JobFailedError(UserError):
    """A job has not ended well, so it has no result.

    Args:
        job_id: which job.
        state: how it ended: failed, cancelled, timeout or lost.
        text: the message, for people.
    """

    def __init__(self, job_id: int, state: str, text: str) -> None:
        super().__init__(text)
        self.job_id = job_id
        self.state = state

    def __reduce__(self) -> tuple[type[JobFailedError], tuple[int, str, str]]:
        return type(self), (self.job_id, self.state, str(self))


class RemoteError(GpuSchedError):
    """An exception of a call that cannot be brought back as it was; its text, and its traceback as
    the cause."""


class BackendUnavailableError(GpuSchedError):
    """A backend cannot be used on this machine; the message is the reason, for people."""


class BackendReadError(GpuSchedError):
    """A reading failed as a whole; becomes ``Snapshot.problem``, never a number."""


class InvalidTransitionError(GpuSchedError):
    """A job was asked to make a move that the table in ``job.py`` does not hold."""

    def __init__(self, job_id: int, start: str, end: str) -> None:
        super().__init__(f"job {job_id} cannot move from {start} to {end}")
        self.job_id = job_id
        self.start = start
        self.end = end
