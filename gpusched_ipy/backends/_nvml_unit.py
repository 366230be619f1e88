"""One NVIDIA card or MIG instance: its fixed facts, and its values at one moment.

A value that the driver does not give is None; a card that is lost or broken says so in its health.
Nothing here initialises NVML or looks for cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends._nvidia_processes import Identities
from gpusched_ipy.backends._nvidia_unified import unified_memory
from gpusched_ipy.backends._nvml_calls import Calls
from gpusched_ipy.backends._nvml_library import (
    ABSENT,
    ARGUMENT_VERSION_MISMATCH,
    DEAD,
    FUNCTION_NOT_FOUND,
    NOT_SUPPORTED,
    OK,
    RESTART,
    STALE,
    NvmlError,
    explain,
    health_of,
)
from gpusched_ipy.backends._nvml_listing import Listing
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind

# NVML: "each sample period may be between 1 second and 1/6 second, depending on the product".
WINDOW_S = 1.0
LIST_S = 5.0  # for how long a process list is taken for true while the memory stays the same
COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive_process"}
# HW slowdown, SW thermal, HW thermal, HW power brake. A software power cap is how a card runs at
# full work, and no fault.
_THROTTLE = 0x08 | 0x20 | 0x40 | 0x80
_DEDICATED, _UNIFIED = MemoryKind.DEDICATED, MemoryKind.UNIFIED
_LOAD, _FULL = int(Detail.LOAD), int(Detail.FULL)
_new = Gpu.__new__
_NAMES = tuple(item.name for item in fields(Gpu))
_PUT = tuple(getattr(Gpu, name).__set__ for name in _NAMES)
_UTILIZATION, _WINDOW, _USED, _TOTAL, _RESERVED, _PROCESSES = (
    _NAMES.index(name)
    for name in (
        "utilization",
        "utilization_window_s",
        "mem_used_bytes",
        "mem_total_bytes",
        "mem_reserved_bytes",
        "processes",
    )
)
# Used, total, reserved; and the pressure where the memory is the machine's.
Memory = tuple[int | None, int | None, int | None, str | None]
_NO_MEMORY: Memory = (None, None, None, None)
# Temperature, power, power limit, clock, throttled. An instance has the card's temperature only:
# the card's power would be counted once for each of its instances.
Extra = tuple[float | None, float | None, float | None, float | None, bool | None]
_NO_EXTRA: Extra = (None, None, None, None, None)
_OUTDATED_MEMORY = frozenset((FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH))


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while a card or an instance exists."""

    uuid: str
    index: int
    name: str
    bus_id: str | None
    parent: str | None = None
    instance: int | None = None
    compute_mode: str | None = None

    def gpu(self, health: Health, text: str) -> Gpu:
        """The card with nothing known but this."""
        return Gpu(
            uuid=self.uuid,
            index=self.index,
            name=self.name,
            vendor="nvidia",
            bus_id=self.bus_id,
            parent=self.parent,
            instance=self.instance,
            health=health,
            health_text=text,
        )


