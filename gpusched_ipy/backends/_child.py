"""Tools run beside us: one answer within a time limit, or a stream read by one thread.

Every child has a session of its own, so that it dies with whatever it started, and nothing here
waits for a child that does not end (one in uninterruptible sleep ignores even SIGKILL). It never
uses a shell and never runs Python between fork and exec.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence

from gpusched_ipy.config import Clock
from gpusched_ipy.errors import BackendReadError

_LIMIT_BYTES = 32 * 1024 * 1024  # an `ioreg -l` of hundreds of clients is below 2 MB
_TEXT_LIMIT = 4096
_NEUTRAL = {"LC_ALL": "C", "LANG": "C"}


def run_once(argv: Sequence[str], timeout_s: float) -> bytes:
    """What ``argv`` prints.

    Raises:
        BackendReadError: it cannot be started, fails, prints too much, or takes too long (then it
            is killed with its group and left to a thread that reaps it).
    """
    name = argv[0]
    status, output, errors = run_any(argv, timeout_s)
    if status != 0:
        said = one_line(errors) or one_line(output) or "no reason given"
        raise BackendReadError(f"{name} ended with status {status}: {said}")
    return output


def run_any(argv: Sequence[str], timeout_s: float) -> tuple[int, bytes, bytes]:
    """Exit status, output and errors of ``argv``, for tools that say in their output what failed.

    Raises:
        BackendReadError: it cannot be started, prints too much, or takes too long.
    """
    name = argv[0]
    try:
        child = _start(argv)
    except OSError as exc:
        raise BackendReadError(f"{name} cannot be started: {exc.strerror or exc}") from exc
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _abandon(child)
        raise BackendReadError(f"{name} gave no answer within {timeout_s:g} s") from None
    if len(output) > _LIMIT_BYTES:
        raise BackendReadError(f"{name} printed more than {_LIMIT_BYTES} bytes")
    return child.returncode, bytes(output), bytes(errors)


class Stream:
    """A child that prints one document after another; the newest complete one is kept.

    Args:
        argv: what to run; never a text of the user's.
        separator: what stands between two documents.
        end: what a complete document ends with, where the separator only comes with the next one.
        clock: dates the documents.
        fresh_s: after so long without a document the stream counts as hung.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        separator: bytes,
        clock: Clock,
        end: bytes | None = None,
        fresh_s: float = 4.0,
    ) -> None:
        self.argv = tuple(argv)
        self.fresh_s = fresh_s
        self._clock = clock
        self._separator = separator
        self._end = end
        self._changed = threading.Condition()
        self._documents: list[tuple[float, bytes]] = []
        self._count = 0
        self._errors = b""
        self._problem: str | None = None
        self._closed = False
        self._heard = clock.now().mono
        try:
            self._child: subprocess.Popen[bytes] | None = _start(argv)
        except OSError as exc:
            self._child = None
            self._problem = f"{argv[0]} cannot be started: {exc.strerror or exc}"
            return
        threading.Thread(
            target=self._read, args=(self._child,), name=f"gpusched-{argv[0]}", daemon=True
        ).start()

    def wait_first(self, timeout_s: float) -> bool:
        """Whether a document arrived within ``timeout_s``; an early end of the child is False."""
        with self._changed:
            self._changed.wait_for(lambda: self._count > 0 or self._problem is not None, timeout_s)
            return self._count > 0

    def drain(self) -> list[tuple[float, bytes]]:
        """The documents since the last call, each with its arrival (monotonic, s), oldest first."""
        with self._changed:
            documents, self._documents = self._documents, []
            return documents

    @property
    def problem(self) -> str | None:
        """Why the stream gives nothing (it ended, or it hangs); None while it flows."""
        with self._changed:
            if self._problem is not None:
                return self._problem
            silent = self._clock.now().mono - self._heard
            if silent > self.fresh_s:
                return f"{self.argv[0]} has printed nothing for {silent:.0f} s"
            return None

    def close(self) -> None:
        """End the child with all it started."""
        with self._changed:
            self._closed = True
            if self._child is not None:
                _kill_group(self._child)

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        assert child.stderr is not None
        gatherer = threading.Thread(target=self._gather_errors, args=(child,), daemon=True)
        gatherer.start()
        buffer = b""
        descriptor = child.stdout.fileno()
        while not self._closed:
            try:
                chunk = os.read(descriptor, 65536)
            except OSError:
                break
            if not chunk:
                break
            buffer = self._take(buffer + chunk)
            if len(buffer) > _LIMIT_BYTES:
                break
        # Closing our end also ends a child of root's, which no signal of ours reaches: SIGPIPE.
        child.stdout.close()
        with self._changed:
            _kill_group(child)
            self._child = None
        gatherer.join(1.0)
        status = child.wait()
        with self._changed:
            said = one_line(self._errors) or f"status {status}"
            self._problem = f"{self.argv[0]} ended: {said}"
            self._changed.notify_all()

    def _take(self, buffer: bytes) -> bytes:
        """Move the complete documents of ``buffer`` out of it; returns the rest."""
        parts = buffer.split(self._separator)
        rest = parts.pop()
        if self._end is not None and rest.rstrip().endswith(self._end):
            parts.append(rest)
            rest = b""
        complete = [part for part in parts if part.strip()]
        if complete:
            now = self._clock.now().mono
            with self._changed:
                self._heard = now
                self._count += len(complete)
                # Nobody may ask for an hour: only the newest are of use.
                self._documents = [*self._documents, *((now, part) for part in complete)][-256:]
                self._changed.notify_all()
        return rest

    def _gather_errors(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stderr is not None
        with contextlib.suppress(OSError, ValueError), child.stderr:
            while chunk := os.read(child.stderr.fileno(), 4096):
                self._errors = (self._errors + chunk)[-_TEXT_LIMIT:]


def one_line(text: bytes) -> str:
    """The last line of what a tool said, printable, for a message."""
    lines = text[-_TEXT_LIMIT:].decode("utf-8", "replace").splitlines()
    printable = (
        "".join(char if char.isprintable() else " " for char in line).strip() for line in lines
    )
    return next((line[:300] for line in reversed(list(printable)) if line), "")


def find(program: str) -> str | None:
    """The program of that name on PATH, its relative entries left out; None where there is none."""
    return shutil.which(program, path=_search_path())


def _search_path() -> str:
    """PATH without its relative entries: nothing is run because it lies where we work."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if os.path.isabs(entry))


def _start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **_NEUTRAL, "PATH": _search_path()},
    )


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    # A child that has ended and is not yet reaped keeps its pid, so the group is still its own.
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _abandon(child: subprocess.Popen[bytes]) -> None:
    _kill_group(child)
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()
    threading.Thread(target=child.wait, name="gpusched-reaper", daemon=True).start()
