"""NVIDIA cards as the kernel lists them: who sleeps, without touching (and so waking) the card.

Any open NVML handle and any call of nvidia-smi brings a suspended laptop card to full power. The
kernel's own files say whether it sleeps and what it is called without doing so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpusched_ipy.snapshot import Gpu, Health

SYSFS = Path("/sys/bus/pci/devices")
PROCFS = Path("/proc/driver/nvidia/gpus")
_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True, slots=True)
class PciCard:
    """One NVIDIA card on the PCI bus."""

    bus_id: str  # as in sysfs: 0000:01:00.0
    may_sleep: bool  # the kernel is allowed to suspend it while the system runs
    asleep: bool


class PciBus:
    """The kernel's view of the NVIDIA cards of this machine; reads small files, writes nothing.

    Args:
        sysfs: the folder of the PCI devices.
        procfs: the folder in which the NVIDIA driver describes its cards.
    """

    def __init__(self, sysfs: Path = SYSFS, procfs: Path = PROCFS) -> None:
        self._sysfs = sysfs
        self._procfs = procfs

    def cards(self) -> tuple[PciCard, ...]:
        """The NVIDIA display and compute cards, in PCI order; empty where there is no bus."""
        try:
            folders = sorted(self._sysfs.iterdir())
        except OSError:
            return ()
        return tuple(
            PciCard(folder.name, self.may_sleep(folder.name), self.asleep(folder.name))
            for folder in folders
            if _text(folder / "vendor") == _VENDOR
            and _text(folder / "class").startswith(_DISPLAY_CLASS)
        )

    def may_sleep(self, bus_id: str) -> bool:
        """Whether runtime power management is on for that card."""
        return _text(self._sysfs / bus_id / "power" / "control") == "auto"

    def asleep(self, bus_id: str) -> bool:
        """Whether that card is suspended now."""
        return _text(self._sysfs / bus_id / "power" / "runtime_status") == "suspended"

    def all_asleep(self) -> bool:
        """Whether there are NVIDIA cards and every one of them is suspended."""
        cards = self.cards()
        return bool(cards) and all(card.asleep for card in cards)

    def sleeping_gpus(self) -> tuple[Gpu, ...]:
        """The cards as the driver's own files describe them, every reading unknown."""
        return tuple(
            self.sleeping_gpu(card.bus_id, index) for index, card in enumerate(self.cards())
        )

    def sleeping_gpu(self, bus_id: str, index: int) -> Gpu:
        """One suspended card; its UUID is the driver's where that is written, else its address."""
        described = self._described(bus_id)
        uuid = described.get("GPU UUID", "")
        return Gpu(
            uuid=uuid if uuid.startswith("GPU-") and "?" not in uuid else f"nvidia:{bus_id}",
            index=index,
            name=described.get("Model") or "NVIDIA GPU",
            vendor="nvidia",
            bus_id=bus_id,
            health=Health.ASLEEP,
            health_text="suspended to save power; it is not woken only to be looked at",
        )

    def _described(self, bus_id: str) -> dict[str, str]:
        lines = _text(self._procfs / bus_id / "information").splitlines()
        pairs = (line.partition(":") for line in lines)
        return {key.strip(): value.strip() for key, _, value in pairs}


def sysfs_bus_id(bus_id: str) -> str:
    """NVML's ``00000000:0C:00.0`` as the kernel writes it: ``0000:0c:00.0``."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:].rjust(4, '0')}:{rest}" if rest else bus_id.lower()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
