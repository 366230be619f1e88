"""Who a process is: user, name, start. It looks up this machine's own pids only."""

from __future__ import annotations

from dataclasses import dataclass

_MOST = 4096


@dataclass(frozen=True, slots=True)
class Owner:
    """A process for people; None is what could not be learned."""

    user: str | None = None
    name: str | None = None
    started_at: float | None = None  # wall clock, s


class Owners:
    """Owners by pid, remembered for as long as the pid means the same process."""

    def __init__(self) -> None:
        self._known: dict[int, Owner] = {}

    def of(self, pid: int) -> Owner:
        """The owner of ``pid``; an empty one when it is gone or hidden."""
        import psutil

        try:
            process = psutil.Process(pid)
            started = process.create_time()
            known = self._known.get(pid)
            if known is not None and known.started_at == started:
                return known
            with process.oneshot():
                owner = Owner(_user(process), process.name() or None, started)
        except (psutil.Error, OSError, ValueError, OverflowError):
            return Owner()
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[pid] = owner
        return owner


def _user(process: object) -> str | None:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        return process.username() or None
    except (psutil.Error, KeyError, OSError):
        return None
