"""``gpusched watch``: the whole panel as a live screen of the terminal, steered by keys.

One thread, the caller's: it waits for keys, for changes of the queue and for the next beat, and
draws. Signals only leave a note for it, so that the terminal is given back as it was. Into a pipe,
or on a terminal that cannot do it, one picture is written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from gpusched_ipy.api import Queue
from gpusched_ipy.backends import Detail
from gpusched_ipy.keyboard import Keyboard
from gpusched_ipy.look import Look, job_table
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.screendraw import draw
from gpusched_ipy.screenstate import ScreenState
from gpusched_ipy.terminal import DONE, FAILED, is_terminal, note, show_table
from gpusched_ipy.view import GPU_COLUMNS, JOB_COLUMNS, gpu_rows, gpus_note

if TYPE_CHECKING:
    from rich.console import Console

_WATCHER = "gpusched watch"
_LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Reading and drawing take at most one part in so many of the time, however long the queue is.
_SHARE = 25


def watch(queue: Queue) -> int:
    """Show GPUs and queue until the user leaves; the exit status.

    Raises:
        UserError: the state directory or the record cannot be used.
    """
    from rich.console import Console

    console = Console()
    lively = is_terminal(sys.stdin) and is_terminal(sys.stdout) and not console.is_dumb_terminal
    monitor = Monitor(queue.settings, queue.clock, queue.state.root)
    try:
        return Screen(queue, monitor, console).run() if lively else picture(queue, monitor)
    finally:
        monitor.stop()


def picture(queue: Queue, monitor: Monitor) -> int:
    """GPUs and queue once, as plain tables; a reading that failed is shown, and is a failure."""
    look = Look(queue, monitor)
    snapshot = look.now()
    now = queue.clock.now()
    rows = gpu_rows(snapshot, now, jobs=look.jobs, members=look.members)
    if rows:
        show_table(GPU_COLUMNS, rows)
    print(gpus_note(snapshot, now, monitor.explanation))
    print()
    show_table(JOB_COLUMNS, job_table(queue, queue.list(), monitor))
    if drained := queue.drained:
        note(f"the queue is drained ({drained}); `gpusched resume` starts jobs again")
    return DONE if snapshot.problem is None else FAILED


class Screen:
    """The live screen.

    Args:
        queue: what is shown and steered.
        monitor: gives the readings.
        console: the terminal.
    """

    def __init__(self, queue: Queue, monitor: Monitor, console: Console) -> None:
        self._queue = queue
        self._monitor = monitor
        self._console = console
        self._clock = queue.clock
        self._every_s = 1.0 / min(4.0, queue.settings.panel_hz)
        self._state = ScreenState(
            queue, monitor, self._size, unicode=console.encoding.lower().startswith("utf")
        )
        self._changed = True
        self._signal: int | None = None  # the one that ends it
        self._stop = False  # Ctrl-Z was pressed

    def run(self) -> int:
        """Show until a key or a signal ends it; the exit status."""
        with ExitStack() as stack:
            wake, ring = os.pipe()
            for end in (wake, ring):
                os.set_blocking(end, False)
                stack.callback(os.close, end)
            keyboard = Keyboard(sys.stdin.fileno(), wake)
            stack.callback(self._monitor.unwant, _WATCHER)
            self._monitor.want(_WATCHER, self._every_s, Detail.FULL)
            stack.callback(self._queue.subscribe(lambda: self._ring(ring)))
            stack.enter_context(self._signals(ring))
            while not self._over(keyboard):
                self._show(keyboard)
        return DONE if self._signal in (None, signal.SIGINT) else 128 + int(self._signal or 0)

    def _show(self, keyboard: Keyboard) -> None:
        """Have the terminal until the screen is left, or stopped by Ctrl-Z."""
        self._stop = False
        with keyboard.opened(), self._live() as draw_now:
            while not self._over(keyboard) and not self._stop:
                self._turn(keyboard, draw_now)
        if self._stop and not self._over(keyboard):
            # The terminal is the shell's own again: now stop, as was asked.
            os.kill(os.getpid(), signal.SIGSTOP)

    def _turn(self, keyboard: Keyboard, draw_now: Callable[[], None]) -> None:
        """Read, draw, and wait for a key, a change of the queue or the next beat."""
        begun = self._clock.now().mono
        self._changed = False
        self._state.read()
        draw_now()
        cost = self._clock.now().mono - begun
        until = begun + max(self._every_s, _SHARE * cost)
        while not self._changed and not self._noted and (left := until - self._mono()) > 0:
            for key in keyboard.wait(left):
                self._state.press(key)
                until = 0.0  # whoever presses a key sees at once what it did
        # A flood of changes is drawn a few times a second, no more.
        early = begun + max(0.1, _SHARE * cost) - self._mono()
        if self._changed and not self._noted and until and early > 0:
            for key in keyboard.wait(early):
                self._state.press(key)

    @property
    def _noted(self) -> bool:
        return self._stop or self._signal is not None

    def _over(self, keyboard: Keyboard) -> bool:
        return self._state.quit or self._signal is not None or keyboard.closed

    def _mono(self) -> float:
        return self._clock.now().mono

    def _size(self) -> tuple[int, int]:
        width, height = self._console.size
        return width, height

    @contextmanager
    def _live(self) -> Iterator[Callable[[], None]]:
        from rich.live import Live

        with Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            yield lambda: live.update(draw(self._state.scene()), refresh=True)

    @contextmanager
    def _signals(self, ring: int) -> Iterator[None]:
        """Signals end the wait for keys; the loop obeys them."""

        def leave(number: int, _frame: object) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt  # it was told before, and hangs
            self._signal = number

        def stop(_number: int, _frame: object) -> None:
            self._stop = True

        wanted: dict[signal.Signals, Any] = dict.fromkeys(_LEAVE, leave)
        wanted |= {signal.SIGTSTP: stop, signal.SIGWINCH: lambda *_: self._ring(ring)}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        waker = signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(waker)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ring(self, ring: int) -> None:
        """Something has changed (called from any thread, and by signals)."""
        self._changed = True
        try:
            os.write(ring, b"\0")
        except BlockingIOError:
            return  # it is full of rings already
