"""The fresh Python of a call: it takes the call, makes it, and keeps what came of it."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gpusched_ipy.calls import Outcome, drop_outcome, keep_outcome, take_call
from gpusched_ipy.statedir import StateDir


def main(argv: Sequence[str]) -> int:
    """Make the call of the job with that uid.

    Args:
        argv: the state directory, and the uid of the job.
    """
    root, job_uid = argv
    state = StateDir(Path(root))
    drop_outcome(state, job_uid)  # of an earlier attempt
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the log shows what has been printed
    outcome = _made(state, job_uid)
    sys.stdout.flush()
    kept = keep_outcome(state, job_uid, outcome)
    if kept.error is None:
        return 0
    if kept.error is not outcome.error:
        print(kept.error, file=sys.stderr)
    return 1


def _made(state: StateDir, job_uid: str) -> Outcome:
    try:
        call = take_call(state, job_uid)
        return Outcome(call.function(*call.args, **call.kwargs))
    except BaseException as exc:  # noqa: BLE001 - whatever it is, it is the outcome of the call
        traceback.print_exc()
        return Outcome(error=exc)
