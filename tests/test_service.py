"""The unit for systemd that the README gives: it parses, and starts what there is."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpusched_ipy.cli import build_parser

README = Path(__file__).parents[1] / "README.md"


def unit() -> str:
    found = re.search(r"```ini\n(\[Unit\].*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_unit_starts_the_agent_and_leaves_jobs_alone() -> None:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(unit())
    service = parsed["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program.startswith("%h/")
    assert Path(program).name == "gpusched"
    asked = build_parser().parse_args(arguments)
    assert (asked.verb, asked.what) == ("agent", "run")
    # Shims are its children: systemd must not end the jobs together with the agent.
    assert service["KillMode"] == "process"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    path = tmp_path / "gpusched.service"
    path.write_text(unit().replace("%h/.venv/bin/gpusched", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
