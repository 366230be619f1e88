"""NVML through the real nvidia-ml-py, on a library of our own that plays the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from fake_nvml import FakeNvml

from gpusched_ipy.backends import Detail, _nvml_library, detect
from gpusched_ipy.backends._nvidia_pci import PciBus, sysfs_bus_id
from gpusched_ipy.backends._nvidia_processes import Identities, in_first_namespace
from gpusched_ipy.backends._nvidia_unified import unified_memory
from gpusched_ipy.backends._nvml_unit import LIST_S
from gpusched_ipy.backends.nvml import NvmlBackend, open_nvml
from gpusched_ipy.config import Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, Health, MemoryKind

pytestmark = pytest.mark.cc

GIB = 1 << 30


class HandClock:
    """A clock that the test moves; wall time is real, as the driver's stamps are."""

    def __init__(self) -> None:
        self.mono = 1000.0

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=SystemClock().now().wall)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    made = FakeNvml(tmp_path)
    made.load(monkeypatch)
    return made


@pytest.fixture
def bus(tmp_path: Path) -> PciBus:
    """A machine without PCI files: nothing there can sleep."""
    return PciBus(tmp_path / "no-pci", tmp_path / "no-proc")


@pytest.fixture
def backend(fake: FakeNvml, clock: HandClock, bus: PciBus) -> Iterator[NvmlBackend]:
    made = NvmlBackend(clock, bus=bus, identities=Identities(host_pids=True))
    yield made
    fake.set({"gpu.0.uuid": "GPU-fake-0"})
    made.close()


def _pci(tmp_path: Path, bus_id: str, *, status: str, control: str = "auto") -> PciBus:
    folder = tmp_path / "pci" / bus_id
    (folder / "power").mkdir(parents=True, exist_ok=True)
    (folder / "vendor").write_text("0x10de\n")
    (folder / "class").write_text("0x030200\n")
    (folder / "power" / "control").write_text(f"{control}\n")
    (folder / "power" / "runtime_status").write_text(f"{status}\n")
    described = tmp_path / "proc" / bus_id
    described.mkdir(parents=True, exist_ok=True)
    (described / "information").write_text(
        "Model: \t\t NVIDIA RTX Laptop\nGPU UUID: \t GPU-laptop\nBus Location: \t " + bus_id + "\n"
    )
    return PciBus(tmp_path / "pci", tmp_path / "proc")


