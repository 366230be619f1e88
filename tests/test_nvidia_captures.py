"""Recorded outputs of nvidia-smi against what a right parser reads from them.

The recordings are other people's and not part of this package: GPUSCHED_CAPTURES names their
folder. No file is treated in a way of its own; each format has one view, and a value that the view
does not have fails, so that nothing of a new recording is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpusched_ipy.backends._nvidia_faults import unknown_text
from gpusched_ipy.backends._nvidia_text import Row, parse_apps, parse_query
from gpusched_ipy.backends._nvidia_xml import XmlGpu, parse_list, parse_xml
from gpusched_ipy.errors import BackendReadError

FOLDER = os.environ.get("GPUSCHED_CAPTURES")
pytestmark = pytest.mark.captures
Entry = dict[str, Any]
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
    asked = re.search(r"--query-[a-z-]+=([a-z_.,]+)", entry["what"])
    named: str = asked[1] if asked else entry["expect"]["fields"]
    return named.split(",")


def csv_view(text: str, entry: Entry) -> dict[str, Any]:
    if "--query-compute-apps" in entry["what"]:
        apps = parse_apps(text, fields(entry))
        return {
            "processes": [
                {"pid": app.pid, "name": app.name, "uuid": app.uuid, "mem_bytes": app.mem_bytes}
                for app in apps
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


def entries() -> list[Entry]:
    if FOLDER is None:
        return []
    listed = json.loads((Path(FOLDER) / "expected.json").read_text(encoding="utf-8"))
    return [entry for entry in listed if entry["format"].startswith("nvidia-smi")]


def those_that_are_read() -> list[Any]:
    """The recordings for ``parametrize``; a lone None, which skips, where there are none."""
    found = [entry for entry in entries() if entry["format"] in VIEWS]
    return [pytest.param(entry, id=entry["file"]) for entry in found] or [None]


def need_captures() -> Path:
    if FOLDER is None:
        pytest.skip("GPUSCHED_CAPTURES does not name the folder of the recordings")
    return Path(FOLDER)


def agree(expected: Any, found: Any, where: str) -> None:
    if isinstance(expected, Mapping):
        assert isinstance(found, Mapping), where
        for key, value in expected.items():
            if key == "note":
                continue
            assert key in found, f"{where}: the view has no {key}"
            agree(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), where
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(expected, found, strict=True)):
            agree(*pair, f"{where}[{number}]")
    elif isinstance(expected, (int, float)) and not isinstance(expected, bool):
        assert found == pytest.approx(expected, rel=1e-9), where
    else:
        assert found == expected, where


def read(entry: Entry) -> str:
    return (need_captures() / entry["file"]).read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize("entry", those_that_are_read())
def test_a_recording_reads_as_expected(entry: Entry | None) -> None:
    need_captures()
    assert entry is not None
    agree(entry["expect"], VIEWS[entry["format"]](read(entry), entry), entry["file"])


def test_every_format_is_read_or_left_out_for_a_reason() -> None:
    need_captures()
    assert {entry["format"] for entry in entries()} == set(VIEWS) | set(NOT_READ)


@pytest.mark.parametrize("entry", those_that_are_read())
def test_a_recording_that_is_cut_gives_nothing_that_is_not_there(entry: Entry | None) -> None:
    need_captures()
    assert entry is not None
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
