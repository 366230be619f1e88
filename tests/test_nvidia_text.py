"""Texts of nvidia-smi as other versions, other cards and worse days print them."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched_ipy.backends import _nvidia_text as text
from gpusched_ipy.backends._nvidia_faults import FaultKind, classify
from gpusched_ipy.backends._nvidia_xml import XmlGpu, parse_xml
from gpusched_ipy.errors import BackendReadError
from gpusched_ipy.snapshot import Health

MIB = 1 << 20
DOCUMENT = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v13.dtd">
<nvidia_smi_log>
  <driver_version>590.48.01</driver_version>
  <cuda_version>13.1</cuda_version>
  <attached_gpus>1</attached_gpus>
  <gpu id="00000000:65:00.0">
    <product_name>NVIDIA RTX PRO 6000</product_name>
    <uuid>GPU-9</uuid>
    <mig_mode><current_mig>Enabled</current_mig></mig_mode>
    <mig_devices>
      <mig_device>
        <index>0</index>
        <gpu_instance_id>3</gpu_instance_id>
        <compute_instance_id>0</compute_instance_id>
        <fb_memory_usage><total>24192 MiB</total><used>40 MiB</used></fb_memory_usage>
      </mig_device>
    </mig_devices>
    <fan_speed>30 %</fan_speed>
    <performance_state>P8</performance_state>
    <fb_memory_usage>
      <total>97887 MiB</total><reserved>637 MiB</reserved><used>44 MiB</used><free>9 MiB</free>
    </fb_memory_usage>
    <compute_mode>Default</compute_mode>
    <utilization><gpu_util>7 %</gpu_util></utilization>
    <temperature><gpu_temp>24 C</gpu_temp></temperature>
    <gpu_power_readings>
      <instant_power_draw>3.99 W</instant_power_draw>
      <current_power_limit>300.00 W</current_power_limit>
    </gpu_power_readings>
    <clocks><sm_clock>180 MHz</sm_clock></clocks>
    <processes>
      <process_info>
        <gpu_instance_id>3</gpu_instance_id>
        <compute_instance_id>0</compute_instance_id>
        <pid>5</pid><type>M+C</type><process_name>a &amp; b</process_name>
        <used_memory>40 MiB</used_memory>
      </process_info>
    </processes>
  </gpu>
</nvidia_smi_log>
"""


def card(document: str) -> XmlGpu:
    (found,) = parse_xml(document).gpus
    return found


@pytest.mark.parametrize(
    ("message", "kind", "bus_id"),
    [
        ("Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost.  Reboot",
         FaultKind.GPU_LOST, "0000:02:00.0"),
        ("Unable to determine the device handle for gpu 0000:65:00.0: GPU is lost.",
         FaultKind.GPU_LOST, "0000:65:00.0"),
        ("Unable to determine the device handle for GPU1: 0000:C2:00.0: Unknown Error",
         FaultKind.GPU_UNKNOWN, "0000:C2:00.0"),
        ("Unable to determine the device handle for GPU0000:07:00.0: Unknown Error",
         FaultKind.GPU_UNKNOWN, "0000:07:00.0"),
        ("Unable to determine the device handle for GPU 0000000F:01:00.0: GPU requires reset",
         FaultKind.GPU_RESET, "0000000F:01:00.0"),
        ("Failed to initialize NVML: GPU access blocked by the operating system",
         FaultKind.NO_PERMISSION, None),
        ("Failed to initialize NVML: Insufficient Permissions", FaultKind.NO_PERMISSION, None),
        ("Failed to initialize NVML: N/A", FaultKind.NVML_UNKNOWN, None),
    ],
)  # fmt: skip
def test_messages_of_several_versions(message: str, kind: FaultKind, bus_id: str | None) -> None:
    fault = classify(message)
    assert fault is not None
    assert (fault.kind, fault.bus_id) == (kind, bus_id)


def test_a_card_that_must_be_reset_says_so_in_its_health() -> None:
    fault = classify(
        "Unable to determine the device handle for GPU 0000:02:00.0: GPU requires reset"
    )
    assert fault is not None
    assert fault.health is Health.RESET_REQUIRED


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[Not Supported]\n",
        "pid, used_gpu_memory [MiB]\n[Not Supported], [Not Supported]\n",
        "pid, used_gpu_memory [MiB]\n812, 300 MiB\n[N/A], [N/A]\n",
        "pid, used_gpu_memory [MiB]\nNo data\n",
        "Failed to initialize NVML: Unknown Error\n",
    ],
)
def test_a_list_with_a_line_that_is_no_process_is_unknown_and_not_shorter(answer: str) -> None:
    assert text.parse_apps(answer) is None


