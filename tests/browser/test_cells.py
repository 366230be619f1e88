"""Queued cells in JupyterLab 4 and Notebook 7: where badges and outputs appear and stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

LOAD = """
import os
os.environ.update({environment!r})
%load_ext gpusched_ipy
import matplotlib
"""
QUEUED = """%%gpuqueue -p 3 -n train
import sys
print('to stdout')
print('to stderr', file=sys.stderr)
from matplotlib.figure import Figure
figure = Figure((3, 1.5), layout="constrained"); figure.subplots().plot([1, 3, 2])
from IPython.display import Image
import io
stream = io.BytesIO(); figure.savefig(stream, format='png'); display(Image(stream.getvalue()))
6 * 7"""
BETWEEN = "print('between')"
SHOW = "%gpuq show train"
LIST = "%gpuq list --all"
AWAY = """%%gpuqueue --isolate -n long
import os, time
print('epoch 1 of 3', end='')
deadline = time.time() + 280
while not os.path.exists({flag!r}):
    assert time.time() < deadline
    time.sleep(0.05)
print('\\repoch 3 of 3')
from matplotlib.figure import Figure
from IPython.display import Image, display
import io
figure = Figure((3, 1.5), layout="constrained"); figure.subplots().plot([1, 3, 2])
stream = io.BytesIO(); figure.savefig(stream, format='png'); display(Image(stream.getvalue()))
1 / 0"""
FAILS = "%%gpuqueue -n bad\n1 / 0"


@contextmanager
def book(
    browser: Any, server: tuple[str, Path], folder: Path, *, classic: bool
) -> Iterator[tuple[Any, Queue, FakeScript]]:
    """A notebook with the extension loaded, on a GPU that a stranger uses."""
    from browser.lab import Lab

    script = FakeScript(folder / "fake.json")
    script.busy()
    explicit = {"state_dir": folder / "state", "fake": script.path, "sample_interval_s": 0.1}
    environment = {f"GPUSCHED_{name.upper()}": str(value) for name, value in explicit.items()}
    base, notebooks = server
    cells = [LOAD.format(environment=environment), QUEUED, BETWEEN, SHOW, LIST, FAILS]
    path = notebooks / f"{folder.name}.ipynb"
    lab = Lab(browser, base, path, cells, classic=classic)
    queue = Queue(Settings.load({name: str(value) for name, value in explicit.items()}))
    try:
        lab.run(0)
        yield lab, queue, script
    finally:
        lab.shutdown()
        queue.store.close()


def test_lab_shows_a_cell_where_it_was_queued_and_again_after_a_reload(
    browser: Any, server: tuple[str, Path], tmp_path: Path, state_dir: Path, shoot: Callable
) -> None:
    with book(browser, server, tmp_path, classic=False) as (lab, queue, script):
        lab.run(1)
        badge = lab.output(1).locator(".gpusched-badge")
        badge.get_by_text("queued #1 train").wait_for()
        badge.get_by_text("97 % used by python").wait_for()
        lab.run(2)
        lab.output(2).get_by_text("between").wait_for()
        assert lab.output(1).get_by_text("to stdout").count() == 0
        shoot(lab.page, "cell-queued")

        script.free()
        badge.get_by_text("done #1 train").wait_for()
        lab.output(1).get_by_text("to stdout").wait_for()
        lab.output(1).get_by_text("to stderr").wait_for()
        lab.output(1).locator("img").wait_for()
        lab.output(1).get_by_text("42", exact=True).wait_for()
        assert lab.output(2).inner_text().strip() == "between"
        lab.run(5, wait=False)
        lab.output(5).get_by_text("failed #2 bad").wait_for()
        lab.output(5).get_by_text("ZeroDivisionError").first.wait_for()
        shoot(lab.page, "cell-done")
        kinds = [output["output_type"] for output in lab.save().cells[1].outputs]
        assert {"stream", "display_data", "execute_result"} <= set(kinds)

        # Queued again and run while no page is open: nothing is lost.
        script.busy()
        lab.run(1)
        badge.get_by_text("queued #3 train").wait_for()
        lab.save()
        lab.page.goto("about:blank")
        script.free()
        wait_until(lambda: queue.show(3).ended, 120, "the cell has run")
        lab.open()
        lab.run(3)
        shown = lab.output(3)
        shown.get_by_text("to stdout").wait_for()
        shown.locator("img").wait_for()
        shown.get_by_text("42", exact=True).wait_for()
        lab.run(4)
        lab.output(4).locator("table").get_by_text("train").first.wait_for()
        shoot(lab.page, "cell-replayed")


def test_after_a_restart_an_isolated_cell_goes_on_under_itself(
    browser: Any, server: tuple[str, Path], tmp_path: Path, state_dir: Path, shoot: Callable
) -> None:
    """Progress, figure and traceback come to the cell although its kernel is another one now."""
    flag = tmp_path / "go"
    with book(browser, server, tmp_path, classic=False) as (lab, _, script):
        script.free()
        lab.write(2, AWAY.format(flag=str(flag)))
        lab.run(2)
        badge = lab.output(2).locator(".gpusched-badge")
        badge.get_by_text("running #1 long").wait_for()
        lab.output(2).get_by_text("epoch 1 of 3").wait_for()
        lab.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
        )
        lab.wait_kernel("idle")
        lab.run(0)
        onward = lab.output(2).locator(".gpusched-onward")
        onward.get_by_text("epoch 1 of 3").wait_for()
        lab.output(0).get_by_text("goes on under its cells").wait_for()
        shown = lab.output(2).get_by_text("epoch 1 of 3").all()
        assert [text.is_visible() for text in shown].count(True) == 1, "it stands there once"
        flag.touch()
        onward.get_by_text("epoch 3 of 3").wait_for()
        onward.locator("img").wait_for()
        onward.get_by_text("ZeroDivisionError").first.wait_for()
        onward.get_by_text("failed #1 long").wait_for()
        shoot(lab.page, "cell-onward")
        lab.run(0)  # the cell that has loaded us need not keep its output
        onward.get_by_text("failed #1 long").wait_for()
        lab.save()
        lab.open()
        onward.get_by_text("failed #1 long").wait_for()
        onward.locator("img").wait_for()

        # Run again it shows what it shows now, and nothing else.
        lab.write(2, "%%gpuqueue --isolate -n long\nprint('anew')")
        lab.run(2)
        lab.output(2).get_by_text("done #2 long").wait_for()
        lab.output(2).get_by_text("anew", exact=True).wait_for()
        assert lab.output(2).locator(".gpusched-onward").count() == 0
        assert lab.errors == []


def test_notebook_7_queues_cells_and_shows_the_panel(
    browser: Any, server: tuple[str, Path], tmp_path: Path, state_dir: Path, shoot: Callable
) -> None:
    with book(browser, server, tmp_path, classic=True) as (lab, queue, script):
        lab.run(1)
        badge = lab.output(1).locator(".gpusched-badge")
        badge.get_by_text("queued #1 train").wait_for()
        lab.write(2, "%gpupanel")
        lab.run(2)
        panel = lab.output(2).locator(".gsq")
        panel.locator(".gsq-pill", has_text="live").wait_for()
        panel.locator("tr.gsq-row", has_text="#1").get_by_text("waiting").wait_for()
        lab.output(2).locator(".gsq-still").wait_for(state="hidden")
        shoot(lab.page, "notebook7-queued")
        script.free()
        badge.get_by_text("done #1 train").wait_for()
        lab.output(1).get_by_text("to stdout").wait_for()
        lab.output(1).locator("img").wait_for()
        panel.get_by_text("Nothing is queued").wait_for()
        panel.get_by_role("button", name="Drain").click()
        panel.get_by_role("button", name="Resume").wait_for()
        assert queue.drained
        shoot(lab.page, "notebook7-done")
