"""Recorded outputs of nvidia-smi against what a right parser reads from them.

Each format has one view, and a value that the view does not have fails, so that nothing of a new
recording is passed over; see ``captures.py``.
"""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from captures import Entry, agree, need, of_formats, path_of

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends._nvidia_faults import unknown_text
from gpusched_ipy.backends._nvidia_pci import PciBus
from gpusched_ipy.backends._nvidia_text import Row, ended, parse_apps, parse_query
from gpusched_ipy.backends._nvidia_xml import XmlGpu, parse_list, parse_xml
from gpusched_ipy.backends.nvidia_smi import NvidiaSmiBackend
from gpusched_ipy.errors import BackendReadError
from gpusched_ipy.snapshot import Health

pytestmark = pytest.mark.captures
StandIn = Callable[[Entry, int], NvidiaSmiBackend]
View = Callable[[str, Entry], dict[str, Any]]

_MODES = {
    "default": "Default",
    "exclusive_process": "Exclusive_Process",
    "prohibited": "Prohibited",
}


def percent(ratio: float | None) -> float | None:
    return None if ratio is None else ratio * 100


def row_view(row: Row) -> dict[str, Any]:
    return {
        "index": row.index,
        "name": row.name,
        "uuid": row.uuid,
        "bus_id": row.bus_id,
        "util_pct": percent(row.utilization),
        "mem_total_bytes": row.mem_total_bytes,
        "mem_used_bytes": row.mem_used_bytes,
        "mem_free_bytes": row.mem_free_bytes,
        "mem_reserved_bytes": row.mem_reserved_bytes,
        "temp_c": row.temperature_c,
        "power_w": row.power_w,
        "power_limit_w": row.power_limit_w,
        "sm_clock_mhz": row.sm_clock_mhz,
        "fan_pct": percent(row.fan),
        "pstate": row.pstate,
        "compute_mode": _MODES.get(row.compute_mode or ""),
        "mig_enabled": row.mig,
    }


def fields(entry: Entry) -> list[str] | None:
    """The columns of an answer without a header, as the recording names them."""
    if "noheader" not in entry["format"]:
        return None
    told = (entry["expect"].get("fields"), entry.get("fields"), entry["what"])
    named = next(
        found[0]
        for text in told
        if text and (found := re.search(r"(?<![\w.-])[a-z_]+(?:[.,][a-z0-9_]+)+", text))
    )
    return named.split(",")


def csv_view(text: str, entry: Entry) -> dict[str, Any]:
    columns = fields(entry) or re.findall(r"[\w.]+(?: \[[^]]*\])?", text.partition("\n")[0])
    if "pid" in columns:
        apps = parse_apps(text, fields(entry))
        return {
            "processes": [
                {"pid": app.pid, "name": app.name, "uuid": app.uuid, "mem_bytes": app.mem_bytes}
                for app in apps or ()
            ]
        }
    answer = parse_query(text, fields(entry))
    rows = [row_view(row) for row in answer.rows]
    # A looped answer has one card many times: a value that never changed, or all of them.
    looped = {
        key: values[0] if all(value == values[0] for value in values) else values
        for key in (rows[0] if rows else {})
        for values in [[row[key] for row in rows]]
    }
    return {
        **looped,
        "gpus": rows,
        "rows": len(rows),
        "columns": answer.columns,
        "fields": ",".join(fields(entry) or ()),
    }


def xml_gpu_view(gpu: XmlGpu) -> dict[str, Any]:
    processes = None
    if gpu.processes is not None:
        processes = [
            {
                "pid": item.pid,
                "type": item.kind,
                "name": item.name,
                "mem_bytes": item.mem_bytes,
                "gi": item.gi,
                "ci": item.ci,
            }
            for item in gpu.processes
        ]
    mig = [
        {
            "mig_index": item.index,
            "gi": item.gi,
            "ci": item.ci,
            "mem_total_bytes": item.mem_total_bytes,
            "mem_used_bytes": item.mem_used_bytes,
        }
        for item in gpu.instances
    ]
    return {**row_view(gpu.row), "processes": processes, "mig": mig}


def xml_view(text: str, entry: Entry) -> dict[str, Any]:
    answer = parse_xml(text)
    return {
        "driver": answer.driver,
        "cuda": answer.cuda,
        "attached": answer.attached,
        "gpus": [xml_gpu_view(gpu) for gpu in answer.gpus],
    }


def list_view(text: str, entry: Entry) -> dict[str, Any]:
    return {
        "gpus": [
            {"index": gpu.index, "name": gpu.name, "uuid": gpu.uuid} for gpu in parse_list(text)
        ],
        "mig": [
            {"profile": item.profile, "device": item.index, "uuid": item.uuid}
            for gpu in parse_list(text)
            for item in gpu.instances
        ],
    }


