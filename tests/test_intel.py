"""Intel GPUs: a tree of kernel files of our own, and a stand-in xpu-smi on PATH."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusched_ipy.backends import Detail, intel
from gpusched_ipy.backends import _fdinfo as fdinfo
from gpusched_ipy.backends import _intel_text as text
from gpusched_ipy.config import Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, Health, MemoryKind

GIB = 1024**3
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MIB = 1024**2
ARC = "0000:03:00.0"


class HandClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.mono = 1000.0

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=1.7e9 + self.mono)


class Machine:
    """A tree of kernel files whose ``/proc`` is that of the host, seen by root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = HandClock()
        self.process(1)
        (root / "proc/self/ns").mkdir(parents=True)
        (root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
        self.write({"proc/meminfo": "MemTotal: 16384 kB\nMemFree: 1 kB\nMemAvailable: 4096 kB\n"})

    def write(self, files: dict[str, str | bytes]) -> None:
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def card(self, number: int = 0, bdf: str = ARC, **files: str) -> Path:
        device = f"sys/class/drm/card{number}/device"
        default = {
            "vendor": "0x8086\n",
            "device": "0x56a0\n",
            "uevent": f"DRIVER=xe\nPCI_SLOT_NAME={bdf}\n",
            "power/runtime_status": "active\n",
        }
        self.write({f"{device}/{name}": value for name, value in {**default, **files}.items()})
        return self.root / device

    def process(self, pid: int, *descriptors: str) -> None:
        for name in ("fd", "fdinfo"):
            (self.root / f"proc/{pid}/{name}").mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(descriptors):
            link = self.root / f"proc/{pid}/fd/{number}"
            if not link.is_symlink():
                link.symlink_to("/dev/dri/renderD128")
            self.write({f"proc/{pid}/fdinfo/{number}": content})

    def hide_others(self) -> None:
        """What a process without root sees: its own namespace, and not into the first process."""
        (self.root / "proc/1/fd").rmdir()

    def backend(self) -> intel.IntelBackend:
        return intel.open_intel(Settings(), self.clock, self.root)


def xe(
    client: int, busy: int, total: int, *, vram: str = "64 MiB", bdf: str = ARC, capacity: int = 1
) -> str:
    return (
        f"pos:\t0\ndrm-driver:\txe\ndrm-client-id:\t{client}\ndrm-pdev:\t{bdf}\n"
        f"drm-total-vram0:\t999 MiB\ndrm-resident-vram0:\t{vram}\ndrm-resident-gtt:\t192 KiB\n"
        f"drm-cycles-rcs:\t0\ndrm-total-cycles-rcs:\t{total}\n"
        f"drm-cycles-ccs:\t{busy}\ndrm-total-cycles-ccs:\t{total}\n"
        f"drm-engine-capacity-ccs:\t{capacity}\n"
    )


def i915(client: int, **engines: int) -> str:
    busy = "".join(f"drm-engine-{name}:\t{ns} ns\n" for name, ns in engines.items())
    return (
        f"drm-driver:\ti915\ndrm-client-id:\t{client}\ndrm-pdev:\t0000:00:02.0\n"
        f"drm-resident-system0:\t12 MiB\n{busy}"
    )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Machine(tmp_path / "root")


def only(backend: intel.IntelBackend, detail: Detail = Detail.FULL) -> Gpu:
    snapshot = backend.read(detail)
    assert snapshot.problem is None
    (gpu,) = snapshot.gpus
    return gpu


def test_the_engines_of_all_processes_are_the_utilization(machine: Machine) -> None:
    machine.card()
    machine.process(50, xe(1, 100, 1000), xe(1, 100, 1000))  # one client, two descriptors
    machine.process(60, xe(2, 0, 1000))
    backend = machine.backend()
    first = only(backend)
    assert (first.uuid, first.vendor, first.utilization) == (f"intel:{ARC}", "intel", None)
    machine.clock.mono += 2
    machine.process(50, xe(1, 700, 2000), xe(1, 700, 2000))
    machine.process(60, xe(2, 200, 2000))
    second = only(backend)
    assert second.utilization == pytest.approx(0.8)
    shares = {process.pid: process.utilization for process in second.processes or ()}
    assert shares == {50: pytest.approx(0.6), 60: pytest.approx(0.2)}
    assert {process.mem_bytes for process in second.processes or ()} == {64 * MIB}
    assert second.mem_used_bytes == 128 * MIB
    assert second.mem_kind is MemoryKind.DEDICATED
    assert second.mem_total_bytes is None  # xe does not tell it


def test_a_class_of_four_engines_is_full_when_all_four_are(machine: Machine) -> None:
    machine.card()
    machine.process(50, xe(1, 0, 1000, capacity=4))
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    machine.process(50, xe(1, 2000, 2000, capacity=4))
    assert only(backend).utilization == pytest.approx(0.5)


def test_i915_counts_in_nanoseconds_and_a_processors_graphics_share_memory(
    machine: Machine,
) -> None:
    machine.card(bdf="0000:00:02.0")
    machine.process(50, i915(3, render=10**9, copy=0))
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 4
    machine.process(50, i915(3, render=3 * 10**9, copy=5))
    gpu = only(backend, Detail.LOAD)
    assert gpu.utilization == pytest.approx(0.5)
    assert gpu.mem_kind is MemoryKind.UNIFIED
    assert (gpu.mem_total_bytes, gpu.mem_used_bytes) == (16 * MIB, 12 * MIB)
    assert [process.mem_bytes for process in only(backend).processes or ()] == [12 * MIB]


def test_nobody_is_known_only_when_all_could_be_seen(machine: Machine) -> None:
    machine.card()
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    assert only(backend).utilization == 0.0
    assert only(backend).processes == ()
    machine.hide_others()
    machine.clock.mono += 1
    gpu = only(backend)
    assert (gpu.utilization, gpu.processes, gpu.mem_used_bytes) == (None, None, None)


def test_hidden_processes_are_not_idleness(machine: Machine) -> None:
    machine.card()
    machine.process(50, xe(1, 0, 1000))
    machine.hide_others()
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    machine.process(50, xe(1, 0, 2000))
    assert only(backend).utilization is None


def test_one_process_that_cannot_be_looked_into_makes_the_list_unknown(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.card()
    machine.process(50, xe(1, 0, 1000))
    machine.process(60, xe(2, 0, 1000))
    listed = os.listdir

    def refuse(path: Any) -> list[str]:
        # Root is refused nothing by a file's mode, so the refusal of the kernel is played here.
        if str(path).endswith("/60/fd"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    machine.process(50, xe(1, 10, 2000))
    gpu = only(backend)
    assert (gpu.utilization, gpu.processes, gpu.mem_used_bytes) == (None, None, None)


def test_a_driver_that_counts_no_engine_time_is_not_idle(machine: Machine) -> None:
    machine.card(bdf="0000:00:02.0")
    machine.process(50, i915(3))
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    assert only(backend).utilization is None


def test_counters_that_run_back_and_new_clients(machine: Machine) -> None:
    machine.card()
    machine.process(50, xe(1, 500, 1000))
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    machine.process(50, xe(1, 400, 2000))
    assert only(backend).utilization is None
    machine.clock.mono += 1
    machine.process(60, xe(2, 7, 3000))  # its time before we saw it is not known
    assert only(backend).utilization is None


@pytest.mark.parametrize(
    "idle",
    [
        "sys/class/drm/card0/device/tile0/gt0/gtidle/idle_residency_ms",
        "sys/class/drm/card0/gt/gt0/rc6_residency_ms",
        "sys/class/drm/card0/power/rc6_residency_ms",
    ],
)
def test_without_root_the_time_out_of_the_idle_state_is_the_utilization(
    machine: Machine, idle: str
) -> None:
    machine.card()
    machine.hide_others()
    machine.write({idle: "5000\n"})
    backend = machine.backend()
    assert only(backend).utilization is None
    machine.clock.mono += 2
    machine.write({idle: "6500\n"})
    gpu = only(backend, Detail.LOAD)
    assert gpu.utilization == pytest.approx(0.25)
    assert gpu.utilization_window_s == 2
    machine.clock.mono += 0.01  # too short for a counter in ms: the last value stands
    machine.write({idle: "6500\n"})
    assert only(backend, Detail.LOAD).utilization == pytest.approx(0.25)
    machine.clock.mono += 1
    machine.write({idle: "N/A\n"})
    assert only(backend, Detail.LOAD).utilization is None


def test_the_busier_of_two_units_counts_and_an_unknown_one_hides_both(machine: Machine) -> None:
    machine.card()
    machine.hide_others()
    base = "sys/class/drm/card0/device/tile0"
    units = (f"{base}/gt0/gtidle/idle_residency_ms", f"{base}/gt1/gtidle/idle_residency_ms")
    machine.write(dict.fromkeys(units, "0\n"))
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 1
    machine.write({units[0]: "1000\n", units[1]: "100\n"})
    assert only(backend).utilization == pytest.approx(0.9)
    machine.clock.mono += 1
    machine.write({units[0]: "2000\n", units[1]: "garbage\n"})
    assert only(backend).utilization is None


def test_the_mean_of_a_long_pause_is_not_the_present(machine: Machine) -> None:
    machine.card()
    machine.process(50, xe(1, 0, 1000))
    idle = "sys/class/drm/card0/device/tile0/gt0/gtidle/idle_residency_ms"
    machine.write({idle: "0\n"})
    backend = machine.backend()
    only(backend)
    machine.clock.mono += 600
    machine.process(50, xe(1, 1, 600_000))
    machine.write({idle: "599000\n"})
    assert only(backend).utilization is None
    machine.clock.mono += 1
    machine.process(50, xe(1, 1001, 601_000))
    assert only(backend).utilization == pytest.approx(1.0)


def test_sensors(machine: Machine) -> None:
    machine.card(
        **{
            "hwmon/hwmon3/temp2_label": "pkg\n",
            "hwmon/hwmon3/temp2_input": "48000\n",
            "hwmon/hwmon3/temp3_label": "vram\n",
            "hwmon/hwmon3/temp3_input": "60000\n",
            "hwmon/hwmon3/energy1_label": "card\n",
            "hwmon/hwmon3/energy1_input": "1000000\n",
            "hwmon/hwmon3/power1_max": "190000000\n",
            "tile0/gt0/freq0/act_freq": "2400\n",
        }
    )
    machine.write({"sys/class/drm/card0/lmem_total_bytes": str(16 * GIB)})
    machine.write({"sys/class/drm/card0/lmem_avail_bytes": str(10 * GIB)})
    backend = machine.backend()
    assert only(backend).power_w is None  # energy becomes power between two readings
    machine.clock.mono += 2
    machine.write({"sys/class/drm/card0/device/hwmon/hwmon3/energy1_input": "61000000\n"})
    gpu = only(backend)
    assert (gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (48.0, 30.0, 190.0)
    assert gpu.sm_clock_mhz == 2400
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (6 * GIB, 16 * GIB)


def test_a_card_that_sleeps_is_not_touched(machine: Machine, tmp_path: Path) -> None:
    device = machine.card(**{"power/runtime_status": "suspended\n"})
    (device / "hwmon/hwmon1").mkdir(parents=True)
    os.mkfifo(device / "hwmon/hwmon1/temp1_input")  # opening it would hang for ever
    stand_in(tmp_path, ["x"])
    gpu = only(machine.backend())
    assert (gpu.health, gpu.utilization, gpu.processes) == (Health.ASLEEP, None, None)
    assert not (tmp_path / "calls").exists()


def test_no_intel_gpu(machine: Machine) -> None:
    with pytest.raises(BackendUnavailableError, match="no Intel GPU"):
        intel.open_intel(Settings(), SystemClock(), machine.root)
    device = machine.card()
    backend = machine.backend()
    (device / "vendor").unlink()
    assert backend.read().problem == "the kernel shows no Intel GPU"


HEADER = (
    "Timestamp, DeviceId, GPU Utilization (%), GPU Power (W), GPU Frequency (MHz), "
    "GPU Core Temperature (Celsius Degree), GPU Memory Utilization (%), GPU Memory Used (MiB)"
)


def stand_in(root: Path, lines: list[str], bdf: str = ARC, after: str = "exec sleep 600") -> None:
    """An xpu-smi that prints these lines and then goes on as ``after`` says."""
    listed = {"device_list": [{"device_id": 0, "device_name": "Arc", "pci_bdf_address": bdf}]}
    (root / "dump").write_text("".join(f"{line}\n" for line in lines))
    (root / "list").write_text(json.dumps(listed))
    (root / "one").write_text(json.dumps({"memory_physical_size_byte": str(16 * GIB)}))
    script = root / "bin/xpu-smi"
    script.write_text(
        f'#!/bin/sh\necho "xpu-smi $*" >> {root}/calls\necho $$ > {root}/pid\n'
        f'case "$*" in "discovery -j") cat {root}/list;; discovery*) cat {root}/one;;\n'
        f"*) cat {root}/dump; {after};; esac\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("the condition did not come true")


def test_xpu_smi_tells_what_is_hidden(machine: Machine, tmp_path: Path) -> None:
    machine.card()
    machine.hide_others()
    stand_in(tmp_path, [HEADER, "08:08:16.817,    0, 75.5, 120.5, 2400, 61.00, 50.00, 8192.00"])
    backend = machine.backend()
    try:
        gpu = wait_for(lambda: next((g for g in backend.read().gpus if g.power_w), None))
    finally:
        backend.close()
    assert (gpu.utilization, gpu.power_w, gpu.temperature_c) == (0.755, 120.5, 61.0)
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (8 * GIB, 16 * GIB)
    assert gpu.sm_clock_mhz == 2400
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split() for call in calls if "dump" in call] == [list(intel.DUMP_ARGV)]


def test_rows_of_another_card_are_not_taken(machine: Machine, tmp_path: Path) -> None:
    machine.card()
    machine.hide_others()
    row = "08:08:16.817, 0, 75.5, 120.5, 2400, 61.00, 50.00, 8192.00"
    stand_in(tmp_path, [HEADER, row], bdf="0000:99:00.0")
    asked = tmp_path / "calls"
    backend = machine.backend()
    try:
        wait_for(lambda: backend.read() and asked.exists() and "discovery -d" in asked.read_text())
        assert only(backend).utilization is None
    finally:
        backend.close()


def test_the_end_of_xpu_smi_is_told(machine: Machine, tmp_path: Path) -> None:
    machine.card()
    stand_in(tmp_path, [HEADER], after="echo 'Error: Level Zero init' >&2; exit 3")
    backend = machine.backend()
    told = wait_for(lambda: backend.read().gpus[0].health_text)
    assert told == "xpu-smi ended: Error: Level Zero init"
    backend.close()


def test_dump_by_the_names_of_its_columns() -> None:
    reader = text.DumpReader()
    assert reader(b"0, 1, 2") is None  # no header yet
    assert reader(b"Timestamp, Device ID, GPU Memory Used (GiB), GPU Power (mW)") is None
    rows = reader(b"08:00:00.000, 1, 2, 15000\r")
    assert rows == {1: text.Row(device=1, mem_used_bytes=2 * GIB, power_w=15.0)}
    assert reader(b"08:00:00.000, 0, N/A, N/A") == {**(rows or {}), 0: text.Row(device=0)}
    for _ in range(2):
        rows = reader(b"08:00:01.000, 0, N/A, N/A")
    assert rows == {0: text.Row(device=0)}  # card 1 has not been there for two rounds


@pytest.mark.parametrize("cell", ["0", "0.00", "N/A", "", "-", "n/a"])
def test_no_memory_used_is_no_permission(cell: str) -> None:
    reader = text.DumpReader()
    reader(b"DeviceId, GPU Memory Used (MiB)")
    assert reader.row(f"0, {cell}".encode()) == text.Row(device=0)


CELLS = st.one_of(
    st.text(max_size=8), st.sampled_from(["N/A", "12,5", "1e9", "-3", "101", "0", "nan", '"'])
)


@given(cells=st.lists(CELLS, min_size=0, max_size=9), header=st.lists(CELLS, max_size=4))
def test_any_dump(cells: list[str], header: list[str]) -> None:
    reader = text.DumpReader()
    reader(",".join(["DeviceId", "GPU Utilization (%)", "GPU Power (W)", *header]).encode())
    row = reader.row(",".join(["0", *cells]).encode())
    if row is None:
        return
    assert row.utilization is None or 0 <= row.utilization <= 1
    for value in (row.power_w, row.temperature_c, row.clock_mhz):
        assert value is None or value >= 0
    assert row.mem_used_bytes is None or row.mem_used_bytes > 0


@given(noise=st.binary(max_size=120))
def test_garbage_from_xpu_smi(noise: bytes) -> None:
    reader = text.DumpReader()
    reader(HEADER.encode())
    for line in noise.split(b"\n"):
        row = reader.row(line)
        assert row is None or row.utilization is None or 0 <= row.utilization <= 1
    assert all(item.bdf for item in text.parse_discovery(noise))
    size = text.parse_memory_size(noise)
    assert size is None or size > 0


def test_fdinfo_of_amdgpu_and_of_older_drivers() -> None:
    client = fdinfo.parse_fdinfo(
        "drm-driver:\tamdgpu\ndrm-pdev:\t0000:0C:00.0\ndrm-client-id:\t7\n"
        "drm-memory-vram:\t2048 KiB\ndrm-memory-gtt:\t1 MiB\ndrm-memory-cpu:\t9 MiB\n"
        "drm-engine-gfx:\t5 ns\n",
        12,
    )
    assert client is not None
    assert (client.pid, client.bdf, client.key) == (
        12,
        "0000:0c:00.0",
        ("amdgpu", "0000:0c:00.0", "7"),
    )
    assert (client.vram_bytes, client.shared_bytes) == (2 * MIB, MIB)
    assert client.busy_ns == {"gfx": 5}
    assert fdinfo.parse_fdinfo("pos:\t0\nflags:\t02\n", 12) is None


@given(cut=st.integers(min_value=0, max_value=len(xe(1, 50, 100))))
def test_fdinfo_cut_anywhere(cut: int) -> None:
    client = fdinfo.parse_fdinfo(xe(1, 50, 100)[:cut], 5)
    if client is not None:
        assert all(busy <= 100 for busy, _ in client.cycles.values())
        assert client.vram_bytes is None or client.vram_bytes <= 999 * MIB


@settings(max_examples=60, suppress_health_check=QUIET, deadline=None)
@given(
    lines=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "drm-cycles-ccs",
                    "drm-total-cycles-ccs",
                    "drm-engine-render",
                    "drm-resident-vram0",
                ]
            ),
            st.one_of(st.text(max_size=8), st.integers().map(str), st.just("5 ns")),
        ),
        max_size=6,
    )
)
def test_any_fdinfo(machine: Machine, lines: list[tuple[str, str]]) -> None:
    machine.card()
    identity = f"drm-driver: xe\ndrm-client-id: 1\ndrm-pdev: {ARC}\n"
    machine.process(50, identity + "".join(f"{key}: {value}\n" for key, value in lines))
    backend = machine.backend()
    backend.read()
    machine.clock.mono += 1
    gpu = only(backend)
    assert gpu.utilization is None or 0 <= gpu.utilization <= 1
    if not any(key in ("drm-cycles-ccs", "drm-engine-render") for key, _ in lines):
        assert gpu.utilization is None
    assert gpu.mem_used_bytes is None or gpu.mem_used_bytes >= 0


