"""Apple GPUs: parsers on shapes of our own writing, and both backends against stand-in tools."""

from __future__ import annotations

import contextlib
import json
import math
import os
import plistlib
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpusched_ipy.backends import Detail, detect, powermetrics
from gpusched_ipy.backends import _apple_text as text
from gpusched_ipy.config import Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import MemoryKind

GIB = 1024**3
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class HandClock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.mono = 1000.0

    def now(self) -> Instant:
        return Instant(mono=self.mono, wall=1.7e9 + self.mono)


def ioreg_tree(
    *, utilization: int = 26, used: int = GIB, clients: dict[str, list[int]] | None = None
) -> list[dict[str, Any]]:
    children = [
        {
            "IOObjectClass": "AGXDeviceUserClient",
            "IOUserClientCreator": creator,
            "AppUsage": [{"API": "Metal", "accumulatedGPUTime": ns} for ns in times],
        }
        for creator, times in (clients or {}).items()
    ]
    return [
        {
            "IOObjectClass": "AGXAcceleratorG15G",
            "model": "Apple M3",
            "gpu-core-count": 10,
            "vendor-id": b"\x6b\x10\x00\x00",
            "PerformanceStatistics": {
                "In use system memory (driver)": 0,
                "Alloc system memory": 5 * GIB,
                "Device Utilization %": utilization,
                "Renderer Utilization %": 25,
                "Tiler Utilization %": 26,
                "In use system memory": used,
                "recoveryCount": 0,
            },
            # One level more than the registry has today: the walk does not count levels.
            "IORegistryEntryChildren": [
                {"IOObjectClass": "AGXSomething", "IORegistryEntryChildren": children[:1]},
                *children[1:],
            ],
        }
    ]


def power_tree(**gpu: Any) -> dict[str, Any]:
    """A document of powermetrics with the gpu_power and thermal samplers (M2 and later)."""
    return {
        "is_delta": True,
        "elapsed_ns": 1_009_000_000,
        "hw_model": "Mac15,3",
        "thermal_pressure": "Nominal",
        "gpu": {
            "freq_hz": 1338.0,
            "idle_ns": 252_250_000,
            "idle_ratio": 0.25,
            "dvfm_states": [
                {"freq": 338, "used_ns": 504_500_000, "used_ratio": 0.5},
                {"freq": 1352, "used_ns": 252_250_000, "used_ratio": 0.25},
            ],
            "sw_requested_state": [{"sw_req_state": "P1", "used_ratio": 1.0}],
            "gpu_energy": 5045,
            **gpu,
        },
    }


def test_ioreg_reads_the_right_memory_counter_and_walks_to_the_clients() -> None:
    tree = ioreg_tree(clients={"pid 533, WindowServer": [5, 6], "pid 7, python3.11": [1]})
    tree[0]["IORegistryEntryChildren"].append(
        {"IOUserClientCreator": "pid 533, WindowServer", "AppUsage": [{"accumulatedGPUTime": 100}]}
    )
    (found,) = text.parse_ioreg(plistlib.dumps(tree))
    assert (found.name, found.cores, found.utilization) == ("Apple M3", 10, 0.26)
    assert found.mem_used_bytes == GIB
    assert {client.pid: (client.name, client.gpu_ns) for client in found.clients} == {
        533: ("WindowServer", 111),
        7: ("python3.11", 1),
    }


def test_ioreg_of_a_mac_with_two_cards() -> None:
    tree = [
        {"IOClass": "IntelAccelerator", "PerformanceStatistics": {"Device Utilization %": 3}},
        {
            "IOClass": "AMDRadeonX6000_AMDNavi14GraphicsAccelerator",
            "model": b"AMD Radeon Pro 5500M\0",
            "PerformanceStatistics": {
                "GPU Activity(%)": 40,
                "vramUsedBytes": 1 * GIB,
                "vramFreeBytes": 3 * GIB,
                "Temperature(C)": 58,
                "Total Power(W)": 19,
                "Core Clock(MHz)": 300,
            },
        },
        {"IOClass": "SomethingElse"},
    ]
    integrated, card = text.parse_ioreg(plistlib.dumps(tree))
    assert (integrated.utilization, integrated.mem_used_bytes) == (0.03, None)
    assert (card.name, card.utilization) == ("AMD Radeon Pro 5500M", 0.4)
    assert (card.mem_used_bytes, card.vram_total_bytes) == (GIB, 4 * GIB)
    assert (card.temperature_c, card.power_w, card.freq_mhz) == (58, 19, 300)
    assert (integrated.temperature_c, integrated.power_w, integrated.freq_mhz) == (None, None, None)


