"""The bell: a file that is touched after every change of the record, and who listens to it.

A ring carries no message; whoever hears it looks at the record. A listener that cannot watch the
file (inotify used up) looks four times a second instead and says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
POLL_S = 0.25


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to show it: watchdog reports a watch that is stopped while it starts to read."""
    return "called when the thread is inactive" not in str(record.msg)


class Bell:
    """Calls ``heard`` from a thread after every ring, until it is closed.

    Args:
        path: the bell of the state directory.
        heard: quick and thread-safe; an exception in it ends the watching of nobody else.
    """

    def __init__(self, path: Path, heard: Callable[[], None]) -> None:
        self.path = path
        self._heard = heard
        self._stop = threading.Event()
        self._observer: Any = None
        self.polling: str | None = None  # why it polls, where it does
        try:
            self._observer = self._watch()
        except OSError as exc:
            self.polling = f"{path} cannot be watched ({exc}); looked at every {POLL_S} s"
            _log.warning("%s", self.polling)
            threading.Thread(target=self._poll, name="gpusched-bell", daemon=True).start()

    def close(self) -> None:
        """Stop listening; closing twice changes nothing."""
        self._stop.set()
        if self._observer is not None:
            self._observer.stop()
            if threading.current_thread() is not self._observer:
                self._observer.join(timeout=1.0)
            self._observer = None

    def _watch(self) -> Any:
        from watchdog.events import FileSystemEvent, FileSystemEventHandler
        from watchdog.observers import Observer

        logging.getLogger("watchdog.observers.inotify").addFilter(_is_news)
        bell = self

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                # A touch is "attrib" to some versions of watchdog, "modified" to others.
                if event.event_type in ("attrib", "modified"):
                    bell._heard()

        observer = Observer()
        observer.daemon = True
        observer.schedule(Handler(), str(self.path))
        observer.start()
        return observer

    def _poll(self) -> None:
        seen = self.path.stat().st_mtime_ns
        while not self._stop.wait(POLL_S):
            at = self.path.stat().st_mtime_ns
            if at != seen:
                seen = at
                self._heard()
