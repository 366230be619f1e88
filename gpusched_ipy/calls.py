"""Calls on disk: a function with its arguments on the way to a fresh Python, and what came of it.

These are the only pickles there are: private files in the state directory, written by one process
of this user and read by another. Each begins with a line of JSON that is read before anything is
unpickled: a pickle of another Python is refused, never tried.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpusched_ipy.errors import RemoteError, StateDirError, UserError
from gpusched_ipy.statedir import StateDir, create_private, open_existing, read_private

MAX_CALL_BYTES = 256 * 2**20
_HEAD_BYTES = 1 << 20  # of the first line, at most
_ERROR_LENGTH = 500
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class RemoteTraceback(Exception):  # noqa: N818 - a traceback, shown as the cause of the error
    """Where in the other process an exception came from."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call: a value, or the exception that ended it."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A function with its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Several calls of one function as one; takes a sequence of arguments, gives a list."""

    func: Callable[..., Any]

    def __call__(self, items: Iterable[tuple[Any, ...]]) -> list[Any]:
        return [self.func(*item) for item in items]


def keep_call(state: StateDir, job_uid: str, call: Call) -> None:
    """Put a call where its job will find it.

    Raises:
        UserError: it does not pickle, is too large, or the disk is full; nothing is left behind.
    """
    # The other Python imports what this one could: modules beside a script or notebook as well.
    path = [os.path.abspath(entry) for entry in sys.path]
    name = name_of(call.function)
    try:
        write_pickle(
            state.call(job_uid), {"path": path}, (call.function, call.args, dict(call.kwargs))
        )
    except TooLargeError as exc:
        raise UserError(
            f"the call of {name} has more than {exc}; write large data to a file and pass its name"
        ) from None
    except OSError as exc:
        raise UserError(f"the call of {name} cannot be written: {exc.strerror}") from exc
    except Exception as exc:  # reducing an object runs code of its owner
        raise UserError(
            f"the call of {name} cannot be pickled ({one_line(exc)}); pass what another process "
            "can use: names of files, not open ones"
        ) from exc


def take_call(state: StateDir, job_uid: str) -> Call:
    """The call of a job; afterwards this Python imports from where the other one did.

    Raises:
        UserError: it is gone, or another Python has written it.
    """
    try:
        with os.fdopen(open_existing(state.call(job_uid)), "rb") as stream:
            head = read_head(stream, "the call")
            sys.path[:] = head["path"]
            return Call(*load_pickle(stream))
    except FileNotFoundError:
        raise UserError("the call is gone; submit it again") from None


def keep_outcome(state: StateDir, job_uid: str, outcome: Outcome) -> Outcome:
    """Put the outcome where whoever waits for it will look, and return it as it was kept.

    What cannot be pickled or is too large becomes an error that says so.

    Raises:
        OSError: it cannot be written.
    """
    error = outcome.error
    trace = "" if error is None else _trace(error)
    try:
        if error is not None:
            _check_round_trip(error)
        replace_pickle(state.call_result(job_uid), (outcome.value, error, trace))
    except OSError:
        raise
    except Exception as exc:  # noqa: BLE001 - reducing an object runs code of its owner
        outcome = Outcome(error=_instead(error, exc))
        replace_pickle(state.call_result(job_uid), (None, outcome.error, trace))
    return outcome


def take_outcome(state: StateDir, job_uid: str) -> Outcome | None:
    """The outcome of a call; None where none was kept.

    Raises:
        UserError: it cannot be read back here.
    """
    try:
        with os.fdopen(open_existing(state.call_result(job_uid)), "rb") as stream:
            read_head(stream, "the result")
            value, error, trace = load_pickle(stream)
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except Exception as exc:  # rebuilding an object runs code of its owner
        raise UserError(f"the result cannot be read back here ({one_line(exc)})") from exc
    if error is not None:
        error.__cause__ = RemoteTraceback(trace)
    return Outcome(value, error)


def drop_call(state: StateDir, job_uid: str) -> None:
    """Delete what is kept of a call."""
    state.call(job_uid).unlink(missing_ok=True)
    drop_outcome(state, job_uid)


def drop_outcome(state: StateDir, job_uid: str) -> None:
    """Delete the outcome of an earlier attempt."""
    state.call_result(job_uid).unlink(missing_ok=True)
    state.call_error(job_uid).unlink(missing_ok=True)


def keep_error(state: StateDir, job_uid: str, error: str) -> None:
    """Put the one line that the record is to say of a job that fails; no pickle: a shim reads it.

    Raises:
        OSError: it cannot be written.
    """
    path = state.call_error(job_uid)
    path.unlink(missing_ok=True)
    with os.fdopen(create_private(path), "w", encoding="utf-8", errors="backslashreplace") as out:
        out.write(error[:_ERROR_LENGTH])


def take_error(state: StateDir, job_uid: str) -> str | None:
    """The line of :func:`keep_error`; None where there is none."""
    try:
        return read_private(state.call_error(job_uid))
    except (FileNotFoundError, StateDirError):
        return None


def name_of(function: Callable[..., Any]) -> str:
    """What the function is called, for people."""
    function = getattr(function, "func", function)  # of functools.partial, and of Batch
    name = getattr(function, "__qualname__", None) or type(function).__name__
    return str(name).replace("<locals>.", "")[-64:]


def one_line(error: BaseException) -> str:
    """The kind of an error and its text, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class TooLargeError(Exception):
    """More bytes than are taken; the text says how many are."""


