"""The fresh Python of an isolated cell: an IPython shell that runs one cell, and whose output is
its transcript. It holds no kernel, no history and no socket.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpusched_ipy import cellsyntax, oom, parcel
from gpusched_ipy.calls import drop_outcome, keep_error, one_line
from gpusched_ipy.errors import UserError
from gpusched_ipy.parcel import Parcel
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.tape import Tape, TapeStream
from gpusched_ipy.transcript import Recorder


def main(argv: Sequence[str]) -> int:
    """Run the isolated cell of the job with that uid.

    Args:
        argv: the state directory, and the uid of the job.
    """
    root, job_uid = argv
    state = StateDir(Path(root))
    drop_outcome(state, job_uid)  # of an earlier attempt
    state.transcript(job_uid).unlink(missing_ok=True)
    faulthandler.enable(2)  # into the job's log
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    try:
        sent = parcel.receive(state, job_uid)
    except UserError as exc:
        print(f"gpuqueue: {exc}", file=sys.stderr)
        keep_error(state, job_uid, str(exc))
        return 1
    tape = Tape(Recorder(state.transcript(job_uid), sent.log_cap))
    sys.stdout, sys.stderr = TapeStream(tape, "stdout", 1), TapeStream(tape, "stderr", 2)
    error = _run(state, job_uid, sent, tape)
    if error is not None:
        keep_error(state, job_uid, error)
    tape.flush()
    return 0 if error is None else 1


def _run(state: StateDir, job_uid: str, sent: Parcel, tape: Tape) -> str | None:
    """Run the cell and keep its outputs; the error that ended it, in one line."""
    from gpusched_ipy.isolatedshell import make_shell

    shell = make_shell(tape)
    shell.user_ns.update(sent.values)
    shell.input_transformers_cleanup.insert(0, _body_alone(shell))
    result = shell.run_cell(sent.source, store_history=True)
    raised = result.error_before_exec or result.error_in_exec
    if raised is not None:
        return f"{oom.LEAD if oom.in_exception(raised) else ''}{one_line(raised)}"
    return _bring_back(state, job_uid, sent.outputs, shell.user_ns, tape)


def _body_alone(shell: Any) -> Any:
    """The magic's line becomes a comment: each line stands where it does in the notebook."""

    def transform(lines: list[str]) -> list[str]:
        found = cellsyntax.split(lines)
        if found is None:
            return lines
        manager = shell.input_transformer_manager
        others = [item for item in manager.cleanup_transforms if item is not transform]
        return cellsyntax.body_of(lines, found[0], [*others, *manager.line_transforms])

    return transform


def _bring_back(
    state: StateDir, job_uid: str, names: Sequence[str], namespace: dict[str, Any], tape: Tape
) -> str | None:
    """Keep the outputs; what is wrong with them is shown under the cell as well."""
    there = {name: namespace[name] for name in names if name in namespace}
    wrong = {name: "the cell has not made it" for name in names if name not in namespace}
    try:
        wrong |= parcel.bring_back(state, job_uid, there)
    except OSError as exc:
        wrong |= dict.fromkeys(there, f"it cannot be written: {exc.strerror}")
    if not wrong:
        return None
    error = "; ".join(f"--out {name}: {why}" for name, why in wrong.items())
    tape.message(
        "error",
        {"ename": "UserError", "evalue": error, "traceback": [f"UserError: {error}"]},
    )
    return error
