"""AMD GPUs: the driver's own files, and amdsmi for what they do not tell.

Utilization, memory, temperature, power and clock come from ``/sys/class/drm/card*/device``, the
processes from KFD (every ROCm process, of any user) and from ``/proc/*/fdinfo`` (graphics, own
processes only without root). A processor with graphics has GTT as its pool. No reading wakes a card
that sleeps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends import _fdinfo as fdinfo
from gpusched_ipy.backends import _sysfs as sysfs
from gpusched_ipy.backends import _values as values
from gpusched_ipy.backends._amd_light import LightCard, known_well
from gpusched_ipy.backends._amd_text import Holder, Reading, current_clock, is_apu, node_address
from gpusched_ipy.backends._amdsmi import AmdSmi
from gpusched_ipy.backends._owners import Owner, Owners
from gpusched_ipy.config import Clock, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, MemoryKind, Snapshot

VENDOR_ID = "0x1002"
_KFD = Path("sys/class/kfd/kfd")
# Cards are looked for again so often, and at once when one says nothing: it costs as much as ten
# readings, and a card comes seldom.
_ENUMERATE_S = 30.0


class AmdBackend:
    """The AMD GPUs of this machine.

    Args:
        root: where ``/sys`` and ``/proc`` are looked for; ``/`` but in tests.
        clock: stamps the readings.
    """

    name = "amd"
    authoritative_pids = False

    def __init__(self, root: Path = Path("/"), clock: Clock | None = None) -> None:
        self.source = "sysfs, KFD, fdinfo"
        self._root = root
        self._clock = clock or SystemClock()
        self._owners = Owners()
        self._library = AmdSmi()
        self._driver: str | None = None
        self._cards: tuple[sysfs.Card, ...] = ()
        self._bare: dict[sysfs.Card, Gpu] = {}  # what does not change while a card is there
        self._listed_at: float | None = None
        self._known: tuple[LightCard, ...] = ()

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        """The GPUs now; none at all is a problem."""
        started = self._clock.now()
        gpus = self._light(started.mono) if detail == Detail.LOAD else ()
        if not gpus:
            gpus = self._whole(detail, started.mono)
        now = self._clock.now()
        return Snapshot(
            backend=self.name,
            source=self.source,
            taken_at=now.wall,
            taken_mono=now.mono,
            driver=self._driver,
            read_s=now.mono - started.mono,
            problem=None if gpus else self._nothing(),
            gpus=gpus,
        )

    def close(self) -> None:
        """Let go of amdsmi and of the files; a later reading opens them again."""
        self._library.close()
        self._forget()

    def _whole(self, detail: Detail, mono: float) -> tuple[Gpu, ...]:
        """A reading that opens every file, and looks for the cards where that is due."""
        known = self._list_is_young(mono)
        if not known:
            self._list(mono)
        gpus = self._each(detail)
        if known and not (gpus and all(gpu.health is not Health.UNKNOWN for gpu in gpus)):
            self._list(mono)
            gpus = self._each(detail)
        if detail == Detail.LOAD:
            self._know(gpus)
        return self._filled(gpus, detail)

    def _light(self, mono: float) -> tuple[Gpu, ...]:
        """Utilization and memory of the known cards; nothing where they must be looked for."""
        if not self._known or not self._list_is_young(mono):
            return ()
        gpus = tuple([gpu for card in self._known if (gpu := card.read()) is not None])
        return gpus if len(gpus) == len(self._known) else ()

    def _list_is_young(self, mono: float) -> bool:
        """Whether the list of cards is young enough."""
        return self._listed_at is not None and 0 <= mono - self._listed_at < _ENUMERATE_S

    def _list(self, mono: float) -> None:
        """Look for the cards."""
        cards = sysfs.cards(self._root, VENDOR_ID)
        if cards != self._cards:
            self._forget()
        bare = (self._named(index, card) for index, card in enumerate(cards))
        self._cards, self._bare = cards, dict(zip(cards, bare, strict=True))
        self._driver = sysfs.read_text(self._root / "sys/module/amdgpu/version")
        self._listed_at = mono

    def _each(self, detail: Detail) -> tuple[Gpu, ...]:
        holders = _kfd_holders(self._root) if detail >= Detail.PROCESSES else None
        scan = self._scan(detail)
        return _told_apart(
            tuple(
                self._gpu(card, detail, _with_graphics(card, holders, scan)) for card in self._cards
            )
        )

    def _know(self, gpus: tuple[Gpu, ...]) -> None:
        self._forget()
        if all(known_well(gpu) for gpu in gpus):
            pairs = zip(self._cards, gpus, strict=True)
            self._known = tuple(LightCard(card.device, gpu) for card, gpu in pairs)

    def _forget(self) -> None:
        for card in self._known:
            card.close()
        self._known = ()

    def _scan(self, detail: Detail) -> fdinfo.Scan | None:
        if detail < Detail.PROCESSES:
            return None
        return fdinfo.scan(self._root, self._clock.now().mono, ("amdgpu",))

    def _nothing(self) -> str:
        return "; ".join(
            part for part in ("the kernel shows no AMD GPU", self._library.problem) if part
        )

    def _named(self, index: int, card: sysfs.Card) -> Gpu:
        return Gpu(
            uuid=f"amd:{_identity(card)}",
            index=index,
            name=_name(self._root, card),
            vendor="amd",
            bus_id=card.bdf,
        )

    def _gpu(self, card: sysfs.Card, detail: Detail, holders: tuple[Holder, ...] | None) -> Gpu:
        gpu = self._bare[card]
        if card.asleep:
            return replace(
                gpu, health=Health.ASLEEP, health_text="suspended; a reading would wake it"
            )
        unified, reading = read_card(card, detail)
        known = reading.utilization is not None or reading.mem_used_bytes is not None
        return replace(
            gpu,
            health=Health.OK if known else Health.UNKNOWN,
            health_text=None if known else "the driver tells neither utilization nor memory",
            utilization=reading.utilization,
            mem_used_bytes=reading.mem_used_bytes,
            mem_total_bytes=reading.mem_total_bytes,
            mem_kind=MemoryKind.UNIFIED if unified else MemoryKind.DEDICATED,
            temperature_c=reading.temperature_c,
            power_w=reading.power_w,
            power_limit_w=reading.power_limit_w,
            sm_clock_mhz=reading.sm_clock_mhz,
            processes=self._processes(holders, unified),
        )

    def _processes(
        self, holders: tuple[Holder, ...] | None, unified: bool
    ) -> tuple[GpuProcess, ...] | None:
        if holders is None:
            return None
        visible = fdinfo.sees_all_processes(self._root)
        return tuple(self._process(holder, visible, unified) for holder in holders)

    def _process(self, holder: Holder, visible: bool, unified: bool) -> GpuProcess:
        # The driver counts in the namespace of the host: in a container that number is another.
        owner = self._owners.of(holder.pid) if visible else Owner()
        return GpuProcess(
            pid=holder.pid,
            user=owner.user,
            name=owner.name or holder.name,
            # KFD counts what lies in VRAM: beside a pool in system memory its 0 says nothing.
            mem_bytes=holder.mem_bytes or (None if unified else holder.mem_bytes),
            kind=holder.kind,
            started_at=owner.started_at,
            visible=visible,
        )

    def _filled(self, gpus: tuple[Gpu, ...], detail: Detail) -> tuple[Gpu, ...]:
        """``gpus`` with amdsmi's values where the files give none."""
        awake = [gpu for gpu in gpus if gpu.health is not Health.ASLEEP]
        lacking = any(_lacks(gpu, detail) for gpu in awake) or not gpus
        if not lacking or not self._library.present:
            return gpus
        if not gpus and not os.path.exists(self._root / "sys/module/amdgpu"):
            return gpus
        readings = self._library.read(detail)
        if not gpus:
            gpus = tuple(
                Gpu(
                    uuid=f"amd:{bdf}",
                    index=index,
                    name="AMD GPU",
                    vendor="amd",
                    bus_id=bdf,
                    health=Health.UNKNOWN,
                )
                for index, bdf in enumerate(sorted(readings))
            )
        return tuple(self._fill(gpu, readings.get(gpu.bus_id or ""), detail) for gpu in gpus)

    def _fill(self, gpu: Gpu, reading: Reading | None, detail: Detail) -> Gpu:
        if reading is None or gpu.health is Health.ASLEEP:
            return gpu
        filled = _merge(gpu, reading)
        if filled.processes is None and detail >= Detail.PROCESSES:
            filled = replace(filled, processes=self._processes(reading.holders, unified=False))
        known = filled.utilization is not None or filled.mem_used_bytes is not None
        return replace(filled, health=Health.OK, health_text=None) if known else filled


