"""nvidia-smi: its texts as values, and the backend on a stand-in command that a test can script."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_nvidia_smi import FakeSmi
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st

from gpusched_ipy.backends import Detail, _nvidia_loop
from gpusched_ipy.backends import _nvidia_text as text
from gpusched_ipy.backends._nvidia_faults import FaultKind, classify, unknown_text
from gpusched_ipy.backends._nvidia_pci import PciBus
from gpusched_ipy.backends._nvidia_processes import Identities
from gpusched_ipy.backends._nvidia_xml import parse_list, parse_xml
from gpusched_ipy.backends.nvidia_smi import NvidiaSmiBackend, open_nvidia_smi
from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.errors import BackendReadError, BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, Health, MemoryKind

MIB = 1 << 20
CARD = {
    "count": "1",
    "index": "0",
    "uuid": "GPU-a",
    "pci.bus_id": "00000000:0C:00.0",
    "name": "NVIDIA A100, 80GB",
    "driver_version": "580.82.07",
    "utilization.gpu": "97 %",
    "memory.total": "81920 MiB",
    "memory.used": "1024 MiB",
    "memory.reserved": "512 MiB",
    "temperature.gpu": "61",
    "power.draw": "250.50 W",
    "enforced.power.limit": "400.00 W",
    "clocks.current.sm": "1410 MHz",
    "clocks_event_reasons.active": "0x0000000000000040",
    "clocks_throttle_reasons.active": "0x0000000000000040",
    "compute_mode": "Exclusive_Process",
    "mig.mode.current": "Disabled",
}


@pytest.fixture
def smi(tmp_path: Path) -> FakeSmi:
    made = FakeSmi(tmp_path)
    made.set({"gpus": [CARD], "apps": []})
    return made


@pytest.fixture
def make(smi: FakeSmi, tmp_path: Path) -> Iterator[Callable[..., NvidiaSmiBackend]]:
    made: list[NvidiaSmiBackend] = []

    def build(*prefix: str, **options: Any) -> NvidiaSmiBackend:
        options = {
            "bus": PciBus(tmp_path / "no-pci", tmp_path / "no-proc"),
            "identities": Identities(host_pids=True),
            "interval_s": 0.02,
            **options,
        }
        made.append(NvidiaSmiBackend((*prefix, str(smi.path)), SystemClock(), **options))
        return made[-1]

    yield build
    for backend in made:
        backend.close()
    for pid, _ in smi.calls():
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), what="the stand-ins gone")


def only(backend: NvidiaSmiBackend, detail: Detail = Detail.FULL) -> Gpu:
    snapshot = backend.read(detail)
    assert snapshot.problem is None
    (gpu,) = snapshot.gpus
    return gpu


# ---- a reading


def test_a_full_reading_has_every_value(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    me = os.getpid()
    smi.change(
        apps=[
            {"gpu_uuid": "GPU-a", "pid": me, "used_gpu_memory": "700 MiB", "process_name": "a, b"},
            {"gpu_uuid": "GPU-other", "pid": 1, "used_gpu_memory": "1 MiB", "process_name": "x"},
        ]
    )
    backend = make()
    gpu = only(backend)
    assert (gpu.uuid, gpu.index, gpu.name, gpu.vendor) == ("GPU-a", 0, CARD["name"], "nvidia")
    assert (gpu.bus_id, gpu.utilization) == ("00000000:0C:00.0", 0.97)
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (1024 * MIB, 81920 * MIB)
    assert gpu.mem_reserved_bytes == 512 * MIB
    assert (gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (61, 250.5, 400)
    assert (gpu.sm_clock_mhz, gpu.throttled) == (1410, True)
    assert (gpu.compute_mode, gpu.mem_kind) == ("exclusive_process", MemoryKind.DEDICATED)
    assert gpu.processes is not None
    (mine,) = gpu.processes
    assert (mine.pid, mine.mem_bytes, mine.kind) == (me, 700 * MIB, "compute")
    assert mine.user
    assert mine.started_at is not None
    assert backend.read().driver == "580.82.07"


def test_a_light_reading_does_not_ask_for_power(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    backend = make()
    for _ in range(3):
        gpu = only(backend, Detail.LOAD)
        assert (gpu.power_w, gpu.temperature_c, gpu.processes) == (None, None, None)
    assert not any("power" in options for _, options in smi.calls())


def test_light_readings_come_from_one_looping_process(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    backend = make()
    _until_the_loop_speaks(backend)
    before = len(smi.calls())
    for percent in (10, 20, 30):
        smi.change(gpus=[{**CARD, "utilization.gpu": f"{percent} %"}])
        wait_until(lambda p=percent: only(backend, Detail.LOAD).utilization == p / 100)
    assert len(smi.calls()) == before
    assert sum("--loop-ms=20" in options for _, options in smi.calls()) == 1


def test_a_reading_with_processes_is_newer_than_its_call(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    backend = make(interval_s=3600)
    only(backend, Detail.LOAD)
    smi.change(gpus=[{**CARD, "utilization.gpu": "3 %"}])
    called = SystemClock().now().mono
    snapshot = backend.read(Detail.PROCESSES)
    assert snapshot.gpus[0].utilization == 0.03
    assert snapshot.taken_mono >= called


def test_rounds_of_several_cards_are_whole(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    def cards(percent: int) -> list[dict[str, str]]:
        return [
            {**CARD, "count": "3", "index": str(n), "uuid": f"GPU-{n}", "utilization.gpu": percent}
            for n in range(3)
        ]

    smi.change(gpus=cards(1))
    backend = make()
    for percent in (2, 3, 4):
        smi.change(gpus=cards(percent))
        while True:
            gpus = backend.read(Detail.LOAD).gpus
            assert [gpu.uuid for gpu in gpus] == ["GPU-0", "GPU-1", "GPU-2"]
            assert len({gpu.utilization for gpu in gpus}) == 1
            if gpus[0].utilization == percent / 100:
                break


def test_a_card_that_is_missing_is_a_problem(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(gpus=[{**CARD, "count": "2"}])
    snapshot = make().read(Detail.PROCESSES)
    assert "did not answer for 1" in (snapshot.problem or "")
    assert snapshot.gpus == ()


# ---- what it cannot say


@pytest.mark.parametrize(
    "cell",
    ["[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "ERR!", "", "-", "nan", "inf", "[ ]",
     "[Insufficient Permissions]", "[Requested functionality has been deprecated]", "12 parsecs"],
)  # fmt: skip
def test_a_cell_without_a_value_is_none(
    cell: str, smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    keep = ("count", "index", "uuid", "memory.total")
    smi.change(gpus=[{key: value if key in keep else cell for key, value in CARD.items()}])
    gpu = only(make())
    assert gpu.health is Health.OK
    for field in ("utilization", "mem_used_bytes", "temperature_c", "power_w", "throttled"):
        assert getattr(gpu, field) is None
    assert (gpu.compute_mode, gpu.bus_id) == (None, None)


@pytest.mark.parametrize("cell", ["[N/A]", "[Not Supported]", "0 MiB"])
def test_memory_that_is_not_supported_is_the_machines(
    cell: str, smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(gpus=[{**CARD, "memory.total": cell, "memory.used": cell}])
    gpu = only(make(), Detail.PROCESSES)
    assert gpu.mem_kind is MemoryKind.UNIFIED
    assert gpu.mem_total_bytes == psutil.virtual_memory().total
    remote = only(make("env"), Detail.PROCESSES)
    assert remote.mem_kind is MemoryKind.UNIFIED
    assert (remote.mem_used_bytes, remote.mem_total_bytes) == (None, None)


@pytest.mark.parametrize("cell", ["[Unknown Error]", "ERR!", "garbage"])
def test_no_other_text_makes_memory_unified(
    cell: str, smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(gpus=[{**CARD, "memory.total": cell}])
    gpu = only(make(), Detail.PROCESSES)
    assert (gpu.mem_kind, gpu.mem_total_bytes) == (MemoryKind.DEDICATED, None)
    # A driver that answers with errors is no place for a job; words that are not known are None.
    assert gpu.health is (Health.OK if cell == "garbage" else Health.UNKNOWN)


@pytest.mark.parametrize(
    ("cell", "health"),
    [("[GPU is lost]", Health.LOST), ("[GPU requires reset]", Health.RESET_REQUIRED)],
)
def test_a_lost_card_says_so_in_its_row(
    cell: str, health: Health, smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    keep = ("count", "index", "uuid", "name", "pci.bus_id")
    sick = {key: value if key in keep else cell for key, value in CARD.items()}
    smi.change(gpus=[{**sick, "count": "2"}, {**CARD, "count": "2", "uuid": "GPU-b", "index": "1"}])
    lost, well = make().read().gpus
    assert (lost.uuid, lost.health, lost.processes) == ("GPU-a", health, None)
    assert (lost.utilization, lost.mem_total_bytes) == (None, None)
    assert lost.mem_kind is MemoryKind.DEDICATED
    assert (well.health, well.utilization) == (Health.OK, 0.97)


def test_a_line_about_one_card_beside_the_rows_of_others(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    line = "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.\n"
    smi.change(gpus=[{**CARD, "count": "2"}], extra=line + "WARNING: infoROM is corrupted\n")
    well, lost = make().read(Detail.PROCESSES).gpus
    assert well.health is Health.OK
    assert (lost.bus_id, lost.health) == ("0000:02:00.0", Health.LOST)
    assert "GPU is lost" in (lost.health_text or "")


@pytest.mark.parametrize(
    ("raw", "status", "said"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570\n",
         18, "version mismatch"),
        ("Failed to initialize NVML: Unknown Error\n", 255, "restart the container"),
        ("Unable to determine the device handle for GPU0000:07:00.0: Unknown Error\n", 255,
         "dmesg"),
        ("Unable to determine the device handle for GPU 0000:03:00.0: GPU is\n lost.  Reboot", 15,
         "lost"),
        ("No devices were found\n", 6, "without its GPUs"),
        ("", 9, "not loaded"),
        ("", 0, "printed nothing"),
        ("ssh: connect to host x port 22: Connection refused\n", 255, "Connection refused"),
        ("\x1b[31mnonsense\x07\n", 1, "nonsense"),
        ("uuid, utilization.gpu [%]\n", 0, ""),
    ],
)  # fmt: skip
def test_every_text_in_place_of_data_is_a_problem(
    raw: str, status: int, said: str, smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(raw=raw, status=status)
    backend = make()
    for detail in (Detail.LOAD, Detail.PROCESSES, Detail.FULL):
        snapshot = backend.read(detail)
        assert snapshot.gpus == ()
        assert snapshot.problem
        assert said in snapshot.problem
        assert snapshot.problem.isprintable()
    smi.set({"gpus": [CARD], "apps": []})
    assert only(backend).utilization == 0.97


def test_fields_that_it_does_not_know_are_given_up(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(unknown=["memory.reserved", "clocks_event_reasons.active", "mig.mode.current"])
    backend = make()
    gpu = only(backend)
    assert (gpu.mem_reserved_bytes, gpu.throttled, gpu.power_w) == (None, True, 250.5)
    before = len(smi.calls())
    only(backend, Detail.FULL)
    assert len(smi.calls()) == before + 2


def test_a_refusal_that_names_no_field_leaves_the_least(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(unknown=["count"], refusal="That is not a valid field to query.\n")
    gpu = only(make())
    assert (gpu.utilization, gpu.power_w) == (0.97, None)


# ---- processes


def test_an_unknown_list_is_none_and_an_empty_one_is_empty(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    assert only(make(), Detail.PROCESSES).processes == ()
    container = make(identities=Identities(host_pids=False))
    assert only(container, Detail.PROCESSES).processes is None
    smi.change(unknown=["process_name"])
    assert only(make(), Detail.PROCESSES).processes is None


def test_each_reading_asks_anew_who_a_process_is(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    app = {"gpu_uuid": "GPU-a", "pid": child.pid, "used_gpu_memory": "1 MiB", "process_name": "x"}
    smi.change(apps=[app])
    backend, users = make(), []
    for _ in range(2):
        (listed,) = only(backend, Detail.PROCESSES).processes or ()
        users.append(listed.user)
        child.communicate()
    assert users[0]
    assert users[1] is None, "it has ended, and its pid may be another's"


def test_pids_of_another_machine_are_not_looked_up(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    app = {"gpu_uuid": "GPU-a", "pid": os.getpid(), "used_gpu_memory": "[N/A]"}
    smi.change(apps=[{**app, "process_name": "/usr/bin/python"}])
    remote = only(make("env"), Detail.PROCESSES)
    assert remote.processes is not None
    (listed,) = remote.processes
    assert (listed.visible, listed.user, listed.started_at) == (False, None, None)
    assert (listed.name, listed.mem_bytes) == ("/usr/bin/python", None)
    contained = only(make(identities=Identities(host_pids=False)), Detail.PROCESSES)
    assert contained.processes is not None
    assert (contained.processes[0].visible, contained.processes[0].name) == (False, None)


# ---- MIG

XML = """<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>580</driver_version><gpu id="00000000:0C:00.0">
<product_name>NVIDIA H100</product_name><uuid>GPU-a</uuid>
<mig_mode><current_mig>Enabled</current_mig></mig_mode>
<mig_devices>{devices}</mig_devices>
<fb_memory_usage><total>81920 MiB</total><used>900 MiB</used></fb_memory_usage>
<utilization><gpu_util>N/A</gpu_util></utilization>
<temperature><gpu_temp>44 C</gpu_temp></temperature>
<processes><process_info><gpu_instance_id>3</gpu_instance_id>
<compute_instance_id>0</compute_instance_id><pid>4000001</pid><type>C</type>
<process_name>python</process_name><used_memory>70 MiB</used_memory></process_info></processes>
</gpu></nvidia_smi_log>
"""
DEVICES = "".join(
    f"<mig_device><index>{index}</index><gpu_instance_id>{3 + index}</gpu_instance_id>"
    "<compute_instance_id>0</compute_instance_id>"
    f"<fb_memory_usage><total>20480 MiB</total><used>{12 + index} MiB</used></fb_memory_usage>"
    "</mig_device>"
    for index in range(2)
)
LIST = """GPU 0: NVIDIA H100 (UUID: GPU-a)
  MIG 2g.20gb     Device  0: (UUID: MIG-one)
  MIG 2g.20gb     Device  1: (UUID: MIG-two)
