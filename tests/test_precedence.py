"""Where a setting comes from: the first that speaks wins, from an option down to the default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpusched_ipy.config import Settings

ASK = "print('panel_hz', get_ipython()._gpusched._settings().panel_hz)"


def ask(*lines: str, arguments: tuple[str, ...] = ()) -> list[str]:
    """What IPython prints that is started with ``arguments`` and runs these lines."""
    code = "\n".join(["%load_ext gpusched_ipy", ASK, *lines])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "IPython",
            "--no-banner",
            "--colors=NoColor",
            *arguments,
            "-c",
            code,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("panel_hz")]


@pytest.mark.timeout(900)
def test_the_documented_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    assert Settings.load().panel_hz == 1.0

    folder = home / "config" / "gpusched_ipy"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("panel_hz = 1.5\n")
    assert Settings.load().panel_hz == 1.5

    monkeypatch.setenv("GPUSCHED_PANEL_HZ", "2")
    assert Settings.load().panel_hz == 2.0

    # IPython's own ways stand above the environment: its file, its command line, then %config.
    (home / "ipython" / "profile_default").mkdir(parents=True)
    file = home / "ipython" / "profile_default" / "ipython_config.py"
    file.write_text("get_config().GpuQueue.panel_hz = 2.5\n")
    assert ask("%config GpuQueue.panel_hz = 3.5", ASK, "%config GpuQueue.panel_hz = None", ASK) == [
        "panel_hz 2.5",
        "panel_hz 3.5",
        "panel_hz 2.0",  # not set there any more: the environment speaks again
    ]
    assert ask(arguments=("--GpuQueue.panel_hz=3",)) == ["panel_hz 3.0"]

    # An option of the call stands above everything.
    assert Settings.load({"panel_hz": "4"}).panel_hz == 4.0
    doctor = subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", "--set", "panel_hz=4", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    (line,) = [line for line in doctor.stdout.splitlines() if "panel_hz" in line]
    assert line.split("=")[1].split() == ["4.0", "(set)"]
