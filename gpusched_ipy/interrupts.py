"""Interrupting the main thread, and keeping interrupts away from what must be done whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def interrupt_main() -> None:
    """As Ctrl-C would: also a system call that blocks the main thread is left."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def shielded(call: Callable[[], _T]) -> _T:
    """``call`` without any interrupt in between: what is recorded there must be recorded whole.

    An interrupt that comes meanwhile was meant for the body, which is over or has not begun; it is
    dropped. In other threads nothing needs to be done: only the main thread is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    while True:
        try:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            break
        except KeyboardInterrupt:
            continue  # it had come just before, and shows here
    try:
        return call()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)


def uninterrupted(call: Callable[[], _T]) -> _T:
    """``call`` without any interrupt in between; one that comes meanwhile comes when it is over.

    For what is recorded before a wait: whoever interrupts it wants to wait no longer.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    came: list[int] = []

    def later(number: int, _frame: Any) -> None:
        came.append(number)

    before = signal.signal(signal.SIGINT, later)
    try:
        return call()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
        if came:
            signal.raise_signal(signal.SIGINT)