"""


@pytest.mark.parametrize("detail", list(Detail))
def test_mig_instances_are_the_gpus(
    detail: Detail, smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    card = {**CARD, "mig.mode.current": "Enabled", "utilization.gpu": "[N/A]"}
    smi.change(gpus=[card], xml=XML.format(devices=DEVICES), list=LIST)
    one, two = make().read(detail).gpus
    assert (one.uuid, one.parent, one.name) == ("MIG-one", "GPU-a", "NVIDIA H100 MIG 2g.20gb")
    assert (one.mem_used_bytes, one.mem_total_bytes) == (12 * MIB, 20480 * MIB)
    assert (one.utilization, one.power_w, one.temperature_c) == (None, None, 44)
    assert one.processes is not None
    assert [item.pid for item in one.processes] == [4000001]
    assert (two.uuid, two.mem_used_bytes, two.processes) == ("MIG-two", 13 * MIB, ())
    assert (one.number, two.number) == ("0:0", "0:1"), "their names are the same"


def test_mig_without_an_instance_is_no_place_for_a_job(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(gpus=[{**CARD, "mig.mode.current": "Enabled"}], xml=XML.format(devices="None"))
    gpu = only(make(), Detail.LOAD)
    assert (gpu.uuid, gpu.health) == ("GPU-a", Health.UNKNOWN)
    assert "no instance" in (gpu.health_text or "")


def test_mig_whose_details_cannot_be_read_is_a_problem(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(gpus=[{**CARD, "mig.mode.current": "Enabled"}], xml="<nvidia_smi_log><gpu>")
    snapshot = make().read(Detail.LOAD)
    assert snapshot.gpus == ()
    assert "XML" in (snapshot.problem or "")


# ---- a command that hangs or dies


def test_an_answer_that_does_not_come_is_a_problem_and_leaves_no_process(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    smi.change(hang=True)
    backend = make(timeout_s=1.0)
    snapshot = backend.read(Detail.PROCESSES)
    assert "no answer within 1 s" in (snapshot.problem or "")
    # The next attempt waits: hung processes must not pile up.
    before = len(smi.calls())
    assert backend.read(Detail.LOAD).problem == snapshot.problem
    assert len(smi.calls()) == before
    for pid, _ in smi.calls():
        wait_until(lambda pid=pid: not _group_lives(pid), what="the whole group gone")


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _until_the_loop_speaks(backend: NvidiaSmiBackend) -> None:
    only(backend, Detail.LOAD)
    wait_until(
        lambda: backend._loop is not None and backend._loop.newest() is not None,
        what="a first round",
    )


def test_a_loop_that_dies_is_a_problem_and_is_started_again(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    backend = make()
    _until_the_loop_speaks(backend)
    smi.change(raw="Failed to initialize NVML: Driver/library version mismatch\n", status=18)
    seen: list[str | None] = []

    def noticed() -> bool:
        seen.append(backend.read(Detail.LOAD).problem)
        return seen[-1] is not None

    wait_until(noticed, what="the death of the loop noticed")
    assert "version mismatch" in (seen[-1] or "")
    smi.set({"gpus": [CARD], "apps": []})
    assert only(backend, Detail.LOAD).utilization == 0.97  # one answer, until there is a loop
    wait_until(
        lambda: (
            only(backend, Detail.LOAD).utilization == 0.97
            and sum("--loop-ms" in options for _, options in smi.calls()) == 2
        ),
        what="a second loop",
    )


def test_a_loop_that_hangs_is_a_problem(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nvidia_loop, "_LEAST_SILENCE_S", 0.5)
    backend = make()
    _until_the_loop_speaks(backend)
    smi.change(hang=True)
    snapshots = []

    def noticed() -> bool:
        snapshots.append(backend.read(Detail.LOAD))
        return snapshots[-1].problem is not None

    wait_until(noticed, what="the hang noticed")
    assert "printed nothing for" in (snapshots[-1].problem or "")
    assert snapshots[-1].gpus == ()


def test_close_ends_the_loop_and_a_later_reading_starts_another(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    backend = make()
    only(backend, Detail.LOAD)
    wait_until(lambda: any("--loop-ms" in options for _, options in smi.calls()))
    (looping,) = [pid for pid, options in smi.calls() if "--loop-ms" in options]
    backend.close()
    wait_until(lambda: not psutil.pid_exists(looping), what="the loop gone")
    assert only(backend, Detail.LOAD).utilization == 0.97


def test_the_loop_is_no_child_of_our_session(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]
) -> None:
    """Ctrl-C in a notebook's terminal is not meant for it."""
    backend = make()
    only(backend, Detail.LOAD)
    wait_until(lambda: any("--loop-ms" in options for _, options in smi.calls()))
    (looping,) = [pid for pid, options in smi.calls() if "--loop-ms" in options]
    assert os.getsid(looping) == looping != os.getsid(0)


