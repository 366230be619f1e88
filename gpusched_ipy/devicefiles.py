"""The files by which programs reach the GPUs (``/dev/nvidia0``, ``/dev/kfd``), and who may open
them. It opens none of them: that can wake a card.
"""

from __future__ import annotations

import grp
import os
import re
from collections.abc import Callable
from pathlib import Path

_NVIDIA = re.compile(r"nvidia(?:ctl|-uvm|[0-9]+)")
_RENDER = re.compile(r"renderD[0-9]+")
_PCI_IDS = {"amd": "0x1002", "intel": "0x8086"}


def device_files(vendor: str, root: Path = Path("/")) -> tuple[Path, ...]:
    """The files of that maker's GPUs; none where there are none, or it needs none (Apple)."""
    dev = root / "dev"
    if vendor == "nvidia":
        return _named(dev, _NVIDIA)
    if vendor not in _PCI_IDS:
        return ()
    nodes = tuple(
        node
        for node in _named(dev / "dri", _RENDER)
        if _maker(root / "sys/class/drm" / node.name) == _PCI_IDS[vendor]
    )
    kfd = dev / "kfd"
    return (kfd, *nodes) if vendor == "amd" and kfd.exists() else nodes


def closed_to_us(
    files: tuple[Path, ...], may: Callable[[Path, int], bool] = os.access
) -> tuple[Path, ...]:
    """Those that this user may not open."""
    return tuple(path for path in files if not may(path, os.R_OK | os.W_OK))


def group_of(path: Path) -> str:
    """The group of a file, by name where it has one."""
    number = path.stat().st_gid
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _named(folder: Path, pattern: re.Pattern[str]) -> tuple[Path, ...]:
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return ()
    return tuple(path for path in found if pattern.fullmatch(path.name))


def _maker(node: Path) -> str | None:
    try:
        return (node / "device/vendor").read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