def read_card(card: sysfs.Card, detail: Detail) -> tuple[bool, Reading]:
    """Whether the card uses the machine's memory, and what its files say of it."""
    device = str(card.device)  # joined as text: a tenth of the price of paths
    vram = sysfs.read_count(f"{device}/mem_info_vram_total")
    gtt = sysfs.read_count(f"{device}/mem_info_gtt_total")
    unified = is_apu(
        sysfs.read_bytes(f"{device}/gpu_metrics"),
        sysfs.read_text(f"{device}/mem_info_vram_vendor"),
        vram,
        gtt,
    ) and (gtt or 0) > (vram or 0)
    pool = "gtt" if unified else "vram"
    reading = Reading(
        name=values.clean_text(sysfs.read_text(f"{device}/product_name")),
        utilization=values.ratio(sysfs.read_text(f"{device}/gpu_busy_percent")),
        mem_used_bytes=sysfs.read_count(f"{device}/mem_info_{pool}_used"),
        mem_total_bytes=(gtt if unified else vram) or None,
    )
    hwmon = card.hwmon() if detail >= Detail.FULL else None
    if detail < Detail.FULL:
        return unified, reading
    sensors = _sensors(hwmon) if hwmon is not None else Reading()
    clock = current_clock(sysfs.read_text(f"{device}/pp_dpm_sclk"))
    return unified, replace(
        reading,
        power_w=sensors.power_w,
        power_limit_w=sensors.power_limit_w,
        temperature_c=sensors.temperature_c,
        sm_clock_mhz=clock if clock is not None else sensors.sm_clock_mhz,
    )


