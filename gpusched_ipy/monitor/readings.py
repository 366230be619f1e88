"""Readings as the processes of one user share them: a small file, replaced atomically.

N notebooks cost one. Whoever reads the GPUs publishes; whoever is due looks at the file first and
reads for itself only when nothing there meets its demand. The rules, in this order:

1. A published reading that is young and detailed enough is adopted (never one with a problem; and
   the holder of the lock adopts only from a faster one).
2. Who holds the flock on ``sampler.lock`` reads. It is taken when one is due, kept while one wants
   readings, and free the moment its holder dies: the next one that is due goes on.
3. Everybody else waits for what the last publisher promised, and a little longer; when nothing
   promised meets the demand, or the promise is broken, it reads for itself, and publishes.

So the lock only decides between equals: a hung or slower holder stops nobody. While no other
process has asked lately (by touching ``sampler.wanted``), its holder writes nothing. Who only has a
job that waits needs no reading while nothing changes: it touches ``sampler.watched`` instead, and
sleeps; the holder then publishes every 8 s, and when something changes, which it tells by
:class:`~gpusched_ipy.monitor.news.News`. The file holds
raw readings: what belongs to one process (allocations, quiet windows) is added by each for itself.
It is never trusted further than a stranger's text: what does not parse is as good as absent.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.errors import StateDirError
from gpusched_ipy.monitor.exchange import put_in_place
from gpusched_ipy.monitor.news import News
from gpusched_ipy.monitor.wire import NEVER, Reader, Reading, Writer
from gpusched_ipy.snapshot import Snapshot
from gpusched_ipy.statedir import create_private, open_existing, open_private

_log = logging.getLogger(__name__)

SCHEMA = 4
# Two boots of one machine differ by more than this in (wall clock - monotonic clock).
BOOT_TOLERANCE_S = 5.0
TOUCH_S = 5.0  # how often a process that lives on others' readings says so
WANTED_S = 12.0  # for how long that holds
LOOKED_S = 0.1  # a look at the file that is no older serves for the next step too
_LONGEST = 1 << 20  # bytes; a longer file is none of ours


def fingerprint(settings: Settings) -> str:
    """What two processes must have in common for a reading of one to be true for the other.

    Besides the choice of the backend: the host, the pid namespace (pids are listed) and the GPUs
    that a container was given.
    """
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0  # no pid namespaces on this system
    played = settings.fake is not None and settings.backend in ("auto", "fake")
    parts = (
        SCHEMA,
        settings.backend,
        str(settings.fake.absolute()) if played and settings.fake else None,
        settings.nvidia_smi,
        socket.gethostname(),
        namespace,
        os.environ.get("NVIDIA_VISIBLE_DEVICES"),
    )
    return json.dumps(parts)


class SharedReadings:
    """The file and the lock, as one process uses them. Called from one thread at a time.

    Args:
        folder: the private state directory; made (0700) when it is missing.
        settings: name the backend whose readings are looked for.
        clock: judges which boot a reading belongs to.
    """

    def __init__(self, folder: Path, settings: Settings, clock: Clock) -> None:
        # Apart from the bell: whoever watches that is woken by every file that changes beside it.
        folder = folder / "readings"
        self.path = folder / "readings.json"
        self._draft = folder / f"readings.json.{os.getpid()}.tmp"
        self.lock_path = folder / "sampler.lock"
        self.wanted_path = folder / "sampler.wanted"
        self.watched_path = folder / "sampler.watched"
        self.news = News(folder / "sampler.news")
        self.problem: str | None = None  # why nothing is shared, for `gpusched doctor`
        self.me = f"{os.getpid()}.{uuid4().hex}"
        self._clock = clock
        self._mark = fingerprint(settings)
        self._writer = Writer(self._mark)
        self._reader = Reader()
        self._lock: int | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._found: Reading | None = None
        self._looked_mono = -NEVER
        self._touched_mono: dict[Path, float] = {}
        self._asked_until: dict[Path, float] = {}  # until then nobody need look who has asked
        self._foreign_until = -NEVER  # until then the file belongs to another configuration

    @property
    def owner(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock is not None

    def newest(self) -> Reading | None:
        """The reading that the file holds; None when there is none for us. Costs a stat."""
        self._looked_mono = self._clock.now().mono
        try:
            status = os.stat(self.path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                found = self._parse(self._bytes())
                self._stamp, self._found = stamp, found
        except FileNotFoundError:
            self._stamp, self._found = None, None
        except (OSError, StateDirError) as exc:
            self._fault(exc)
            return None
        return self._found if self._found and self._of_this_boot(self._found.snapshot) else None

    def take_lock(self) -> bool:
        """Whether the lock is ours; takes it when it is free, never waits for it."""
        if self._lock is not None:
            return True
        try:
            self._make_folder()
            lock = open_private(self.lock_path)
        except (OSError, StateDirError) as exc:
            self._fault(exc)
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(lock)
            if not isinstance(exc, BlockingIOError):
                self._fault(exc)
            return False
        self._lock = lock
        self._sweep()
        return True

    def drop_lock(self) -> None:
        """Let the next one have the lock. Only closes: a fork's child must never unlock it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
            with suppress(OSError):  # it is nobody's any more; the next holder sweeps as well
                self._draft.unlink()

    def ask(self, *, patiently: bool = False) -> None:
        """Let the holder of the lock know that another process lives on its readings.

        Args:
            patiently: those that count are enough.
        """
        now, path = self._clock.now().mono, self.watched_path if patiently else self.wanted_path
        if now - self._touched_mono.get(path, -NEVER) < TOUCH_S:
            return
        self._touched_mono[path] = now
        try:
            self._make_folder()
            wanted = open_private(path)
            os.utime(wanted)
            os.close(wanted)
        except (OSError, StateDirError) as exc:
            self._fault(exc)

    @property
    def wanted(self) -> bool:
        """Whether each reading is worth publishing: we are not the holder, or others have asked."""
        return self._lock is None or self._asked(self.wanted_path)

    @property
    def watched(self) -> bool:
        """Whether others have asked for those readings that count."""
        return self._asked(self.watched_path)

    def _asked(self, path: Path) -> bool:
        now = self._clock.now()
        if now.mono < self._asked_until.get(path, -NEVER):
            return True
        try:
            asked = os.lstat(path).st_mtime
        except OSError:  # nobody has ever asked; a real fault shows where the file is written
            return False
        wanted = abs(now.wall - asked) < WANTED_S
        if wanted:
            self._asked_until[path] = now.mono + TOUCH_S
        return wanted

    def publish(self, reading: Reading) -> None:
        """Show ``reading`` to the others; not over a newer one or another configuration's."""
        now = self._clock.now().mono
        found = self._found if now - self._looked_mono < LOOKED_S else self.newest()
        newer = found is not None and found.snapshot.taken_mono > reading.snapshot.taken_mono
        if newer or now < self._foreign_until:
            return
        try:
            status = self._write(self._writer.text(reading).encode())
        except OSError as exc:
            self._fault(exc)
            return
        self.problem = None
        # The file is ours now; a stat that still shows this inode needs no reading back.
        self._stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        self._found = reading

    def _write(self, text: bytes) -> os.stat_result:
        handle = self._open_draft()
        try:
            size = len(text)
            while text:
                text = text[os.write(handle, text) :]
            status = os.fstat(handle)
            if status.st_size != size:  # what stood there before was longer
                os.ftruncate(handle, size)
                status = os.fstat(handle)
        finally:
            os.close(handle)
        put_in_place(self._draft, self.path)
        return status

    def _open_draft(self) -> int:
        """Our spare file: what the last exchange has left under its name, or a new one."""
        draft = self._draft
        try:
            return open_existing(draft, os.O_WRONLY)
        except FileNotFoundError:
            self._make_folder()
        except StateDirError:  # nothing that we would write to
            draft.unlink(missing_ok=True)
        return create_private(draft, os.O_WRONLY)

    def _make_folder(self) -> None:
        for folder in (self.path.parent.parent, self.path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _bytes(self) -> bytes:
        handle = open_existing(self.path)
        try:
            return os.read(handle, _LONGEST)
        finally:
            os.close(handle)

    def _parse(self, text: bytes) -> Reading | None:
        try:
            mark, reading = self._reader.reading(text.decode())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
            # A newer member may write another form; then each reads for itself.
            _log.debug("%s is no reading for this version: %s", self.path, exc)
            return None
        if mark != self._mark:
            self._make_way(reading.snapshot, reading.promises)
            return None
        return reading

    def _make_way(self, snapshot: Snapshot, promises: tuple[float, ...]) -> None:
        """Members of another configuration were first: leave them the file while they go on."""
        planned = min(promises, default=NEVER)
        lasting = planned != NEVER and self._of_this_boot(snapshot)
        period = max(0.0, planned - snapshot.taken_mono)
        self._foreign_until = snapshot.taken_mono + 3 * period if lasting else -NEVER

    def _of_this_boot(self, snapshot: Snapshot) -> bool:
        """A monotonic time says nothing after a restart or a suspend; both clocks together do."""
        now = self._clock.now()
        drift = (now.wall - now.mono) - (snapshot.taken_at - snapshot.taken_mono)
        return abs(drift) < BOOT_TOLERANCE_S and snapshot.taken_mono <= now.mono + 1.0

    def _sweep(self) -> None:
        """Drafts of publishers that were killed between writing and renaming."""
        limit = self._clock.now().wall - 60
        for draft in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            with suppress(FileNotFoundError):  # its writer was alive after all and renamed it
                if draft.stat().st_mtime < limit:
                    draft.unlink()

    def _fault(self, exc: OSError | StateDirError) -> None:
        why = f"{exc.strerror} ({exc.filename})" if isinstance(exc, OSError) else str(exc)
        problem = f"readings are not shared: {why}"
        if self.problem is None:  # once, until it has worked again
            _log.warning("%s", problem)
        self.problem = problem
