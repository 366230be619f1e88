"""Who has a graphics card open, from ``/proc/<pid>/fdinfo``: memory and engine time per process.

The kernel shows a process's files to its own user and to root only. :attr:`Scan.complete` says
whether everything could be looked at: only then is "nobody" known, and a sum of engine times a
utilization. Counters of one client are shown by each of its descriptors and count once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpusched_ipy.backends import _sysfs
from gpusched_ipy.backends import _values as values

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # fixed in the kernel (PROC_PID_INIT_INO)
_VRAM = ("vram", "local")


@dataclass(slots=True)
class Client:
    """One opening of a card, as the driver counts it."""

    pid: int
    driver: str
    bdf: str
    client_id: str
    vram_bytes: int | None = None
    shared_bytes: int | None = None  # system memory that the GPU uses
    busy_ns: dict[str, int] = field(default_factory=dict)  # by engine (i915, amdgpu)
    cycles: dict[str, tuple[int, int]] = field(default_factory=dict)  # (busy, all) by engine (xe)
    capacity: dict[str, int] = field(default_factory=dict)  # engines of a class

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two descriptors the same client."""
        return (self.driver, self.bdf, self.client_id)


@dataclass(frozen=True, slots=True)
class Scan:
    """All clients that could be seen at one moment."""

    mono: float
    clients: Mapping[tuple[str, str, str], Client]
    complete: bool

    def of(self, bdf: str) -> list[Client]:
        """The clients of the card at that PCI address."""
        return [client for client in self.clients.values() if client.bdf == bdf]


def parse_fdinfo(text: str, pid: int) -> Client | None:
    """One fdinfo file; None where it is no graphics card's, or is cut before its identity."""
    pairs = dict(_pairs(text))
    driver, bdf, client_id = (
        pairs.get(f"drm-{key}", "") for key in ("driver", "pdev", "client-id")
    )
    if not driver or not bdf or not client_id:
        return None
    client = Client(pid, driver, bdf.lower(), client_id)
    _add_memory(client, pairs)
    for key, value in pairs.items():
        _add_engine(client, key, value, pairs)
    return client


def scan(root: Path, mono: float, drivers: Iterable[str]) -> Scan:
    """Every client of these drivers that this process may see."""
    wanted = frozenset(drivers)
    clients: dict[tuple[str, str, str], Client] = {}
    complete = _nobody_is_hidden(root)
    for process in _sysfs.folder(root / "proc"):
        if not process.name.isdigit():
            continue
        try:
            descriptors = _graphics_descriptors(process)
        except PermissionError:
            complete = False
            continue
        except OSError:
            continue  # it has ended
        for descriptor in descriptors:
            text = _sysfs.read_text(process / "fdinfo" / descriptor)
            client = parse_fdinfo(text, int(process.name)) if text is not None else None
            if client is not None and client.driver in wanted:
                clients.setdefault(client.key, client)
    return Scan(mono, clients, complete)


def sees_all_processes(root: Path) -> bool:
    """Whether ``/proc`` counts the processes of the whole machine, and not those of a container."""
    try:
        return os.readlink(root / "proc/self/ns/pid") == _INITIAL_PID_NAMESPACE
    except OSError:
        return False


def _nobody_is_hidden(root: Path) -> bool:
    """Whether even the first process can be looked into (a mount option can hide all others')."""
    try:
        os.listdir(root / "proc/1/fd")
    except OSError:
        return False
    return sees_all_processes(root)


def utilization(before: Scan | None, now: Scan, bdf: str) -> float | None:
    """The busiest engine class of a card between two scans, 0-1; None where it cannot be known."""
    if before is None or not (before.complete and now.complete) or now.mono <= before.mono:
        return None
    engines: dict[str, float] = {}
    for client in now.of(bdf):
        if not client.busy_ns and not client.cycles:
            return None  # a driver that counts no engine time: silence is not idleness
        for engine, busy in _busy(before.clients.get(client.key), client, now.mono - before.mono):
            if busy is None:
                return None
            engines[engine] = engines.get(engine, 0.0) + busy
    return min(1.0, max(engines.values(), default=0.0))


def process_share(before: Scan | None, now: Scan, client: Client) -> float | None:
    """What one client keeps busy of its busiest engine class, 0-1."""
    earlier = None if before is None else before.clients.get(client.key)
    if earlier is None or before is None or now.mono <= before.mono:
        return None
    shares = [busy for _, busy in _busy(earlier, client, now.mono - before.mono)]
    known = [busy for busy in shares if busy is not None]
    return min(1.0, max(known)) if known and len(known) == len(shares) else None


def _busy(
    before: Client | None, now: Client, elapsed_s: float
) -> Iterable[tuple[str, float | None]]:
    """Each engine class of a client with its busy share; a new client was idle before it was."""
    for engine, ns in now.busy_ns.items():
        earlier = 0 if before is None else before.busy_ns.get(engine, 0)
        yield engine, _share(ns - earlier, elapsed_s * 1e9, now.capacity.get(engine, 1))
    for engine, (busy, total) in now.cycles.items():
        if before is None or engine not in before.cycles:
            # The clock of an engine has no start of ours: nothing is known without a first reading.
            yield engine, (0.0 if busy == 0 else None)
            continue
        earlier_busy, earlier_total = before.cycles[engine]
        yield (
            engine,
            _share(busy - earlier_busy, total - earlier_total, now.capacity.get(engine, 1)),
        )


def _share(busy: float, total: float, capacity: int) -> float | None:
    if busy < 0 or total < 0 or capacity < 1:
        return None
    if total == 0:
        return 0.0 if busy == 0 else None
    return busy / total / capacity


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        key, mark, value = line.partition(":")
        if mark:
            yield key.strip(), value.strip()


def _add_memory(client: Client, pairs: Mapping[str, str]) -> None:
    """Resident memory by region; older drivers tell ``total``, the oldest ``drm-memory-``."""
    for prefix in ("drm-resident-", "drm-total-", "drm-memory-"):
        regions = {key[len(prefix) :]: key for key in pairs if key.startswith(prefix)}
        found = False
        for region, key in regions.items():
            size = values.byte_count(pairs[key])
            if size is None or region.startswith("cycles"):
                continue
            found = True
            if region.startswith(_VRAM):
                client.vram_bytes = (client.vram_bytes or 0) + size
            elif region.startswith(("system", "gtt")):
                client.shared_bytes = (client.shared_bytes or 0) + size
        if found:
            return


def _add_engine(client: Client, key: str, value: str, pairs: Mapping[str, str]) -> None:
    if key.startswith("drm-engine-capacity-"):
        client.capacity[key.removeprefix("drm-engine-capacity-")] = values.whole(value) or 1
    elif key.startswith("drm-engine-"):
        spent = values.whole(value, {"ns": 1.0, "": 1.0})
        if spent is not None:
            client.busy_ns[key.removeprefix("drm-engine-")] = spent
    elif key.startswith("drm-cycles-"):
        engine = key.removeprefix("drm-cycles-")
        busy = values.whole(value)
        total = values.whole(pairs.get(f"drm-total-cycles-{engine}"))
        if busy is not None and total is not None:
            client.cycles[engine] = (busy, total)


def _graphics_descriptors(process: Path) -> list[str]:
    """The descriptors of a process that are files of graphics cards."""
    found = []
    for name in os.listdir(process / "fd"):
        try:
            if os.readlink(process / "fd" / name).startswith("/dev/dri/"):
                found.append(name)
        except FileNotFoundError:
            continue
    return found
