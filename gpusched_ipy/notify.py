"""Tells the user once that a batch is over, that a job of it failed, or that the long wait is over.

A batch is a sweep, or all jobs of one notebook or terminal until none of them is left open. What is
told goes to the user's own hook or to the terminal's bell; nothing here ever uses a network.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from gpusched_ipy.bell import Bell
from gpusched_ipy.config import Clock, Instant, SystemClock
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.job import Job, JobState
from gpusched_ipy.records import job_json, signal_name
from gpusched_ipy.store import Store
from gpusched_ipy.text import clean, format_duration

_log = logging.getLogger(__name__)

BELL = ("bell",)
# A job that has waited so long may begin when nobody looks any more.
LONG_WAIT_S = 600.0
# Who submits job after job in a loop has one batch.
SETTLE_S = 1.0
HOOK_S = 30.0
_TEXT_CHARS = 300
_REMEMBERED = 10_000  # jobs that have been told of
_RECORDED = 100  # batches of which the record knows what was told
# A desktop takes angle brackets for markup.
_NO_MARKUP = {ord("<"): "\u2039", ord(">"): "\u203a", ord("&"): "+"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One thing to tell."""

    event: str  # "ended", "failed" or "started"
    batch: str  # the sweep, notebook or terminal, for people
    text: str
    job: Job  # that ended last, failed first, or began
    counts: dict[str, int]  # how many jobs of the batch ended how, until now
    jobs: tuple[int, ...]  # the ids of these

    @property
    def title(self) -> str:
        """In a few words."""
        if self.event != "ended":
            word = "has begun" if self.event == "started" else "failed"
            return f"gpusched: job {self.job.id} {word}"
        total = sum(self.counts.values())
        bad = total - self.counts.get(str(JobState.COMPLETED), 0)
        done = f"gpusched: {total} job{'s' if total > 1 else ''} ended"
        return f"{done}, {bad} not well" if bad else done

    def json(self, now: Instant) -> dict[str, Any]:
        """What the hook reads."""
        return {
            "event": self.event,
            "batch": self.batch,
            "title": self.title,
            "text": self.text,
            "counts": self.counts,
            "jobs": list(self.jobs),
            "job": job_json(self.job, now),
        }


@dataclass(slots=True)
class _Batch:
    open: set[int] = field(default_factory=set)
    ended: dict[int, Job] = field(default_factory=dict)
    begun: Job | None = None  # the first that began after a long wait
    told: set[str] = field(default_factory=set)
    since: float | None = None  # monotonic s: none is open since then

    @property
    def failed(self) -> list[Job]:
        bad = (JobState.FAILED, JobState.TIMEOUT, JobState.LOST)
        return sorted((job for job in self.ended.values() if job.state in bad), key=_by_end)


class Batches:
    """The batches that are open, job by job. Pure: the clock comes in."""

    def __init__(self) -> None:
        self._batches: dict[str, _Batch] = {}
        self._over: OrderedDict[tuple[int, int], None] = OrderedDict()

    def saw(self, job: Job, mono: float) -> None:
        """Take over how a job stands now."""
        if (job.id, job.epoch) in self._over and job.ended:
            return  # something has been added to its record since
        batch = self._batches.setdefault(_key(job), _Batch())
        if job.ended:
            batch.open.discard(job.id)
            batch.ended[job.id] = job
        elif job.held and job.state is JobState.PENDING:
            batch.open.discard(job.id)
        else:
            batch.open.add(job.id)
            batch.ended.pop(job.id, None)
        if job.state is JobState.RUNNING and batch.begun is None and _waited_s(job) >= LONG_WAIT_S:
            batch.begun = job
        if batch.open:
            batch.since = None
        elif batch.since is None:
            batch.since = mono

    @property
    def settling(self) -> bool:
        """Whether a batch may be over in a moment."""
        return any(batch.since is not None for batch in self._batches.values())

    def due(self, mono: float) -> Iterator[Message]:
        """What is to be told now; each thing comes once."""
        for key, batch in tuple(self._batches.items()):
            if batch.since is not None and mono - batch.since >= SETTLE_S:
                del self._batches[key]
                self._forget(batch)
                last = max(batch.ended.values(), key=_by_end, default=None)
                if last is not None and not _all_cancelled(batch):
                    yield _message("ended", batch, last)
            elif batch.open:
                yield from self._on_the_way(batch)

    def _on_the_way(self, batch: _Batch) -> Iterator[Message]:
        if batch.failed and "failed" not in batch.told:
            batch.told.add("failed")
            yield _message("failed", batch, batch.failed[0])
        if batch.begun is not None and "started" not in batch.told:
            batch.told.add("started")
            yield _message("started", batch, batch.begun)

    def _forget(self, batch: _Batch) -> None:
        for job in batch.ended.values():
            self._over[job.id, job.epoch] = None
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)


