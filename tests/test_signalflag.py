"""A flag that is set in the middle of the wait for it."""

from __future__ import annotations

import random
import signal

from gpusched_ipy.signalflag import SignalFlag


def test_a_handler_raises_the_flag_in_the_middle_of_the_wait_for_it() -> None:
    # threading.Event hangs here after some hundreds of turns: its wait holds the lock set takes.
    dice = random.Random(1)
    before = signal.getsignal(signal.SIGALRM)
    try:
        for _ in range(2000):
            flag = SignalFlag()
            signal.signal(signal.SIGALRM, lambda *_, flag=flag: flag.set())
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-6, 3e-4))
            assert flag.wait(60)
            assert flag.wait(0), "once up it stays"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_flag_that_nobody_raises_stays_down() -> None:
    flag = SignalFlag()
    assert not flag.wait(0.01)
    for _ in range(100_000):  # more than its pipe holds
        flag.set()
    assert flag.wait(None)
