"""AMD GPUs: a tree of kernel files of our own, and a stand-in amdsmi module."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusched_ipy.backends import Detail, amd, detect
from gpusched_ipy.backends import _amd_text as text
from gpusched_ipy.config import Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, Health, MemoryKind

GIB = 1024**3
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
MIB = 1024**2


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def card(root: Path, number: int = 0, bdf: str = "0000:03:00.0", **files: str | bytes) -> Path:
    """A discrete card; ``files`` replace or add files of its device folder."""
    device = f"sys/class/drm/card{number}/device"
    default: dict[str, str | bytes] = {
        "vendor": "0x1002\n",
        "device": "0x744c\n",
        "uevent": f"DRIVER=amdgpu\nPCI_SLOT_NAME={bdf}\n",
        "unique_id": f"abcdef012345678{number}\n",
        "product_name": "\n",
        "gpu_busy_percent": "37\n",
        "mem_info_vram_total": f"{24 * GIB}\n",
        "mem_info_vram_used": f"{3 * GIB}\n",
        "mem_info_gtt_total": f"{32 * GIB}\n",
        "mem_info_gtt_used": f"{50 * MIB}\n",
        "mem_info_vram_vendor": "samsung\n",
        "gpu_metrics": bytes([0x78, 0, 1, 3]) + bytes(116),
        "pp_dpm_sclk": "0: 500Mhz \n1: 2371Mhz *\n2: 2526Mhz \n",
        "hwmon/hwmon5/temp1_input": "45000\n",
        "hwmon/hwmon5/temp1_label": "edge\n",
        "hwmon/hwmon5/temp2_input": "51000\n",
        "hwmon/hwmon5/temp2_label": "junction\n",
        "hwmon/hwmon5/power1_average": "66000000\n",
        "hwmon/hwmon5/power1_cap": "303000000\n",
        "power/runtime_status": "active\n",
    }
    write(root, {f"{device}/{name}": value for name, value in {**default, **files}.items()})
    return root / device


def process(root: Path, pid: int, fdinfo: str = "") -> None:
    """A process with one descriptor that, with ``fdinfo``, is a graphics card's."""
    for name in ("fd", "fdinfo"):
        (root / f"proc/{pid}/{name}").mkdir(parents=True, exist_ok=True)
    target = "/dev/dri/renderD128" if fdinfo else "/dev/null"
    (root / f"proc/{pid}/fd/7").symlink_to(target)
    write(root, {f"proc/{pid}/fdinfo/7": fdinfo or "pos:\t0\n"})


