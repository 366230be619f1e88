"""NVIDIA's library, loaded and initialised through nvidia-ml-py, and the meaning of its codes.

Our own initialisation is counted and balanced: what somebody else in this process initialised is
never shut down. Nothing here decides what a reading means for a job.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Health

_log = logging.getLogger(__name__)

OK = 0
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
INSUFFICIENT_SIZE = 7
DRIVER_NOT_LOADED = 9
IRQ_ISSUE = 11
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
OPERATING_SYSTEM = 17
VERSION_MISMATCH = 18
NO_DATA = 21
ARGUMENT_VERSION_MISMATCH = 25
DEPRECATED = 26
GPU_NOT_FOUND = 28

# The value is not to be had; nothing is wrong.
ABSENT = frozenset(
    (
        NOT_SUPPORTED,
        NO_PERMISSION,
        NOT_FOUND,
        FUNCTION_NOT_FOUND,
        NO_DATA,
        ARGUMENT_VERSION_MISMATCH,
        DEPRECATED,
    )
)
# The library has to be initialised again before anything else can be asked.
RESTART = frozenset((UNINITIALIZED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, VERSION_MISMATCH))
DEAD = frozenset((GPU_IS_LOST, RESET_REQUIRED))
# The handle is no longer one: the cards or their instances have changed.
STALE = frozenset((INVALID_ARGUMENT, GPU_NOT_FOUND))

_LIBRARY = "libnvidia-ml.so.1"
_DRIVER_VERSION = "/proc/driver/nvidia/version"
_HEALTH = {GPU_IS_LOST: Health.LOST, RESET_REQUIRED: Health.RESET_REQUIRED}
_TEXTS = {
    UNINITIALIZED: "NVML was shut down by another part of this process",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 is not found; the NVIDIA driver is not installed here",
    NO_PERMISSION: (
        "this user may not ask the NVIDIA driver; ask for access to /dev/nvidia* (in a container: "
        "start it with the GPU)"
    ),
    FUNCTION_NOT_FOUND: (
        "libnvidia-ml.so.1 lacks functions that drivers since 470 have: it is not the driver's own "
        "or very old; upgrade the NVIDIA driver"
    ),
    IRQ_ISSUE: "the NVIDIA driver has a fault with a GPU's interrupts; `dmesg` says more",
    OPERATING_SYSTEM: (
        "the operating system blocks the access to the GPU; under WSL update the Windows driver, "
        "in a container give it the GPU"
    ),
    GPU_IS_LOST: "the GPU is lost; the machine has to be restarted to get it back",
    RESET_REQUIRED: "the GPU requires a reset (nvidia-smi --gpu-reset, as root)",
    VERSION_MISMATCH: (
        "driver/library version mismatch: the NVIDIA driver was upgraded under the running system; "
        "restart the machine, or reload its kernel modules and then restart this process"
    ),
    999: (
        "unknown error of the NVIDIA driver; in a container this comes after its access to the GPU "
        "was cut (restart the container), elsewhere `dmesg` says more"
    ),
}


class NvmlError(Exception):
    """A call answered with a code that ends the whole reading (one of RESTART or STALE)."""

    def __init__(self, code: int) -> None:
        super().__init__(explain(code))
        self.code = code


def health_of(code: int) -> Health:
    """What a code that a card answered says of the card."""
    return _HEALTH.get(code, Health.UNKNOWN)


def explain(code: int) -> str:
    """A code in words, with what to do."""
    return _TEXTS.get(code, f"NVML answered with error {code}")


def why_not_loaded() -> str:
    """Why the driver's library cannot be used, where nvidia-ml-py did not find it."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as exc:
        said = str(exc)
    else:
        return explain(LIBRARY_NOT_FOUND)
    if "no such file" not in said.lower():
        return f"{_LIBRARY} cannot be loaded ({said}); install the NVIDIA driver's libraries again"
    if os.path.exists(_DRIVER_VERSION):
        return (
            f"the NVIDIA driver is loaded and its library {_LIBRARY} is not found; install it (in "
            "a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        )
    return explain(LIBRARY_NOT_FOUND)


def load_pynvml() -> Any:
    """The module of nvidia-ml-py.

    Raises:
        BackendUnavailableError: it is missing, or another package of that name stands in its place.
    """
    try:
        module = import_module("pynvml")
    except ImportError as exc:
        raise BackendUnavailableError(f"nvidia-ml-py is not installed ({exc})") from exc
    if not all(hasattr(module, name) for name in ("_nvmlGetFunctionPointer", "nvmlMemory_v2")):
        where = getattr(module, "__file__", "?")
        raise BackendUnavailableError(
            f"the module pynvml at {where} is not nvidia-ml-py >= 12.535.108 but an old package of "
            "the same name; run `pip uninstall nvidia-ml-py3 pynvml` and `pip install nvidia-ml-py`"
        )
    return module


class Library:
    """One initialisation of NVML, ours.

    Args:
        nvml: the module of nvidia-ml-py.
    """

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        self.held = False  # our own initialisation stands

    def init(self) -> int:
        """Initialise; the code of the library (0: done)."""
        try:
            self.nvml.nvmlInitWithFlags(0)
        except self.nvml.NVMLError as exc:
            return int(exc.value)
        self.held = True
        return OK

    def shutdown(self, *, lost: bool = False) -> None:
        """Take our own initialisation back, once; ``lost``: it is gone already."""
        if not self.held:
            return
        self.held = False
        if lost:
            return
        try:
            self.nvml.nvmlShutdown()
        except self.nvml.NVMLError as exc:
            _log.debug("nvmlShutdown answered with error %s", exc.value)  # nothing left to undo

    def function(self, *names: str) -> Callable[..., int] | None:
        """The first of these C functions that the driver's library has; it returns a code."""
        for name in names:
            try:
                found: Callable[..., int] = self.nvml._nvmlGetFunctionPointer(name)
            except self.nvml.NVMLError:
                continue
            return found
        return None

    def driver(self) -> str | None:
        """The driver's version, where it says."""
        try:
            text = self.nvml.nvmlSystemGetDriverVersion()
        except self.nvml.NVMLError:
            return None
        return text.decode() if isinstance(text, bytes) else str(text)