@settings(max_examples=40, suppress_health_check=QUIET, deadline=None)
@given(
    name=st.sampled_from(
        [
            "sys/class/drm/card0/device/uevent",
            "sys/class/drm/card0/device/hwmon/hwmon1/temp1_input",
            "sys/class/drm/card0/device/hwmon/hwmon1/energy1_input",
            "sys/class/drm/card0/device/tile0/gt0/gtidle/idle_residency_ms",
            "sys/class/drm/card0/device/tile0/gt0/freq0/act_freq",
            "sys/class/drm/card0/lmem_total_bytes",
            "sys/class/drm/card0/lmem_avail_bytes",
            "proc/meminfo",
        ]
    ),
    content=st.one_of(st.binary(max_size=30), st.integers().map(lambda value: str(value).encode())),
)
def test_any_content_of_any_file(machine: Machine, name: str, content: bytes) -> None:
    machine.card()
    machine.write({name: content})
    backend = machine.backend()
    backend.read()
    machine.clock.mono += 1
    gpu = only(backend)
    for value in (gpu.temperature_c, gpu.power_w, gpu.sm_clock_mhz, gpu.mem_used_bytes):
        assert value is None or value >= 0
    assert gpu.utilization is None or 0 <= gpu.utilization <= 1
    assert gpu.mem_total_bytes is None or gpu.mem_total_bytes > 0
    assert gpu.uuid.isprintable()
