"""The live panel in a real JupyterLab: it shows, follows, obeys, survives, and stops its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job, JobKind, JobState

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

SETUP = """
import time
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.panel import GpuPanel
settings = Settings.load({explicit!r})
wanted = set()
class Watched(Monitor):
    def want(self, who, *more):
        wanted.add(who)
        super().want(who, *more)
    def unwant(self, who):
        wanted.discard(who)
        super().unwant(who)
monitor = Watched(settings)
panel = GpuPanel(Queue(settings), monitor, settings)
"""
SHOW = "panel"
STATUS = "print(panel.working, bool(wanted))"
BUSY = """
import os
turns = 0
while turns % 100_000 or not os.path.exists({seen!r}):
    turns += 1
"""
SPACER = "from IPython.display import HTML; HTML('<div style=\"height: 4000px\">far</div>')"
EVIL = "<img src=x onerror=\"document.title='owned'\">"


class Desk:
    """A notebook with the panel shown below its second cell, and the queue as the test sees it."""

    def __init__(self, lab: Any, queue: Queue, script: FakeScript, seen: Path) -> None:
        self.lab = lab
        self.seen = seen  # ends the busy cell
        self.queue = queue
        self.script = script
        self.panel = lab.output(1).locator(".gsq")

    def submit(self, name: str, **fields: Any) -> Job:
        """A cell's job that nobody can start: its kernel does not exist."""
        return self.queue.submit(kind=JobKind.CELL, code="pass", name=name, home="none", **fields)

    def row(self, job: Job) -> Any:
        return self.panel.locator("tr.gsq-row", has_text=f"#{job.id}")

    def button(self, job: Job, verb: str) -> Any:
        return self.row(job).locator(f"button[data-verb={verb}]")

    def wait_pill(self, word: str) -> None:
        self.panel.locator(".gsq-pill", has_text=word).wait_for()

    def wait_working(self, working: bool) -> None:
        """Whether the panel has its thread, and wants readings."""
        wait_until(lambda: self.lab.ask(STATUS).split() == [str(working)] * 2, 20, str(working))


@pytest.fixture
def desk(browser: Any, server: tuple[str, Path], tmp_path: Path, state_dir: Path) -> Iterator[Desk]:
    from browser.lab import Lab

    script = FakeScript(tmp_path / "fake.json", gpus=2)
    explicit = {
        "state_dir": str(state_dir),
        "fake": str(script.path),
        "panel_hz": 4,
        "sample_interval_s": 0.1,
    }
    base, folder = server
    seen = tmp_path / "seen"
    cells = [SETUP.format(explicit=explicit), SHOW, BUSY.format(seen=str(seen)), SPACER]
    lab = Lab(browser, base, folder / f"{tmp_path.name}.ipynb", cells)
    desk = Desk(lab, Queue(Settings.load(explicit)), script, seen)
    lab.run(0)
    lab.run(1)
    desk.wait_pill("live")
    yield desk
    seen.touch()
    lab.shutdown()
    desk.queue.store.close()


def test_it_follows_gpus_and_queue_without_a_click(
    desk: Desk, shoot: Callable[[Any, str], Path]
) -> None:
    page = desk.lab.page
    card = desk.panel.locator(".gsq-card").first
    card.get_by_text("0\u202f%", exact=True).wait_for()
    desk.script.busy(0, utilization=0.97, memory="30GiB")
    card.get_by_text("97\u202f%", exact=True).wait_for()
    card.get_by_text("30.0\u202fGiB", exact=True).wait_for()
    card.get_by_text("pid 4242").wait_for()
    first = desk.submit("first", priority=3)
    desk.row(first).get_by_text("waiting").wait_for()

    desk.lab.run(2, wait=False)
    desk.lab.wait_kernel("busy")
    desk.script.busy(1, utilization=0.35, memory="8GiB")
    second = desk.submit(EVIL)
    desk.panel.locator(".gsq-card").nth(1).get_by_text("35\u202f%", exact=True).wait_for()
    desk.row(second).get_by_text(EVIL).wait_for()
    assert _kernel_is_busy(desk)
    desk.seen.touch()
    assert page.title() != "owned"

    card.locator("canvas").focus()
    page.keyboard.press("ArrowLeft")
    card.locator(".gsq-tip.gsq-shown", has_text="utilization").wait_for()
    shoot(page, "panel-light")
    desk.lab.command("apputils:change-theme", {"theme": "JupyterLab Dark"})
    desk.lab.output(1).locator(".gsq[data-theme=dark]").wait_for()
    shoot(page, "panel-dark")
    page.set_viewport_size({"width": 640, "height": 1300})
    page.wait_for_function("() => document.querySelector('.gsq').clientWidth < 420")
    shoot(page, "panel-narrow")
    overflow = page.evaluate(
        "() => { const p = document.querySelector('.gsq'); return p.scrollWidth - p.clientWidth }"
    )
    assert overflow <= 0
    desk.lab.command("apputils:change-theme", {"theme": "JupyterLab Light"})
    assert desk.lab.errors == []