def test_a_full_reading_has_every_value(fake: FakeNvml, backend: NvmlBackend) -> None:
    me = os.getpid()
    fake.set(
        {
            "driver": "580.82.07",
            "gpu.0.uuid": "GPU-a",
            "gpu.0.name": "NVIDIA A100",
            "gpu.0.util": 97,
            "gpu.0.mem_total": 40 * GIB,
            "gpu.0.mem_used": 30 * GIB,
            "gpu.0.mem_reserved": GIB,
            "gpu.0.temp": 61,
            "gpu.0.power": 250500,
            "gpu.0.power_limit": 400000,
            "gpu.0.sm_clock": 1410,
            "gpu.0.reasons": 0x40,
            "gpu.0.compute_mode": 3,
            "gpu.0.proc": [f"{me}:{29 * GIB}:C:90", f"{me}:{2 * GIB}:G", "3999999:NA:M"],
        }
    )
    snapshot = backend.read(Detail.FULL)
    assert snapshot.problem is None
    assert (snapshot.backend, snapshot.driver) == ("nvml", "580.82.07")
    assert snapshot.taken_mono == 1000.0
    assert snapshot.read_s is not None
    (gpu,) = snapshot.gpus
    assert (gpu.uuid, gpu.index, gpu.name, gpu.vendor) == ("GPU-a", 0, "NVIDIA A100", "nvidia")
    assert gpu.bus_id == "00000000:01:00.0"
    assert gpu.health is Health.OK
    assert gpu.utilization == 0.97
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (30 * GIB, 40 * GIB)
    assert gpu.mem_reserved_bytes == GIB
    assert gpu.mem_kind is MemoryKind.DEDICATED
    assert (gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (61, 250.5, 400)
    assert (gpu.sm_clock_mhz, gpu.throttled) == (1410, True)
    assert gpu.compute_mode == "exclusive_process"
    assert gpu.processes is not None
    mine, stranger = gpu.processes
    assert (mine.pid, mine.mem_bytes, mine.kind, mine.utilization) == (me, 29 * GIB, "both", 0.9)
    assert mine.name
    assert mine.user
    assert mine.started_at is not None
    assert mine.visible
    assert (stranger.pid, stranger.mem_bytes, stranger.kind) == (3999999, None, "compute")
    assert stranger.name is None


def test_no_process_is_an_empty_list_and_a_power_cap_is_no_throttling(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.change(gpu__0__reasons=0x04)
    (gpu,) = backend.read(Detail.FULL).gpus
    assert gpu.processes == ()
    assert gpu.throttled is False


@pytest.mark.parametrize(
    ("detail", "asked"),
    [
        (Detail.LOAD, {"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo_v2"}),
        (
            Detail.PROCESSES,
            {
                "nvmlDeviceGetUtilizationRates",
                "nvmlDeviceGetMemoryInfo_v2",
                "nvmlDeviceGetComputeRunningProcesses_v3",
                "nvmlDeviceGetGraphicsRunningProcesses_v3",
                "nvmlDeviceGetMPSComputeRunningProcesses_v3",
            },
        ),
    ],
)
def test_a_lighter_reading_asks_the_driver_for_no_more(
    fake: FakeNvml, backend: NvmlBackend, detail: Detail, asked: set[str]
) -> None:
    fake.change(gpu__0__proc=[f"{os.getpid()}:1024:C"])
    backend.read(detail)
    fake.calls(reset=True)
    (gpu,) = backend.read(detail).gpus
    assert fake.calls() == len(asked)
    assert {name for name in asked if fake.calls(name) == 1} == asked
    assert gpu.power_w is None
    assert gpu.temperature_c is None
    assert (gpu.processes is None) == (detail is Detail.LOAD)


def test_each_reading_is_new(fake: FakeNvml, backend: NvmlBackend) -> None:
    for percent in (0, 40, 100, 0):
        fake.change(gpu__0__util=percent, gpu__0__mem_used=percent * GIB // 2)
        (gpu,) = backend.read(Detail.LOAD).gpus
        assert gpu.utilization == percent / 100
        assert gpu.mem_used_bytes == percent * GIB // 2


def test_watching_lists_processes_again_where_the_memory_has_moved(
    fake: FakeNvml, bus: PciBus
) -> None:
    class Both(HandClock):
        def now(self) -> Instant:
            return Instant(mono=self.mono, wall=self.mono)

    clock = Both()
    backend = NvmlBackend(clock, bus=bus, identities=Identities(host_pids=True))

    def pids() -> list[int]:
        (gpu,) = backend.watch(Detail.PROCESSES).gpus
        assert gpu.processes is not None
        return [process.pid for process in gpu.processes]

    listed = "nvmlDeviceGetComputeRunningProcesses_v3"
    fake.change(gpu__0__proc=["4000001:1024:C"], gpu__0__mem_used=GIB)
    assert pids() == [4000001]
    fake.calls(reset=True)
    fake.change(gpu__0__util=70)
    assert pids() == [4000001]
    assert backend.watch(Detail.PROCESSES).gpus[0].utilization == 0.7
    assert fake.calls(listed) == 0
    fake.change(gpu__0__proc=["4000001:1024:C", "4000002:1:C"], gpu__0__mem_used=GIB + 1)
    assert pids() == [4000001, 4000002]
    fake.change(gpu__0__proc=["4000003:1024:C"])  # no driver does that: another, to the byte alike
    assert pids() == [4000001, 4000002]
    (gpu,) = backend.read(Detail.PROCESSES).gpus  # a reading from which a job is started
    assert gpu.processes is not None
    assert [process.pid for process in gpu.processes] == [4000003]
    fake.change(gpu__0__proc=["4000004:1024:C"])
    clock.mono += LIST_S
    assert pids() == [4000004]
    backend.close()


def test_processes_come_and_go_in_any_number(fake: FakeNvml, backend: NvmlBackend) -> None:
    for count in (1, 200, 0, 3):
        fake.change(gpu__0__proc=[f"{5_000_000 + n}:{n + 1}:C" for n in range(count)])
        (gpu,) = backend.read(Detail.PROCESSES).gpus
        assert gpu.processes is not None
        assert {item.pid: item.mem_bytes for item in gpu.processes} == {
            5_000_000 + n: n + 1 for n in range(count)
        }


def test_zero_bytes_of_a_process_are_unknown(fake: FakeNvml, backend: NvmlBackend) -> None:
    fake.change(gpu__0__proc=["4000000:0:C"])
    (gpu,) = backend.read(Detail.PROCESSES).gpus
    assert gpu.processes is not None
    assert gpu.processes[0].mem_bytes is None


def test_an_impossible_utilization_is_unknown(fake: FakeNvml, backend: NvmlBackend) -> None:
    fake.change(gpu__0__util=4294967295, gpu__0__proc=["4000000:1:C:3000"])
    (gpu,) = backend.read(Detail.FULL).gpus
    assert gpu.utilization is None
    assert gpu.processes is not None
    assert gpu.processes[0].utilization == 0.0


@pytest.mark.parametrize("variant", ["DRIVER_470", "DRIVER_535_54"])
def test_older_drivers(
    variant: str, tmp_path: Path, bus: PciBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNvml(tmp_path, variant)
    fake.load(monkeypatch)
    procs = [f"{4_000_000 + n}:{(n + 1) * GIB}:C" for n in range(3)]
    fake.set({"gpu.0.mem_used": 5 * GIB, "gpu.0.mem_reserved": GIB, "gpu.0.proc": procs})
    backend = NvmlBackend(bus=bus, identities=Identities(host_pids=True))
    (gpu,) = backend.read(Detail.FULL).gpus
    backend.close()
    # The old call counts what the driver keeps for itself as used, and does not say how much it is.
    old = variant == "DRIVER_470"
    assert gpu.mem_used_bytes == (6 * GIB if old else 5 * GIB)
    assert gpu.mem_reserved_bytes == (None if old else GIB)
    assert gpu.processes is not None
    assert [(item.pid, item.mem_bytes) for item in gpu.processes] == [
        (4_000_000 + n, (n + 1) * GIB) for n in range(3)
    ]


@pytest.mark.parametrize("code", [13, 25])
def test_memory_v2_that_the_driver_refuses(code: int, fake: FakeNvml, backend: NvmlBackend) -> None:
    fake.change(gpu__0__error__nvmlDeviceGetMemoryInfo_v2=code, gpu__0__mem_used=GIB)
    (gpu,) = backend.read(Detail.LOAD).gpus
    assert gpu.mem_total_bytes == 80 * GIB
    assert gpu.mem_used_bytes == GIB + (512 << 20)


# ---- MIG


def _mig_state() -> dict[str, object]:
    return {
        "gpu.0.uuid": "GPU-card",
        "gpu.0.name": "NVIDIA H100",
        "gpu.0.util": 55,
        "gpu.0.temp": 50,
        "gpu.0.mig": 1,
        "gpu.0.mig.0.uuid": "MIG-a",
        "gpu.0.mig.0.name": "NVIDIA H100 MIG 3g.40gb",
        "gpu.0.mig.0.mem_total": 40 * GIB,
        "gpu.0.mig.0.mem_used": 7 * GIB,
        "gpu.0.mig.0.proc": ["4000001:1024:C"],
        "gpu.0.mig.2.uuid": "MIG-b",
        "gpu.0.mig.2.mem_total": 20 * GIB,
        "gpu.1.uuid": "GPU-plain",
        "gpu.1.util": 3,
    }


def test_mig_instances_are_the_gpus_and_their_card_is_not(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.set(_mig_state())
    first, second, plain = backend.read(Detail.FULL).gpus
    assert (first.uuid, first.parent, first.number) == ("MIG-a", "GPU-card", "0:0")
    assert first.name == "NVIDIA H100 MIG 3g.40gb"
    assert (first.utilization, first.power_w, first.temperature_c) == (None, None, 50)
    assert (first.mem_used_bytes, first.mem_total_bytes) == (7 * GIB, 40 * GIB)
    assert first.processes is not None
    assert [item.pid for item in first.processes] == [4000001]
    assert (second.uuid, second.parent, second.processes) == ("MIG-b", "GPU-card", ())
    assert second.number == "0:2", "two of one profile are told apart"
    assert "MIG" in second.name
    assert (plain.uuid, plain.parent, plain.utilization) == ("GPU-plain", None, 0.03)


def test_mig_instances_made_and_destroyed_while_we_look(
    fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    def uuids() -> list[str]:
        snapshot = backend.read(Detail.LOAD)
        assert snapshot.problem is None
        return [gpu.uuid for gpu in snapshot.gpus]

    fake.set(_mig_state())
    assert uuids() == ["MIG-a", "MIG-b", "GPU-plain"]
    gone = {key: value for key, value in _mig_state().items() if ".mig.2" not in key}
    fake.set(gone)
    assert uuids() == ["MIG-a", "GPU-plain"]  # its handle stopped working: noticed at once
    fake.set(_mig_state())
    clock.mono += 11
    assert uuids() == ["MIG-a", "MIG-b", "GPU-plain"]


def test_mig_without_an_instance_is_no_place_for_a_job(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.set({"gpu.0.uuid": "GPU-card", "gpu.0.mig": 1, "gpu.0.mig.0.error": 6})
    (card,) = backend.read(Detail.LOAD).gpus
    assert (card.uuid, card.health) == ("GPU-card", Health.UNKNOWN)
    assert "no instance" in (card.health_text or "")
    assert (card.utilization, card.mem_total_bytes) == (None, None)


# ---- memory that is the machine's


@pytest.mark.parametrize(
    "state",
    [{"gpu.0.error.nvmlDeviceGetMemoryInfo": 3}, {"gpu.0.mem_total": 0, "gpu.0.mem_used": 0}],
    ids=["NOT_SUPPORTED", "total 0"],
)
def test_unified_memory_is_the_machines(
    state: dict[str, int], fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.set({"gpu.0.name": "NVIDIA GB10", "gpu.0.util": 12, "gpu.0.mem_reserved": 0, **state})
    (gpu,) = backend.read(Detail.LOAD).gpus
    assert gpu.mem_kind is MemoryKind.UNIFIED
    assert gpu.mem_total_bytes == unified_memory().total
    assert gpu.mem_used_bytes is not None
    assert 0 < gpu.mem_used_bytes < gpu.mem_total_bytes
    assert gpu.mem_pressure in ("normal", "warn", "critical")
    assert gpu.utilization == 0.12


def test_a_light_reading_is_the_same_gpu_as_a_full_one(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    """The light one is copied field by field; nothing of an earlier reading may stay in it."""
    fake.set({"gpu.0.util": 1, "gpu.0.mem_used": GIB, "gpu.0.compute_mode": 2})
    states = [
        {"gpu__0__util": 99, "gpu__0__mem_used": 2 * GIB, "gpu__0__mem_reserved": 7},
        {"gpu__0__error__nvmlDeviceGetUtilizationRates": 3},
        {"gpu__0__error__nvmlDeviceGetMemoryInfo": 3},
        {"gpu__0__error__nvmlDeviceGetMemoryInfo": 4},
        {"gpu__0__error__nvmlDeviceGetMemoryInfo": None},
        {"gpu__0__error__nvmlDeviceGetUtilizationRates": None, "gpu__0__util": 0},
    ]
    dear = ("temperature_c", "power_w", "power_limit_w", "sm_clock_mhz", "throttled", "processes")
    for state in states:
        fake.change(**state)
        (light,) = backend.read(Detail.LOAD).gpus
        (full,) = backend.read(Detail.FULL).gpus
        changing = {"mem_used_bytes"} if light.mem_kind is MemoryKind.UNIFIED else set()
        for item in fields(Gpu):
            if item.name not in dear and item.name not in changing:
                assert getattr(light, item.name) == getattr(full, item.name), item.name


@pytest.mark.parametrize("code", [4, 6, 10, 17, 20, 999])
def test_no_other_error_makes_memory_unified(
    code: int, fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.change(gpu__0__error__nvmlDeviceGetMemoryInfo=code)
    (gpu,) = backend.read(Detail.LOAD).gpus
    assert gpu.mem_kind is MemoryKind.DEDICATED
    assert (gpu.mem_used_bytes, gpu.mem_total_bytes) == (None, None)


# ---- what the driver cannot or does not want to say


@pytest.mark.parametrize("code", [3, 4, 6, 13, 21, 26])
@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit_w"),
        ("nvmlDeviceGetClockInfo", "sm_clock_mhz"),
        ("nvmlDeviceGetCurrentClocks", "throttled"),
        ("nvmlDeviceGetComputeMode", "compute_mode"),
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
    ],
)
def test_a_value_that_is_not_given_is_none_and_harms_no_other(
    function: str, field: str, code: int, fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.set({f"gpu.0.error.{function}": code})
    snapshot = backend.read(Detail.FULL)
    (gpu,) = snapshot.gpus
    assert snapshot.problem is None
    assert gpu.health is Health.OK
    assert getattr(gpu, field) is None
    others = {"utilization", "temperature_c", "processes", "mem_used_bytes"} - {field}
    assert all(getattr(gpu, other) is not None for other in others)


def test_a_missing_graphics_list_does_not_hide_the_compute_list(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    fake.set(
        {
            "gpu.0.error.nvmlDeviceGetGraphicsRunning": 3,
            "gpu.0.proc": ["4000000:5:C", "4000001:5:G"],
        }
    )
    (gpu,) = backend.read(Detail.PROCESSES).gpus
    assert gpu.processes is not None
    assert [item.pid for item in gpu.processes] == [4000000]


@pytest.mark.parametrize(
    ("code", "health"),
    [
        (15, Health.LOST),
        (16, Health.RESET_REQUIRED),
        (11, Health.UNKNOWN),
        (999, Health.UNKNOWN),
        (10, Health.UNKNOWN),
    ],
)
def test_a_card_that_is_not_well_says_so_and_the_others_go_on(
    code: int, health: Health, fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    fake.set({"gpu.0.uuid": "GPU-sick", "gpu.0.name": "Sick", "gpu.1.uuid": "GPU-well"})
    assert [gpu.health for gpu in backend.read().gpus] == [Health.OK, Health.OK]
    fake.change(gpu__0__error=code, gpu__1__util=8)
    for _ in range(2):  # with its handle, and when it is looked for again
        snapshot = backend.read(Detail.FULL)
        sick, well = sorted(snapshot.gpus, key=lambda gpu: gpu.uuid)
        assert snapshot.problem is None
        assert (sick.uuid, sick.name, sick.health) == ("GPU-sick", "Sick", health)
        assert sick.health_text
        assert (sick.utilization, sick.mem_used_bytes, sick.mem_total_bytes) == (None, None, None)
        assert (sick.processes, sick.power_w) == (None, None)
        assert (well.health, well.utilization) == (Health.OK, 0.08)
        clock.mono += 11
    fake.change(gpu__0__error=None)
    clock.mono += 11
    assert [gpu.health for gpu in backend.read().gpus] == [Health.OK, Health.OK]


def test_a_card_lost_before_we_came_still_shows(fake: FakeNvml, backend: NvmlBackend) -> None:
    fake.set({"gpu.0.error": 15, "gpu.1.uuid": "GPU-well"})
    healths = {gpu.uuid: gpu.health for gpu in backend.read().gpus}
    assert healths == {"GPU-well": Health.OK, "nvidia:index:0": Health.LOST}


def test_a_card_that_we_may_not_use_is_not_ours(
    fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    fake.set({"gpu.0.error": 4, "gpu.1.uuid": "GPU-ours"})
    assert [gpu.uuid for gpu in backend.read().gpus] == ["GPU-ours"]
    fake.set({"gpu.0.error": 4})
    clock.mono += 11
    snapshot = backend.read()
    assert snapshot.gpus == ()
    assert "may use none" in (snapshot.problem or "")


# ---- the driver as a whole


def test_no_visible_gpu_is_a_problem_and_no_idle_machine(
    fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    fake.set({"driver": "580"})
    snapshot = backend.read()
    assert snapshot.gpus == ()
    assert "shows no GPU" in (snapshot.problem or "")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (18, "driver/library version mismatch"),
        (999, "unknown error"),
        (4, "access to /dev/nvidia"),
        (11, "dmesg"),
        (13, "upgrade the NVIDIA driver"),
        (17, "the operating system blocks"),
        (77, "error 77"),
    ],
)
def test_a_driver_that_is_there_and_not_well_is_a_problem_until_it_recovers(
    code: int, text: str, fake: FakeNvml, clock: HandClock
) -> None:
    fake.change(init=code)
    backend = open_nvml(Settings(), clock)
    snapshot = backend.read()
    assert text in (snapshot.problem or "")
    assert snapshot.gpus == ()
    fake.change(init=None)
    clock.mono += 120
    assert backend.read().problem is None
    backend.close()


@pytest.mark.parametrize("code", [9, 12])
def test_without_a_driver_the_backend_is_not_available(
    code: int, fake: FakeNvml, clock: HandClock
) -> None:
    fake.change(init=code)
    with pytest.raises(BackendUnavailableError, match="driver"):
        open_nvml(Settings(), clock)


@pytest.mark.parametrize("code", [9, 999])
def test_letting_go_of_a_broken_driver_raises_nothing(
    code: int, fake: FakeNvml, clock: HandClock
) -> None:
    backend = NvmlBackend(clock, bus=PciBus(Path("none"), Path("none")))
    assert backend.read().problem is None
    fake.change(all=code)
    backend.close()
    backend.read()
    backend.close()
    while fake.refcount() > 0:
        fake.change(all=None)
        pynvml.nvmlShutdown()


@pytest.mark.parametrize(
    ("content", "said"),
    [("no library", "cannot be loaded"), (None, "is not installed here")],
    ids=["garbage in its place", "none"],
)
def test_a_library_that_cannot_be_loaded_is_not_called_missing(
    content: str | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "libnvidia-ml.so.1").write_text(content)
    code = (
        "from gpusched_ipy.backends import detect\n"
        "from gpusched_ipy.config import Settings\n"
        "print(detect(Settings(backend='nvml')).explanation)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if content is None and "no GPU can be read" not in done.stdout:
        pytest.skip("this machine has a libnvidia-ml.so.1 of its own")
    assert said in done.stdout, done.stderr


def test_a_loaded_driver_without_its_library_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    monkeypatch.setattr(_nvml_library, "_LIBRARY", str(tmp_path / "libnvidia-ml.so.1"))
    monkeypatch.setattr(_nvml_library, "_DRIVER_VERSION", str(version))
    assert "not installed" in _nvml_library.why_not_loaded()
    version.write_text("NVRM version: ...")
    assert "NVIDIA_DRIVER_CAPABILITIES" in _nvml_library.why_not_loaded()


def test_detect_names_the_reason(fake: FakeNvml, clock: HandClock) -> None:
    fake.change(init=9)
    found = detect(Settings(backend="nvml"), clock)
    assert found.backend is None
    assert "not loaded" in found.explanation


def test_attempts_are_made_with_growing_pauses(
    fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    fake.change(init=18)
    fake.calls(reset=True)
    tried = []
    for _ in range(400):
        before = fake.calls("nvmlInitWithFlags")
        assert backend.read().problem
        if fake.calls("nvmlInitWithFlags") > before:
            tried.append(clock.mono)
        clock.mono += 0.5
    pauses = [after - before for before, after in pairwise(tried)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    fake.change(init=None)
    clock.mono += 60
    assert backend.read().problem is None


def test_a_library_that_somebody_shut_down_is_opened_again_at_once(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    assert backend.read().problem is None
    pynvml.nvmlShutdown()
    assert fake.refcount() == 0
    assert backend.read().problem is None
    assert fake.refcount() == 1
    backend.close()
    assert fake.refcount() == 0


def test_a_driver_that_goes_away_and_comes_back(
    fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    assert backend.read().problem is None
    fake.change(all=9)
    snapshot = backend.read()
    assert (snapshot.gpus, snapshot.problem) == ((), "the NVIDIA driver is not loaded")
    fake.change(all=None)
    clock.mono += 2
    assert backend.read().problem is None
    assert fake.refcount() <= 2  # the shutdown of the dead library could not be counted


def test_a_working_handle_outlives_a_driver_upgrade(
    fake: FakeNvml, backend: NvmlBackend, clock: HandClock
) -> None:
    assert backend.read().problem is None
    fake.change(init=18, gpu__0__util=33)  # from now on every new process is refused
    for _ in range(5):
        clock.mono += 15
        (gpu,) = backend.read().gpus
        assert gpu.utilization == 0.33


def test_what_others_initialised_stays_initialised(fake: FakeNvml, backend: NvmlBackend) -> None:
    pynvml.nvmlInit()
    backend.read()
    assert fake.refcount() == 2
    backend.close()
    backend.close()
    assert fake.refcount() == 1
    assert pynvml.nvmlDeviceGetCount() == 1
    backend.read()
    assert fake.refcount() == 2
    backend.close()
    pynvml.nvmlShutdown()


def test_a_hanging_driver_hangs_one_thread_and_not_the_interpreter(
    fake: FakeNvml, backend: NvmlBackend
) -> None:
    assert backend.read(Detail.LOAD).problem is None
    fake.change(hang="nvmlDeviceGetUtilizationRates")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(backend.read(Detail.LOAD)), daemon=True)
    thread.start()
    steps = 0
    while fake.calls("nvmlDeviceGetUtilizationRates") < 2:
        steps += 1
    thread.join(0.05)
    assert thread.is_alive()
    assert not answers
    fake.change(hang=None)
    thread.join(60)
    assert answers[0].problem is None


# ---- cards that sleep


def test_a_sleeping_card_is_never_touched(fake: FakeNvml, clock: HandClock, tmp_path: Path) -> None:
    bus = _pci(tmp_path, "0000:01:00.0", status="suspended")
    backend = NvmlBackend(clock, bus=bus)
    assert backend.open() == 0
    snapshot = backend.read(Detail.FULL)
    (gpu,) = snapshot.gpus
    assert snapshot.problem is None
    assert (gpu.uuid, gpu.name, gpu.health) == ("GPU-laptop", "NVIDIA RTX Laptop", Health.ASLEEP)
    assert (gpu.utilization, gpu.mem_used_bytes, gpu.processes) == (None, None, None)
    assert fake.calls() == 0
    fake.set({"gpu.0.uuid": "GPU-laptop", "gpu.0.util": 5})
    _pci(tmp_path, "0000:01:00.0", status="active")
    (gpu,) = backend.read(Detail.LOAD).gpus
    assert (gpu.uuid, gpu.utilization) == ("GPU-laptop", 0.05)
    _pci(tmp_path, "0000:01:00.0", status="suspended")
    fake.calls(reset=True)
    (gpu,) = backend.read(Detail.FULL).gpus
    assert gpu.health is Health.ASLEEP
    assert fake.calls() == 0
    backend.close()


def test_a_card_that_may_not_sleep_costs_no_look_at_its_power_state(
    fake: FakeNvml, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = NvmlBackend(clock, bus=_pci(tmp_path, "0000:01:00.0", status="active", control="on"))
    backend.read(Detail.LOAD)
    looked: list[str] = []
    monkeypatch.setattr(PciBus, "asleep", lambda self, bus_id: looked.append(bus_id))
    backend.read(Detail.LOAD)
    assert looked == []
    backend.close()


def test_bus_addresses() -> None:
    assert sysfs_bus_id("00000000:0C:00.0") == "0000:0c:00.0"
    assert sysfs_bus_id("0000000F:01:00.0") == "000f:01:00.0"
    assert sysfs_bus_id("") == ""


# ---- whose pid it is


def test_a_pid_of_another_namespace_is_not_looked_up(
    fake: FakeNvml, clock: HandClock, bus: PciBus
) -> None:
    fake.change(gpu__0__proc=[f"{os.getpid()}:1024:C"])
    backend = NvmlBackend(clock, bus=bus, identities=Identities(host_pids=False))
    (gpu,) = backend.read(Detail.FULL).gpus
    backend.close()
    assert gpu.processes is not None
    (listed,) = gpu.processes
    assert (listed.visible, listed.name, listed.user) == (False, None, None)
    assert listed.utilization is None  # the two lists may count pids differently


def test_a_pid_that_provably_uses_the_gpu_is_known_in_a_container_too(tmp_path: Path) -> None:
    me = os.getpid()
    (tmp_path / str(me) / "fd").mkdir(parents=True)
    identities = Identities(host_pids=False, proc=tmp_path)
    assert not identities.find(me).visible
    (tmp_path / str(me) / "fd" / "7").symlink_to("/dev/nvidia0")
    identities.begin()
    assert identities.find(me).visible
    assert identities.find(me).name


def test_a_pid_given_out_again_is_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = Identities(host_pids=True)
    looked: list[int] = []

    def look_up(pid: int) -> object:
        looked.append(pid)
        return SimpleNamespace()

    monkeypatch.setattr("gpusched_ipy.backends._nvidia_processes._look_up", look_up)
    real = os.stat
    entries = iter([(1, 10), (1, 10), (2, 20)])

    def stat(path: str) -> object:
        if str(path) != "/proc/77":
            return real(path)
        inode, changed = next(entries)
        return SimpleNamespace(st_ino=inode, st_ctime_ns=changed)

    monkeypatch.setattr(os, "stat", stat)
    for _ in range(3):
        identities.begin()
        for _ in range(8):  # it is on so many GPUs, and asked for once
            identities.find(77)
    assert looked == [77, 77]


def test_each_reading_asks_anew_who_a_process_is(fake: FakeNvml, backend: NvmlBackend) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fake.set({"gpu.0.uuid": "GPU-fake-0", "gpu.0.proc": [f"{child.pid}:{GIB}:C"]})
    names = []
    for _ in range(2):
        (gpu,) = backend.read(Detail.FULL).gpus
        assert gpu.processes is not None
        names.append(gpu.processes[0].name)
        child.communicate()
    assert names[0]
    assert names[1] is None, "it has ended, and its pid may be another's"


def test_a_process_that_is_gone_has_no_name() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    found = Identities(host_pids=True).find(child.pid)
    assert (found.name, found.user, found.started_at) == (None, None, None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pid namespaces are Linux's")
def test_the_first_pid_namespace_is_told_from_others() -> None:
    link = os.readlink("/proc/self/ns/pid")
    assert in_first_namespace() == (link == "pid:[4026531836]")


# ---- the package, and a process of its own


def test_the_dead_package_of_the_same_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__file__="/site/pynvml.py", nvmlInit=lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", old)
    with pytest.raises(BackendUnavailableError, match="nvidia-ml-py3"):
        open_nvml(Settings(), HandClock())


def test_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailableError, match="not installed"):
        open_nvml(Settings(), HandClock())


def test_the_library_is_found_by_its_name_in_a_process_of_its_own(tmp_path: Path) -> None:
    fake = FakeNvml(tmp_path)
    fake.set({"gpu.0.uuid": "GPU-child", "gpu.0.util": 42})
    code = (
        "from gpusched_ipy.backends import detect\n"
        "from gpusched_ipy.config import Settings\n"
        "found = detect(Settings(backend='auto'))\n"
        "gpu, = found.backend.read().gpus\n"
        "print(found.backend.name, gpu.uuid, gpu.utilization)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **fake.env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["nvml", "GPU-child", "0.42"], done.stderr


def test_the_cost_of_our_side(
    fake: FakeNvml, backend: NvmlBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds far above the targets: the benchmark measures, this only catches a blunder."""
    import timeit
    from time import thread_time

    monkeypatch.setenv("FAKE_NVML_POLL_US", "10000000")
    me = os.getpid()
    fake.set(
        {
            **{f"gpu.{index}.uuid": f"GPU-{index}" for index in range(8)},
            **{f"gpu.{index}.proc": [f"{me}:1024:C", "4000000:1:C"] for index in range(8)},
        }
    )
    cost: Callable[[Detail], float] = lambda detail: (  # noqa: E731
        min(timeit.repeat(lambda: backend.read(detail), timer=thread_time, number=20, repeat=20))
        / 20
    )
    assert len(backend.read().gpus) == 8
    assert cost(Detail.LOAD) < 250e-6
    assert cost(Detail.FULL) < 1500e-6