def test_no_thread_stays_behind(smi: FakeSmi, make: Callable[..., NvidiaSmiBackend]) -> None:
    backend = make()
    backend.read(Detail.LOAD)
    backend.read(Detail.FULL)
    backend.close()
    wait_until(
        lambda: not any(item.name.startswith("gpusched-") for item in threading.enumerate()),
        what="the threads gone",
    )


def test_a_sleeping_card_is_never_touched(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend], tmp_path: Path
) -> None:
    folder = tmp_path / "pci" / "0000:01:00.0"
    (folder / "power").mkdir(parents=True)
    (folder / "vendor").write_text("0x10de\n")
    (folder / "class").write_text("0x030200\n")
    (folder / "power" / "runtime_status").write_text("suspended\n")
    gpu = only(make(bus=PciBus(tmp_path / "pci", tmp_path / "no-proc")))
    assert (gpu.uuid, gpu.health) == ("nvidia:0000:01:00.0", Health.ASLEEP)
    assert smi.calls() == []


# ---- opening


def test_without_the_command_it_is_not_available(tmp_path: Path) -> None:
    settings = Settings(nvidia_smi=(str(tmp_path / "nvidia-smi-none"),))
    with pytest.raises(BackendUnavailableError, match="no command"):
        open_nvidia_smi(settings, SystemClock())


