"""Recorded outputs of Apple, AMD and Intel tools against what a right parser reads from them.

Each format has one view, and a value that the view does not have fails, so that nothing of a new
recording is passed over; see ``captures.py``.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_nvidia_captures as nvidia
from captures import Entry, agree, entries, folder, need, of_formats, path_of

from gpusched_ipy.backends import Detail, amd, powermetrics
from gpusched_ipy.backends import _amd_text as amd_text
from gpusched_ipy.backends import _apple_text as apple
from gpusched_ipy.backends import _intel_text as intel
from gpusched_ipy.backends import _sysfs as sysfs
from gpusched_ipy.config import Settings, SystemClock

pytestmark = pytest.mark.captures
View = Callable[[Path, Path], dict[str, Any]]


def percent(ratio: float | None) -> float | None:
    return None if ratio is None else ratio * 100


def sample_view(sample: apple.Sample) -> dict[str, Any]:
    energy = (
        sample.power_w * sample.elapsed_s * 1000
        if sample.power_w is not None and sample.elapsed_s is not None
        else None
    )
    return {
        "hw_model": sample.model,
        "elapsed_ns": None if sample.elapsed_s is None else sample.elapsed_s * 1e9,
        "thermal_pressure": sample.thermal_pressure,
        "gpu_freq_mhz": sample.freq_mhz,
        "gpu_idle_ratio": None if sample.active is None else 1 - sample.active,
        "util_pct": percent(sample.active),
        "util_scaled_pct": percent(sample.scaled),
        "gpu_energy_mj": energy,
        "power_w": sample.power_w,
        "mem_used_bytes": sample.ram_used_bytes,
        "mem_total_bytes": sample.ram_total_bytes,
        "temp_c": sample.temperature_c,
        "processes": None,
    }


def powermetrics_view(path: Path, scratch: Path) -> dict[str, Any]:
    documents = map(apple.parse_powermetrics, apple.split_documents(path.read_bytes()))
    return {"documents": [sample_view(sample) for sample in documents if sample is not None]}


def macmon_view(path: Path, scratch: Path) -> dict[str, Any]:
    samples = map(apple.parse_macmon, path.read_bytes().splitlines())
    return {"gpus": [sample_view(sample) for sample in samples if sample is not None]}


def ioreg_view(path: Path, scratch: Path) -> dict[str, Any]:
    return {
        "gpus": [
            {
                "name": item.name,
                "cores": item.cores,
                "util_pct": percent(item.utilization),
                "mem_used_bytes": item.mem_used_bytes,
                "mem_total_bytes": item.vram_total_bytes,
                "temp_c": item.temperature_c,
                "power_w": item.power_w,
                "freq_mhz": item.freq_mhz,
            }
            for item in apple.parse_ioreg(path.read_bytes())
        ]
    }


def xpu_smi_view(path: Path, scratch: Path) -> dict[str, Any]:
    reader = intel.DumpReader()
    rows = [row for line in path.read_bytes().splitlines() if (row := reader.row(line))]
    shown = [
        {
            "index": row.device,
            "util_pct": percent(row.utilization),
            "power_w": row.power_w,
            "freq_mhz": row.clock_mhz,
            "temp_c": row.temperature_c,
            "mem_used_bytes": row.mem_used_bytes,
            "mem_pct": percent(row.mem_ratio),
        }
        for row in rows
    ]
    return {
        "rows": len(rows),
        "devices": len({row.device for row in rows}),
        "first": shown[0],
        "last": shown[-1],
    }


def sysfs_view(path: Path, scratch: Path) -> dict[str, Any]:
    """The folder of one card's device files, read by the backend where the kernel has it."""
    place = scratch / "sys/class/drm/card0"
    place.mkdir(parents=True)
    (place / "device").symlink_to(path)
    (gpu,) = amd.AmdBackend(scratch).read(Detail.FULL).gpus
    (card,) = sysfs.cards(scratch, amd.VENDOR_ID)
    clock = amd_text.current_clock(sysfs.read_text(path / "pp_dpm_sclk"))
    return {
        "gpus": [
            {
                "util_pct": percent(gpu.utilization),
                "mem_total_bytes": gpu.mem_total_bytes,
                "mem_used_bytes": gpu.mem_used_bytes,
                "gtt_total_bytes": sysfs.read_count(path / "mem_info_gtt_total"),
                "gtt_used_bytes": sysfs.read_count(path / "mem_info_gtt_used"),
                "unique_id": gpu.uuid.removeprefix("amd:"),
                "name": amd.read_card(card, Detail.FULL)[1].name,
                "temp_c": gpu.temperature_c,
                "power_w": gpu.power_w,
                "freq_mhz": clock,
            }
        ]
    }