class Notifier:
    """Watches the record in a thread and tells; of several members one tells each thing.

    Args:
        argv: the hook, or :data:`BELL`.
        ring: how the bell rings here; None: it cannot.
    """

    def __init__(
        self,
        store: Store,
        argv: Sequence[str],
        *,
        ring: TextIO | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._argv = tuple(argv)
        self._ring = ring
        self._clock = clock or SystemClock()
        self._began = self._clock.now().wall
        self._batches = Batches()
        self._rev: int | None = None
        self._rang = threading.Event()
        self._stopping = threading.Event()
        self._look()  # what is open now
        self._bell = Bell(store.state.bell, self._rang.set)
        self._thread = threading.Thread(target=self._run, name="gpusched-notify", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell what is over by now, and leave."""
        self._bell.close()
        self._stopping.set()
        self._rang.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        over = False
        while not over:
            self._rang.wait(SETTLE_S / 4 if self._batches.settling else None)
            self._rang.clear()
            over = self._stopping.is_set()
            try:
                self._look()
                for message in self._batches.due(self._clock.now().mono):
                    self._tell(message)
                over = over and not self._batches.settling
            except GpuSchedError as exc:
                _log.warning("whether a batch is over cannot be read: %s", exc)

    def _look(self) -> None:
        self._rev, changed = self._store.changed_since(self._rev)
        now = self._clock.now()
        for job in changed:
            if not job.ended or (job.ended_at or now.wall) >= self._began - SETTLE_S:
                self._batches.saw(job, now.mono)

    def _tell(self, message: Message) -> None:
        if self._argv == BELL:
            if self._ring is not None:
                ring(self._ring)
        elif self._is_first(message):
            run_hook(self._argv, message, self._clock.now())

    def _is_first(self, message: Message) -> bool:
        """Whether no other member has told it; it is noted in the record."""
        what = f"{message.event} {_key(message.job)}"
        token = f"{message.job.id}.{message.job.epoch}"
        with self._store.writing():
            told: dict[str, str] = json.loads(self._store.value("notified") or "{}")
            if told.pop(what, None) == token:
                return False
            kept = {**told, what: token}
            newest = dict(list(kept.items())[-_RECORDED:])
            self._store.set_value("notified", json.dumps(newest))
        return True


def ring(stream: TextIO) -> None:
    """The bell of a terminal; a stream that is none stays silent."""
    with suppress(OSError, ValueError):  # the terminal has gone
        if stream.isatty():
            stream.write("\a")
            stream.flush()


def run_hook(argv: Sequence[str], message: Message, now: Instant) -> None:
    """Run the user's hook: JSON on its stdin, ``{title}`` and ``{text}`` in its arguments.

    Without a shell and with a time limit; that it failed is said in the log, and nothing else.
    """
    words = {"{title}": message.title, "{text}": message.text}
    filled = [_filled(word, words) for word in argv]
    try:
        hook = subprocess.Popen(
            filled,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
    except OSError as exc:
        _log.warning("the hook of the setting notify cannot be run: %s", exc)
        return
    try:
        _, said = hook.communicate(f"{json.dumps(message.json(now))}\n".encode(), timeout=HOOK_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(hook.pid, signal.SIGKILL)
        hook.communicate()
        _log.warning("the hook of the setting notify was ended after %g s", HOOK_S)
        return
    if hook.returncode:
        why = clean(said.decode("utf-8", "replace").strip(), _TEXT_CHARS)
        _log.warning("the hook of the setting notify ended with %d: %s", hook.returncode, why)


def notifier(
    store: Store, argv: Sequence[str] | None, *, terminal: TextIO | None = None
) -> Notifier | None:
    """A notifier as the setting ``notify`` has it; None where there is nothing to do here.

    Args:
        terminal: where the bell rings; None: this process has no terminal.
    """
    if argv is None or (tuple(argv) == BELL and terminal is None):
        return None
    return Notifier(store, argv, ring=terminal)


def ring_here(argv: Sequence[str] | None) -> None:
    """The bell at the end of a command of the terminal that has waited, if the user wants it."""
    if argv is not None and tuple(argv) == BELL:
        ring(sys.stderr)


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value.translate(_NO_MARKUP))
    return word


def _key(job: Job) -> str:
    """Whose batch the job belongs to."""
    return f"sweep {job.spec.array.id}" if job.spec.array is not None else job.spec.owner


def _by_end(job: Job) -> tuple[float, int]:
    return (job.ended_at or 0.0, job.id)


def _waited_s(job: Job) -> float:
    return (job.started_at or job.submitted_at) - job.submitted_at


def _all_cancelled(batch: _Batch) -> bool:
    """Whether its user has cancelled all of it, and so knows."""
    return all(job.state is JobState.CANCELLED for job in batch.ended.values())


def _message(event: str, batch: _Batch, job: Job) -> Message:
    counts = Counter(str(one.state) for one in batch.ended.values())
    name = clean(job.spec.owner if job.spec.array is None else f"sweep {job.name}", 60)
    if event == "started":
        text = f"#{job.id} {job.name} waited {format_duration(_waited_s(job))}"
    else:
        parts = [f"{count} {state}" for state, count in counts.most_common()]
        bad = [f"#{one.id} {one.name}: {_how(one)}" for one in batch.failed[:2]]
        text = "; ".join([", ".join(parts), *bad])
    return Message(
        event=event,
        batch=name,
        text=clean(f"{name}: {text}", _TEXT_CHARS),
        job=job,
        counts=dict(counts),
        jobs=tuple(sorted(batch.ended)),
    )


def _how(job: Job) -> str:
    if job.error:
        return job.error
    if job.signal is not None:
        return f"ended by {signal_name(job.signal)}"
    return f"exit status {job.exit_code}" if job.exit_code is not None else str(job.state)