def test_a_list_that_is_known_to_be_empty() -> None:
    header = "\ufeffpid, used_gpu_memory [MiB]\r\n"
    assert text.parse_apps(header) == ()
    warned = f"{header}812, [N/A]\r\nWARNING: infoROM is corrupted at gpu 0000:00:1E.0\r\n"
    (app,) = text.parse_apps(warned) or ()
    assert (app.pid, app.mem_bytes) == (812, None)


def test_a_mark_before_the_header_and_a_last_line_without_an_end() -> None:
    answer = "\ufeffuuid, memory.total [MiB], utilization.gpu [%]\r\nGPU-1, 189471 MiB, 12 %"
    assert text.parse_query(answer).rows == ()  # it may have been cut
    (row,) = text.parse_query(text.ended(answer)).rows
    assert (row.uuid, row.mem_total_bytes, row.utilization) == ("GPU-1", 189471 * MIB, 0.12)


def test_every_value_of_a_document() -> None:
    found = card(DOCUMENT)
    row, (instance,), (process,) = found.row, found.instances, found.processes or ()
    assert (row.utilization, row.power_w, row.power_limit_w) == (0.07, 3.99, 300)
    assert (row.fan, row.pstate, row.mig, row.sm_clock_mhz) == (0.3, "P8", True, 180)
    assert (instance.gi, instance.mem_total_bytes) == (3, 24192 * MIB)
    assert (process.pid, process.name, process.mem_bytes) == (5, "a & b", 40 * MIB)


def test_what_is_said_after_the_document_does_not_cost_it() -> None:
    warned = f"{DOCUMENT}WARNING: infoROM is corrupted at gpu 0000:65:00.0\n"
    assert card(warned) == card(DOCUMENT)


@pytest.mark.parametrize(
    ("said", "health"),
    [("GPU is lost", Health.LOST), ("GPU requires reset", Health.RESET_REQUIRED)],
)
def test_a_card_that_is_not_well_in_a_document(said: str, health: Health) -> None:
    assert card(DOCUMENT.replace("7 %", said)).row.health is health


LEAVES = [node for node in ET.fromstring(DOCUMENT).iter() if not len(node)]
TEXTS = st.one_of(
    st.sampled_from(
        (
            *("N/A", "[N/A]", "Not Supported", "Unknown Error", "ERR!", "", "None", "0", "-1"),
            *("1,5 W", "999999 %", "1e400 MiB", "nan", "inf", "7 furlongs", "GPU is lost"),
            *("GPU requires reset", "Requested functionality has been deprecated"),
        )
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
)


def harmless(found: XmlGpu) -> None:
    """No value out of its range, and nothing made up for what is not told."""
    row = found.row
    assert row.utilization is None or 0 <= row.utilization <= 1
    assert row.power_w is None or 0 <= row.power_w <= 10_000
    assert row.temperature_c is None or 0 < row.temperature_c <= 250
    for item in (row, *found.instances):
        assert item.mem_total_bytes is None or item.mem_total_bytes > 0
        assert item.mem_used_bytes is None or item.mem_total_bytes is not None


@given(st.integers(0, len(LEAVES) - 1), TEXTS)
def test_any_text_in_any_place_of_a_document(place: int, said: str) -> None:
    root = ET.fromstring(DOCUMENT)
    leaf = [node for node in root.iter() if not len(node)][place]
    leaf.text = said
    harmless(card(ET.tostring(root, encoding="unicode")))


@given(st.sets(st.integers(0, len(LEAVES) - 1)))
def test_a_document_without_some_of_its_values(missing: set[int]) -> None:
    root = ET.fromstring(DOCUMENT)
    leaves = [node for node in root.iter() if not len(node)]
    parents = {child: node for node in root.iter() for child in node}
    full = card(DOCUMENT)
    for place in missing:
        parents[leaves[place]].remove(leaves[place])
    found = card(ET.tostring(root, encoding="unicode"))
    harmless(found)
    assert found.row.utilization in (full.row.utilization, None)
    assert found.row.mem_used_bytes in (full.row.mem_used_bytes, None)


@given(st.integers(0, len(DOCUMENT) - 2))
def test_a_document_that_is_cut_is_refused(end: int) -> None:
    if "</nvidia_smi_log>" not in DOCUMENT[:end]:
        with pytest.raises(BackendReadError):
            parse_xml(DOCUMENT[:end])
