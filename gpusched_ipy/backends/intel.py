"""Intel GPUs: the drivers' own files (i915, xe), and xpu-smi where it is installed.

There is no library that knows everything, and much is hidden without root. Utilization is the
busiest engine of all processes (root, who sees them all), else what xpu-smi says, else the share of
time in which the graphics unit was not in its idle state, which is never less than the work done.
Another user's work is never taken for idleness: what cannot be seen is None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends import _fdinfo as fdinfo
from gpusched_ipy.backends import _sysfs as sysfs
from gpusched_ipy.backends._child import find, run_once
from gpusched_ipy.backends._feed import Feed
from gpusched_ipy.backends._intel_files import (
    SHORTEST_S,
    Meters,
    Rate,
    awake_share,
    is_integrated,
    with_memory,
    with_sensors,
)
from gpusched_ipy.backends._intel_text import (
    DumpReader,
    Listed,
    Row,
    parse_discovery,
    parse_memory_size,
)
from gpusched_ipy.backends._owners import Owner, Owners
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import BackendReadError, BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind, Snapshot

VENDOR_ID = "0x8086"
DRIVERS = ("i915", "xe")
DUMP_ARGV = ("xpu-smi", "dump", "-d", "-1", "--metrics", "0,1,2,3,5,18")
DISCOVERY_ARGV = ("xpu-smi", "discovery", "-j")
_TIMEOUT_S = 10.0
_FRESH_S = 5.0


class IntelBackend:
    """The Intel GPUs of this machine.

    Args:
        root: where ``/sys`` and ``/proc`` are looked for; ``/`` but in tests.
        clock: stamps the readings.
        longest_s: two readings further apart than this are not compared.
    """

    name = "intel"
    authoritative_pids = False

    def __init__(
        self, root: Path = Path("/"), clock: Clock | None = None, longest_s: float = 10.0
    ) -> None:
        self._root = root
        self._longest_s = longest_s
        self._clock = clock or SystemClock()
        self._owners = Owners()
        self._meters: dict[Path, Meters] = {}
        self._base: fdinfo.Scan | None = None
        self._engines: dict[str, float | None] = {}
        self._shares: dict[tuple[str, str, str], float | None] = {}
        self._sees_all = True
        self._feed: Feed[Mapping[int, Row]] | None = None
        self._listed: tuple[Listed, ...] | None = None
        self._sizes: dict[int, int | None] = {}
        if find(DUMP_ARGV[0]) is not None:
            self._feed = Feed(
                DUMP_ARGV, DumpReader(), self._clock, separator=b"\n", fresh_s=_FRESH_S
            )
        self.source = "sysfs, fdinfo" + (", xpu-smi" if self._feed else "")

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        """The GPUs now; none at all is a problem."""
        started = self._clock.now()
        cards = sysfs.cards(self._root, VENDOR_ID)
        awake = [card for card in cards if not card.asleep]
        scan = self._scan(detail) if awake else None
        rows = self._rows() if awake else {}
        gpus = tuple(
            self._gpu(index, card, detail, scan, rows.get(card.bdf or ""))
            if card in awake
            else replace(
                _outline(self._root, index, card),
                health=Health.ASLEEP,
                health_text="suspended; a reading would wake it",
            )
            for index, card in enumerate(cards)
        )
        now = self._clock.now()
        return Snapshot(
            backend=self.name,
            source=self.source,
            taken_at=now.wall,
            taken_mono=now.mono,
            driver=sysfs.read_text(self._root / "proc/sys/kernel/osrelease"),
            read_s=now.mono - started.mono,
            problem=None if gpus else "the kernel shows no Intel GPU",
            gpus=gpus,
        )

    def close(self) -> None:
        """End xpu-smi and forget the counters; a later reading starts anew."""
        if self._feed is not None:
            self._feed.close()
        self._base = None
        self._meters.clear()
        self._engines.clear()
        self._shares.clear()

    def _scan(self, detail: Detail) -> fdinfo.Scan | None:
        """The processes where they are asked for, or where they give the utilization."""
        if detail < Detail.PROCESSES and not self._sees_all:
            return None
        scan = fdinfo.scan(self._root, self._clock.now().mono, DRIVERS)
        self._sees_all = scan.complete
        if self._base is not None and scan.mono - self._base.mono > self._longest_s:
            self._base = None
        if self._base is None or scan.mono - self._base.mono >= SHORTEST_S:
            bdfs = {client.bdf for client in scan.clients.values()}
            bdfs |= {card.bdf for card in sysfs.cards(self._root, VENDOR_ID) if card.bdf}
            self._engines = {bdf: fdinfo.utilization(self._base, scan, bdf) for bdf in bdfs}
            self._shares = {
                key: fdinfo.process_share(self._base, scan, client)
                for key, client in scan.clients.items()
            }
            self._base = scan
        return scan

    def _rows(self) -> Mapping[str, tuple[Row, int | None]]:
        """xpu-smi's newest rows and the size of each card, by PCI address."""
        rows = self._feed.latest() if self._feed is not None else None
        if not rows:
            return {}
        if self._listed is None:
            self._listed = parse_discovery(_ask(DISCOVERY_ARGV))
        found = {}
        for listed in self._listed:
            if listed.device not in self._sizes:
                argv = ("xpu-smi", "discovery", "-d", str(listed.device), "-j")
                self._sizes[listed.device] = parse_memory_size(_ask(argv))
            if listed.device in rows:
                found[listed.bdf] = (rows[listed.device], self._sizes[listed.device])
        return found

    def _gpu(
        self,
        index: int,
        card: sysfs.Card,
        detail: Detail,
        scan: fdinfo.Scan | None,
        told: tuple[Row, int | None] | None,
    ) -> Gpu:
        meters = self._meters.setdefault(card.path, Meters(self._longest_s, Rate(self._longest_s)))
        row, size = told or (Row(device=-1), None)
        now = self._clock.now().mono
        busy, window = awake_share(meters, card, now)
        exact = self._engines.get(card.bdf or "") if scan is not None else None
        known = (exact, row.utilization, busy)
        gpu = replace(
            _outline(self._root, index, card),
            health_text=self._feed.problem if self._feed is not None else None,
            utilization=next((value for value in known if value is not None), None),
            utilization_window_s=window if known[:2] == (None, None) else None,
            processes=self._processes(card, scan) if detail >= Detail.PROCESSES else None,
        )
        gpu = with_memory(gpu, self._root, card, scan, row, size)
        return with_sensors(gpu, card, meters, row, now) if detail >= Detail.FULL else gpu

    def _processes(
        self, card: sysfs.Card, scan: fdinfo.Scan | None
    ) -> tuple[GpuProcess, ...] | None:
        """The processes of a card; None where some may be hidden: a part is not the list."""
        if scan is None or not scan.complete or card.bdf is None:
            return None
        merged: dict[int, GpuProcess] = {}
        for client in scan.of(card.bdf):
            known = merged.get(client.pid)
            size = client.vram_bytes if client.vram_bytes is not None else client.shared_bytes
            share = self._shares.get(client.key)
            merged[client.pid] = _process(
                client.pid, self._owners.of(client.pid), known, size, share
            )
        return tuple(item for item in merged.values() if item.mem_bytes or item.pid != os.getpid())