def kfd(root: Path, gpu_id: int = 51110, location: int = 0x0300, **memory: str) -> None:
    node = "sys/class/kfd/kfd/topology/nodes"
    write(
        root,
        {
            f"{node}/0/gpu_id": "0\n",
            f"{node}/0/properties": "cpu_cores_count 16\nsimd_count 0\nlocation_id 0\n",
            f"{node}/{gpu_id}/gpu_id": f"{gpu_id}\n",
            f"{node}/{gpu_id}/properties": f"simd_count 192\nlocation_id {location}\ndomain 0\n",
        },
    )
    (root / "sys/class/kfd/kfd/proc").mkdir(exist_ok=True)
    for pid, used in memory.items():
        write(root, {f"sys/class/kfd/kfd/proc/{pid.removeprefix('pid')}/vram_{gpu_id}": used})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine whose ``/proc`` is that of the host."""
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(tmp_path / "state"))
    found = tmp_path / "root"
    process(found, 1)
    (found / "proc/self/ns").mkdir(parents=True)
    (found / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    return found


def read(root: Path, detail: Detail = Detail.FULL) -> tuple[Gpu, ...]:
    snapshot = amd.AmdBackend(root).read(detail)
    assert snapshot.problem is None
    return snapshot.gpus


def test_a_discrete_card(root: Path) -> None:
    card(root)
    (gpu,) = read(root)
    assert (gpu.uuid, gpu.bus_id, gpu.vendor, gpu.index) == (
        "amd:abcdef0123456780",
        "0000:03:00.0",
        "amd",
        0,
    )
    assert (gpu.utilization, gpu.health) == (0.37, Health.OK)
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (3 * GIB, 24 * GIB)
    assert gpu.mem_kind is MemoryKind.DEDICATED
    assert (gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (45.0, 66.0, 303.0)
    assert gpu.sm_clock_mhz == 2371
    assert gpu.name == "AMD GPU 0x744c"
    assert read(root, Detail.LOAD)[0].power_w is None


def test_the_name_is_the_drivers_or_the_machines_table(root: Path) -> None:
    card(root)
    write(
        root, {"usr/share/misc/pci.ids": "1001  Other\n\t744c  Wrong\n1002  AMD\n\t744c  Navi 31\n"}
    )
    assert read(root)[0].name == "Navi 31"
    card(root, product_name="Radeon RX 7900 XTX\n")
    assert read(root)[0].name == "Radeon RX 7900 XTX"


@pytest.mark.parametrize("metrics", [bytes([0x80, 0, 2, 4]), bytes([0x80, 0, 3, 0])])
def test_a_processor_with_graphics_has_gtt_as_its_pool(root: Path, metrics: bytes) -> None:
    card(
        root,
        gpu_metrics=metrics,
        mem_info_vram_total=f"{512 * MIB}\n",
        mem_info_vram_used=f"{400 * MIB}\n",
        mem_info_gtt_total=f"{96 * GIB}\n",
        mem_info_gtt_used=f"{20 * GIB}\n",
    )
    (gpu,) = read(root)
    assert gpu.mem_kind is MemoryKind.UNIFIED
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (20 * GIB, 96 * GIB)


def test_a_processor_that_was_given_much_memory_uses_that(root: Path) -> None:
    card(
        root,
        gpu_metrics=bytes([0x80, 0, 3, 0]),
        mem_info_vram_total=f"{96 * GIB}\n",
        mem_info_gtt_total=f"{16 * GIB}\n",
    )
    assert read(root)[0].mem_total_bytes == 96 * GIB


@pytest.mark.parametrize(
    ("metrics", "vendor", "vram", "gtt", "apu"),
    [
        (None, None, 512 * MIB, 15 * GIB, True),
        (None, "unknown", 512 * MIB, 15 * GIB, True),
        (None, "hynix", 4 * GIB, 32 * GIB, False),  # a small card in a big machine
        (bytes([0, 0, 1, 1]), None, 4 * GIB, 32 * GIB, False),
        (b"", None, None, None, False),
    ],
)
def test_what_makes_a_processor_with_graphics(
    metrics: bytes | None, vendor: str | None, vram: int | None, gtt: int | None, apu: bool
) -> None:
    assert text.is_apu(metrics, vendor, vram, gtt) is apu


def test_instinct_has_a_junction_and_no_edge(root: Path) -> None:
    device = card(root, **{"hwmon/hwmon5/power1_input": "133000000\n"})
    for name in ("temp1_input", "temp1_label", "power1_average"):
        (device / "hwmon/hwmon5" / name).unlink()
    (gpu,) = read(root)
    assert (gpu.temperature_c, gpu.power_w) == (51.0, 133.0)


def test_connectors_render_nodes_and_other_makers_are_no_cards(root: Path) -> None:
    card(root, 1, "0000:83:00.0")
    card(root, 0, "0000:c3:00.0")
    card(root, 2, "0000:01:00.0", vendor="0x10de\n")
    write(root, {"sys/class/drm/card1-DP-1/device/vendor": "0x1002\n"})
    write(
        root, {"sys/class/drm/renderD128/device/vendor": "0x1002\n", "sys/class/drm/version": "x"}
    )
    assert [gpu.bus_id for gpu in read(root)] == ["0000:83:00.0", "0000:c3:00.0"]


def test_the_key_without_a_unique_id_and_of_partitions(root: Path) -> None:
    card(root, 0, "0000:03:00.0", unique_id="\n")
    card(root, 1, "0000:83:00.0", unique_id="0000000000000000\n")
    card(root, 2, "0000:c3:00.0", unique_id="77\n")
    card(root, 3, "0000:c3:00.1", unique_id="77\n")
    assert [gpu.uuid for gpu in read(root)] == [
        "amd:0000:03:00.0",
        "amd:0000:83:00.0",
        "amd:77:0000:c3:00.0",
        "amd:77:0000:c3:00.1",
    ]


def test_a_card_that_sleeps_is_not_touched(root: Path) -> None:
    device = card(root, **{"power/runtime_status": "suspended\n"})
    (device / "gpu_busy_percent").unlink()
    os.mkfifo(device / "gpu_busy_percent")  # opening it would hang for ever
    (gpu,) = read(root)
    assert (gpu.health, gpu.utilization, gpu.mem_used_bytes) == (Health.ASLEEP, None, None)
    assert gpu.processes is None


def test_rocm_processes_of_every_user(root: Path) -> None:
    card(root)
    kfd(root, pid41=f"{6 * GIB}\n", pid43="0\n")
    (gpu,) = read(root, Detail.PROCESSES)
    assert gpu.processes is not None
    assert {(p.pid, p.mem_bytes, p.kind, p.visible) for p in gpu.processes} == {
        (41, 6 * GIB, "compute", True),
        (43, 0, "compute", True),
    }
    assert read(root, Detail.LOAD)[0].processes is None


def test_kfd_without_processes_is_known_to_be_empty(root: Path) -> None:
    card(root)
    kfd(root)
    assert read(root)[0].processes == ()


def test_a_process_is_listed_on_the_cards_that_it_uses(root: Path) -> None:
    card(root, 0, "0000:03:00.0")
    card(root, 1, "0000:83:00.0")
    kfd(root, 1001, 0x0300, pid41=f"{GIB}\n")
    kfd(root, 1002, 0x8300, pid41="0\n")
    first, second = read(root, Detail.PROCESSES)
    assert [p.pid for p in first.processes or ()] == [41]
    assert second.processes == ()


def test_graphics_processes_join_the_list(root: Path) -> None:
    card(root)
    kfd(root, pid41=f"{GIB}\n")
    shown = "drm-driver:\tamdgpu\ndrm-pdev:\t0000:03:00.0\ndrm-client-id:\t9\n"
    process(root, 500, shown + "drm-memory-vram:\t2048 KiB\ndrm-engine-gfx:\t12 ns\n")
    process(root, 41, shown.replace("9\n", "10\n") + "drm-resident-vram:\t1 MiB\n")
    (gpu,) = read(root, Detail.PROCESSES)
    assert {(p.pid, p.mem_bytes, p.kind) for p in gpu.processes or ()} == {
        (41, GIB, "compute"),
        (500, 2 * MIB, "graphics"),
    }


def test_without_kfd_a_partial_list_is_no_list(root: Path) -> None:
    card(root)
    assert read(root)[0].processes == ()  # everything could be looked at, and nobody was there
    (root / "proc/self/ns/pid").unlink()
    (root / "proc/self/ns/pid").symlink_to("pid:[4026532000]")
    assert read(root)[0].processes is None


def test_pids_of_the_host_are_not_looked_up_in_a_container(root: Path) -> None:
    card(root)
    kfd(root, **{f"pid{os.getpid()}": f"{GIB}\n"})
    (mine,) = read(root)[0].processes or ()
    assert mine.user is not None
    (root / "proc/self/ns/pid").unlink()
    (root / "proc/self/ns/pid").symlink_to("pid:[4026532000]")
    (other,) = read(root)[0].processes or ()
    assert (other.visible, other.user, other.name) == (False, None, None)


def test_what_is_missing_is_unknown(root: Path) -> None:
    device = card(root)
    for path in [*device.glob("mem_info*"), device / "gpu_busy_percent", device / "pp_dpm_sclk"]:
        path.unlink()
    (gpu,) = read(root)
    assert (gpu.utilization, gpu.mem_used_bytes, gpu.mem_total_bytes) == (None, None, None)
    assert gpu.sm_clock_mhz is None
    assert gpu.health is Health.UNKNOWN


@pytest.mark.parametrize("said", ["65535", "-1", "", "N/A", "101", "nan", "\x00", "4,5,6"])
def test_an_impossible_utilization_is_unknown(root: Path, said: str) -> None:
    card(root, gpu_busy_percent=said)
    assert read(root)[0].utilization is None


FILES = [
    "gpu_busy_percent",
    "mem_info_vram_total",
    "mem_info_vram_used",
    "mem_info_gtt_total",
    "gpu_metrics",
    "uevent",
    "unique_id",
    "product_name",
    "pp_dpm_sclk",
    "hwmon/hwmon5/temp1_input",
    "hwmon/hwmon5/temp1_label",
    "hwmon/hwmon5/power1_average",
]


@settings(max_examples=80, suppress_health_check=QUIET, deadline=None)
@given(
    name=st.sampled_from(FILES),
    content=st.one_of(st.none(), st.binary(max_size=40), st.text(max_size=9)),
)
def test_any_content_of_any_file(root: Path, name: str, content: bytes | str | None) -> None:
    device = card(root)
    kfd(root, pid41=f"{GIB}\n")
    if content is None:
        (device / name).unlink()
    else:
        write(device, {name: content})
    (gpu,) = read(root)
    assert gpu.utilization is None or 0 <= gpu.utilization <= 1
    for value in (gpu.temperature_c, gpu.power_w, gpu.sm_clock_mhz, gpu.mem_used_bytes):
        assert value is None or value >= 0
    assert gpu.mem_total_bytes is None or gpu.mem_total_bytes > 0
    if content is None and name == "gpu_busy_percent":
        assert gpu.utilization is None
    assert gpu.uuid.startswith("amd:")
    assert gpu.uuid.isprintable()
    assert gpu.name.isprintable()


@settings(max_examples=50, suppress_health_check=QUIET, deadline=None)
@given(properties=st.text(max_size=60), memory=st.binary(max_size=20))
def test_any_content_of_kfd(root: Path, properties: str, memory: bytes) -> None:
    card(root)
    kfd(root, pid41="1\n")
    base = "sys/class/kfd/kfd"
    write(root, {f"{base}/proc/41/vram_51110": memory})
    assert all(p.mem_bytes is None or p.mem_bytes >= 0 for p in read(root)[0].processes or ())
    write(root, {f"{base}/topology/nodes/51110/properties": properties})
    assert len(read(root)) == 1


def test_no_amd_gpu(root: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="no AMD GPU"):
        amd.open_amd(Settings(), SystemClock(), root)
    assert detect(Settings(backend="amd")).backend is None or Path("/sys/class/kfd").exists()


def test_cards_that_vanish_are_a_problem(root: Path) -> None:
    device = card(root)
    backend = amd.open_amd(Settings(), SystemClock(), root)
    (device / "vendor").unlink()
    gone = backend.read()
    assert gone.gpus == ()
    assert gone.problem == "the kernel shows no AMD GPU"


# A stand-in of the amdsmi module. Written by us in the shapes of its documentation.
MODULE = """
import os, sys
print("loading libraries")
if os.environ.get("AMDSMI_FAULT") == "import":
    raise KeyError("libamd_smi.so")