def test_its_buttons_steer_the_queue(desk: Desk, shoot: Callable[[Any, str], Path]) -> None:
    first, second, third = (desk.submit(name) for name in ("first", "second", "third"))
    desk.button(first, "hold").click()
    desk.row(first).get_by_text("held", exact=True).first.wait_for()
    assert desk.queue.show(first.id).held
    desk.button(first, "release").click()
    desk.row(first).get_by_text("waiting").wait_for()
    desk.button(third, "up").click()
    desk.button(third, "up").click()
    wait_until(lambda: desk.queue.show(third.id).priority == 2, what="priority 2")
    desk.panel.locator("tr.gsq-row").first.get_by_text("third").wait_for()
    desk.panel.get_by_role("button", name="Drain").click()
    desk.panel.get_by_role("button", name="Resume").wait_for()
    assert desk.queue.drained
    shoot(desk.lab.page, "panel-drained")

    # A row that slides under a resting pointer is not the one that was meant.
    desk.button(first, "cancel").hover()
    fourth = desk.submit("fourth", priority=1)  # takes the place of the first
    desk.panel.locator("tr.gsq-row").nth(1).get_by_text("fourth").wait_for()
    desk.lab.page.mouse.down()
    desk.lab.page.mouse.up()
    desk.panel.get_by_text("The list has just moved").wait_for()
    assert desk.queue.show(fourth.id).state is JobState.PENDING
    desk.button(fourth, "cancel").click()
    wait_until(lambda: desk.queue.show(fourth.id).state is JobState.CANCELLED, what="cancelled")
    desk.row(fourth).wait_for(state="detached")

    # By keyboard, and none of it reaches the notebook's own shortcuts.
    cell = desk.lab.active_cell()
    desk.button(third, "cancel").focus()
    desk.lab.page.keyboard.press("ArrowDown")
    assert desk.lab.page.evaluate("() => document.activeElement.dataset.verb") == "cancel"
    desk.lab.page.keyboard.press("Enter")
    wait_until(lambda: desk.queue.show(first.id).state is JobState.CANCELLED, what="cancelled")
    assert desk.lab.active_cell() == cell
    desk.row(first).wait_for(state="detached")
    assert desk.queue.show(second.id).state is JobState.PENDING

    # While a cell runs a click is either obeyed or shown as waiting, and obeyed afterwards.
    desk.lab.run(2, wait=False)
    desk.lab.wait_kernel("busy")
    desk.button(second, "cancel").click()
    busy = desk.row(second).locator("button[data-verb=cancel][aria-busy=true]")
    wait_until(lambda: busy.count() or not desk.row(second).count(), what="shown as waiting")
    desk.seen.touch()
    wait_until(lambda: desk.queue.show(second.id).state is JobState.CANCELLED, what="cancelled")
    assert desk.lab.errors == []


def test_a_reload_keeps_it_alive_and_a_restart_shows(
    desk: Desk, shoot: Callable[[Any, str], Path]
) -> None:
    desk.submit("before")
    desk.lab.command("docmanager:save")
    desk.lab.open()
    desk.wait_pill("live")
    desk.panel.get_by_text("before").wait_for()
    desk.script.busy(0, utilization=0.42)
    desk.panel.get_by_text("42\u202f%", exact=True).wait_for()
    desk.lab.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
    )
    desk.wait_pill("stale")
    desk.panel.get_by_text("No news from the kernel").wait_for()
    held = desk.panel.locator("button[data-verb=hold]")
    assert held.get_attribute("aria-disabled") == "true"
    shoot(desk.lab.page, "panel-stale")


def test_a_closed_or_hidden_panel_does_no_work(
    desk: Desk, shoot: Callable[[Any, str], Path]
) -> None:
    desk.script.raw('{"problem": "driver lost"}')
    desk.wait_pill("not readable")
    desk.panel.get_by_text("The GPUs cannot be read: driver lost").wait_for()
    shoot(desk.lab.page, "panel-problem")
    desk.wait_working(True)
    desk.lab.run(3)
    desk.lab.page.evaluate(
        """() => { const nb = window.jupyterapp.shell.currentWidget.content;
        return nb.scrollToItem(3, 'end') }"""
    )
    desk.wait_working(False)
    desk.panel.scroll_into_view_if_needed()
    desk.wait_pill("not readable")
    desk.wait_working(True)
    desk.lab.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.model.cells.get(1).outputs.clear()"
    )
    desk.wait_working(False)
    assert desk.lab.errors == []


def _kernel_is_busy(desk: Desk) -> bool:
    status = desk.lab.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.kernelDisplayStatus"
    )
    return bool(status == "busy")
