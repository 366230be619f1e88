"""The C functions of one initialised NVML, called with buffers that are made once.

Going past nvidia-ml-py's wrappers for the calls of every reading saves an object and, where a value
is not supported, an exception for each of them. Codes stay codes; nothing is judged here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

from gpusched_ipy.backends._nvml_library import (
    FUNCTION_NOT_FOUND,
    INSUFFICIENT_SIZE,
    NOT_SUPPORTED,
    OK,
    Library,
)

_NO_MEMORY = 0xFFFFFFFFFFFFFFFF
_ROOM = 64
# A process record by its size in bytes: the drivers changed it more than once under one name.
_LAYOUTS = {
    16: struct.Struct("=I4xQ"),
    24: struct.Struct("=I4xQII"),
    32: struct.Struct("=I4xQIIQ"),
}
_LONGEST = max(_LAYOUTS)
_UNWRITTEN = 0xA5
_SAMPLE = struct.Struct("=I4xQIIII")  # pid, time stamp in us, per cent of SM, memory, enc, dec

ProcessRow = tuple[int, int | None]  # pid, bytes


class Calls:
    """The calls of a reading, bound to one initialised library.

    Args:
        library: initialised.
    """

    def __init__(self, library: Library) -> None:
        nvml = library.nvml
        self._bind = library.function
        self.utilization = self._bound("nvmlDeviceGetUtilizationRates")
        self.memory_v2 = library.function("nvmlDeviceGetMemoryInfo_v2")
        self.memory_v1 = self._bound("nvmlDeviceGetMemoryInfo")
        self.rates = nvml.c_nvmlUtilization_t()
        self.rates_at = ctypes.byref(self.rates)
        self.info_v2 = nvml.c_nvmlMemory_v2_t()
        self.info_v2.version = nvml.nvmlMemory_v2
        self.info_v2_at = ctypes.byref(self.info_v2)
        self.info_v1 = nvml.c_nvmlMemory_t()
        self.info_v1_at = ctypes.byref(self.info_v1)
        self._number = ctypes.c_uint()
        self._number_at = ctypes.byref(self._number)
        self._count = ctypes.c_uint()
        self._count_at = ctypes.byref(self._count)
        self._mask = ctypes.c_ulonglong()
        self._buffer = ctypes.create_string_buffer(_ROOM * _LONGEST)
        self._room = _ROOM
        self._lists = tuple(
            _ProcessList(library.function(f"{name}_v3", f"{name}_v2"))
            for name in (
                "nvmlDeviceGetComputeRunningProcesses",
                "nvmlDeviceGetGraphicsRunningProcesses",
                "nvmlDeviceGetMPSComputeRunningProcesses",
            )
        )
        self._samples = library.function("nvmlDeviceGetProcessUtilization")
        self._sampled = ctypes.create_string_buffer(_ROOM * _SAMPLE.size)
        self._temperature = self._bound("nvmlDeviceGetTemperature")
        self._power = self._bound("nvmlDeviceGetPowerUsage")
        self._power_limit = self._bound("nvmlDeviceGetEnforcedPowerLimit")
        self._clock = self._bound("nvmlDeviceGetClockInfo")
        self._reasons = library.function(
            "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetCurrentClocksEventReasons"
        )

    def temperature(self, handle: Any) -> tuple[int, int]:
        """Code and degrees C of the chip."""
        return self._temperature(handle, 0, self._number_at), self._number.value

    def power(self, handle: Any) -> tuple[int, int]:
        """Code and milliwatts."""
        return self._power(handle, self._number_at), self._number.value

    def power_limit(self, handle: Any) -> tuple[int, int]:
        """Code and milliwatts of the limit in force."""
        return self._power_limit(handle, self._number_at), self._number.value

    def sm_clock(self, handle: Any) -> tuple[int, int]:
        """Code and MHz of the multiprocessors."""
        return self._clock(handle, 1, self._number_at), self._number.value

    def clock_reasons(self, handle: Any) -> tuple[int, int]:
        """Code and the mask of what holds the clocks down."""
        if self._reasons is None:
            return FUNCTION_NOT_FOUND, 0
        return self._reasons(handle, ctypes.byref(self._mask)), self._mask.value

    def processes(self, handle: Any) -> tuple[tuple[int, list[ProcessRow]], ...]:
        """For compute, graphics and MPS: the code, and pid with bytes of each process."""
        return tuple(self._list(listed, handle) for listed in self._lists)

    def process_utilization(
        self, handle: Any, since_us: int
    ) -> tuple[int, list[tuple[int, int, int]]]:
        """Code and, newer than ``since_us`` (wall clock), pid, time stamp and SM per cent."""
        if self._samples is None:
            return FUNCTION_NOT_FOUND, []
        self._count.value = _ROOM
        since = ctypes.c_ulonglong(since_us)
        code = self._samples(handle, self._sampled, self._count_at, since)
        if code != OK:
            return code, []
        used = memoryview(self._sampled).cast("B")[: self._count.value * _SAMPLE.size]
        return OK, [(row[0], row[1], row[2]) for row in _SAMPLE.iter_unpack(used)]

    def _list(self, listed: _ProcessList, handle: Any) -> tuple[int, list[ProcessRow]]:
        function = listed.function
        if function is None:
            return FUNCTION_NOT_FOUND, []
        count = self._count
        code = INSUFFICIENT_SIZE
        for _ in range(4):
            count.value = self._room
            if listed.layout is None:
                ctypes.memset(self._buffer, _UNWRITTEN, len(self._buffer))
            code = function(handle, self._count_at, self._buffer)
            if code != INSUFFICIENT_SIZE:
                break
            # Room to spare: processes may start between two calls.
            self._room = count.value * 2 + 5
            self._buffer = ctypes.create_string_buffer(self._room * _LONGEST)
        if code != OK or count.value == 0:
            return code, []
        rows = listed.rows(memoryview(self._buffer).cast("B"), count.value)
        # Records of a size that is not known are a list that is not known, not an empty one.
        return (NOT_SUPPORTED, []) if rows is None else (OK, rows)

    def _bound(self, name: str) -> Callable[..., int]:
        return self._bind(name) or _missing


def _missing(*_: object) -> int:
    return FUNCTION_NOT_FOUND


class _ProcessList:
    """One of the three list functions, and the records that this driver writes for it."""

    def __init__(self, function: Callable[..., int] | None) -> None:
        self.function = function
        self.layout: struct.Struct | None = None

    def rows(self, written: memoryview, count: int) -> list[ProcessRow] | None:
        if self.layout is None:
            size = len(bytes(written).rstrip(bytes((_UNWRITTEN,))))
            # Rounded up to whole words: the last byte of a number may look unwritten by chance.
            self.layout = _LAYOUTS.get(-(-size // (8 * count)) * 8)
        if self.layout is None:
            return None
        used = written[: count * self.layout.size]
        return [(row[0], _bytes(row[1])) for row in self.layout.iter_unpack(used)]


def _bytes(value: int) -> int | None:
    # 0 is how some drivers (WSL, containers) say that they do not know.
    return None if value in (0, _NO_MEMORY) else value