VIEWS: dict[str, View] = {
    "powermetrics plist": powermetrics_view,
    "powermetrics plist stream": powermetrics_view,
    "macmon JSON": macmon_view,
    "ioreg plist": ioreg_view,
    "xpu-smi csv": xpu_smi_view,
    "sysfs tree": sysfs_view,
}
# What no backend reads: the same facts come from the formats above, in a form that does not change.
NOT_READ = {
    "powermetrics text": "the property list says the same",
    "ioreg text": "the property list says the same",
    "rocm-smi JSON": "rocm-smi prints what is read from the kernel's files",
    "rocm-smi table": "rocm-smi prints what is read from the kernel's files",
    "amd-smi JSON": "amdsmi is asked as a library",
    "tegrastats": "no Jetson backend",
}


@pytest.mark.parametrize("entry", of_formats(VIEWS))
def test_a_recording_reads_as_expected(entry: Entry | None, tmp_path: Path) -> None:
    entry = need(entry)
    found = VIEWS[entry["format"]](path_of(entry), tmp_path / "root")
    agree(entry["expect"], found, entry["file"])


def test_no_recording_is_passed_over() -> None:
    """Whatever lies in the folder is listed, and whatever is listed is read or left out."""
    place = folder()
    known = {*VIEWS, *NOT_READ, *nvidia.VIEWS, *nvidia.NOT_READ}
    strange = {
        entry["file"]: entry["format"] for entry in entries() if entry["format"] not in known
    }
    assert not strange, f"no view reads these formats: {strange}"
    listed = [path_of(entry) for entry in entries()]
    assert not [str(path) for path in listed if not path.exists()]
    loose = [
        str(path.relative_to(place))
        for path in place.rglob("*")
        if path.is_file() and path.parent != place and not {path, *path.parents} & {*listed}
    ]
    assert not loose, f"expected.json says nothing of {loose}"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("entry", of_formats(VIEWS))
def test_a_recording_that_is_cut_gives_no_value_that_is_not_there(
    entry: Entry | None, share: float, tmp_path: Path
) -> None:
    path = path_of(entry := need(entry))
    if path.is_dir():
        pytest.skip("a folder of files, not a text")
    whole = path.read_bytes()
    part = tmp_path / "cut"
    part.write_bytes(whole[: int(len(whole) * share)])
    lists = ("documents", "gpus")
    full = VIEWS[entry["format"]](path, tmp_path)
    if entry["format"] == "xpu-smi csv":
        reader = intel.DumpReader()
        lines = part.read_bytes().splitlines()
        complete = [row for line in lines[:-1] if (row := reader.row(line))]
        assert len(complete) <= full["rows"]
        return
    try:
        cut = VIEWS[entry["format"]](part, tmp_path)
    except ValueError:
        # One document, which the backend refuses as a whole.
        assert entry["format"] == "ioreg plist"
        return
    for key in lists:
        assert cut.get(key, []) == full.get(key, [])[: len(cut.get(key, []))]


def test_the_recorded_stream_reaches_the_reading_of_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder()
    streams = [entry for entry in entries() if entry["format"] == "powermetrics plist stream"]
    if not streams:
        pytest.skip("there is no recording of a stream in the folder")
    for entry in streams:
        bin_ = tmp_path / "bin"
        bin_.mkdir(exist_ok=True)
        for name, body in {
            "sudo": f"cat {path_of(entry)}; exec sleep 600",
            "ioreg": f"cat {tmp_path}/ioreg",
            "sysctl": "exit 1",
        }.items():
            (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
            (bin_ / name).chmod(stat.S_IRWXU)
        (tmp_path / "ioreg").write_text(
            '<plist version="1.0"><array><dict><key>PerformanceStatistics</key>'
            "<dict/></dict></array></plist>"
        )
        monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
        backend = powermetrics.open_powermetrics(Settings(), SystemClock())
        last = entry["expect"]["documents"][-1]
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                (gpu,) = backend.read().gpus
                if gpu.power_w == pytest.approx(last["power_w"], abs=1e-4):
                    break
                time.sleep(0.02)
        finally:
            backend.close()
        assert gpu.power_w == pytest.approx(last["power_w"], abs=1e-4)
        assert gpu.sm_clock_mhz == pytest.approx(last["gpu_freq_mhz"])
        # ioreg did not tell it here, so powermetrics' own residency stands.
        assert percent(gpu.utilization) == pytest.approx(last["util_pct"], abs=1e-3)
