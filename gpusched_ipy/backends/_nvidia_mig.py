"""MIG instances out of what nvidia-smi says of them in two places. Pure.

``-q -x`` has the memory and the processes of each instance, ``-L`` its UUID and profile; what joins
them is the number of the instance on its card.
"""

from __future__ import annotations

from collections.abc import Callable

from gpusched_ipy.backends._nvidia_xml import ListedGpu, XmlGpu, XmlInstance, XmlProcess
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health

Name = Callable[[int, str | None, int | None, str | None], GpuProcess]


def instances(
    card: XmlGpu, index: int | None, listed: tuple[ListedGpu, ...], process: Name
) -> tuple[Gpu, ...]:
    """The instances of ``card``, each a GPU; without any the card itself, where nothing can run.

    Args:
        card: from ``-q -x``.
        index: its number for people.
        listed: all of ``-L``.
        process: makes a process of pid, kind, bytes and the name that nvidia-smi gave.
    """
    row = card.row
    known = next((item for item in listed if item.uuid == row.uuid), None)
    by_number = {item.index: item for item in card.instances}
    found = tuple(
        Gpu(
            uuid=item.uuid,
            index=index,
            name=f"{row.name or 'NVIDIA GPU'} MIG {item.profile}",
            vendor="nvidia",
            bus_id=row.bus_id,
            parent=row.uuid,
            instance=item.index,
            mem_used_bytes=by_number[item.index].mem_used_bytes,
            mem_total_bytes=by_number[item.index].mem_total_bytes,
            mem_reserved_bytes=by_number[item.index].mem_reserved_bytes,
            temperature_c=row.temperature_c,
            compute_mode=row.compute_mode,
            processes=_processes(card.processes, by_number[item.index], process),
        )
        for item in (known.instances if known else ())
        if item.index in by_number
    )
    return found or (_empty(card, index),)


def _processes(
    listed: tuple[XmlProcess, ...] | None, instance: XmlInstance, process: Name
) -> tuple[GpuProcess, ...] | None:
    if listed is None:
        return None
    return tuple(
        process(item.pid, item.kind, item.mem_bytes, item.name)
        for item in listed
        if (item.gi, item.ci) == (instance.gi, instance.ci)
    )


def _empty(card: XmlGpu, index: int | None) -> Gpu:
    row = card.row
    return Gpu(
        uuid=row.uuid or f"nvidia:{row.bus_id}",
        index=index,
        name=row.name or "NVIDIA GPU",
        vendor="nvidia",
        bus_id=row.bus_id,
        health=Health.UNKNOWN,
        health_text=(
            f"MIG is on and GPU {index} has no instance that this user can see; "
            "`nvidia-smi mig -cgi PROFILE -C` (as root) makes one"
        ),
    )