class Unit:
    """A card or an instance that can be read.

    Args:
        handle: NVML's.
        facts: its fixed facts.
        calls: the functions of the initialised library.
        identities: who the listed pids are.
        card: the handle of the card, for what an instance shares with it.
    """

    __slots__ = (
        "_calls",
        "_card",
        "_fault",
        "_handle",
        "_is_instance",
        "_known_list",
        "_last",
        "_last_values",
        "_listing",
        "_template",
        "facts",
    )

    def __init__(
        self, handle: Any, facts: Facts, calls: Calls, identities: Identities, card: Any = None
    ) -> None:
        self.facts = facts
        self._handle = handle
        self._card = handle if card is None else card
        self._is_instance = facts.parent is not None
        self._listing = Listing(
            handle, calls, identities, note=self._note_optional, shares=not self._is_instance
        )
        self._calls = calls
        # Memory used then, time, and the processes.
        self._known_list: tuple[int | None, float, tuple[GpuProcess, ...] | None] | None = None
        self._last: Gpu | None = None
        self._last_values: object = None
        self._template: list[Any] | None = None
        self._fault = OK  # the first code of this reading that says the card is not well

    def read(self, detail: Detail, wall: float, watching: bool = False) -> Gpu:
        """The values now; ``wall`` is the time of the reading.

        Args:
            detail: what is wanted.
            wall: s since the epoch.
            watching: the last process list will do while the memory has not moved.

        Raises:
            NvmlError: the library has to be initialised, or the cards to be looked for, again.
        """
        self._fault = OK
        calls, handle = self._calls, self._handle
        utilization: float | None = None
        if not self._is_instance:
            if code := calls.utilization(handle, calls.rates_at):
                self._note(code)
            elif (percent := calls.rates.gpu) <= 100:
                utilization = percent / 100
        # This call and the one above are all of a light reading, so they are made right here.
        code = FUNCTION_NOT_FOUND
        if calls.memory_v2 is not None:
            code = calls.memory_v2(handle, calls.info_v2_at)
        if not code and (total := (info := calls.info_v2).total):
            memory: Memory = (info.used, total, info.reserved, None)
        else:
            memory = self._other_memory(code)
        if detail != _FULL and not self._fault:
            processes = None if detail == _LOAD else self._list(memory, wall, watching)
            if not self._fault:
                return self._light(utilization, memory, processes)
        processes = None
        if not self._fault:
            processes = self._listing.read(wall)
        extra = self._extra() if detail == _FULL and not self._fault else _NO_EXTRA
        if self._fault:
            return self.facts.gpu(health_of(self._fault), explain(self._fault))
        temperature, power, limit, clock, throttled = extra
        return self._gpu(
            utilization,
            memory,
            temperature_c=temperature,
            power_w=power,
            power_limit_w=limit,
            sm_clock_mhz=clock,
            throttled=throttled,
            processes=processes,
        )

    def _list(self, memory: Memory, wall: float, watching: bool) -> tuple[GpuProcess, ...] | None:
        """The processes, asked for where the last list may no longer be true."""
        used, _, _, pressure = memory
        known = self._known_list
        # The memory of the whole machine moves for other reasons, and stays for others.
        if watching and known is not None and used is not None and pressure is None:
            listed_used, listed_at, listed = known
            if used == listed_used and 0 <= wall - listed_at < LIST_S:
                return listed
        listed = self._listing.read(None)
        self._known_list = (used, wall, listed)
        return listed

    def _light(
        self,
        utilization: float | None,
        memory: Memory,
        processes: tuple[GpuProcess, ...] | None,
    ) -> Gpu:
        """The GPU without the dearest values; the same object as long as nothing changes."""
        values = (utilization, memory, processes)
        if self._last is None or values != self._last_values:
            self._last_values = values
            self._last = self._copy(utilization, memory, processes)
        return self._last

    def _copy(
        self,
        utilization: float | None,
        memory: Memory,
        processes: tuple[GpuProcess, ...] | None,
    ) -> Gpu:
        """As :meth:`_gpu` makes it, at half the price: the fixed fields are copied slot by slot."""
        if memory[3] is not None:
            return self._gpu(utilization, memory, processes=processes)
        if self._template is None:
            made = self._gpu(utilization, memory)
            self._template = [getattr(made, name) for name in _NAMES]
        template = self._template
        template[_UTILIZATION] = utilization
        template[_WINDOW] = None if utilization is None else WINDOW_S
        template[_USED], template[_TOTAL], template[_RESERVED] = memory[:3]
        template[_PROCESSES] = processes
        copy = _new(Gpu)
        for put, value in zip(_PUT, template, strict=True):
            put(copy, value)
        return copy

    def _gpu(self, utilization: float | None, memory: Memory, **dearer: Any) -> Gpu:
        facts = self.facts
        used, total, reserved, pressure = memory
        return Gpu(
            uuid=facts.uuid,
            index=facts.index,
            name=facts.name,
            vendor="nvidia",
            bus_id=facts.bus_id,
            parent=facts.parent,
            instance=facts.instance,
            utilization=utilization,
            utilization_window_s=None if utilization is None else WINDOW_S,
            mem_used_bytes=used,
            mem_total_bytes=total,
            mem_reserved_bytes=reserved,
            mem_kind=_DEDICATED if pressure is None else _UNIFIED,
            mem_pressure=pressure,
            compute_mode=facts.compute_mode,
            **dearer,
        )

    def _other_memory(self, code: int) -> Memory:
        """The memory of a card to which the current call answered ``code`` (or a total of 0)."""
        calls = self._calls
        if code in _OUTDATED_MEMORY:
            # Drivers before 515: used includes what the driver keeps for itself.
            calls.memory_v2 = None
            code = calls.memory_v1(self._handle, calls.info_v1_at)
            if not code and calls.info_v1.total:
                return calls.info_v1.used, calls.info_v1.total, None, None
        if code in (OK, NOT_SUPPORTED) and not self._is_instance:
            used, total, pressure = unified_memory()
            return used, total, None, pressure
        self._note(code)
        return _NO_MEMORY

    def _extra(self) -> Extra:
        calls = self._calls
        temperature = self._value(calls.temperature, self._card)
        if self._is_instance:
            return temperature, None, None, None, None
        power = self._value(calls.power, self._handle)
        limit = self._value(calls.power_limit, self._handle)
        clock = self._value(calls.sm_clock, self._handle)
        reasons = self._value(calls.clock_reasons, self._handle)
        return (
            temperature,
            None if power is None else power / 1000,
            None if limit is None else limit / 1000,
            clock,
            None if reasons is None else bool(int(reasons) & _THROTTLE),
        )

    def _value(self, call: Callable[[Any], tuple[int, int]], handle: Any) -> float | None:
        code, value = call(handle)
        if code:
            self._note_optional(code)
            return None
        return float(value)

    def _note(self, code: int) -> None:
        """A code of utilization or memory: what is neither known nor harmless is a fault."""
        if code in ABSENT:
            return
        if code in RESTART or code in STALE:
            raise NvmlError(code)
        self._fault = self._fault or code

    def _note_optional(self, code: int) -> None:
        """A code of any other value: only a dead card or library counts."""
        if code in RESTART:
            raise NvmlError(code)
        if code in DEAD:
            self._fault = self._fault or code
