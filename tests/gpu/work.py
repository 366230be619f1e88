"""Work for a real GPU, in a process of its own: hold memory, keep it busy, say when and where.

It needs nothing but NVIDIA's driver (libcuda), so that a machine without frameworks can be tested;
``--with torch`` and ``--with cupy`` do the same by these. What it saw goes to ``--out`` as JSON,
once when its context and its memory stand and again when it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

STARTED = time.time()
MIB = 1 << 20
SPIN_CYCLES = 20_000_000  # about 10 to 20 ms
# Waits for a number of clock cycles: the card is busy and its memory is not.
PTX = """
.version 6.4
.target {target}
.address_size 64
.visible .entry spin(.param .u64 cycles)
{{
    .reg .u64 %rd<4>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [cycles];
    mov.u64 %rd2, %clock64;
AGAIN:
    mov.u64 %rd3, %clock64;
    sub.u64 %rd3, %rd3, %rd2;
    setp.lt.u64 %p1, %rd3, %rd1;
    @%p1 bra AGAIN;
    ret;
}}
"""
TARGETS = ("sm_75", "sm_70", "sm_52")


class Engine(Protocol):
    """One way of using the GPU."""

    def start(self, mib: int) -> None:
        """Make a context and take that much memory."""

    def spin(self) -> None:
        """Keep the card busy for some milliseconds."""

    def uuid(self) -> str:
        """The UUID of the first visible card, as NVML writes it."""


class Driver:
    """libcuda, called directly."""

    def start(self, mib: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        if mib:
            memory = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(mib * MIB))
        self._function = self._load()

    def spin(self) -> None:
        cycles = ctypes.c_uint64(SPIN_CYCLES)
        params = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(cycles), ctypes.c_void_p))
        shape = (1, 1, 1, 1, 1, 1, 0)
        self._call("cuLaunchKernel", self._function, *shape, None, params, None)
        self._call("cuCtxSynchronize")

    def uuid(self) -> str:
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid", ctypes.byref(raw), self._device)
        text = bytes(raw).hex()
        return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def _load(self) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        refused = []
        for target in TARGETS:
            text = PTX.format(target=target).encode()
            code = self._cuda.cuModuleLoadData(ctypes.byref(module), text)
            if code == 0:
                self._call("cuModuleGetFunction", ctypes.byref(function), module, b"spin")
                return function
            refused.append(f"{target}: {code}")
        raise RuntimeError(f"the driver compiles none of {refused}")

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._cuda, name)(*args)
        if code != 0:
            raise RuntimeError(f"{name} answered {code}")


class Torch:
    """PyTorch."""

    def start(self, mib: int) -> None:
        import torch

        self._torch = torch
        self._held = torch.empty(max(1, mib) * MIB, dtype=torch.uint8, device="cuda")
        self._matrix = torch.ones((2048, 2048), device="cuda")
        torch.cuda.synchronize()

    def spin(self) -> None:
        for _ in range(20):
            self._matrix @ self._matrix
        self._torch.cuda.synchronize()

    def uuid(self) -> str:
        # Before PyTorch 2.4 it does not tell.
        told = getattr(self._torch.cuda.get_device_properties(0), "uuid", None)
        return "unknown" if told is None else f"GPU-{told}"


class Cupy:
    """CuPy."""

    def start(self, mib: int) -> None:
        import cupy

        self._cupy = cupy
        self._held = cupy.empty(max(1, mib) * MIB, dtype=cupy.uint8)
        self._matrix = cupy.ones((2048, 2048), dtype=cupy.float32)
        cupy.cuda.Device().synchronize()

    def spin(self) -> None:
        for _ in range(20):
            self._matrix @ self._matrix
        self._cupy.cuda.Device().synchronize()

    def uuid(self) -> str:
        raw = self._cupy.cuda.runtime.getDeviceProperties(0)["uuid"]
        text = bytes(raw)[:16].hex()
        return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


ENGINES: dict[str, type[Engine]] = {"driver": Driver, "torch": Torch, "cupy": Cupy}


def note(path: Path, seen: dict[str, Any]) -> None:
    """Write what was seen, at once and whole."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(seen), encoding="utf-8")
    os.replace(fresh, path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--with", dest="engine", choices=sorted(ENGINES), default="driver")
    parser.add_argument("--mib", type=int, default=256, help="memory to hold")
    parser.add_argument("--busy", type=float, default=0.0, help="seconds of work")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds of doing nothing after it")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    engine = ENGINES[given.engine]()
    engine.start(given.mib)
    ready = time.time()
    seen: dict[str, Any] = {
        "pid": os.getpid(),
        "started": STARTED,
        "ready": ready,
        "uuid": engine.uuid(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "order": os.environ.get("CUDA_DEVICE_ORDER"),
    }
    note(given.out, seen)
    while time.time() < ready + given.busy:
        engine.spin()
    time.sleep(given.idle)
    note(given.out, {**seen, "ended": time.time()})


if __name__ == "__main__":
    main()