def open_intel(settings: Settings, clock: Clock, root: Path = Path("/")) -> IntelBackend:
    """The Intel GPUs of this machine.

    Raises:
        BackendUnavailableError: the kernel shows none.
    """
    if not sysfs.cards(root, VENDOR_ID):
        raise BackendUnavailableError("the kernel shows no Intel GPU")
    return IntelBackend(root, clock, max(10.0, 3 * settings.sample_interval_s))


def _ask(argv: tuple[str, ...]) -> bytes:
    try:
        return run_once(argv, _TIMEOUT_S)
    except BackendReadError:
        return b""  # the row then belongs to no card, and its values stay unknown


def _outline(root: Path, index: int, card: sysfs.Card) -> Gpu:
    listed = sysfs.pci_name(root, card.vendor_id, card.device_id)
    return Gpu(
        uuid=f"intel:{card.bdf or f'card{card.number}'}",
        index=index,
        name=listed or f"Intel GPU {card.device_id or ''}".strip(),
        vendor="intel",
        bus_id=card.bdf,
        mem_kind=MemoryKind.UNIFIED if is_integrated(card) else MemoryKind.DEDICATED,
    )


def _process(
    pid: int, owner: Owner, known: GpuProcess | None, size: int | None, share: float | None
) -> GpuProcess:
    before = None if known is None else known.mem_bytes
    busier = [value for value in (share, known.utilization if known else None) if value is not None]
    return GpuProcess(
        pid=pid,
        user=owner.user,
        name=owner.name,
        mem_bytes=before if size is None else size + (before or 0),
        utilization=max(busier, default=None),
        started_at=owner.started_at,
    )
