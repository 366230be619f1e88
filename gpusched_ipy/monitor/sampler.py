"""The part of the monitor that reads: choose the backend, read it or adopt what another has read.

Everything here runs in the one sampler thread of a process and may hang when the driver hangs; it
holds no lock that a caller could wait for. It keeps no history and decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpusched_ipy.backends import Backend, Detail, Detected
from gpusched_ipy.config import Clock, Instant, Settings
from gpusched_ipy.errors import GpuSchedError
from gpusched_ipy.monitor.readings import SharedReadings
from gpusched_ipy.monitor.wire import NEVER, JobLoad, Reading
from gpusched_ipy.snapshot import Snapshot

_log = logging.getLogger(__name__)

RETRY_S = 30.0  # between two attempts to find a backend on a machine that had none
SLOW_READ_S = 1.0  # a slower reading is dated by its beginning
IDLE_S = 60.0  # a driver not needed for so long is let go of while another process reads
CALM_S = 8.0  # how often it is published that nothing has changed; less than ``STEADY_S``
GRACE_S = 0.5  # at least so long a promise of another process is waited for

Chooser = Callable[[Settings, Clock], Detected]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What is due: a reading of at least this detail, and how others may serve it."""

    detail: Detail
    period_s: float  # how often it is wanted
    last_mono: float  # when it was last read or adopted
    periods: tuple[float, ...]  # for each detail; NEVER where nobody wants it
    lasts: tuple[float, ...]
    own: bool = False  # True: nothing but a reading of our own, now
    patient: bool = False  # True: readings that change nothing are not needed
    calm: bool = False  # True: patient, and nothing has changed lately
    least: Detail = Detail.LOAD  # what is asked for: power and clocks come besides, see ``SLOW_S``

    def promises(self, taken_mono: float, detail: Detail) -> tuple[float, ...]:
        """When a reading of each detail follows one of ``detail`` at ``taken_mono``."""
        nexts: list[float] = []
        first = NEVER
        for rank in range(len(self.periods) - 1, -1, -1):  # a dearer reading serves the others too
            if self.periods[rank] != NEVER:
                last = taken_mono if rank <= detail else self.lasts[rank]
                first = min(first, max(taken_mono, last + self.periods[rank]))
            nexts.append(first)
        return tuple(reversed(nexts))


def no_reading(now: Instant, problem: str, backend: str = "none", source: str = "") -> Snapshot:
    """A reading that failed."""
    return Snapshot(
        backend=backend, source=source, taken_at=now.wall, taken_mono=now.mono, problem=problem
    )


class Source:
    """The backend of one sampler thread: chosen at its first reading, called by that thread alone.

    Attributes:
        busy_since: since when (monotonic, s) the driver has been asked and not answered; None
            between two readings. Any thread may look at it.
    """

    def __init__(self, settings: Settings, clock: Clock, choose: Chooser) -> None:
        self.busy_since: float | None = None
        self.interval_s = settings.sample_interval_s
        self._settings = settings
        self._clock = clock
        self._choose = choose
        self._detected: Detected | None = None
        self._explanation = ""
        self._retry_mono = -NEVER

    def read(self, detail: Detail, *, watching: bool = False) -> Reading:
        """A reading of the real backend; whatever goes wrong is its ``problem``.

        Args:
            detail: what it must hold.
            watching: one of many, from which nothing is started: see ``NvmlBackend.watch``.
        """
        began = self._clock.now()
        self.busy_since = began.mono
        loads: dict[str, JobLoad] = {}
        try:
            backend = self._backend(began)
            if backend is None:
                snapshot = no_reading(began, self._explanation)
            else:
                read = getattr(backend, "watch", backend.read) if watching else backend.read
                snapshot = self._dated(read(detail), began)
                loads = _job_loads(backend, snapshot)
        except Exception as exc:  # noqa: BLE001 - a faulty backend must not end the sampler; shown
            text = str(exc) if isinstance(exc, GpuSchedError) else f"{type(exc).__name__}: {exc}"
            _log.debug("a reading failed", exc_info=exc)
            snapshot = no_reading(began, f"the reading failed: {text}")
        finally:
            self.busy_since = None
        return Reading(snapshot=snapshot, detail=detail, explanation=self._explanation, loads=loads)

    def close(self) -> None:
        """Let go of the driver; the next reading opens it again."""
        if self._detected and self._detected.backend:
            self._detected.backend.close()

    def _backend(self, now: Instant) -> Backend | None:
        missing = self._detected is None or self._detected.backend is None
        if missing and now.mono >= self._retry_mono:
            self._detected = self._choose(self._settings, self._clock)
            self._explanation = self._detected.explanation
            self._retry_mono = now.mono + RETRY_S
        return self._detected.backend if self._detected else None

    def _dated(self, snapshot: Snapshot, began: Instant) -> Snapshot:
        """What the reading cost; after a hang its date is its beginning: never old data as new."""
        took = self._clock.now().mono - began.mono
        if took > SLOW_READ_S and snapshot.taken_mono > began.mono:
            snapshot = replace(snapshot, taken_at=began.wall, taken_mono=began.mono)
        return snapshot if snapshot.read_s is not None else replace(snapshot, read_s=took)


