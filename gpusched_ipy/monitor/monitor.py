"""Watches the GPUs for one process: one thread, on demand, that may hang without hanging anybody.

Nothing is read while nobody wants a reading (:meth:`Monitor.want`), and the backend is chosen by
the sampler thread at its first reading, never earlier. Callers only look at what the thread has
left; the one call that waits, :meth:`Monitor.read_now`, has a time limit. When the driver does not
answer, :meth:`Monitor.latest` says so in its ``problem`` and shows no old data as new.

The processes of a user share their readings through a file in the state directory, see
:mod:`~gpusched_ipy.monitor.readings`. The monitor decides nothing: that is for ``policy``.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gpusched_ipy.backends import DETAILS, Detail, detect
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.monitor.changes import STEADY_S, Changes
from gpusched_ipy.monitor.idle import IdleProcesses
from gpusched_ipy.monitor.readings import SharedReadings
from gpusched_ipy.monitor.recent import Allocated, QuietWindows, Recent, with_jobs
from gpusched_ipy.monitor.sampler import CALM_S, Chooser, Need, Sampler, Source, no_reading
from gpusched_ipy.monitor.wants import Wants
from gpusched_ipy.monitor.wire import NEVER, Reading
from gpusched_ipy.snapshot import Snapshot

_log = logging.getLogger(__name__)

LINGER_S = 10.0  # the thread stays this long after the last want, then ends and frees the driver
STOP_S = 1.0  # the longest that stop() waits for a thread that may hang

Listener = Callable[[Snapshot], None]


@dataclass(slots=True, eq=False)
class _Ask:
    """One caller of read_now."""

    detail: Detail
    done: threading.Event = field(default_factory=threading.Event)
    answer: Snapshot | None = None


@dataclass(slots=True, eq=False)
class _Running:
    """A sampler and its thread; one that hangs is abandoned together with its backend."""

    sampler: Sampler
    thread: threading.Thread


class Monitor:
    """The GPUs as this process sees them.

    Args:
        settings: name the backend, the sampling interval and the limits of a quiet window.
        clock: stamps and paces the readings.
        state_dir: where the processes of a user share readings; None: this one reads for itself.
        choose: opens the backend.
        patience_s: how long the driver may take to answer before that is a problem (at least three
            sampling intervals).
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock | None = None,
        state_dir: Path | None = None,
        *,
        choose: Chooser = detect,
        patience_s: float = 3.0,
    ) -> None:
        self.settings = settings
        self._clock = clock or SystemClock()
        self._state_dir = state_dir
        self._choose = choose
        self._patience_s = max(patience_s, 3 * settings.sample_interval_s)
        self._reset()
        _monitors.add(self)

    def _reset(self) -> None:
        """As new: at the beginning, and in the child of a fork, which has none of the threads."""
        self._cond = threading.Condition()
        self._wants = Wants()
        self._counts = True  # something has changed lately
        self._asks: list[_Ask] = []
        self._listeners: list[Listener] = []
        self._listeners_to_changes: list[Listener] = []
        self._running: _Running | None = None
        self._explanation: str | None = None
        self._allocated: Allocated = {}
        self._latest: list[Snapshot | None] = [None] * len(DETAILS)
        self._lasts: list[float] = [-NEVER] * len(DETAILS)
        self._recent = Recent()
        self._idle = IdleProcesses(self.settings.max_utilization)
        limit, interval_s = self.settings.max_utilization, self.settings.sample_interval_s
        self._quiet = QuietWindows(limit, interval_s)
        self._changes = Changes(limit, max(STEADY_S, self.settings.quiet_s + 5 * interval_s))

    def want(
        self,
        who: str,
        interval_s: float | None = None,
        detail: Detail = Detail.LOAD,
        *,
        patient: bool = False,
    ) -> None:
        """Have readings taken until :meth:`unwant`; the first at once. No effect without sampling.

        Args:
            who: names this want; the same name again replaces it.
            interval_s: seconds between two readings; None: the setting ``sample_interval_s``.
            detail: what each of them must hold. Dearer values are read every 5 s in any case.
            patient: while another process reads, those that show something a start could hang on
                are enough, and one every 8 s.
        """
        if not self.settings.sampling:
            return
        interval = self.settings.sample_interval_s if interval_s is None else interval_s
        with self._cond:
            new = self._wants.add(who, interval, detail, patient=patient)
            self._ensure_thread()
            if new:
                self._notify()

    def unwant(self, who: str) -> None:
        """End a want; one that is not there is ended already."""
        with self._cond:
            if self._wants.drop(who):
                self._notify()

    @contextmanager
    def wanting(
        self,
        who: str,
        interval_s: float | None = None,
        detail: Detail = Detail.LOAD,
        *,
        patient: bool = False,
    ) -> Iterator[None]:
        """:meth:`want` for the length of a block."""
        self.want(who, interval_s, detail, patient=patient)
        try:
            yield
        finally:
            self.unwant(who)

    def set_allocated(self, allocated: Allocated) -> None:
        """Say which jobs of ours run where: UUID -> ((job id, pid or None), ...).

        Scripted GPUs show what these jobs add to them from the next reading on.
        """
        with self._cond:
            self._allocated = {uuid: tuple(jobs) for uuid, jobs in allocated.items()}

    def latest(self, detail: Detail = Detail.LOAD) -> Snapshot | None:
        """The newest reading that holds at least ``detail``; None before the first.

        It never waits and may be old: judge it by ``age_s``. While the driver does not answer it is
        a snapshot with that problem and no GPUs.
        """
        with self._cond:
            hung_s = self._hung_s()
            newest = self._latest[detail]
        if hung_s is not None and hung_s > self._patience_s:
            return self._no_answer(hung_s, newest)
        return newest

    def history(self, seconds: float) -> tuple[Snapshot, ...]:
        """The readings of the last ``seconds``, oldest first, of up to one hour.

        Those older than five minutes no longer hold process lists.
        """
        with self._cond:
            return self._recent.since(self._clock.now().mono - seconds)

    def read_now(self, timeout_s: float = 2.0, detail: Detail = Detail.PROCESSES) -> Snapshot:
        """A reading of the real backend by this process that began after this call.

        What cannot be had within ``timeout_s`` is a snapshot with the ``problem`` and no GPUs.
        """
        ask = _Ask(detail)
        with self._cond:
            running = self._ensure_thread()
            if threading.current_thread() is running.thread:  # a listener asks: no one to wait for
                inside: Sampler | None = running.sampler
                need = self._need(detail, own=True)
            else:
                inside, need = None, None
                self._asks.append(ask)
                self._notify()
        if inside is not None and need is not None:
            reading = inside.take(need)
            ask.answer = self._record(running, reading, need) if reading else None
        else:
            ask.done.wait(timeout_s)
        return ask.answer or self._unanswered(ask, timeout_s)

    def listen(self, listener: Listener, *, to_changes: bool = False) -> Callable[[], None]:
        """Call ``listener`` from the sampler thread with each new reading; returns the way out.

        Args:
            to_changes: only with those that show something that a start could hang on, and those
                that follow such a one within 10 s or a quiet window.
        """
        with self._cond:
            listeners = self._listeners_to_changes if to_changes else self._listeners
            listeners.append(listener)

        def leave() -> None:
            with self._cond:
                if listener in listeners:
                    listeners.remove(listener)

        return leave

    @property
    def explanation(self) -> str | None:
        """Which backend is used and why the better ones are not; None before the first reading."""
        with self._cond:
            return self._explanation

    @property
    def sharing(self) -> str:
        """How this process shares readings with others, in one line for people."""
        with self._cond:
            running = self._running if self._wants else None
        if self._state_dir is None:
            return "off: no state directory"
        if running is None or running.sampler.shared is None:
            return "idle: nothing is read"
        shared = running.sampler.shared
        doing = "adopts another process's readings" if running.sampler.adopts else "reads the GPUs"
        return shared.problem or f"this process {doing}"

    def stop(self) -> None:
        """End all wants and the thread; a thread that hangs is left behind, with its backend."""
        with self._cond:
            running, self._running = self._running, None
            self._wants.clear()
            for ask in self._asks:
                ask.done.set()
            self._asks.clear()
            self._notify(running)
        if running is not None and running.thread is not threading.current_thread():
            running.thread.join(STOP_S)
            running.sampler.rest()

    def _ensure_thread(self) -> _Running:
        """The sampler thread, started when there is none (``_cond`` is held)."""
        if self._running is None or not self._running.thread.is_alive():
            source = Source(self.settings, self._clock, self._choose)
            shared = None
            if self._state_dir is not None:
                shared = SharedReadings(self._state_dir, self.settings, self._clock)
            sampler = Sampler(source, shared, self._clock)
            thread = threading.Thread(
                target=self._run, args=(sampler,), name="gpusched-sampler", daemon=True
            )
            self._running = _Running(sampler, thread)
            thread.start()
        return self._running

    def after_fork(self) -> None:
        """Start afresh in the child of a fork; the lock is closed there, never unlocked."""
        running = self._running
        self._reset()
        if running is not None:
            running.sampler.forget()

    def _notify(self, running: _Running | None = None) -> None:
        """Wake the sampler thread, however it waits (``_cond`` is held)."""
        self._cond.notify_all()
        running = running or self._running
        if running is not None:
            running.sampler.call()

    def _run(self, sampler: Sampler) -> None:
        try:
            while (turn := self._next_turn(sampler)) is not None:
                need, asks = turn
                reading = sampler.take(need)
                if reading is None:
                    continue
                running = self._running
                shown = None
                if running is not None and running.sampler is sampler:
                    shown = self._record(running, reading, need)
                for ask in asks:
                    ask.answer = shown
                    ask.done.set()
        finally:
            sampler.close()

    def _next_turn(self, sampler: Sampler) -> tuple[Need, list[_Ask]] | None:
        """Wait for something to do; None: this thread is not needed any more."""
        with self._cond:
            while self._running is not None and self._running.sampler is sampler:
                if self._asks:
                    asks, self._asks = self._asks, []
                    return self._need(max(ask.detail for ask in asks), own=True), asks
                due, detail = self._wants.due(self._lasts, sampler.lag_s)
                if due == NEVER:
                    sampler.rest()
                    if not self._cond.wait(LINGER_S) and not self._wants and not self._asks:
                        self._running = None
                    continue
                now = self._clock.now().mono
                calm = self._calm and sampler.calm_until > now
                due = max(due, sampler.look_again, sampler.calm_until if calm else -NEVER)
                if due <= now:
                    return self._need(detail), []
                if calm:
                    self._sleep(sampler, due - now)
                else:
                    self._cond.wait(due - now)
            return None

    @property
    def _calm(self) -> bool:
        """Whether nothing is needed but what changes something (``_cond`` is held)."""
        return self._wants.patient and not self._counts

    def _sleep(self, sampler: Sampler, longest_s: float) -> None:
        """Wait for the process that reads; :meth:`_notify` ends it too (``_cond`` is held)."""
        self._cond.release()
        try:
            sampler.sleep(longest_s)
        finally:
            self._cond.acquire()

    def _need(self, detail: Detail, *, own: bool = False) -> Need:
        return self._wants.need(detail, self._lasts, own=own, calm=self._calm)

    def _record(self, running: _Running, reading: Reading, need: Need) -> Snapshot:
        """Remember a reading and tell the listeners (in the sampler thread)."""
        with self._cond:
            snapshot = with_jobs(reading.snapshot, reading.loads, self._allocated)
            period_s = min(self._wants.periods)
            if running.sampler.slept:  # nothing has changed meanwhile: the windows go on
                period_s = max(CALM_S, 0.0 if period_s == NEVER else period_s)
            snapshot = self._quiet.mark(snapshot, None if period_s == NEVER else period_s)
            snapshot = self._idle.mark(snapshot)
            failed = snapshot.problem is not None
            for detail in DETAILS:
                if failed or detail <= reading.detail:
                    self._latest[detail] = snapshot
                    self._lasts[detail] = snapshot.taken_mono
            self._recent.add(snapshot)
            self._explanation = reading.explanation or self._explanation
            running.sampler.look_again = -NEVER
            counts = self._counts = self._changes.count(snapshot)
            running.sampler.slept = snapshot.vouched_mono > 0
            listeners = (*self._listeners, *(self._listeners_to_changes if counts else ()))
        if not running.sampler.adopts:
            running.sampler.share(reading, need, calm=not counts)
        for listener in listeners:
            try:
                listener(snapshot)
            except Exception:  # noqa: BLE001 - a listener's fault must not end the sampler; logged
                _log.exception("a listener of the monitor failed")
        return snapshot

    def _hung_s(self) -> float | None:
        """For how long the driver has been asked and not answered (``_cond`` is held)."""
        since = self._running.sampler.source.busy_since if self._running else None
        return None if since is None else max(0.0, self._clock.now().mono - since)

    def _no_answer(self, hung_s: float, newest: Snapshot | None) -> Snapshot:
        return no_reading(
            self._clock.now(),
            f"the driver has not answered for {hung_s:.0f} s",
            newest.backend if newest else "none",
            newest.source if newest else "",
        )

    def _unanswered(self, ask: _Ask, timeout_s: float) -> Snapshot:
        """What read_now gives when its time ran out."""
        with self._cond:
            if ask in self._asks:
                self._asks.remove(ask)
            hung_s, newest = self._hung_s(), self._latest[Detail.LOAD]
            stopped = self._running is None
        if stopped:
            return no_reading(self._clock.now(), "the monitor was stopped")
        return self._no_answer(max(timeout_s, hung_s or 0.0), newest)


_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()


def _forget_threads() -> None:
    """A fork's child has the objects but not the threads; it starts its own when it wants some."""
    for monitor in tuple(_monitors):
        monitor.after_fork()


os.register_at_fork(after_in_child=_forget_threads)