class AmdSmiClkType: GFX = 1
class AmdSmiTemperatureType: EDGE = 0; HOTSPOT = 1
class AmdSmiTemperatureMetric: CURRENT = 0
STATE = {"shut": 0}
def amdsmi_init():
    if os.environ.get("AMDSMI_FAULT") == "init": raise RuntimeError("34 driver not loaded")
def amdsmi_shut_down(): STATE["shut"] += 1
def amdsmi_get_processor_handles(): return ["a"]
def amdsmi_get_gpu_device_bdf(h): return "0000:03:00.0"
def amdsmi_get_gpu_asic_info(h): return {"market_name": "AMD Instinct MI300X"}
def amdsmi_get_gpu_activity(h):
    print("noise", file=sys.stderr)
    return {"gfx_activity": 88, "umc_activity": "N/A"}
def amdsmi_get_gpu_vram_usage(h): return {"vram_total": 196592, "vram_used": 283}
def amdsmi_get_power_info(h):
    return {"current_socket_power": 140, "average_socket_power": "N/A", "power_limit": 750000000}
def amdsmi_get_temp_metric(h, kind, metric):
    if kind == 0: raise RuntimeError("AMDSMI_STATUS_NOT_SUPPORTED")
    return 41
def amdsmi_get_clock_info(h, kind): return {"clk": 132, "min_clk": 132}
def amdsmi_get_gpu_process_list(h):
    return [{"name": "python3", "pid": 77, "mem": 1048576, "memory_usage": {"vram_mem": 4096}}]
