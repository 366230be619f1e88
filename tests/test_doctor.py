"""What ``gpusched doctor`` says of GPUs that are not well and of files that are closed to us."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpusched_ipy import doctor
from gpusched_ipy.devicefiles import closed_to_us, device_files, group_of
from gpusched_ipy.doctor import Finding
from gpusched_ipy.snapshot import Gpu, Health, Snapshot


def reading(*gpus: Gpu, problem: str | None = None) -> list[Finding]:
    """What is said of one reading of the backend in use."""
    snapshot = Snapshot(
        backend="nvml",
        source="NVML",
        taken_at=0.0,
        taken_mono=0.0,
        driver="580.82.07",
        problem=problem,
        gpus=gpus,
    )
    return list(doctor._reading(snapshot, True))


def faults(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.fault]


@pytest.mark.parametrize(
    "health", [Health.LOST, Health.RESET_REQUIRED, Health.DRIVER_MISMATCH, Health.UNKNOWN]
)
def test_a_gpu_that_is_not_well_is_a_fault_with_advice(health: Health) -> None:
    gpu = Gpu(uuid="GPU-1", vendor="fake", health=health, health_text="what the driver says")
    (fault,) = faults(reading(gpu))
    assert "what the driver says" in fault.text
    assert fault.advice


def test_a_gpu_that_sleeps_and_a_silent_second_source_are_told_and_no_fault() -> None:
    asleep = Gpu(uuid="GPU-1", vendor="fake", health=Health.ASLEEP, health_text="suspended")
    well = Gpu(uuid="GPU-2", vendor="fake", health_text="macmon ended: status 1", processes=())
    findings = reading(asleep, well)
    assert faults(findings) == []
    said = "\n".join(finding.text for finding in findings)
    assert "suspended" in said
    assert "macmon ended" in said
    assert "driver 580.82.07" in said


@pytest.mark.parametrize(
    ("problem", "advice"),
    [
        ("nvidia-smi gave no answer within 10 s", "dmesg"),
        ("nvidia-smi has printed nothing for 6 s", "dmesg"),
        ("driver/library version mismatch", "reboot"),
    ],
)
def test_a_reading_that_failed_has_advice(problem: str, advice: str) -> None:
    (fault,) = faults(reading(problem=problem))
    assert problem in fault.text
    assert advice in (fault.advice or "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with cards of every maker."""
    for name in ("nvidiactl", "nvidia0", "nvidia-uvm", "nvidia-caps", "null", "kfd"):
        _file(tmp_path / "dev" / name)
    for number, maker in ((128, "0x1002"), (129, "0x8086"), (130, "0x10de")):
        _file(tmp_path / f"dev/dri/renderD{number}")
        _file(tmp_path / f"sys/class/drm/renderD{number}/device/vendor", f"{maker}\n")
    _file(tmp_path / "dev/dri/card0")
    return tmp_path


def _file(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("vendor", "names"),
    [
        ("nvidia", ["nvidia-uvm", "nvidia0", "nvidiactl"]),
        ("amd", ["kfd", "renderD128"]),
        ("intel", ["renderD129"]),
        ("apple", []),
    ],
)
def test_the_device_files_of_a_maker(vendor: str, names: list[str], root: Path) -> None:
    assert [path.name for path in device_files(vendor, root)] == names
    assert device_files(vendor, root / "nowhere") == ()


def test_a_file_that_is_closed_to_us_is_a_fault_that_names_its_group(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = device_files("amd", root)
    closed = files[1]
    assert closed_to_us(files, lambda path, mode: path != closed and bool(mode)) == (closed,)
    monkeypatch.setattr(doctor, "device_files", lambda vendor: files)
    monkeypatch.setattr(doctor, "closed_to_us", lambda paths: (closed,))
    (fault,) = faults(reading(Gpu(uuid="amd:1", vendor="amd", processes=())))
    assert str(closed) in fault.text
    assert f"usermod -aG {group_of(closed)}" in (fault.advice or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_permissions_decide(root: Path) -> None:
    files = device_files("intel", root)
    assert closed_to_us(files) == ()
    files[0].chmod(0)
    assert closed_to_us(files) == files
