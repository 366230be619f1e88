"""What an isolated cell takes along and brings back: its source, and variables by their names.

Pickles like those of calls, in the same private files; it imports no IPython and runs nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpusched_ipy.calls import (
    MAX_CALL_BYTES,
    TooLargeError,
    load_pickle,
    one_line,
    read_head,
    replace_pickle,
    take_outcome,
    write_pickle,
)
from gpusched_ipy.errors import UserError
from gpusched_ipy.statedir import StateDir, open_existing
from gpusched_ipy.text import format_bytes

_LIMIT = f"{MAX_CALL_BYTES // 2**20} MiB"
_COUNTED = 64 * 2**30  # bytes, of what is too large


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What an isolated cell is sent with."""

    source: str  # the cell as it stands in the notebook
    outputs: tuple[str, ...]  # the variables that it is to bring back
    log_cap: int  # bytes of its transcript, at most
    values: Mapping[str, Any] = field(default_factory=dict)  # those that it takes along


def taken(names: Iterable[str], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of these names.

    Raises:
        UserError: one does not exist.
    """
    values: dict[str, Any] = {}
    for name in names:
        if name not in namespace:
            raise UserError(
                f"--in {name}: there is no variable {name}; run the cell that makes it first"
            )
        values[name] = namespace[name]
    return values


def send(state: StateDir, job_uid: str, parcel: Parcel) -> None:
    """Put a parcel where its job will find it.

    Raises:
        UserError: a variable does not pickle or is too large, or the disk is full; nothing is left.
    """
    head = {"path": [os.path.abspath(entry) for entry in sys.path]}
    content = (parcel.source, parcel.outputs, parcel.log_cap, dict(parcel.values))
    try:
        write_pickle(state.call(job_uid), head, content)
    except OSError as exc:
        raise UserError(f"the inputs cannot be written: {exc.strerror}") from exc
    except Exception as exc:  # reducing an object runs code of its owner
        # One by one only now: together they keep what they share.
        check(parcel.values)
        raise UserError(f"the inputs together: {_together(exc, parcel.values)}") from exc


def check(values: Mapping[str, Any]) -> None:
    """Refuse inputs that could not be sent; nothing is written.

    Raises:
        UserError: one does not pickle or is too large, or all together are.
    """
    for name, why in unfit(values).items():
        raise UserError(f"--in {name}: {why}")
    try:
        size = _size(dict(values))
    except Exception as exc:  # reducing an object runs code of its owner
        raise UserError(f"the inputs together: {_why_not(exc)}") from exc
    if size > MAX_CALL_BYTES:
        raise UserError(f"the inputs together: {_too_large(size, 'write large data to files')}")


def receive(state: StateDir, job_uid: str) -> Parcel:
    """The parcel of a job; afterwards this Python imports from where the sender did.

    Raises:
        UserError: it is gone, another Python has written it, or it cannot be rebuilt here.
    """
    try:
        with os.fdopen(open_existing(state.call(job_uid)), "rb") as stream:
            sys.path[:] = read_head(stream, "the cell")["path"]
            source, outputs, log_cap, values = load_pickle(stream)
    except FileNotFoundError:
        raise UserError("what the cell was sent with is gone; run the cell again") from None
    except UserError:
        raise
    except Exception as exc:  # rebuilding an object runs code of its owner
        raise UserError(f"the inputs cannot be read here ({one_line(exc)})") from exc
    return Parcel(source=source, outputs=outputs, log_cap=log_cap, values=values)


def bring_back(state: StateDir, job_uid: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Keep the outputs of a cell; why not, by name, of those that cannot be kept.

    Raises:
        OSError: they cannot be written.
    """
    path = state.call_result(job_uid)
    try:
        replace_pickle(path, (dict(values), None, ""))
    except OSError:
        raise
    except Exception as exc:  # noqa: BLE001 - reducing an object runs code of its owner
        bad = unfit(values)
        if not bad:
            bad = dict.fromkeys(values, _together(exc, values))
        replace_pickle(path, ({n: v for n, v in values.items() if n not in bad}, None, ""))
        return bad
    return {}


def fetch(state: StateDir, job_uid: str) -> dict[str, Any] | None:
    """The outputs of a cell that has ended, by name; None where none are kept.

    Raises:
        UserError: they cannot be read back here.
    """
    outcome = take_outcome(state, job_uid)
    return None if outcome is None else outcome.value


def unfit(values: Mapping[str, Any]) -> dict[str, str]:
    """Which of these variables cannot be pickled by themselves, and why."""
    bad: dict[str, str] = {}
    for name, value in values.items():
        try:
            size = _size(value)
        except Exception as exc:  # noqa: BLE001 - reducing an object runs code of its owner
            bad[name] = _why_not(exc)
        else:
            if size > MAX_CALL_BYTES:
                bad[name] = _too_large(size, "write it to a file and pass its name")
    return bad


def _together(error: Exception, values: Mapping[str, Any]) -> str:
    """Why variables cannot be kept each of which could."""
    if isinstance(error, TooLargeError):
        return _too_large(_size(dict(values)), "write large data to files")
    return _why_not(error)


def _size(value: object) -> int:
    """What it would take, in bytes; no more than :data:`_COUNTED` are counted.

    Raises:
        Exception: whatever an object raises that does not pickle.
    """
    from cloudpickle import Pickler

    counted = _Counting()
    try:
        Pickler(counted).dump(value)
    except TooLargeError:
        return _COUNTED + 1
    return counted.size


def _too_large(size: int, instead: str) -> str:
    known = f"more than {format_bytes(_COUNTED)}" if size > _COUNTED else format_bytes(size)
    return f"{known} pickled, and at most {_LIMIT} are taken; {instead}"


def _why_not(error: Exception) -> str:
    return f"it cannot be pickled ({one_line(error)})"


class _Counting:
    """A stream that keeps nothing, and ends what never ends."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        """Count."""
        size = memoryview(data).nbytes
        self.size += size
        if self.size > _COUNTED:
            raise TooLargeError(format_bytes(_COUNTED))
        return size