"""


@pytest.fixture
def amdsmi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    write(folder, {"amdsmi/__init__.py": MODULE})
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    sys.modules.pop("amdsmi", None)
    yield folder
    sys.modules.pop("amdsmi", None)


def test_amdsmi_fills_what_the_files_do_not_tell(
    root: Path, amdsmi: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    device = card(root)
    for path in [*device.glob("mem_info*"), device / "gpu_busy_percent"]:
        path.unlink()
    for path in (device / "hwmon/hwmon5").iterdir():
        path.unlink()
    (root / "proc/self/ns/pid").unlink()  # so that the list of processes is not known either
    backend = amd.AmdBackend(root)
    (gpu,) = backend.read().gpus
    assert (gpu.name, gpu.utilization) == ("AMD Instinct MI300X", 0.88)
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (283 * MIB, 196592 * MIB)
    assert (gpu.power_w, gpu.power_limit_w, gpu.temperature_c) == (140, 750, 41)
    assert (gpu.sm_clock_mhz, gpu.health) == (2371, Health.OK)  # the files' own clock stays
    assert [(p.pid, p.mem_bytes) for p in gpu.processes or ()] == [(77, 4096)]
    assert capfd.readouterr() == ("", "")
    backend.close()
    assert sys.modules["amdsmi"].STATE == {"shut": 1}


def test_amdsmi_is_not_asked_where_the_files_tell_all(root: Path, amdsmi: Path) -> None:
    card(root)
    kfd(root)
    assert read(root)[0].utilization == 0.37
    assert "amdsmi" not in sys.modules


@pytest.mark.parametrize("fault", ["import", "init"])
def test_an_amdsmi_that_does_not_work(
    root: Path,
    amdsmi: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    monkeypatch.setenv("AMDSMI_FAULT", fault)
    device = card(root)
    (device / "gpu_busy_percent").unlink()
    assert read(root)[0].utilization is None
    assert capfd.readouterr() == ("", "")
    (root / "sys/module/amdgpu").mkdir(parents=True)
    (device / "vendor").unlink()
    with pytest.raises(BackendUnavailableError, match="amdsmi does not work here"):
        amd.open_amd(Settings(), SystemClock(), root)


def test_amdsmi_alone(root: Path, amdsmi: Path) -> None:
    (root / "sys/module/amdgpu").mkdir(parents=True)
    backend = amd.open_amd(Settings(), SystemClock(), root)
    (gpu,) = backend.read().gpus
    assert (gpu.uuid, gpu.utilization, gpu.name) == (
        "amd:0000:03:00.0",
        0.88,
        "AMD Instinct MI300X",
    )
    backend.close()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"activity": {"gfx_activity": "N/A"}}, text.Reading()),
        (
            {"activity": {"gfx_activity": {"value": 42, "unit": "%"}}},
            text.Reading(utilization=0.42),
        ),
        ({"activity": "N/A"}, text.Reading()),
        (
            {"power": {"average_socket_power": 33, "current_socket_power": 0}},
            text.Reading(power_w=33),
        ),
        ({"power": {"power_limit": {"value": 300, "unit": "W"}}}, text.Reading(power_limit_w=300)),
        (
            {"vram": {"vram_total": {"value": 16, "unit": "GB"}, "vram_used": "N/A"}},
            text.Reading(mem_total_bytes=16 * GIB),
        ),
        ({"vram": {"vram_total": 0}}, text.Reading()),
        ({"processes": []}, text.Reading(holders=())),
        ({"processes": [{"pid": "N/A"}]}, text.Reading()),
        ({"processes": ["handle"]}, text.Reading()),
        ({"temperature": {"value": 40, "unit": "C"}}, text.Reading(temperature_c=40)),
        ({"clock": {"cur_clk": 800}}, text.Reading(sm_clock_mhz=800)),
    ],
)
def test_shapes_of_amdsmi(answers: dict[str, Any], expected: text.Reading) -> None:
    assert text.from_amdsmi(**answers) == expected


ANSWERS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["value", "unit", "gfx_activity", "vram_used", "pid", "mem", "memory_usage", "clk"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@given(
    answers=st.dictionaries(
        st.sampled_from(["asic", "board", "activity", "vram", "power", "temperature", "processes"]),
        ANSWERS,
    )
)
def test_any_answer_of_amdsmi(answers: dict[str, Any]) -> None:
    found = text.from_amdsmi(**answers)
    assert found.utilization is None or 0 <= found.utilization <= 1
    assert found.mem_total_bytes is None or found.mem_total_bytes > 0
    for value in (found.power_w, found.temperature_c, found.mem_used_bytes):
        assert value is None or value >= 0
    if "activity" not in answers:
        assert found.utilization is None


@given(table=st.text(max_size=80))
def test_any_table_of_clocks(table: str) -> None:
    found = text.current_clock(table)
    assert found is None or 0 <= found <= 20_000


@pytest.mark.parametrize(
    ("table", "mhz"),
    [
        ("0: 500Mhz *\n1: 800Mhz\n", 500),
        ("S: 0Mhz *\n0: 500Mhz\n", 0),
        ("0: 1Ghz *", 1000),
        ("0: 500Mhz\n1: 800Mhz\n", None),
        ("", None),
    ],
)
def test_the_starred_clock(table: str, mhz: float | None) -> None:
    assert text.current_clock(table) == mhz


def test_a_light_reading_asks_no_sensor_of_a_card_that_has_fallen_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = card(tmp_path)
    backend = amd.AmdBackend(tmp_path)
    asked: list[str] = []
    pread = os.pread

    def noted(handle: int, size: int, offset: int) -> bytes:
        asked.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        return pread(handle, size, offset)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc that names the files of a process")
    monkeypatch.setattr(os, "pread", noted)
    backend.read(Detail.LOAD)
    assert backend.read(Detail.LOAD).gpus[0].utilization == 0.37
    assert asked == ["runtime_status", "gpu_busy_percent", "mem_info_vram_used"]
    asked.clear()
    (device / "power/runtime_status").write_text("suspended\n")
    assert backend.read(Detail.LOAD).gpus[0].health is Health.ASLEEP
    assert asked == ["runtime_status"]
    backend.close()


def test_light_readings_see_every_change_of_cards_that_are_known(tmp_path: Path) -> None:
    class Hand:
        mono = 100.0

        def now(self) -> Instant:
            return Instant(mono=self.mono, wall=self.mono)

    clock = Hand()
    device = card(tmp_path)
    backend = amd.AmdBackend(tmp_path, clock)

    def load() -> list[tuple[float | None, int | None, Health]]:
        gpus = backend.read(Detail.LOAD).gpus
        return [(gpu.utilization, gpu.mem_used_bytes, gpu.health) for gpu in gpus]

    first = backend.read(Detail.LOAD)
    assert load() == [(0.37, 3 * GIB, Health.OK)]
    assert backend.read(Detail.LOAD).gpus[0] == first.gpus[0]
    (device / "gpu_busy_percent").write_text("99\n")
    (device / "mem_info_vram_used").write_text(f"{5 * GIB}\n")
    assert load() == [(0.99, 5 * GIB, Health.OK)]
    (device / "gpu_busy_percent").write_text("garbage\n")
    assert load() == [(None, 5 * GIB, Health.OK)]
    (device / "gpu_busy_percent").write_text("0\n")
    assert load() == [(0.0, 5 * GIB, Health.OK)]
    (device / "power/runtime_status").write_text("suspended\n")
    assert load() == [(None, None, Health.ASLEEP)]
    (device / "power/runtime_status").write_text("active\n")
    assert load() == [(0.0, 5 * GIB, Health.OK)]
    card(tmp_path, 1, "0000:04:00.0")
    clock.mono += 30.0
    assert len(load()) == 2
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 6
    backend.close()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert before - after == 6
    assert len(load()) == 2
    backend.close()