class _Capped:
    """A stream that takes so many bytes and no more."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = MAX_CALL_BYTES

    def write(self, data: Any) -> int:
        """Write, or complain."""
        self._left -= memoryview(data).nbytes
        if self._left < 0:
            raise TooLargeError(f"{MAX_CALL_BYTES // 2**20} MiB")
        return self._stream.write(data)


def write_pickle(path: Path, head: Mapping[str, Any], content: object) -> None:
    """A new private file: the line of JSON, then the pickle; nothing is left where it fails.

    Raises:
        TooLargeError: it has more bytes than are taken.
        OSError: it cannot be written.
        Exception: whatever an object raises that does not pickle.
    """
    from cloudpickle import Pickler

    fd = create_private(path)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(json.dumps({"python": _PYTHON, **head}).encode() + b"\n")
            Pickler(_Capped(stream)).dump(content)
    except BaseException:
        path.unlink()
        raise


def replace_pickle(path: Path, content: object) -> None:
    """:func:`write_pickle` in the place of what stands there, at once or not at all."""
    beside = path.with_suffix(".new")
    beside.unlink(missing_ok=True)
    write_pickle(beside, {}, content)
    os.replace(beside, path)


def read_head(stream: IO[bytes], what: str) -> dict[str, Any]:
    """The line of JSON; afterwards the pickle may be loaded.

    Raises:
        UserError: another Python has written it.
    """
    head: dict[str, Any] = json.loads(stream.readline(_HEAD_BYTES))
    if head["python"] != _PYTHON:
        raise UserError(
            f"{what} was written by Python {head['python']}, and this is {_PYTHON}; use the same"
        )
    return head


def load_pickle(stream: IO[bytes]) -> Any:
    """What the rest of a file of ours holds."""
    from cloudpickle import load

    return load(stream)


def _trace(error: BaseException) -> str:
    """The traceback without the frames of this package that called the function."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _check_round_trip(error: BaseException) -> None:
    """Some exceptions can be pickled and yet not be made again: better to know it here."""
    from cloudpickle import dumps, loads

    loads(dumps(error))


def _instead(error: BaseException | None, why: Exception) -> BaseException:
    """The error that stands for what could not be kept."""
    if error is not None:
        return RemoteError(one_line(error))
    if isinstance(why, TooLargeError):
        return RemoteError(f"the result has more than {why}; write it to a file, return its name")
    return RemoteError(f"the result cannot be pickled ({one_line(why)})")