@pytest.mark.parametrize(
    "raw",
    [
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure\n",
        "Failed to initialize NVML: Driver Not Loaded\n",
        "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.\n",
    ],
)
def test_without_a_driver_it_is_not_available(raw: str, smi: FakeSmi) -> None:
    smi.change(raw=raw, status=9)
    with pytest.raises(BackendUnavailableError, match="driver"):
        open_nvidia_smi(Settings(nvidia_smi=(str(smi.path),)), SystemClock())


@pytest.mark.parametrize(
    "raw", ["Failed to initialize NVML: Unknown Error\n", "No devices were found\n"]
)
def test_a_driver_that_is_not_well_is_opened_and_reports_it(raw: str, smi: FakeSmi) -> None:
    smi.change(raw=raw, status=255)
    backend = open_nvidia_smi(Settings(nvidia_smi=(str(smi.path),)), SystemClock())
    assert backend.read(Detail.LOAD).problem
    backend.close()


# ---- the texts, whatever they are

CELLS = st.one_of(
    st.sampled_from(
        ["[N/A]", "97 %", "11125 MiB", "12,5 W", "1.234,5 MiB", "-3 %", "101 %", "ERR!"]
    ),
    st.text(max_size=20),
    st.floats(allow_nan=True).map(str),
    st.integers().map(lambda n: f"{n} MiB"),
)
HEADER = (
    "index, uuid, name, utilization.gpu [%], memory.total [MiB], memory.used [MiB], power.draw [W]"
)


