"""The live panel in a real JupyterLab: it shows, follows, obeys, survives, and stops its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

SETUP = """
import time
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.panel import GpuPanel, loop
loop.FIRST_S = 0.0
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
queue = Queue(settings)
panel = GpuPanel(queue, monitor, settings)
sent = 0
send = panel._send
def counted(message, points):
    global sent
    sent += 1
    send(message, points)
panel._send = counted
"""
SHOW = "panel"
STATUS = "print(panel.working, bool(wanted))"
SENT = "print(sent)"
SETTLED = """
while [job.state for job in queue.list(all=True) if job.name == "gone wrong"] != ["failed"]:
    time.sleep(0.01)
"""
THREADS = """
import threading
print(sum(thread.name == 'gpusched-panel' for thread in threading.enumerate()))
"""
NONE = """
blind = Settings.load({'backend': 'nvidia-smi', 'nvidia_smi': '/nonexistent/nvidia-smi'})
GpuPanel(queue, Monitor(blind), settings)
"""
BUSY = """
import os
turns = 0
while turns % 100_000 or not os.path.exists({seen!r}):
    turns += 1
"""
SPACER = "from IPython.display import HTML; HTML('<div style=\"height: 4000px\">far</div>')"
LONG_S = 150.0
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

    def fail(self, name: str) -> None:
        """A job that begins on the first GPU, and fails."""
        store, job = self.queue.store, self.submit(name)
        claimed = store.claim(job, ("GPU-fake-0",), member="none")
        store.take_over(job.id, epoch=claimed.epoch, claimed_by="none", member="none")
        store.finish_if_active(job.id, epoch=claimed.epoch, state=JobState.FAILED)

    def row(self, job: Job) -> Any:
        return self.panel.locator("tr.gsq-row", has_text=f"#{job.id}")

    def button(self, job: Job, verb: str) -> Any:
        return self.row(job).locator(f"button[data-verb={verb}]")

    def wait_pill(self, word: str) -> None:
        self.panel.locator(".gsq-pill", has_text=word).wait_for()

    def wait_working(self, working: bool) -> None:
        """Whether the panel has its thread, and wants readings."""
        wait_until(lambda: self.lab.ask(STATUS).split() == [str(working)] * 2, LONG_S, str(working))


@pytest.fixture
def desk(
    browser: Any,
    server: tuple[str, Path],
    tmp_path: Path,
    state_dir: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Desk]:
    from browser.lab import Lab

    script = FakeScript(tmp_path / "fake.json", gpus=getattr(request, "param", 2))
    explicit = {
        "state_dir": str(state_dir),
        "fake": str(script.path),
        "panel_hz": 4,
        "sample_interval_s": 0.1,
    }
    base, folder = server
    seen = tmp_path / "seen"
    busy = BUSY.format(seen=str(seen))
    cells = [SETUP.format(explicit=explicit), SHOW, busy, SPACER, SHOW, NONE]
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
    wait_until(lambda: desk.queue.show(third.id).priority == 2, LONG_S, "priority 2")
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
    wait_until(lambda: desk.queue.show(fourth.id).state is JobState.CANCELLED, LONG_S, "cancelled")
    desk.row(fourth).wait_for(state="detached")

    # By keyboard, and none of it reaches the notebook's own shortcuts.
    cell = desk.lab.active_cell()
    desk.button(third, "cancel").focus()
    desk.lab.page.keyboard.press("ArrowDown")
    assert desk.lab.page.evaluate("() => document.activeElement.dataset.verb") == "cancel"
    desk.lab.page.keyboard.press("Enter")
    wait_until(lambda: desk.queue.show(first.id).state is JobState.CANCELLED, LONG_S, "cancelled")
    assert desk.lab.active_cell() == cell
    desk.row(first).wait_for(state="detached")
    assert desk.queue.show(second.id).state is JobState.PENDING

    # While a cell runs a click is either obeyed or shown as waiting, and obeyed afterwards.
    desk.lab.run(2, wait=False)
    desk.lab.wait_kernel("busy")
    desk.button(second, "cancel").click()
    busy = desk.row(second).locator("button[data-verb=cancel][aria-busy=true]")
    wait_until(lambda: busy.count() or not desk.row(second).count(), LONG_S, "shown as waiting")
    desk.seen.touch()
    wait_until(lambda: desk.queue.show(second.id).state is JobState.CANCELLED, LONG_S, "cancelled")
    assert desk.lab.errors == []


def test_a_sweep_is_one_row_that_unfolds(desk: Desk, shoot: Callable[[Any, str], Path]) -> None:
    sweep = {"lr": [0.1, 0.01], "seed": [1, 2]}
    grid = desk.queue.submit_all(["true"], name="grid", sweep=sweep, hold=True).jobs
    rows = desk.panel.locator("tr.gsq-row")
    whole = desk.panel.locator("tr.gsq-row", has_text="grid \u00d74")
    whole.get_by_text("4 pending (4 held)").wait_for()
    assert rows.count() == 1
    whole.locator("button[data-verb=up]").click()
    wait_until(lambda: {desk.queue.show(job.id).priority for job in grid} == {1}, LONG_S, "raised")
    whole.locator("button.gsq-fold").click()
    desk.panel.locator("tr.gsq-member", has_text="grid lr=0.01 seed=2").wait_for()
    assert rows.count() == 5
    assert whole.locator("button.gsq-fold").get_attribute("aria-expanded") == "true"
    shoot(desk.lab.page, "panel-sweep")
    member = desk.panel.locator("tr.gsq-member", has_text=f"#{grid[1].id}")
    member.locator("button[data-verb=cancel]").click()
    whole.get_by_text("1 cancelled").wait_for()
    # One click does not end many jobs.
    whole.locator("button[data-verb=cancel]").click()
    desk.panel.get_by_text("again to end all its jobs").wait_for()
    assert desk.queue.show(grid[0].id).state is JobState.PENDING
    whole.locator("button[data-verb=cancel]").click()
    desk.panel.get_by_text("Nothing is queued").wait_for()
    assert {desk.queue.show(job.id).state for job in grid} == {JobState.CANCELLED}
    assert desk.lab.errors == []


def test_a_reload_keeps_it_alive_and_a_restart_shows(
    desk: Desk, shoot: Callable[[Any, str], Path]
) -> None:
    desk.submit("before")
    desk.lab.output(1).locator(".gsq-still svg").nth(1).wait_for(state="attached")
    desk.lab.save()
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

    # Opened again without that kernel: the picture that was saved, and no error in its place.
    saved = desk.lab.save().cells[1].outputs
    assert ["application/vnd.jupyter.widget-view+json" in out.data for out in saved] == [
        True,
        False,
    ]
    desk.lab.open()
    still = desk.lab.output(1).locator(".gsq-still")
    still.get_by_text("as it was at").wait_for()
    assert still.locator("svg").count() == 2
    error = desk.lab.output(1).get_by_text("Error displaying widget")
    error.wait_for(state="attached")
    assert error.is_hidden()
    shoot(desk.lab.page, "panel-reopened")


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
    sent = desk.lab.ask(SENT)
    desk.submit("unseen")
    desk.fail("gone wrong")
    desk.script.busy(0, utilization=0.5)
    assert desk.lab.ask(THREADS).split() == ["0"], "no thread that could send"
    assert desk.lab.ask(f"{SETTLED}{SENT}") == sent, "nothing is sent to nobody"
    desk.script.raw('{"problem": "driver lost"}')
    desk.panel.scroll_into_view_if_needed()
    desk.wait_pill("not readable")
    desk.wait_working(True)
    news = desk.panel.locator(".gsq-news")
    news.get_by_text("1 ended meanwhile, 1 not well").wait_for()
    desk.panel.hover()
    news.wait_for(state="hidden")
    desk.lab.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.model.cells.get(1).outputs.clear()"
    )
    desk.wait_working(False)
    assert desk.lab.errors == []


def test_shown_twice_and_in_two_pages_it_works_once(
    desk: Desk, browser: Any, server: tuple[str, Path], shoot: Callable[[Any, str], Path]
) -> None:
    from browser.lab import Lab

    lab = desk.lab
    lab.run(4)
    again = lab.output(4).locator(".gsq")
    again.locator(".gsq-pill", has_text="live").wait_for()
    lab.save()
    other = Lab(browser, server[0], lab.path)
    mirror = other.output(1).locator(".gsq")
    mirror.locator(".gsq-pill", has_text="live").wait_for()
    job = desk.submit("shared")
    for shown in (desk.panel, again, mirror):
        shown.locator("tr.gsq-row", has_text="shared").wait_for()
    assert other.ask(THREADS).split() == ["1"]
    hold = mirror.locator("tr.gsq-row", has_text="shared").locator("button[data-verb=hold]")
    hold.click()
    wait_until(lambda: desk.queue.show(job.id).held, LONG_S, "held")
    shoot(other.page, "panel-two-pages")
    other.page.close()
    lab.page.bring_to_front()
    desk.row(job).get_by_text("held", exact=True).first.wait_for()
    assert lab.errors == []


@pytest.mark.parametrize("desk", [8], indirect=True)
def test_eight_gpus_and_ten_thousand_jobs(desk: Desk, shoot: Callable[[Any, str], Path]) -> None:
    page = desk.lab.page
    for place in range(8):
        desk.script.busy(place, utilization=0.1 + place / 10, memory=f"{4 + 4 * place}GiB")
    with desk.queue.store.writing():
        for number in range(10_000):
            desk.queue.store.submit(
                JobSpec(
                    uid=f"sweep-{number}",
                    kind=JobKind.CELL,
                    name=f"sweep {number}",
                    priority=number % 3,
                    code="pass",
                    home="none",
                    owner="notebook sweep.ipynb",
                )
            )
    desk.panel.get_by_text("10000 waiting").wait_for()
    assert desk.panel.locator(".gsq-card").count() == 8
    assert desk.panel.locator("tr.gsq-row").count() == 200
    desk.panel.locator(".gsq-card").nth(7).get_by_text("80\u202f%", exact=True).wait_for()
    shoot(page, "panel-many")
    desk.panel.get_by_role("button", name="next page").click()
    desk.panel.get_by_text("400 of 10000").wait_for()
    desk.script.free(3)
    desk.panel.locator(".gsq-card").nth(3).get_by_text("0\u202f%", exact=True).wait_for()
    # Whoever cannot see the colours is told the same: names, states and what a button does.
    card = desk.panel.get_by_role("group", name="GPU 3, Fake A100")
    assert card.get_by_role("img").get_attribute("aria-label").startswith("GPU 3, last")
    assert desk.panel.get_by_role("button", name="cancel job").count() == 200
    assert desk.panel.get_by_role("columnheader", name="State").count() == 1
    desk.lab.command("apputils:change-theme", {"theme": "JupyterLab Dark"})
    page.set_viewport_size({"width": 700, "height": 1300})
    page.wait_for_function("() => document.querySelector('.gsq').clientWidth < 450")
    shoot(page, "panel-many-narrow")
    desk.lab.command("apputils:change-theme", {"theme": "JupyterLab Light"})
    with desk.queue.store.writing():  # in one write: the fixture would cancel them one by one
        desk.queue.cancel("sweep *")
    desk.panel.get_by_text("Nothing is queued").wait_for()
    assert desk.lab.errors == []


def test_no_gpu_is_no_error(desk: Desk, shoot: Callable[[Any, str], Path]) -> None:
    desk.lab.run(5)
    blind = desk.lab.output(5).locator(".gsq")
    blind.locator(".gsq-pill", has_text="no GPU").wait_for()
    blind.get_by_text("Jobs wait until a GPU can be read").wait_for()
    desk.lab.page.evaluate(
        "() => { const nb = window.jupyterapp.shell.currentWidget.content; nb.scrollToItem(5) }"
    )
    shoot(desk.lab.page, "panel-no-gpu")


def _kernel_is_busy(desk: Desk) -> bool:
    # Not the kernel's own sign: that says idle as soon as a subshell has taken a click.
    prompt = desk.lab.page.locator(".jp-Notebook .jp-Cell").nth(2).locator(".jp-InputPrompt")
    return bool(prompt.inner_text().strip() == "[*]:")