def open_amd(settings: Settings, clock: Clock, root: Path = Path("/")) -> AmdBackend:
    """The AMD GPUs of this machine.

    Raises:
        BackendUnavailableError: the kernel shows none.
    """
    backend = AmdBackend(root, clock)
    if not sysfs.cards(root, VENDOR_ID):
        problem = backend.read(Detail.LOAD).problem
        if problem is not None:
            backend.close()
            raise BackendUnavailableError(problem)
    return backend


def _sensors(hwmon: Path) -> Reading:
    """Of the edge or, where there is no such sensor (Instinct), of the junction."""
    place = sysfs.labelled(hwmon, "temp", "input", "edge", "junction") or hwmon / "temp1_input"
    watts = (
        values.watts(sysfs.read_text(hwmon / name), 1e-6)
        for name in ("power1_average", "power1_input")
    )
    return Reading(
        power_w=next((found for found in watts if found is not None), None),
        power_limit_w=values.watts(sysfs.read_text(hwmon / "power1_cap"), 1e-6) or None,
        temperature_c=values.celsius(sysfs.read_text(place), 1e-3),
        sm_clock_mhz=values.megahertz(sysfs.read_text(hwmon / "freq1_input"), 1e-6),
    )


def _kfd_holders(root: Path) -> Mapping[str, tuple[Holder, ...]] | None:
    """ROCm processes by PCI address; None where there is no KFD to ask."""
    kfd = root / _KFD
    if not os.path.isdir(kfd / "proc"):
        return None
    found: dict[str, list[Holder]] = {}
    places: dict[str, str] = {}
    for node in sysfs.folder(kfd / "topology/nodes"):
        gpu_id = sysfs.read_count(node / "gpu_id")
        address = node_address(sysfs.read_text(node / "properties"))
        if gpu_id and address:
            places[f"vram_{gpu_id}"] = address
            found.setdefault(address, [])
    for process in sysfs.folder(kfd / "proc"):
        if process.name.isdigit():
            for address, memory in _kfd_memory(process, places).items():
                found[address].append(Holder(int(process.name), None, memory, "compute"))
    return {address: tuple(holders) for address, holders in found.items()}


