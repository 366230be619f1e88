"""The queue on a real NVIDIA GPU: what is read, what is waited for, what never overlaps."""

from __future__ import annotations

import os
import shutil
import time
import timeit
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
from helpers import wait_until

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends.nvidia_smi import NvidiaSmiBackend
from gpusched_ipy.backends.nvml import NvmlBackend
from gpusched_ipy.policy.fit import TOLERATED_SHARE
from gpusched_ipy.snapshot import Gpu, Snapshot

pytestmark = pytest.mark.gpu

MIB = 1 << 20
GIB = 1 << 30
BESIDE_PATH = ("/usr/local/nvidia/bin", "/usr/lib/wsl/lib", "/opt/bin")
Figure = Callable[[str, str], None]
Run = Callable[..., Any]


# Processes are compared where they are made to be there; the rest is filled in by others.
FIELDS = [
    item
    for item in fields(Gpu)
    if item.name not in ("processes", "throttled", "health_text", "quiet_s", "quiet_samples")
]


def nvidia_smi() -> str:
    """The command, where images put it beside PATH too; skips where there is none."""
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), *BESIDE_PATH))
    found = shutil.which("nvidia-smi", path=places)
    if found is None:
        pytest.skip("nvidia-smi is not installed")
    return found


def used(backend: NvmlBackend, uuid: str) -> int:
    gpu = backend.read(Detail.LOAD).gpu(uuid)
    assert gpu is not None
    assert gpu.mem_used_bytes is not None
    return gpu.mem_used_bytes


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def near(first: float | None, second: float | None, allowed: float) -> bool:
    """Both unknown, or both known and not far apart."""
    if first is None or second is None:
        return first is second
    return abs(first - second) <= allowed


def differences(by_nvml: Snapshot, by_smi: Snapshot) -> list[str]:
    """What the two ways of reading do not agree on; values that move may move a little."""
    allowed = {
        "utilization": 0.25,
        "mem_used_bytes": 64 * MIB,
        "mem_total_bytes": MIB,
        "mem_reserved_bytes": 2 * MIB,
        "temperature_c": 4,
        "power_w": 60,
        "power_limit_w": 1,
        "sm_clock_mhz": 1800,  # from asleep to full speed
    }
    found = []
    for one in by_nvml.gpus:
        other = by_smi.gpu(one.uuid)
        if other is None:
            found.append(f"{one.uuid} is missing")
            continue
        pairs = {item.name: (getattr(one, item.name), getattr(other, item.name)) for item in FIELDS}
        found += [
            f"{name}: {values[0]} and {values[1]}"
            for name, values in pairs.items()
            if not (near(*values, allowed[name]) if name in allowed else values[0] == values[1])
        ]
    return found


def test_nvml_and_nvidia_smi_agree_field_by_field(nvml: NvmlBackend, figure: Figure) -> None:
    smi = NvidiaSmiBackend((nvidia_smi(),))
    # Clocks and power follow the questions themselves: the best of a few rounds counts.
    rounds = [differences(nvml.read(), smi.read()) for _ in range(5)]
    smi.close()
    figure("NVML and nvidia-smi", f"{min(map(len, rounds))} fields differ")
    assert [] in rounds, rounds


def test_what_a_reading_costs(nvml: NvmlBackend, figure: Figure) -> None:
    gpus = len(nvml.read().gpus)
    for detail, limit in ((Detail.LOAD, 0.05), (Detail.PROCESSES, 0.5), (Detail.FULL, 1.0)):
        times = timeit.repeat(lambda d=detail: nvml.read(d), number=1, repeat=50)
        middle = sorted(times)[25]
        figure(f"a reading ({detail.name}), {gpus} GPU", f"{middle * 1e6:.0f} us median of 50")
        assert middle < limit


def test_nvidia_smi_as_the_only_source(card: Gpu, figure: Figure) -> None:
    smi = NvidiaSmiBackend((nvidia_smi(),), interval_s=0.5)
    began = time.monotonic()
    assert smi.read(Detail.PROCESSES).problem is None
    figure("nvidia-smi, one answer with processes", f"{time.monotonic() - began:.3f} s")
    stamps = set()

    def rounds() -> bool:
        snapshot = smi.read(Detail.LOAD)
        assert snapshot.problem is None
        assert snapshot.gpu(card.uuid) is not None
        stamps.add(snapshot.taken_mono)
        return smi._loop is not None and len(stamps) > 4

    wait_until(rounds, timeout=30, what="rounds of the loop")
    smi.close()