@given(st.text())
def test_garbage_gives_no_gpu_and_no_exception(noise: str) -> None:
    answer = text.parse_query(noise)
    assert all(row.utilization is None or 0 <= row.utilization <= 1 for row in answer.rows)
    assert unknown_text(noise).text
    text.parse_apps(noise)
    parse_list(noise)
    with pytest.raises(BackendReadError, match="nvidia-smi"):
        parse_xml(noise)


@given(st.lists(CELLS, min_size=7, max_size=7))
def test_any_cell_becomes_a_value_or_none(cells: list[str]) -> None:
    line = ", ".join(cells).replace("\n", " ").replace("\r", " ")
    for row in text.parse_query(f"{HEADER}\n{line}\n").rows:
        assert row.utilization is None or 0 <= row.utilization <= 1
        assert row.mem_total_bytes is None or 0 < row.mem_total_bytes <= 1 << 60
        assert row.mem_used_bytes is None or row.mem_used_bytes >= 0
        assert row.power_w is None or row.power_w >= 0


@given(st.sets(st.sampled_from(sorted(CARD)), min_size=1), st.randoms(use_true_random=False))
def test_any_columns_in_any_order(kept: set[str], random: Any) -> None:
    names = sorted(kept)
    random.shuffle(names)
    (row,) = text.parse_query(
        ", ".join(names) + "\n" + ", ".join(CARD[name] for name in names) + "\n"
    ).rows
    assert row.utilization == (0.97 if "utilization.gpu" in kept else None)
    assert row.mem_used_bytes == (1024 * MIB if "memory.used" in kept else None)
    assert row.name == (CARD["name"] if "name" in kept else None)
    assert row.power_w == (250.5 if "power.draw" in kept else None)