def _kfd_memory(process: Path, places: Mapping[str, str]) -> dict[str, int | None]:
    """Bytes by address; KFD lists a process on every card: its zeros beside a use say nothing."""
    found: dict[str, int | None] = {}
    for name, address in places.items():
        if os.path.exists(process / name):
            found[address] = _plus(found.get(address), sysfs.read_count(process / name))
    if any(found.values()):
        found = {address: memory for address, memory in found.items() if memory != 0}
    return found


def _with_graphics(
    card: sysfs.Card, kfd: Mapping[str, tuple[Holder, ...]] | None, scan: fdinfo.Scan | None
) -> tuple[Holder, ...] | None:
    """The processes of a card from both lists; None where neither is known to be complete."""
    if scan is None or card.bdf is None:
        return None
    listed = None if kfd is None else kfd.get(card.bdf)
    if listed is None and not scan.complete:
        return None
    merged = {holder.pid: holder for holder in listed or ()}
    graphics: dict[int, int | None] = {}
    for client in scan.of(card.bdf):
        sizes = [client.vram_bytes, client.shared_bytes if not client.vram_bytes else None]
        size = next((item for item in sizes if item is not None), None)
        graphics[client.pid] = _plus(graphics.get(client.pid), size)
    for pid, size in graphics.items():
        known = merged.get(pid)
        memory = (
            size if known is None or known.mem_bytes is None else max(known.mem_bytes, size or 0)
        )
        merged[pid] = Holder(pid, None, memory, "graphics" if known is None else "compute")
    # A monitor that opens the card is listed with nothing: this process is no user of it.
    return tuple(item for item in merged.values() if item.mem_bytes or item.pid != os.getpid())


def _plus(left: int | None, right: int | None) -> int | None:
    return left if right is None else right + (left or 0)


def _lacks(gpu: Gpu, detail: Detail) -> bool:
    wanted: list[object] = [gpu.utilization, gpu.mem_used_bytes]
    if detail >= Detail.PROCESSES:
        wanted.append(gpu.processes)
    if detail >= Detail.FULL:
        wanted += [gpu.temperature_c, gpu.power_w]
    return any(value is None for value in wanted)


def _merge(gpu: Gpu, reading: Reading) -> Gpu:
    pool = gpu.mem_used_bytes is None and gpu.mem_total_bytes is None
    fields = ("utilization", "power_w", "power_limit_w", "temperature_c", "sm_clock_mhz")
    wanted = (*fields, *(("mem_used_bytes", "mem_total_bytes") if pool else ()))
    changes = {name: getattr(reading, name) for name in wanted if getattr(gpu, name) is None}
    named = gpu.name if reading.name is None or not gpu.name.startswith("AMD GPU") else reading.name
    return replace(gpu, name=named, **changes)


def _identity(card: sysfs.Card) -> str:
    unique = (sysfs.read_text(card.device / "unique_id") or "").lower()
    usable = unique.strip("0") and unique.isalnum()
    return unique if usable else card.bdf or f"card{card.number}"


def _told_apart(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Partitions of one card share its identity: their addresses tell them apart."""
    seen = [gpu.uuid for gpu in gpus]
    return tuple(
        gpu
        if seen.count(gpu.uuid) == 1
        else replace(gpu, uuid=f"{gpu.uuid}:{gpu.bus_id or gpu.index}")
        for gpu in gpus
    )


def _name(root: Path, card: sysfs.Card) -> str:
    told = values.clean_text(sysfs.read_text(card.device / "product_name"))
    listed = sysfs.pci_name(root, card.vendor_id, card.device_id)
    return told or listed or f"AMD GPU {card.device_id or ''}".strip()
