"""Cells of a real kernel on a real Ray: what they take along, show as they run, and bring back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels import Cell, Kernel, Page, started

from tests.engines.ray_head import RayHead

pytestmark = [pytest.mark.kernel, pytest.mark.ray, pytest.mark.timeout(300, func_only=True)]
PATIENCE_S = 150.0


@pytest.fixture
def kernel(ray_head: RayHead, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel that finds the Ray of the tests."""
    found = {
        "GPUSCHED_RAY_ADDRESS": ray_head.url,
        "GPUSCHED_RAY_TOKEN_FILE": str(ray_head.token_file),
        "GPUSCHED_ENGINE_DIR": str(tmp_path / "engines"),
        "JPY_SESSION_NAME": "train.ipynb",
    }
    with started(tmp_path, **found) as kernel:
        yield kernel
    (tmp_path / "go").touch()  # a test that has failed leaves no job that waits on a GPU


def until(kernel: Kernel, cell: Cell, word: str) -> None:
    assert cell.errors == [], cell.traceback
    kernel.until(
        lambda: cell.badges and word in cell.badges[-1] and "once this" not in cell.badges[-1],
        f"its badge never said {word!r}: {cell.badges[-3:]}",
        PATIENCE_S,
    )


def test_a_cell_goes_to_ray_shows_itself_and_comes_home(kernel: Kernel, tmp_path: Path) -> None:
    go = tmp_path / "go"
    kernel.run("xs = [1, 2, 3]\nclass Model:\n    def __init__(self, w): self.w = w")
    cell = kernel.run(
        "%%gpuqueue --engine ray -n train --in xs,Model --out model\n"
        "%config InlineBackend.figure_formats = ['png']\n"
        "import os, pathlib, subprocess, sys, time\n"
        "print('on a node ☃', 'RAY_JOB_ID' in os.environ or 'RAY_ADDRESS' in os.environ)\n"
        "_ = subprocess.run(['echo', 'from a process'])\n"
        "for step in range(3):\n"
        "    sys.stderr.write(f'\\rstep {step + 1}/3'); sys.stderr.flush()\n"
        "import matplotlib.pyplot as plt\n"
        "plt.plot(xs); plt.show()\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "model = Model(sum(xs))\n"
        "os.environ['CUDA_VISIBLE_DEVICES']"
    )
    # All of this while it runs.
    kernel.until(lambda: cell.displays, f"no figure: {cell.badges[-3:]}", PATIENCE_S)
    assert "image/png" in cell.displays[0]["data"]
    assert cell.text() == "on a node ☃ True\nfrom a process\n"
    assert cell.text("stderr").endswith("\rstep 3/3")
    assert "running" in cell.badges[-1]
    go.touch()
    until(kernel, cell, "model is here")
    assert cell.results in (["'0'"], ["'1'"])
    assert kernel.run("model.w, type(model) is Model").results == ["(6, True)"]


def test_a_cell_on_ray_that_fails_shows_its_traceback(kernel: Kernel) -> None:
    cell = kernel.run("%%gpuqueue --engine ray -n bad\nprint('so far')\n1 / 0")
    kernel.until(
        lambda: cell.badges and "ZeroDivisionError" in cell.badges[-1], "its badge", PATIENCE_S
    )
    assert "so far" in cell.text()
    assert "1 / 0" in cell.traceback


def test_a_cell_on_ray_goes_on_under_itself_after_a_restart_of_its_kernel(
    kernel: Kernel, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    kernel.run("x = 20")
    cell = kernel.run(
        "%%gpuqueue --engine ray -n long --in x --out y\n"
        "import pathlib, time\n"
        "print('before', flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "print('after')\n"
        "y = x + 1"
    )
    kernel.until(lambda: "before" in cell.text(), f"{cell.badges[-3:]}", PATIENCE_S)
    kernel.restart()
    assert kernel.run("%load_ext gpusched_ipy").errors == []
    page = Page(kernel)
    kernel.until(lambda: page.text() == "before\n", "it is not shown", PATIENCE_S)
    early = kernel.run("%gpuq fetch long", stop=False)
    assert "is running" in early.traceback
    assert kernel.run("%gpuq log long").text() == "before\n"
    go.touch()
    assert kernel.run("%gpuq wait long").errors == []
    assert kernel.run("%gpuq log long").text() == "before\nafter\n"
    kernel.until(lambda: "y is here" in page.cells()[0]["badge"], "its end", PATIENCE_S)
    assert page.text() == "before\nafter\n"
    assert kernel.run("y").results == ["21"]
    assert kernel.run("%gpuq fetch long").errors == []
