"""The kernel's files about graphics cards, for the vendors that have no library of their own.

Every reader gives None for what is missing, unreadable or empty. The root of the tree can be moved
(tests). It never writes, and it touches no sensor of a card that sleeps: that would wake it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpusched_ipy.backends import _values as values

_CARD = re.compile(r"card([0-9]+)")  # not card0-DP-1, which is a connector, nor renderD128
_BDF = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]", re.IGNORECASE)
_PCI_IDS = ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids")
_LIMIT = 1 << 16


@dataclass(frozen=True, slots=True)
class Card:
    """One graphics card of the kernel."""

    number: int  # of cardN
    path: Path  # /sys/class/drm/cardN
    device: Path  # /sys/class/drm/cardN/device
    bdf: str | None  # its PCI address
    vendor_id: str
    device_id: str | None
    driver: str | None

    @property
    def asleep(self) -> bool:
        """Whether the card is suspended; reading most other files would wake it."""
        return read_text(f"{self.device}/power/runtime_status") in ("suspended", "suspending")

    def hwmon(self) -> Path | None:
        """The folder of its sensors."""
        return next(iter(folder(self.device / "hwmon")), None)


def cards(root: Path, vendor_id: str) -> tuple[Card, ...]:
    """The cards of that PCI vendor, in PCI order (the index that people know)."""
    found = []
    for path in folder(root / "sys/class/drm"):
        number = _CARD.fullmatch(path.name)
        device = path / "device"
        vendor = read_text(device / "vendor")
        if number is None or vendor is None or vendor.lower() != vendor_id:
            continue
        found.append(
            Card(
                number=int(number[1]),
                path=path,
                device=device,
                bdf=_bdf(device),
                vendor_id=vendor_id,
                device_id=(read_text(device / "device") or "").lower() or None,
                driver=_link_name(device / "driver"),
            )
        )
    return tuple(sorted(found, key=lambda card: (card.bdf or "~", card.number)))


def folder(path: Path) -> list[Path]:
    """What is in a folder, sorted; nothing where it cannot be listed."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def read_text(path: Path | str) -> str | None:
    """The text of a small file without its ends, or None."""
    raw = read_bytes(path)
    return (raw.decode("utf-8", "replace").strip("\0 \t\r\n") or None) if raw is not None else None


def read_bytes(path: Path | str) -> bytes | None:
    """The first 64 KiB of a file, or None where the kernel refuses (busy, suspended, no access)."""
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read(_LIMIT)
    except (OSError, ValueError):
        return None


def read_count(path: Path | str) -> int | None:
    """A whole number that is not negative, or None."""
    return values.whole(read_text(path))


def labelled(hwmon: Path, kind: str, what: str, *labels: str) -> Path | None:
    """The file of the sensor with the first of these labels that there is."""
    found: dict[str, Path] = {}
    for path in folder(hwmon):
        if path.name.startswith(kind) and path.name.endswith("_label"):
            label = (read_text(path) or "").lower()
            found.setdefault(label, hwmon / f"{path.name.removesuffix('_label')}_{what}")
    return next((found[label] for label in labels if label in found), None)


def pci_name(root: Path, vendor_id: str, device_id: str | None) -> str | None:
    """The name of a PCI device in the machine's own table of names, or None."""
    if device_id is None:
        return None
    return _pci_names(root, vendor_id.removeprefix("0x")).get(device_id.removeprefix("0x"))


@cache
def _pci_names(root: Path, vendor: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for place in _PCI_IDS:
        try:
            lines = (root / place).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        inside = False
        for line in lines:
            if line[:1] not in ("\t", "#", ""):
                inside = line.lower().startswith(vendor)
            elif inside and line.startswith("\t") and not line.startswith("\t\t"):
                device, _, name = line.strip().partition("  ")
                names[device.lower()] = name.strip()
        break
    return names


def _bdf(device: Path) -> str | None:
    for line in (read_text(device / "uevent") or "").splitlines():
        key, _, value = line.partition("=")
        if key == "PCI_SLOT_NAME" and _BDF.fullmatch(value.strip()):
            return value.strip().lower()
    name = os.path.basename(os.path.realpath(device))
    return name.lower() if _BDF.fullmatch(name) else None


def _link_name(path: Path) -> str | None:
    try:
        return os.path.basename(os.readlink(path)) or None
    except OSError:
        return None
