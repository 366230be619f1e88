"""What ``nvidia-smi -q -x`` and ``nvidia-smi -L`` print, as values. Pure.

They are read where MIG is on: only there stand the memory, the processes and the UUIDs of
instances. A block that is missing is legal and unknown; only text that is no such document at all
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from xml.etree import ElementTree as ET

from gpusched_ipy.backends import _nvidia_text as cells
from gpusched_ipy.backends._nvidia_faults import classify
from gpusched_ipy.backends._values import celsius, megahertz, ratio, watts, whole
from gpusched_ipy.errors import BackendReadError

_LISTED_CARD = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[^)\s]+)\)")
_LISTED_INSTANCE = re.compile(r"\s+MIG (.+?)\s+Device\s+(\d+): \(UUID: (MIG-[^)\s]+)\)")
_BOM = "\ufeff"
_END = "</nvidia_smi_log>"
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class XmlProcess:
    """One process of a card; ``kind`` as nvidia-smi writes it: C, G, C+G, M+C."""

    pid: int
    kind: str | None = None
    name: str | None = None
    mem_bytes: int | None = None
    gi: int | None = None
    ci: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class XmlInstance:
    """One MIG instance of a card."""

    index: int | None = None  # as "Device N" of ``-L``
    gi: int | None = None
    ci: int | None = None
    mem_total_bytes: int | None = None
    mem_used_bytes: int | None = None
    mem_reserved_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class XmlGpu:
    """One card: its row, its processes (None: not said), its instances."""

    row: cells.Row
    processes: tuple[XmlProcess, ...] | None
    instances: tuple[XmlInstance, ...]


@dataclass(frozen=True, slots=True)
class XmlAnswer:
    """A whole document."""

    driver: str | None
    cuda: str | None
    attached: int | None
    gpus: tuple[XmlGpu, ...]


@dataclass(frozen=True, slots=True)
class ListedInstance:
    """An instance as ``-L`` lists it."""

    profile: str
    index: int
    uuid: str


@dataclass(frozen=True, slots=True)
class ListedGpu:
    """A card as ``-L`` lists it."""

    index: int
    name: str
    uuid: str
    instances: tuple[ListedInstance, ...]


def parse_xml(text: str) -> XmlAnswer:
    """A ``-q -x`` document.

    Raises:
        BackendReadError: it is not one, or it is cut off.
    """
    try:
        root = ET.fromstring(_document(text))
    except (ET.ParseError, ValueError) as exc:
        fault = classify(text)
        raise BackendReadError(
            fault.text if fault else f"nvidia-smi -q -x printed no XML document ({exc})"
        ) from exc
    if root.tag != "nvidia_smi_log":
        raise BackendReadError(f"nvidia-smi -q -x printed a document of {root.tag[:80]!r}")
    driver = _at(root, cells.words, "driver_version")
    found = root.findall("gpu")
    return XmlAnswer(
        driver=driver,
        cuda=_at(root, cells.words, "cuda_version"),
        attached=_at(root, whole, "attached_gpus"),
        gpus=tuple(_gpu(node, index, driver) for index, node in enumerate(found)),
    )


def _document(text: str) -> str:
    """``text`` without what is said after the document (a warning about a card's infoROM)."""
    end = text.rfind(_END)
    return text[: end + len(_END) if end >= 0 else None].lstrip(_BOM).strip()


def parse_list(text: str) -> tuple[ListedGpu, ...]:
    """The cards and instances of a ``-L`` answer; other lines are left out."""
    gpus: list[ListedGpu] = []
    for line in text.splitlines():
        if found := _LISTED_CARD.fullmatch(line.strip()):
            gpus.append(ListedGpu(int(found[1]), found[2], found[3], ()))
        elif gpus and (found := _LISTED_INSTANCE.fullmatch(line.rstrip())):
            card = gpus[-1]
            instance = ListedInstance(found[1], int(found[2]), found[3])
            gpus[-1] = ListedGpu(card.index, card.name, card.uuid, (*card.instances, instance))
    return tuple(gpus)


def _gpu(node: ET.Element, index: int, driver: str | None) -> XmlGpu:
    total = _at(node, cells.memory, "fb_memory_usage/total")
    said_total = _at(node, cells.bare, "fb_memory_usage/total")
    health, said = cells.health_of(leaf.text or "" for leaf in node.iter())
    row = cells.Row(
        index=index,
        uuid=_at(node, cells.uuid, "uuid"),
        bus_id=node.get("id") or _at(node, cells.words, "pci/pci_bus_id"),
        name=_at(node, cells.words, "product_name"),
        driver=driver,
        utilization=_at(node, ratio, "utilization/gpu_util"),
        mem_total_bytes=total or None,
        mem_used_bytes=_at(node, cells.memory, "fb_memory_usage/used") if total else None,
        mem_reserved_bytes=_at(node, cells.memory, "fb_memory_usage/reserved"),
        mem_free_bytes=_at(node, cells.memory, "fb_memory_usage/free") if total else None,
        mem_unsupported=total == 0 or said_total in ("n/a", "not supported"),
        temperature_c=_at(node, celsius, "temperature/gpu_temp"),
        power_w=_at(
            node,
            watts,
            "gpu_power_readings/instant_power_draw",
            "gpu_power_readings/power_draw",
            "gpu_power_readings/average_power_draw",
            "power_readings/power_draw",
        ),
        power_limit_w=_at(
            node,
            watts,
            "gpu_power_readings/current_power_limit",
            "power_readings/enforced_power_limit",
            "power_readings/power_limit",
        ),
        sm_clock_mhz=_at(node, megahertz, "clocks/sm_clock"),
        compute_mode=_at(node, cells.mode, "compute_mode"),
        mig=_at(node, cells.switch, "mig_mode/current_mig"),
        fan=_at(node, ratio, "fan_speed"),
        pstate=_at(node, cells.words, "performance_state"),
        health=health,
        health_text=said,
    )
    listed = node.find("processes")
    processes = None if listed is None else _processes(listed)
    instances = tuple(_instance(item) for item in node.iterfind("mig_devices/mig_device"))
    return XmlGpu(row, processes, instances)


def _processes(node: ET.Element) -> tuple[XmlProcess, ...] | None:
    """The processes; None where the block says that they cannot be had."""
    if cells.bare(node.text or "") in ("n/a", "not supported", "insufficient permissions"):
        return None
    found = (_process(item) for item in node.iterfind("process_info"))
    return tuple(item for item in found if item is not None)


def _process(node: ET.Element) -> XmlProcess | None:
    pid = _at(node, whole, "pid")
    if pid is None:
        return None
    return XmlProcess(
        pid=pid,
        kind=_at(node, cells.words, "type"),
        name=_at(node, cells.words, "process_name"),
        mem_bytes=_at(node, cells.process_memory, "used_memory"),
        gi=_at(node, whole, "gpu_instance_id"),
        ci=_at(node, whole, "compute_instance_id"),
    )


def _instance(node: ET.Element) -> XmlInstance:
    total = _at(node, cells.memory, "fb_memory_usage/total") or None
    return XmlInstance(
        index=_at(node, whole, "index"),
        gi=_at(node, whole, "gpu_instance_id"),
        ci=_at(node, whole, "compute_instance_id"),
        mem_total_bytes=total,
        mem_used_bytes=_at(node, cells.memory, "fb_memory_usage/used") if total else None,
        mem_reserved_bytes=_at(node, cells.memory, "fb_memory_usage/reserved"),
    )


def _at(node: ET.Element, parse: Callable[[str], Value | None], *paths: str) -> Value | None:
    """The first of these paths that has a value."""
    for path in paths:
        text = node.findtext(path)
        value = None if text is None else parse(text.strip())
        if value is not None:
            return value
    return None
