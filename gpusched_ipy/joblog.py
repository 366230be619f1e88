"""The output of a job as a stream of bytes, whatever kind it is; at once or until it has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpusched_ipy.api import Queue
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobKind
from gpusched_ipy.output import follow_log

if TYPE_CHECKING:
    from gpusched_ipy.transcript import Output

# Jobs whose output is that of a cell: streams, displays, errors.
SHOWN_KINDS = frozenset({JobKind.CELL, JobKind.ISOLATED})
# A missed ring of the bell delays what is shown by no more than this.
_STEP_S = 0.5


def written(queue: Queue, job: Job) -> Iterator[bytes]:
    """What the job has written so far.

    Raises:
        UserError: it has no output, and why.
    """
    path = queue.log_path(job.id)
    if path is None:
        raise UserError(_why_none(job))
    if job.kind in SHOWN_KINDS:
        yield _cell_text(queue, job)
    else:
        yield from follow_log(path, lambda: False)


def follow(queue: Queue, job_id: int) -> Iterator[bytes]:
    """What the job writes, from its begin to its end; waits for its start first.

    Raises:
        UserError: it never had any output, and why.
    """
    rang = threading.Event()
    leave = queue.subscribe(rang.set)
    try:
        job = queue.show(job_id)
        while not job.ended and queue.log_path(job_id) is None:
            _sleep(rang)
            job = queue.show(job_id)
        path = queue.log_path(job_id)
        if path is None:
            raise UserError(_why_none(job))
        if job.kind in SHOWN_KINDS:
            yield from _follow_cell(queue, job_id, rang)
        else:
            yield from follow_log(path, lambda: _goes_on(queue, job_id, rang))
    finally:
        leave()


def _goes_on(queue: Queue, job_id: int, rang: threading.Event) -> bool:
    """Wait a moment for more; False once the job has ended."""
    if queue.show(job_id).ended:
        return False
    rang.wait(0.1)
    rang.clear()
    return True


def _follow_cell(queue: Queue, job_id: int, rang: threading.Event) -> Iterator[bytes]:
    before = b""
    goes_on = True
    while goes_on:
        goes_on = _goes_on(queue, job_id, rang)
        text = _cell_text(queue, queue.show(job_id))
        # A progress bar rewrites its line: begin again where the two differ.
        at = len(before) if text.startswith(before) else 0
        if text[at:]:
            yield text[at:]
        before = text


def _cell_text(queue: Queue, job: Job) -> bytes:
    text = "".join(output.text for output in shown(queue, job))
    return text.encode("utf-8", "backslashreplace")


def shown(queue: Queue, job: Job) -> list[Output]:
    """What a cell has shown, as it stands now."""
    from gpusched_ipy.transcript import read

    log = queue.state.log(job.attempt) if job.attempt and job.kind is JobKind.ISOLATED else None
    return read(queue.state.transcript(job.spec.uid), log)


def _why_none(job: Job) -> str:
    if job.kind is JobKind.ALLOCATION:
        return f"job {job.id} writes to its own terminal; the queue keeps no log of it"
    if job.ended:
        return f"job {job.id} never began, so it has written nothing"
    why = f": {job.reason.text}" if job.reason else ""
    return f"job {job.id} has not begun{why}; `gpusched log -f {job.id}` waits for it"


def _sleep(rang: threading.Event) -> None:
    rang.wait(_STEP_S)
    rang.clear()