def test_ioreg_without_a_gpu_and_with_garbage() -> None:
    assert text.parse_ioreg(b"\n") == ()
    with pytest.raises(ValueError, match="no property list"):
        text.parse_ioreg(b"+-o AGXAccelerator <class ...>")


def test_powermetrics_units() -> None:
    sample = text.parse_powermetrics(b"\0" + plistlib.dumps(power_tree()) + b"\n")
    assert sample is not None
    assert sample.active == pytest.approx(0.75)
    assert sample.scaled == pytest.approx(0.5 * 338 / 1352 + 0.25)
    assert sample.freq_mhz == 1338.0  # the key says Hz, the number is MHz
    assert sample.power_w == pytest.approx(5.0)  # 5045 mJ in 1.009 s
    assert (sample.model, sample.thermal_pressure) == ("Mac15,3", "Nominal")


def test_powermetrics_of_other_releases() -> None:
    tree = power_tree(freq_hz=1338e6)
    del tree["gpu"]["idle_ratio"]
    del tree["gpu"]["gpu_energy"]
    tree["processor"] = {"gpu_power": 15.3528, "clusters": [{"name": "S-Cluster"}]}
    sample = text.parse_powermetrics(plistlib.dumps(tree))
    assert sample is not None
    assert sample.active == pytest.approx(0.75)  # from idle_ns
    assert sample.freq_mhz == pytest.approx(1338)
    assert sample.power_w == pytest.approx(0.0153528)


@pytest.mark.parametrize(
    "line",
    [
        b"<key>idle_ratio</key><real></real>",
        b"<key>idle_ratio</key><real>-nan(ind)</real>",
        b"<key>idle_ratio</key><rea",
        b"<key>kern_bootargs</key><string>a & b</string>",
        b"<key>idle_ratio</key>",
    ],
)
def test_one_broken_line_does_not_cost_the_document(line: bytes) -> None:
    whole = plistlib.dumps(power_tree())
    document = whole.replace(b"</dict>\n</plist>", line + b"\n</dict>\n</plist>")
    assert document != whole
    sample = text.parse_powermetrics(document)
    assert sample is not None
    assert sample.active == pytest.approx(0.75)


def test_a_stream_gives_complete_documents_only() -> None:
    first, second = (plistlib.dumps(power_tree(idle_ratio=ratio)) for ratio in (0.25, 0.5))
    stream = first + b"\0" + second + b"\0" + first[: len(first) // 2]
    samples = [text.parse_powermetrics(part) for part in text.split_documents(stream)]
    assert [sample.active for sample in samples if sample] == pytest.approx([0.75, 0.5])


def test_macmon_old_and_new_names() -> None:
    old = {"gpu_usage": [503, 0.0136], "gpu_power": 0.0108, "temp": {"gpu_temp_avg": 29.4}}
    new = {
        "gpu_freq_mhz": 461,
        "gpu_scaled_ratio": 0.02,
        "gpu_active_ratio": 0.09,
        "gpu_power": 0.017,
        "temp": {"gpu_temp_avg": 0.0},
        "memory": {"ram_total": 24 * GIB, "ram_usage": 20 * GIB},
    }
    before, now = (text.parse_macmon(json.dumps(item).encode()) for item in (old, new))
    assert before is not None
    assert now is not None
    assert (before.freq_mhz, before.scaled, before.active) == (503, 0.0136, None)
    assert (before.power_w, before.temperature_c) == (0.0108, 29.4)
    assert (now.freq_mhz, now.scaled, now.active) == (461, 0.02, 0.09)
    assert now.temperature_c is None  # a sensor that is not there reads 0
    assert (now.ram_used_bytes, now.ram_total_bytes) == (20 * GIB, 24 * GIB)


@pytest.mark.parametrize(
    ("said", "word"),
    [(b"1\n", "normal"), (b"2", "warn"), (b"4\n", "critical"), (b"0\n", None), (b"", None)],
)
def test_pressure(said: bytes, word: str | None) -> None:
    assert text.parse_pressure(said) == word


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(min_value=-(2**63), max_value=2**64 - 1),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["N/A", "12,5", "1.234,5 W", "-", "[Not Supported]", "nan", "٣"]),
    st.lists(st.integers(min_value=0, max_value=9), max_size=2),
    st.dictionaries(st.sampled_from(["value", "unit", "freq"]), st.text(max_size=4), max_size=2),
)