def error_view(text: str, entry: Entry) -> dict[str, Any]:
    answer = parse_query(text)
    fault = answer.faults[0] if answer.faults else unknown_text(text)
    return {"error": fault.kind.name, "gpus": [row_view(row) for row in answer.rows]}


VIEWS: dict[str, View] = {
    "nvidia-smi csv (header, units)": csv_view,
    "nvidia-smi csv (noheader,nounits)": csv_view,
    "nvidia-smi XML": xml_view,
    "nvidia-smi -L": list_view,
    "nvidia-smi error text": error_view,
}
# What no backend reads: made for people, with names cut short and words that move.
NOT_READ = {
    "nvidia-smi table": "the CSV says the same",
    "nvidia-smi -q text": "the XML says the same",
    "nvidia-smi pmon": "the CSV of the processes has their memory, NVML their utilization",
    "nvidia-smi dmon": "the CSV says the same",
}


def read(entry: Entry) -> str:
    """What was printed, as the backend takes it from a command that ended well."""
    return ended(path_of(entry).read_text(encoding="utf-8", errors="replace"))


@pytest.mark.parametrize("entry", of_formats(VIEWS))
def test_a_recording_reads_as_expected(entry: Entry | None) -> None:
    entry = need(entry)
    agree(entry["expect"], VIEWS[entry["format"]](read(entry), entry), entry["file"])


@pytest.mark.parametrize("entry", of_formats({"nvidia-smi error text"}))
@pytest.mark.parametrize("status", [0, 255])
def test_every_recorded_error_text_is_a_problem(
    entry: Entry | None, status: int, stand_in: StandIn
) -> None:
    entry = need(entry)
    backend = stand_in(entry, status)
    for detail in (Detail.LOAD, Detail.FULL):
        snapshot = backend.read(detail)
        told = snapshot.problem or [gpu.health_text for gpu in snapshot.gpus]
        assert told, f"{entry['file']} says nothing of what is wrong"
        for gpu in snapshot.gpus:
            assert gpu.health is not Health.OK
            assert (gpu.utilization, gpu.mem_used_bytes, gpu.power_w) == (None, None, None)


@pytest.mark.parametrize("entry", of_formats({"nvidia-smi csv (header, units)"}))
def test_a_recording_reaches_the_reading_of_the_backend(
    entry: Entry | None, stand_in: StandIn
) -> None:
    entry = need(entry)
    expected = entry["expect"].get("gpus", [])
    if not expected or any(gpu.get("uuid") is None or gpu.get("mig_enabled") for gpu in expected):
        pytest.skip("no list of GPUs, or one that takes more answers than this recording has")
    snapshot = stand_in(entry, 0).read(Detail.FULL)
    assert snapshot.problem is None
    found = [
        {
            "uuid": gpu.uuid,
            "bus_id": gpu.bus_id,
            "util_pct": percent(gpu.utilization),
            "temp_c": gpu.temperature_c,
            "power_w": gpu.power_w,
            "power_limit_w": gpu.power_limit_w,
            "sm_clock_mhz": gpu.sm_clock_mhz,
        }
        for gpu in snapshot.gpus
    ]
    assert len(found) == len(expected)
    for told, gpu in zip(expected, found, strict=True):
        agree({key: told[key] for key in gpu if key in told}, gpu, entry["file"])


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    """An nvidia-smi that prints a recording, whatever it is asked, and the backend on it."""
    made: list[NvidiaSmiBackend] = []

    def make(entry: Entry, status: int) -> NvidiaSmiBackend:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\ncat {shlex.quote(str(path_of(entry)))}\nexit {status}\n")
        command.chmod(stat.S_IRWXU)
        bus = PciBus(tmp_path / "no-pci", tmp_path / "no-proc")
        made.append(NvidiaSmiBackend((str(command),), bus=bus))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


@pytest.mark.parametrize("entry", of_formats(VIEWS))
def test_a_recording_that_is_cut_gives_nothing_that_is_not_there(entry: Entry | None) -> None:
    entry = need(entry)
    text = read(entry)
    view = VIEWS[entry["format"]]
    full = view(text, entry)
    step = max(1, len(text) // 60)
    for end in range(0, len(text), step):
        try:
            cut = view(text[:end], entry)
        except BackendReadError:
            assert entry["format"] == "nvidia-smi XML"
            continue
        for key in ("gpus", "processes", "mig"):
            part = cut.get(key, [])
            assert part == full.get(key, [])[: len(part)], f"{entry['file']} cut at {end}"
