"""Utilization and memory of the AMD cards that are known already, from files that stay open.

It opens nothing that a full reading has not read, wakes no card, and gives up on the smallest
surprise: then the full reading is made, which looks at everything anew.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gpusched_ipy.backends import _values as values
from gpusched_ipy.snapshot import Gpu, Health, MemoryKind

_ASLEEP = (b"suspended", b"suspending")
_LONGEST = 64  # bytes; these files hold one word


class LightCard:
    """One card, kept as a full reading has found it.

    Args:
        device: its folder.
        gpu: what the full reading said of it.
    """

    def __init__(self, device: Path, gpu: Gpu) -> None:
        pool = "gtt" if gpu.mem_kind is MemoryKind.UNIFIED else "vram"
        names = ("power/runtime_status", "gpu_busy_percent", f"mem_info_{pool}_used")
        self._handles: list[int] = []
        self._said: list[bytes] = []
        self._bare = replace(gpu, utilization=None, mem_used_bytes=None, processes=None)
        self._gpu = gpu
        try:
            for name in names:
                self._handles.append(os.open(device / name, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()

    def read(self) -> Gpu | None:
        """The card now; None where only a full reading can tell."""
        if not self._handles:
            return None
        status, *sensors = self._handles
        try:
            said = [os.pread(status, _LONGEST, 0)]
            if said[0].strip() in _ASLEEP:
                return None  # asking a sensor would wake it
            said += [os.pread(handle, _LONGEST, 0) for handle in sensors]
        except OSError:  # suspended, unplugged, or the driver was unloaded
            return None
        if said != self._said:
            gpu = self._made(said)
            if gpu is None:
                return None
            self._said, self._gpu = said, gpu
        return self._gpu

    def _made(self, said: list[bytes]) -> Gpu | None:
        utilization = values.ratio(said[1].decode("ascii", "replace"))
        used = values.whole(said[2].decode("ascii", "replace"))
        if utilization is None or used is None:
            return None
        return replace(self._bare, utilization=utilization, mem_used_bytes=used)

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._handles:
            os.close(handle)
        self._handles = []


def known_well(gpu: Gpu) -> bool:
    """Whether the files alone told utilization and memory, so that they will again."""
    told = gpu.utilization is not None and gpu.mem_used_bytes is not None
    return told and gpu.health is Health.OK
