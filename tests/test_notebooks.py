"""The notebooks: executed as ``make demo`` does, and saved with what they have shown."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from requires import require

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "notebooks" / "tour.ipynb"
TRAIN = ROOT / "notebooks" / "train_torch.ipynb"
ISOLATED = ROOT / "notebooks" / "isolated.ipynb"
SEVERAL = ROOT / "notebooks" / "several.ipynb"
PRIORITIES = ROOT / "notebooks" / "priorities.ipynb"
SWEEP = ROOT / "notebooks" / "sweep.ipynb"


def execute(notebook: Path, temp: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook on the scripted GPU, and leave nothing behind."""
    environ = os.environ | {"GPUSCHED_BACKEND": "fake", "TMPDIR": str(temp)}
    return subprocess.run(
        [sys.executable, "scripts/run_notebook.py", str(notebook)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.notebooks
@pytest.mark.kernel
def test_the_tour_shows_waiting_with_a_reason_and_the_right_order(tmp_path: Path) -> None:
    done = execute(TOUR, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shown = done.stdout
    assert "we practise on a scripted one" in shown
    assert "97 % used by python (pid 4242, user user1)" in shown
    assert "1 job ahead" in shown
    assert "the important cell runs on GPU-fake-0" in shown
    order = ["9  high-cell ", "5  command ", "2  low-cell ", "1  low-command "]
    places = [shown.index(line) for line in order]
    assert places == sorted(places)
    assert "all cells ran" in shown


@pytest.mark.notebooks
@pytest.mark.kernel
@pytest.mark.torch
@pytest.mark.timeout(900)
def test_a_model_is_trained_in_queued_cells_and_in_a_queued_script(tmp_path: Path) -> None:
    require("torch", find_spec("torch"), "PyTorch is not installed")
    done = execute(TRAIN, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the model has learned it: True" in done.stdout
    assert "lr-0.01 completed exit status 0" in done.stdout


@pytest.mark.parametrize(
    "path", [TOUR, TRAIN, ISOLATED, PRIORITIES, SEVERAL, SWEEP], ids=lambda path: path.stem
)
def test_it_is_saved_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert sum(bool(cell.outputs) for cell in code) >= len(code) - 3
    for cell in code:
        expected = "raises-exception" in cell.metadata.get("tags", ())
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == expected, cell.source


@pytest.mark.notebooks
@pytest.mark.kernel
def test_a_notebook_that_fails_is_a_failure(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ipynb"
    cells = [nbformat.v4.new_code_cell("print('before')\n1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), broken)
    done = execute(broken, tmp_path)
    assert done.returncode == 1
    assert "before" in done.stdout
    assert "ZeroDivisionError" in done.stderr
