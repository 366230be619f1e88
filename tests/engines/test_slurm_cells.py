"""Cells of a real kernel on a real Slurm: what they take along, show, and bring back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels import Cell, Kernel, Page, started

from tests.engines.slurmcluster import SlurmCluster

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]
PATIENCE_S = 120.0


@pytest.fixture
def kernel(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Kernel]:
    """A kernel that finds the Slurm of the tests."""
    engines = str(tmp_path / "engines")
    environment = {"SLURM_CONF": str(slurm.conf), "GPUSCHED_ENGINE_DIR": engines}
    with started(tmp_path, JPY_SESSION_NAME="train.ipynb", **environment) as kernel:
        yield kernel


def until(kernel: Kernel, cell: Cell, word: str) -> None:
    assert cell.errors == [], cell.traceback
    kernel.until(
        lambda: cell.badges and word in cell.badges[-1] and "once this" not in cell.badges[-1],
        f"its badge never said {word!r}",
        PATIENCE_S,
    )


def test_a_cell_goes_to_a_node_and_comes_home(kernel: Kernel) -> None:
    kernel.run("xs = [1, 2, 3]\nclass Model:\n    def __init__(self, w): self.w = w")
    cell = kernel.run(
        "%%gpuqueue --engine slurm -n train --in xs,Model --out model\n"
        "%config InlineBackend.figure_formats = ['png']\n"
        "import os, sys, subprocess\n"
        "print('on a node ☃', 'SLURM_JOB_ID' in os.environ, flush=True)\n"
        "_ = subprocess.run(['echo', 'from a process'])\n"
        "sys.stderr.write('1/1\\n')\n"
        "import matplotlib.pyplot as plt\n"
        "plt.plot(xs); plt.show()\n"
        "model = Model(sum(xs))\n"
        "os.environ['CUDA_VISIBLE_DEVICES']"
    )
    failing = kernel.run("%%gpuqueue --engine slurm -n bad\nprint('so far')\n1 / 0")
    until(kernel, cell, "model is here")
    assert cell.text() == "on a node ☃ True\nfrom a process\n"
    assert cell.text("stderr") == "1/1\n"
    assert "image/png" in cell.displays[0]["data"]
    assert cell.results in (["'0'"], ["'1'"])
    assert kernel.run("model.w, type(model) is Model").results == ["(6, True)"]
    kernel.until(lambda: "ZeroDivisionError" in failing.badges[-1], "its badge", PATIENCE_S)
    assert "so far" in failing.text()
    assert "1 / 0" in failing.traceback
    # After a restart of the kernel what it brought is there still.
    kernel.restart()
    assert kernel.run("%load_ext gpusched_ipy").errors == []
    kernel.run("class Model: pass")
    assert kernel.run("%gpuq fetch train").errors == []
    assert kernel.run("model.w").results == ["6"]
    refused = kernel.run("%%gpuqueue --in xs\n1")
    assert "isolated" in refused.traceback, "without an engine it is an ordinary cell"


def test_after_a_restart_a_cell_on_a_node_goes_on_under_itself(
    kernel: Kernel, tmp_path: Path
) -> None:
    flag = tmp_path / "go"
    cell = kernel.run(
        "%%gpuqueue --engine slurm -n train --out model\n"
        "import os, time\nimport matplotlib.pyplot as plt\n"
        "%config InlineBackend.figure_formats = ['png']\n"
        "print('epoch 1', flush=True)\ndeadline = time.time() + 200\n"
        f"while not os.path.exists({str(flag)!r}):\n"
        "    assert time.time() < deadline\n    time.sleep(0.05)\n"
        "print('epoch 2')\nplt.plot([1, 2]); plt.show()\nmodel = 6"
    )
    kernel.until(lambda: "epoch 1" in cell.text(), "it never began", PATIENCE_S)
    kernel.restart()
    assert kernel.run("%load_ext gpusched_ipy").errors == []
    page = Page(kernel)
    kernel.until(lambda: "epoch 1" in page.text(), "what it had shown is gone", PATIENCE_S)
    assert "running #1 train" in page.cells()[0]["badge"]
    flag.touch()
    kernel.until(lambda: "model is here" in page.cells()[0]["badge"], "its end", PATIENCE_S)
    assert page.text() == "epoch 1\nepoch 2\n"
    assert "image/png" in page.outputs()[-1]["data"]
    assert kernel.run("model").results == ["6"]
