"""Whether this process has opened CUDA, and which GPUs it then sees. It opens nothing by itself.

CUDA reads CUDA_VISIBLE_DEVICES when it is initialised, once in a process, whichever library does
it: from then on changing the variable changes nothing. The driver's own library, where it is loaded
already, is asked (CUDA driver API: cuDeviceGetCount, cuDevicePrimaryCtxGetState, cuDeviceGetUuid).
"""

from __future__ import annotations

import ctypes
import os
import uuid

_LIBRARY = "libcuda.so.1"
_UUID_BYTES = 16


def opened(count: int = 1) -> tuple[str, ...] | None:
    """The UUIDs (without their prefix) of the GPUs this process is bound to, in CUDA's order.

    Those that it has a context on; before the first context, the first ``count`` that CUDA shows
    it, because that is what libraries take. None: CUDA has not been initialised here, so the
    variable still counts.
    """
    library = _loaded()
    if library is None:
        return None
    shown = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(shown)):
        return None  # 3: not initialised
    devices = range(shown.value)
    active = [number for number in devices if _has_context(library, number)]
    found = [_uuid(library, number) for number in active or devices[:count]]
    return tuple(name for name in found if name is not None)


def match(bound: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``known`` (``GPU-…``, ``MIG-…``) that CUDA means, in CUDA's order."""
    by_tail = {gpu.partition("-")[2].lower(): gpu for gpu in known}
    return tuple(by_tail[name] for name in bound if name in by_tail)


def _loaded() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except (OSError, AttributeError):  # not loaded, or a system that cannot say
        return None


def _has_context(library: ctypes.CDLL, number: int) -> bool:
    flags, active = ctypes.c_uint(), ctypes.c_int()
    failed = library.cuDevicePrimaryCtxGetState(number, ctypes.byref(flags), ctypes.byref(active))
    return not failed and bool(active.value)


def _uuid(library: ctypes.CDLL, number: int) -> str | None:
    ask = getattr(library, "cuDeviceGetUuid_v2", None) or library.cuDeviceGetUuid
    raw = (ctypes.c_ubyte * _UUID_BYTES)()
    return None if ask(raw, number) else str(uuid.UUID(bytes=bytes(raw)))