def test_a_memory_hog_is_seen_waited_for_and_its_end_acted_on(
    nvml: NvmlBackend, card: Gpu, work: Run, stranger: Run, submit: Run, show: Run, figure: Figure
) -> None:
    before = used(nvml, card.uuid)
    # Far more than the share of a card that a stranger may hold beside an exclusive job.
    mib = max(4096, int(2 * TOLERATED_SHARE * (card.mem_total_bytes or 0)) // MIB)
    hog, process = stranger(card.uuid, mib=mib, idle=600)
    hog.ready()
    assert used(nvml, card.uuid) - before > 0.95 * mib * MIB
    listed = nvml.read(Detail.PROCESSES).gpu(card.uuid)
    assert listed is not None
    if listed.processes is not None and any(item.visible for item in listed.processes):
        assert process.pid in {item.pid for item in listed.processes}
    job = submit(card.uuid, made := work())
    wait_until(lambda: show(job)["reason"], timeout=20, what="a reason for waiting")
    time.sleep(4)  # longer than the quiet window: that nothing starts is the point
    waiting = show(job)
    assert waiting["state"] == "pending"
    figure("the reason while a memory hog is there", waiting["reason"])
    process.kill()
    process.wait()
    gone = time.time()
    made.ready()
    done = wait_until(lambda: show(job)["ended_at"] and show(job), timeout=60, what="the job's end")
    assert done["state"] == "completed"
    figure("stranger gone to job started", f"{seconds(done['started_at']) - gone:.2f} s")


def test_a_busy_loop_is_seen_waited_for_and_its_end_acted_on(
    nvml: NvmlBackend, card: Gpu, work: Run, stranger: Run, submit: Run, show: Run, figure: Figure
) -> None:
    busy, process = stranger(card.uuid, mib=0, busy=600)
    seen_from = busy.ready()["ready"]

    def utilization() -> float:
        gpu = nvml.read(Detail.LOAD).gpu(card.uuid)
        return (gpu.utilization if gpu is not None else None) or 0.0

    wait_until(lambda: utilization() > 0.5, timeout=20, what="the work seen")
    figure("busy loop begun to utilization seen", f"{time.time() - seen_from:.2f} s")
    job = submit(card.uuid, made := work())
    wait_until(lambda: show(job)["reason"], timeout=20, what="a reason for waiting")
    time.sleep(4)  # longer than the quiet window: that nothing starts is the point
    assert show(job)["state"] == "pending"
    process.kill()
    process.wait()
    gone = time.time()
    figure("busy loop gone to context of the job", f"{made.ready()['ready'] - gone:.2f} s")


def test_two_jobs_never_overlap(
    nvml: NvmlBackend, card: Gpu, work: Run, submit: Run, gpusched: Run, figure: Figure
) -> None:
    first, second = work(mib=512, busy=3), work(mib=512, busy=3)
    before = {item.pid for item in card.processes or ()}
    jobs = [submit(card.uuid, made) for made in (first, second)]
    most, listed = 0, False
    while second.seen() is None or "ended" not in second.seen():
        gpu = nvml.read(Detail.PROCESSES).gpu(card.uuid)
        assert gpu is not None
        listed = listed or gpu.processes is not None
        most = max(most, len({item.pid for item in gpu.processes or ()} - before))
        time.sleep(0.02)
    gpusched("wait", *jobs)
    earlier, later = sorted((first.ended(), second.ended()), key=lambda seen: seen["started"])
    told = str(most) if listed else "the driver tells no process here"
    figure("two jobs: processes on the card at once", told)
    figure(
        "hand-off: end of one to start of the next", f"{later['started'] - earlier['ended']:.3f} s"
    )
    assert later["started"] >= earlier["ended"]
    assert most <= 1


def test_the_job_reaches_the_card_it_was_given(
    nvml: NvmlBackend, card: Gpu, work: Run, submit: Run, show: Run, gpusched: Run
) -> None:
    cards = [gpu for gpu in nvml.read().gpus if gpu.parent is None]
    for gpu in [gpu for gpu in cards if (gpu.utilization or 0) <= 0.1]:
        made = work()
        job = submit(gpu.uuid, made)
        gpusched("wait", job)
        seen, record = made.ended(), show(job)
        assert record["gpus"] == [gpu.uuid]
        assert (seen["visible"], seen["order"]) == (gpu.uuid, "PCI_BUS_ID")
        assert seen["uuid"] == gpu.uuid


def test_memory_is_free_again_at_the_end_of_a_job(
    nvml: NvmlBackend, card: Gpu, work: Run, submit: Run, show: Run, gpusched: Run, figure: Figure
) -> None:
    before = used(nvml, card.uuid)
    made = work(mib=4096, busy=2)
    job = submit(card.uuid, made)
    made.ready()
    assert used(nvml, card.uuid) - before > 4000 * MIB
    gpusched("wait", job)
    ended = time.time()
    wait_until(
        lambda: used(nvml, card.uuid) - before < 64 * MIB, timeout=20, what="the memory free again"
    )
    figure("end of the job to memory free", f"{time.time() - ended:.2f} s")
    usage = show(job)["usage"]
    if usage is not None and usage.get("peak_mem_bytes") is not None:
        figure("peak memory in the record", f"{usage['peak_mem_bytes'] / GIB:.2f} GiB")
        assert usage["peak_mem_bytes"] > 4000 * MIB


def test_the_hand_off_with_the_start_of_cuda(
    card: Gpu, engine: str, work: Run, submit: Run, gpusched: Run, figure: Figure
) -> None:
    chain = [work(busy=1, **{"with": engine}) for _ in range(3)]
    jobs = [submit(card.uuid, made) for made in chain]
    gpusched("wait", *jobs, timeout=110)
    runs = sorted((made.ended() for made in chain), key=lambda seen: seen["started"])
    assert all(later["started"] >= earlier["ended"] for earlier, later in pairwise(runs))
    gaps = [later["ready"] - earlier["ended"] for earlier, later in pairwise(runs)]
    starts = [seen["ready"] - seen["started"] for seen in runs]
    figure(f"end of work to context of the next ({engine})", f"{min(gaps):.2f} s")
    figure(f"start-up of a job's CUDA ({engine})", f"{min(starts):.2f} s")


def test_the_command_line_shows_the_card(card: Gpu, gpusched: Run) -> None:
    assert card.name in gpusched("gpus")