def _calm(found: Reading, now: float) -> bool:
    """Whether its publisher tells of whatever counts."""
    return now < found.calm_until <= now + 2 * CALM_S and found.snapshot.problem is None


def _job_loads(backend: Backend, snapshot: Snapshot) -> dict[str, JobLoad]:
    job_load: Callable[[str], JobLoad] | None = getattr(backend, "job_load", None)
    if job_load is None:
        return {}
    loads = {gpu.uuid: job_load(gpu.uuid) for gpu in snapshot.gpus}
    return {uuid: load for uuid, load in loads.items() if load != (None, None)}


class Sampler:
    """Gives a reading for each need: adopted from the shared file where possible, else read.

    Attributes:
        look_again: before that time (monotonic) there is nothing to do about what is due.
        adopts: whether the last reading was another process's.
        lag_s: how much later than its own plan this process comes, so that it finds what the
            process that reads has just published.
    """

    def __init__(self, source: Source, shared: SharedReadings | None, clock: Clock) -> None:
        self.source = source
        self.shared = shared
        self.look_again = -NEVER
        self.adopts = False
        self.lag_s = 0.0
        self.calm_until = -NEVER  # until then whoever reads tells of what counts
        self.slept = False  # since the last reading that was recorded, on another's word
        self._read_mono = -NEVER
        self._told_calm = False  # others sleep on what has been published last
        self._published: Reading | None = None
        self._clock = clock

    def take(self, need: Need) -> Reading | None:
        """A reading; None while it is better to wait for another process (see ``look_again``)."""
        shared = self.shared
        if need.own or shared is None:
            return self._read(need)
        now = self._clock.now().mono
        if need.patient:
            shared.news.drain()
        found = shared.newest()
        step = min(0.1, max(0.01, need.period_s / 20))
        if found is not None and need.calm and self._follows(found, need, now):
            shared.ask(patiently=True)
            self.calm_until, self.slept = found.calm_until + step, True
            if found.snapshot.taken_mono <= need.last_mono:
                return None
            self.adopts = True
            if now - self._read_mono > IDLE_S:
                self.source.close()
            return replace(found, snapshot=replace(found.snapshot, vouched_mono=self.calm_until))
        patiently = need.patient and not (found is not None and _calm(found, now))
        if found is not None and self._serves(found, need, now):
            self.adopts, self.lag_s = True, step
            shared.ask(patiently=patiently)
            if now - self._read_mono > IDLE_S:
                self.source.close()
            return found
        if not shared.take_lock():
            shared.ask(patiently=patiently)
            if found is not None and self._promised(found, need, now):
                self.look_again = now + step
                return None
        return self._read(need)

    def sleep(self, longest_s: float) -> None:
        """Wait until the reader on whom we live tells something, or :meth:`call`."""
        shared = self.shared
        if shared is not None and shared.news.sleep(longest_s):
            self.calm_until = -NEVER

    def call(self) -> None:
        """End the :meth:`sleep` of the sampler thread, from any other."""
        if self.shared is not None:
            self.shared.news.call()

    def rest(self) -> None:
        """Nobody wants anything: let another process have the lock."""
        self.calm_until = -NEVER
        shared, told, self._told_calm = self.shared, self._told_calm, False
        if shared is None:
            return
        if told and self._published is not None:  # nobody stands by that any more
            shared.publish(replace(self._published, calm_until=0.0))
        shared.drop_lock()
        if told:
            shared.news.tell()

    def close(self) -> None:
        """This thread ends."""
        self.rest()
        self.source.close()
        if self.shared is not None:
            self.shared.news.close()

    def forget(self) -> None:
        """In the child of a fork: what is open belongs to the parent, which tells for itself."""
        if self.shared is not None:
            self.shared.drop_lock()
            self.shared.news.forget()

    def _read(self, need: Need) -> Reading:
        reading = self.source.read(need.detail, watching=not need.own)
        self.adopts, self.lag_s = False, 0.0
        self._read_mono = self._clock.now().mono
        return reading

    def share(self, reading: Reading, need: Need, *, calm: bool) -> None:
        """Publish what this process has read, where others want it.

        Args:
            calm: nothing that counts has changed lately.
        """
        shared, now = self.shared, self._clock.now().mono
        if shared is None:
            return
        each, watched = shared.wanted, shared.owner and shared.watched
        pace_s = min(need.periods)
        calm = calm and watched and pace_s <= self.source.interval_s
        due = not (calm and self._told_calm and self._standing(now + pace_s))
        if not each and not (watched and due):
            return
        found = shared.newest() if not shared.owner else None
        if found is not None and _calm(found, now):
            return  # they sleep on the holder's word, and it will tell them
        taken = reading.snapshot.taken_mono
        failed = reading.snapshot.problem is not None
        # A promise of more failures would keep others waiting, and one that is not to be published.
        kept = each or not calm
        promises = need.promises(taken, need.detail) if kept and not failed else reading.promises
        until = taken + CALM_S if calm and not failed else 0.0
        reading = replace(reading, promises=promises, by=shared.me, calm_until=until)
        shared.publish(reading)
        self._published = reading
        slept, self._told_calm = self._told_calm, until > 0
        if slept and not self._told_calm:
            shared.news.tell()

    def _standing(self, mono: float) -> bool:
        """Whether what we have published last still stands then, with a little to spare."""
        return self._published is not None and mono < self._published.calm_until - 0.5

    def _follows(self, found: Reading, need: Need, now: float) -> bool:
        """Whether we may sleep on the word of who has published this."""
        shared = self.shared
        if shared is None or shared.owner or not shared.news.able or not _calm(found, now):
            return False
        if found.detail < need.least:
            return False
        pid = found.by.partition(".")[0]
        heard = shared.news.watching
        if not pid.isdecimal() or not shared.news.follow(int(pid)):
            return False
        return heard or shared.newest() is found  # what was told before is not heard

    def _serves(self, found: Reading, need: Need, now: float) -> bool:
        taken = found.snapshot.taken_mono
        every_s = found.promises[need.detail] - taken
        if self.shared is not None and self.shared.owner and every_s > 0.95 * need.period_s:
            return False  # the holder of the lock gives its part away only to a faster one
        return (
            found.snapshot.problem is None
            and found.detail >= need.detail
            and taken > need.last_mono
            and now - taken < 0.9 * need.period_s
        )

    def _promised(self, found: Reading, need: Need, now: float) -> bool:
        """Whether another process has said it reads about now, and is not overdue."""
        at = found.promises[need.detail]
        mine = self.shared is not None and found.by == self.shared.me
        late = at + max(GRACE_S, need.period_s)
        return not mine and at <= now + 0.1 * need.period_s and now < late