def _plist(value: Any) -> Any:
    """``value`` without what a property list cannot hold."""
    if isinstance(value, dict):
        return {key: _plist(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plist(item) for item in value if item is not None]
    if isinstance(value, str):
        return "".join(char for char in value if char.isprintable())
    return value


def _check(sample: text.Sample | None) -> None:
    if sample is None:
        return
    for ratio in (sample.active, sample.scaled):
        assert ratio is None or 0 <= ratio <= 1
    for amount in (sample.freq_mhz, sample.power_w, sample.temperature_c):
        assert amount is None or (math.isfinite(amount) and amount >= 0)
    assert sample.ram_total_bytes is None or sample.ram_total_bytes > 0


@given(key=st.sampled_from(sorted(power_tree()["gpu"])), value=SCALARS)
def test_powermetrics_with_any_value_in_any_field(key: str, value: Any) -> None:
    tree = power_tree()
    tree["gpu"].pop(key)
    if value is not None:
        tree["gpu"][key] = _plist(value)
    sample = text.parse_powermetrics(plistlib.dumps(tree))
    _check(sample)
    assert sample is not None
    if key in ("idle_ratio", "idle_ns"):
        usable = not isinstance(value, bool) and isinstance(value, (int, float))
        # Only a source that says "all idle" may give 0.
        assert sample.active != 0 or (usable and value > 0) or isinstance(value, str)
    else:
        assert sample.active == pytest.approx(0.75)


@given(cut=st.integers(min_value=0, max_value=len(plistlib.dumps(power_tree())) - 12))
def test_powermetrics_cut_anywhere_is_no_reading(cut: int) -> None:
    assert text.parse_powermetrics(plistlib.dumps(power_tree())[:cut]) is None


@given(noise=st.binary(max_size=200))
def test_garbage_is_no_reading(noise: bytes) -> None:
    _check(text.parse_powermetrics(noise))
    _check(text.parse_powermetrics(noise + b"</plist>"))
    _check(text.parse_macmon(noise))
    assert text.parse_pressure(noise) in (None, "normal", "warn", "critical")
    with contextlib.suppress(ValueError):  # what the backend makes a problem of
        assert all(item.utilization is None for item in text.parse_ioreg(noise))


@given(
    at=st.integers(min_value=0, max_value=len(plistlib.dumps(power_tree())) - 10),
    noise=st.binary(min_size=1, max_size=8),
)
@example(at=30, noise=b"\0")  # the name of the encoding
def test_damage_anywhere_never_gives_a_value_out_of_range(at: int, noise: bytes) -> None:
    whole = plistlib.dumps(power_tree())
    _check(text.parse_powermetrics(whole[:at] + noise + whole[at + len(noise) :]))


@given(
    stats=st.dictionaries(
        st.sampled_from(sorted(ioreg_tree()[0]["PerformanceStatistics"])), SCALARS
    )
)
def test_ioreg_with_any_statistics(stats: dict[str, Any]) -> None:
    tree = ioreg_tree(clients={"pid 5, python": [7]})
    tree[0]["PerformanceStatistics"] = _plist(stats)
    (found,) = text.parse_ioreg(plistlib.dumps(tree))
    assert found.utilization is None or 0 <= found.utilization <= 1
    assert found.mem_used_bytes is None or found.mem_used_bytes >= 0
    if "Device Utilization %" not in stats:
        assert found.utilization is None
    if "In use system memory" not in stats:
        assert found.mem_used_bytes is None


@given(
    record=st.dictionaries(st.sampled_from(["gpu_usage", "gpu_power", "temp", "memory"]), SCALARS)
)
def test_macmon_with_any_values(record: dict[str, Any]) -> None:
    _check(text.parse_macmon(json.dumps(record).encode()))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tools]:
    found = Tools(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:/usr/bin:/bin")
    monkeypatch.setenv("GPUSCHED_STATE_DIR", str(tmp_path / "state"))
    yield found
    found.end()


class Tools:
    """Stand-ins for the tools of a Mac: each prints what the test put into its file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        self.opened: list[powermetrics.AppleBackend] = []
        self.show(ioreg_tree())
        log = f'echo "ioreg $*" >> {root}/calls'
        answer = (
            f'case "$*" in *"-d 1 "*) cat {root}/ioreg.load;; *) cat {root}/ioreg.clients;; esac'
        )
        self.script("ioreg", f"{log}\n{answer}")
        self.script(
            "sysctl",
            f'case "$*" in *hw.memsize*) echo {16 * GIB};; *) cat {root}/pressure;; esac',
        )
        (root / "pressure").write_text("1\n")

    def script(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def show(self, tree: list[dict[str, Any]]) -> None:
        shallow = [
            {k: v for k, v in item.items() if k != "IORegistryEntryChildren"} for item in tree
        ]
        (self.root / "ioreg.load").write_bytes(plistlib.dumps(shallow))
        (self.root / "ioreg.clients").write_bytes(plistlib.dumps(tree))

    def stream(self, name: str, documents: list[bytes], after: str = "exec sleep 600") -> None:
        """A tool that prints these and then goes on as ``after`` says; its pid is kept."""
        for number, document in enumerate(documents):
            (self.root / f"{name}.{number}").write_bytes(document)
        shown = "\n".join(f"cat {self.root}/{name}.{number}" for number in range(len(documents)))
        note = f'echo $$ > {self.root}/{name}.pid\necho "{name} $*" >> {self.root}/calls'
        self.script(name, f"{note}\n{shown}\n{after}")

    def calls(self, name: str) -> list[list[str]]:
        lines = (self.root / "calls").read_text().splitlines()
        return [line.split() for line in lines if line.startswith(name)]

    def pid(self, name: str) -> int:
        return int((self.root / f"{name}.pid").read_text())

    def open(self, name: str, clock: Any = None) -> powermetrics.AppleBackend:
        openers = {
            "ioreg": powermetrics.open_ioreg,
            "powermetrics": powermetrics.open_powermetrics,
        }
        backend = openers[name](Settings(), clock or SystemClock())
        self.opened.append(backend)
        return backend

    def end(self) -> None:
        for backend in self.opened:
            backend.close()


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("the condition did not come true")


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_without_root(tools: Tools) -> None:
    tools.show(ioreg_tree(clients={f"pid {os.getpid()}, python": [10**9]}))
    backend = tools.open("ioreg")
    light = backend.read(Detail.LOAD)
    full = backend.read(Detail.FULL)
    (gpu,) = full.gpus
    assert (full.problem, full.backend, gpu.uuid, gpu.vendor) == (None, "ioreg", "apple:0", "apple")
    assert gpu.name == "Apple M3 (10-core GPU)"
    assert (gpu.utilization, gpu.mem_used_bytes, gpu.mem_total_bytes) == (0.26, GIB, 16 * GIB)
    assert (gpu.mem_kind, gpu.mem_pressure) == (MemoryKind.UNIFIED, "normal")
    assert (gpu.power_w, gpu.temperature_c, gpu.sm_clock_mhz) == (None, None, None)
    assert light.gpus[0].processes is None  # not asked for is not "none"
    assert gpu.processes is not None
    (process,) = gpu.processes
    assert (process.pid, process.mem_bytes, process.utilization) == (os.getpid(), None, None)
    assert process.user is not None
    assert process.started_at is not None
    calls = {tuple(call) for call in tools.calls("ioreg")}
    assert calls == {powermetrics.IOREG_ARGV, powermetrics.IOREG_CLIENTS_ARGV}


def test_gpu_time_between_two_readings_is_a_share(tools: Tools) -> None:
    clock = HandClock()
    backend = tools.open("ioreg", clock)
    tools.show(ioreg_tree(clients={"pid 999999, python": [10**9], "pid 999998, Safari": [5]}))
    backend.read(Detail.PROCESSES)
    tools.show(ioreg_tree(clients={"pid 999999, python": [2 * 10**9], "pid 999998, Safari": [4]}))
    clock.mono += 4
    (gpu,) = backend.read(Detail.PROCESSES).gpus
    assert gpu.processes is not None
    shares = {process.name: process.utilization for process in gpu.processes}
    assert shares == {"python": 0.25, "Safari": None}  # a counter that ran backwards is another's


def test_nonsense_from_macmon_is_told(tools: Tools) -> None:
    tools.stream("macmon", [b"error: cannot sample\n" * 20])
    backend = tools.open("ioreg")
    told = wait_for(lambda: backend.read().gpus[0].health_text)
    assert told == "macmon prints what is not a reading"
    assert backend.read().gpus[0].utilization == 0.26


def test_pressure_is_read_each_time(tools: Tools) -> None:
    backend = tools.open("ioreg")
    (tools.root / "pressure").write_text("4\n")
    assert backend.read(Detail.LOAD).gpus[0].mem_pressure == "critical"
    tools.script("sysctl", "echo 'sysctl: unknown oid' >&2; exit 1")
    assert backend.read(Detail.LOAD).gpus[0].mem_pressure is None


def test_macmon_adds_what_ioreg_does_not_know(tools: Tools) -> None:
    line = {"gpu_usage": [503, 0.5], "gpu_power": 4.5, "temp": {"gpu_temp_avg": 41.5}}
    tools.stream("macmon", [b"macmon: hello\n" + json.dumps(line).encode() + b"\n"])
    backend = tools.open("ioreg")
    gpu = wait_for(lambda: next((g for g in backend.read().gpus if g.power_w is not None), None))
    assert (gpu.power_w, gpu.sm_clock_mhz, gpu.temperature_c) == (4.5, 503, 41.5)
    assert gpu.utilization == 0.26  # still ioreg's
    assert tools.calls("macmon") == [list(powermetrics.MACMON_ARGV)]
    pid = tools.pid("macmon")
    backend.close()
    wait_for(lambda: is_gone(pid))


def test_powermetrics_by_sudo(tools: Tools) -> None:
    first, second = (plistlib.dumps(power_tree(gpu_energy=mj)) for mj in (5045, 10090))
    tools.stream("sudo", [first, b"\0" + second, b"\0" + first[:700]])
    backend = tools.open("powermetrics")
    gpu = wait_for(lambda: next((g for g in backend.read().gpus if g.power_w == 10.0), None))
    assert (gpu.sm_clock_mhz, gpu.throttled, gpu.temperature_c) == (1338.0, False, None)
    assert (gpu.utilization, gpu.health_text) == (0.26, None)
    assert tools.calls("sudo") == [list(powermetrics.POWERMETRICS_ARGV)]
    assert tools.calls("sudo")[0][:3] == ["sudo", "-n", "/usr/bin/powermetrics"]


def test_sudo_that_asks_for_a_password_is_a_reason(tools: Tools) -> None:
    tools.script("sudo", "echo 'sudo: a password is required' >&2; exit 1")
    with pytest.raises(
        BackendUnavailableError, match=r"sudo -n .* a password is required.*NOPASSWD"
    ):
        tools.open("powermetrics")


def test_the_end_of_powermetrics_is_noticed_and_it_starts_again(tools: Tools) -> None:
    clock = HandClock()
    tools.stream("sudo", [plistlib.dumps(power_tree())])
    backend = tools.open("powermetrics", clock)
    assert wait_for(lambda: backend.read().gpus[0].power_w)
    before = tools.pid("sudo")
    tools.stream("sudo", [plistlib.dumps(power_tree(gpu_energy=2 * 5045))])
    os.kill(before, signal.SIGKILL)
    snapshot = wait_for(lambda: next((s for s in [backend.read()] if s.gpus[0].health_text), None))
    assert "sudo ended" in (snapshot.gpus[0].health_text or "")
    assert (snapshot.problem, snapshot.gpus[0].utilization) == (None, 0.26)
    clock.mono += 5  # older than a reading may be, and past the pause
    # The old value is never shown again: either nothing yet, or what the new one prints.
    assert backend.read().gpus[0].power_w in (None, pytest.approx(10.0))
    assert wait_for(lambda: backend.read().gpus[0].power_w) == pytest.approx(10.0)
    assert backend.read().gpus[0].health_text is None
    assert len(tools.calls("sudo")) == 2


def test_silence_of_powermetrics_is_noticed(tools: Tools) -> None:
    clock = HandClock()
    tools.stream("sudo", [plistlib.dumps(power_tree())])
    backend = tools.open("powermetrics", clock)
    assert wait_for(lambda: backend.read().gpus[0].power_w)
    pid = tools.pid("sudo")
    clock.mono += 60
    (gpu,) = backend.read().gpus
    assert gpu.power_w is None
    assert "printed nothing for 60 s" in (gpu.health_text or "")
    wait_for(lambda: is_gone(pid))


def test_powermetrics_that_prints_nonsense_is_not_used(tools: Tools) -> None:
    tools.stream("sudo", [b"powermetrics: unrecognized sampler: bandwidth\0\0"], after="exit 64")
    with pytest.raises(BackendUnavailableError, match="powermetrics"):
        tools.open("powermetrics")


def test_no_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("ioreg", "powermetrics"):
        found = detect(Settings(backend=name))
        assert found.backend is None
        assert "not a Mac" in found.explanation


def test_detection_takes_ioreg_where_sudo_refuses(tools: Tools) -> None:
    tools.script("sudo", "exit 1")
    found = detect(Settings(backend="ioreg"))
    assert found.backend is not None
    assert found.backend.read(Detail.LOAD).problem is None


def test_ioreg_that_fails_is_a_problem_and_no_old_data(tools: Tools) -> None:
    backend = tools.open("ioreg")
    assert backend.read().gpus
    tools.script("ioreg", "echo 'ioreg: error: cannot' >&2; exit 1")
    failed = backend.read()
    assert failed.gpus == ()
    assert failed.problem == "ioreg ended with status 1: ioreg: error: cannot"
    tools.script("ioreg", "exit 0")
    assert backend.read().problem == "ioreg shows no GPU"
    tools.script("ioreg", "echo nonsense")
    assert "no property list" in (backend.read().problem or "")
    (tools.bin / "ioreg").unlink()
    assert "cannot be started" in (backend.read().problem or "")


def test_ioreg_that_hangs_is_left_and_killed_with_what_it_started(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tools.open("ioreg")
    body = f"sleep 600 &\necho $! > {tools.root}/grandchild\necho $$ > {tools.root}/child\nwait"
    tools.script("ioreg", body)
    for limit_s in (0.5, 2.0, 8.0, 32.0):
        monkeypatch.setattr(powermetrics, "_TIMEOUT_S", limit_s)
        started = time.monotonic()
        assert f"no answer within {limit_s:g} s" in (backend.read(Detail.LOAD).problem or "")
        assert time.monotonic() - started < limit_s + 60
        child = tools.root / "child"
        if child.exists() and child.read_text():  # it has come so far before it was killed
            break
    for name in ("child", "grandchild"):
        pid = int((tools.root / name).read_text())
        wait_for(lambda pid=pid: is_gone(pid))


@settings(max_examples=15, suppress_health_check=QUIET, deadline=None)
@given(noise=st.binary(max_size=300))
def test_whatever_the_tools_print_the_reading_never_raises(tools: Tools, noise: bytes) -> None:
    tools.show(ioreg_tree())
    backend = tools.open("ioreg")
    (tools.root / "ioreg.clients").write_bytes(noise)
    (tools.root / "pressure").write_bytes(noise)
    snapshot = backend.read()
    assert snapshot.problem is not None
    assert snapshot.gpus == ()
