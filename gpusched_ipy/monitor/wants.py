"""What readings a process wants, and when the next one is due. It knows no clock and no lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpusched_ipy.backends import DETAILS, Detail
from gpusched_ipy.monitor.sampler import Need
from gpusched_ipy.monitor.wire import NEVER

SLOW_S = 5.0  # how often process lists, power and clocks are read when nobody asks for them
MIN_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class _Want:
    interval_s: float
    detail: Detail
    patient: bool


class Wants:
    """All wants of one process, by name."""

    def __init__(self) -> None:
        self._wants: dict[str, _Want] = {}
        self._periods: tuple[float, ...] | None = None  # worked out of the wants; None: not yet

    def __bool__(self) -> bool:
        return bool(self._wants)

    def add(self, who: str, interval_s: float, detail: Detail, *, patient: bool) -> bool:
        """Note a want, in the place of an earlier one of that name; whether anything is new."""
        want = _Want(max(MIN_INTERVAL_S, interval_s), detail, patient)
        if self._wants.get(who) == want:  # loops say the same again at every turn
            return False
        self._wants[who], self._periods = want, None
        return True

    def drop(self, who: str) -> bool:
        """Forget a want; whether there was one."""
        self._periods = None
        return self._wants.pop(who, None) is not None

    def clear(self) -> None:
        """Forget all."""
        self._wants.clear()
        self._periods = None

    @property
    def patient(self) -> bool:
        """Whether readings that change nothing are needed by nobody."""
        return bool(self._wants) and all(want.patient for want in self._wants.values())

    @property
    def periods(self) -> tuple[float, ...]:
        """For each detail how often it is wanted (s); NEVER where nobody wants it."""
        if self._periods is None:
            periods = [NEVER] * len(DETAILS)
            for want in self._wants.values():
                periods[want.detail] = min(periods[want.detail], want.interval_s)
            fastest = min(periods)
            if fastest != NEVER:
                periods[Detail.FULL] = min(periods[Detail.FULL], max(SLOW_S, fastest))
            self._periods = tuple(periods)
        return self._periods

    def due(self, lasts: Sequence[float], lag_s: float) -> tuple[float, Detail]:
        """When the next reading is due, and the most that is due about then.

        Args:
            lasts: when each detail was last read (monotonic, s).
            lag_s: how much later than that it is to be.
        """
        periods = self.periods
        dues = [last + period + lag_s for period, last in zip(periods, lasts, strict=True)]
        for detail in DETAILS:
            if periods[detail] == NEVER:
                dues[detail] = NEVER
        first = min(dues)
        about = first + 0.1 * min(periods) if first > -NEVER else first
        most = Detail.LOAD
        for detail in DETAILS:
            if dues[detail] <= about:
                most = detail
        return first, most

    def need(self, detail: Detail, lasts: Sequence[float], *, own: bool, calm: bool) -> Need:
        """A reading of that detail as the sampler has to know of it."""
        periods = self.periods
        return Need(
            detail=detail,
            period_s=min(periods[detail:]),
            last_mono=lasts[detail],
            periods=periods,
            lasts=tuple(lasts),
            own=own,
            patient=self.patient,
            calm=calm,
            least=max((want.detail for want in self._wants.values()), default=Detail.LOAD),
        )