@given(st.integers(0, 400))
def test_a_cut_answer_has_no_value_that_was_not_there(end: int) -> None:
    whole_text = f"{HEADER}\n0, GPU-a, A100, 97 %, 81920 MiB, 11125 MiB, 250.50 W\n"
    full = text.parse_query(whole_text).rows
    assert text.parse_query(whole_text[:end]).rows in ((), full)
    apps = "pid, process_name, used_gpu_memory [MiB]\n812, a, b, 300 MiB\n"
    header_ends = apps.index("\n") + 1
    assert text.parse_apps(apps[:end]) in (
        (text.parse_apps(apps), ()) if end >= header_ends else (None,)
    )


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("8192 MiB", 8192 * MIB),
        ("8192", 8192 * MIB),
        ("8 GiB", 8192 * MIB),
        ("8388608 KiB", 8192 * MIB),
        ("8192,0 MiB", 8192 * MIB),
        ("8,192 MiB", None),
        ("8192 furlongs", None),
        ("-1 MiB", None),
        ("1.7e302 MiB", None),
        ("99999999999999999999 MiB", None),
    ],
)
def test_memory_in_any_unit_and_locale(cell: str, expected: int | None) -> None:
    row = text.parse_query(f"uuid, memory.total [MiB]\nGPU-a, {cell}\n").rows[0]
    assert row.mem_total_bytes == expected


def test_without_blanks_nothing_is_guessed() -> None:
    fields = ("index", "name", "power.draw")
    (row,) = text.parse_query("0,A100,250.5\n", fields).rows
    assert (row.index, row.name, row.power_w) == (0, "A100", 250.5)
    assert text.parse_query("0,A100,250,5\n", fields).rows == ()


def test_messages_that_are_broken_over_two_lines() -> None:
    broken = "Unable to determine the device handle for GPU 0000:03:00.0: GPU is\n lost.  Reboot\n"
    (fault,) = text.parse_query(broken).faults
    assert (fault.kind, fault.bus_id) == (FaultKind.GPU_LOST, "0000:03:00.0")
    assert classify("a row, 12 %") is None


def test_an_xml_bomb_is_refused_and_small() -> None:
    bomb = '<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
    )
    with pytest.raises(BackendReadError):
        parse_xml(f"{bomb}]><nvidia_smi_log>&j;</nvidia_smi_log>")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of a child in /proc")
def test_the_command_runs_in_a_neutral_locale(
    smi: FakeSmi, make: Callable[..., NvidiaSmiBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    backend = make()
    only(backend, Detail.LOAD)
    wait_until(lambda: any("--loop-ms" in options for _, options in smi.calls()))
    (looping,) = [pid for pid, options in smi.calls() if "--loop-ms" in options]
    assert psutil.Process(looping).environ()["LC_ALL"] == "C"
