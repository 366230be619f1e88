"""What the panel says, when it works, what its buttons do, and its still substitutes."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import GIB, FakeScript, wait_until

from gpusched_ipy import paced
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Instant, Settings
from gpusched_ipy.entries import Entry
from gpusched_ipy.errors import StoreError
from gpusched_ipy.job import (
    ExpectedStart,
    Job,
    JobKind,
    JobSpec,
    JobState,
    WaitCode,
    WaitReason,
)
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.panel import GpuPanel
from gpusched_ipy.panel import feed as panel_feed
from gpusched_ipy.panel import loop as panel_loop
from gpusched_ipy.panel.feed import PAGE, JobPage, pack, point, state_message, thin
from gpusched_ipy.panel.loop import PanelLoop
from gpusched_ipy.panel.still import still_html, still_text
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, Snapshot

NOW = 1_800_000_000.0
EVIL = "<script>alert(1)</script>\x1b[31m"


def snapshot(at: float = NOW, *gpus: Gpu, problem: str | None = None) -> Snapshot:
    return Snapshot(
        backend="fake",
        source="test",
        taken_at=at,
        taken_mono=at - NOW + 5000,
        gpus=gpus,
        problem=problem,
    )


def gpu(utilization: float | None = 0.5, **fields: Any) -> Gpu:
    values: dict[str, Any] = {"uuid": "GPU-0", "index": 0, "mem_total_bytes": 40 * GIB}
    return Gpu(**values | {"utilization": utilization, "mem_used_bytes": 10 * GIB} | fields)


def job(number: int = 1, name: str = "train", **fields: Any) -> Job:
    spec = JobSpec(uid=str(number), kind=JobKind.CELL, name=name, owner="notebook a.ipynb")
    values: dict[str, Any] = {"state": JobState.PENDING, "priority": 0, "submitted_at": NOW - 60}
    return Job(id=number, spec=spec, **values | fields)


def rows_of(*jobs: Job) -> tuple[Entry, ...]:
    return tuple(Entry(job=one, ahead=ahead) for ahead, one in enumerate(jobs))


def said(page: JobPage, *gpus: Gpu, now: float = NOW) -> dict[str, Any]:
    reading = snapshot(NOW, *gpus)
    return state_message(reading, gpus, page, source="fake", members={"k": "notebook b"}, now=now)


class TestMessages:
    def test_a_point_is_six_little_floats_and_unknown_is_nan(self) -> None:
        reading = gpu(None, temperature_c=61, throttled=True)
        counts, data = pack([snapshot(NOW, reading)], ["GPU-0"], NOW - 2)
        assert counts == [1]
        assert len(data) == 24
        at, util, used, heat, power, slow = struct.unpack("<6f", data)
        assert (at, used, heat, slow) == (2.0, 10.0, 61.0, 1.0)
        assert math.isnan(util)
        assert math.isnan(power)

    def test_a_failed_reading_has_no_point_and_a_missing_gpu_an_unknown_one(self) -> None:
        readings = [snapshot(NOW, gpu()), snapshot(NOW + 1, problem="lost"), snapshot(NOW + 2)]
        counts, data = pack(readings, ["GPU-0"], NOW)
        assert counts == [2]
        assert math.isnan(struct.unpack("<12f", data)[7])
        assert all(math.isnan(value) for value in point(None, 1.0)[1:])

    def test_thinning_keeps_the_peaks_and_the_order(self) -> None:
        many = [snapshot(NOW + i, gpu(1.0 if i == 777 else 0.1)) for i in range(3000)]
        few = thin(many, 100)
        assert len(few) <= 100
        assert many[777] in few
        assert [item.taken_at for item in few] == sorted(item.taken_at for item in few)
        assert thin(many[:5], 100) == many[:5]

    def test_rows_carry_what_people_need_and_no_control_characters(self) -> None:
        why = WaitReason(code=WaitCode.GPU_BUSY, text="GPU 0: 97 % used\x1b[2J")
        page = JobPage(rows=rows_of(job(7, EVIL, reason=why, held=True, priority=3)), total=1)
        (row,) = said(page, gpu())["jobs"]
        assert row["name"] == "<script>alert(1)</script>\\x1b[31m"  # the page shows it as text
        assert row["reason"] == "GPU 0: 97 % used\\x1b[2J"
        assert (row["id"], row["priority"], row["held"], row["state"]) == (7, 3, True, "pending")
        assert (row["owner"], row["since"]) == ("notebook a.ipynb", NOW - 60)

    def test_a_running_job_says_where_and_one_far_back_how_many_are_ahead(self) -> None:
        running = job(1, state=JobState.RUNNING, gpus=("GPU-0",), started_at=NOW - 5)
        page = JobPage(rows=rows_of(running, job(2), job(3)), total=3, running=1, waiting=2)
        rows = said(page, gpu())["jobs"]
        assert [row["reason"] for row in rows] == ["on GPU 0", None, "1 ahead of it in line"]
        later = said(replace(page, rows=(Entry(job=job(900), ahead=400),)), gpu())["jobs"]
        assert later[0]["reason"] == "399 ahead of it in line"

    def test_spans_are_those_of_the_window_on_shown_gpus(self) -> None:
        ran = {"state": JobState.COMPLETED, "gpus": ("GPU-0",)}
        spans = (
            job(1, **ran, started_at=NOW - 2000, ended_at=NOW - 700),
            job(2, **ran, started_at=NOW - 700, ended_at=NOW - 500),
            job(3, state=JobState.RUNNING, gpus=("GPU-9", "GPU-0"), started_at=NOW - 5),
            job(4, started_at=NOW - 5, gpus=("GPU-0",)),  # it went back to waiting
        )
        found = said(JobPage(spans=spans), gpu())["spans"]
        assert [(span["id"], span["gpu"], span["end"]) for span in found] == [
            (3, 0, None),
            (2, 0, NOW - 500),
        ]

    def test_a_card_names_our_jobs_strangers_and_other_notebooks(self) -> None:
        running = job(3, state=JobState.RUNNING, gpus=("GPU-0",), started_at=NOW)
        listed = (
            GpuProcess(pid=1, name="python", job=3),
            GpuProcess(pid=2, name="python", user="user1", mem_bytes=2 * GIB),
            GpuProcess(pid=3, name="python", member="k", mem_bytes=GIB),
        )
        (card,) = said(JobPage(spans=(running,)), gpu(processes=listed))["gpus"]
        texts = [line["text"] for line in card["who"]]
        assert texts[0] == "#3 train"
        assert texts[1].startswith("python (pid 2, user user1)")
        assert texts[2].startswith("notebook b (pid 3)")
        assert len(texts) == 3

    def test_unknown_processes_and_ill_health_are_said(self) -> None:
        sick = gpu(processes=None, health=Health.LOST, health_text="Xid 79")
        (card,) = said(JobPage(), sick)["gpus"]
        assert card["who"] == [{"text": "processes unknown", "job": None}]
        assert "fallen off the bus: Xid 79" in card["note"]
        assert said(JobPage(), gpu(processes=()))["gpus"][0]["who"][0]["text"] == "no process"


@dataclass
class Kernel:
    """A host whose main thread runs a cell when the test says so."""

    busy: bool = False
    free_since: float = 0.0


class Page:
    """A page as the loop sees it: what it was sent, and what it says."""

    def __init__(self, queue: Queue, monitor: Monitor, settings: Settings) -> None:
        self.queue = queue
        self.monitor = monitor
        self.kernel = Kernel()
        self.sent: list[tuple[dict[str, Any], bytes | None]] = []
        self.loop = PanelLoop(
            queue, monitor, settings, lambda *message: self.sent.append(message), host=self.kernel
        )
        self.clicks = 0

    def say(self, kind: str, view: str = "a") -> None:
        self.loop.receive({"t": kind, "v": view})

    def click(
        self, verb: str, number: object = None, value: object = None, *, sweep: bool = False
    ) -> list[Any]:
        """Press a button; the answer."""
        self.clicks += 1
        name = f"c{self.clicks}"
        asked = {"t": "do", "v": "a", "c": name, "verb": verb, "id": number, "value": value}
        asked["sweep"] = sweep
        self.loop.receive(asked)
        return wait_until(lambda: self.answers().get(name), what=f"{verb} answered")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message, _ in list(self.sent) if message["t"] == kind]

    def answers(self) -> dict[str, list[Any]]:
        return {one[0]: one for tick in self.of("tick") for one in tick["answers"]}

    def state(self) -> Mapping[str, Any]:
        return self.of("state")[-1] if self.of("state") else {}

    def wait_state(self, **fields: object) -> Mapping[str, Any]:
        return wait_until(
            lambda: all(self.state().get(k) == v for k, v in fields.items()) and self.state(),
            what=str(fields),
        )


@pytest.fixture
def page(fake: FakeScript) -> Iterator[Page]:
    settings = Settings.load({"panel_hz": 4})
    queue = Queue(settings)
    monitor = Monitor(settings)
    page = Page(queue, monitor, settings)
    yield page
    page.loop.close()
    monitor.stop()
    queue.store.close()


def submit(queue: Queue, name: str, **fields: Any) -> Job:
    return queue.submit(kind=JobKind.CELL, code="pass", name=name, home="nobody", **fields)


class TestLoop:
    def test_hello_brings_everything_and_then_it_beats(self, page: Page) -> None:
        page.say("hello")
        wait_until(lambda: len(page.of("tick")) >= 3, what="three beats")
        kinds = [message["t"] for message, _ in page.sent]
        assert kinds[:2] == ["state", "past"]
        first, second, third = page.of("tick")[:3]
        assert (first["seq"], second["seq"], third["seq"]) == (1, 2, 3)
        assert third["every"] == 0.25
        wait_until(lambda: page.state()["gpus"], what="the first reading")
        assert page.state()["gpus"][0]["name"] == "Fake A100"
        assert page.of("tick")[-1]["rev"] == page.state()["rev"]

    def test_an_unchanged_queue_and_card_send_only_ticks(self, page: Page) -> None:
        page.say("hello")
        wait_until(lambda: page.state() and page.state()["gpus"], what="the first reading")
        states, ticks = len(page.of("state")), len(page.of("tick"))
        wait_until(lambda: len(page.of("tick")) >= ticks + 4, what="four beats")
        assert len(page.of("state")) == states
        full = wait_until(
            lambda: [points for message, points in page.sent if message.get("counts") == [3]],
            what="three readings in a beat",
        )
        assert len(full[-1] or b"") == 3 * 24

    def test_a_new_job_and_a_new_reading_appear_without_a_question(
        self, page: Page, fake: FakeScript
    ) -> None:
        page.say("hello")
        wait_until(lambda: page.of("tick"), what="a beat")
        submit(page.queue, "later", priority=2)
        page.wait_state(total=1, counts={"running": 0, "waiting": 1, "held": 0})
        assert page.state()["jobs"][0]["name"] == "later"
        fake.busy(utilization=0.75)
        wait_until(
            lambda: struct.unpack("<f", (page.sent[-1][1] or bytes(24))[-20:-16])[0] == 0.75,
            what="the new utilization",
        )

    def test_however_often_pages_speak_it_keeps_its_rate(self, page: Page) -> None:
        page.say("hello")
        wait_until(lambda: page.of("tick"), what="a beat")
        for _ in range(50):
            page.say("beat")
        wait_until(lambda: len(page.of("tick")) >= 6, what="beats")
        first, last = page.of("tick")[0], page.of("tick")[-1]
        assert last["now"] - first["now"] >= 0.25 * (last["seq"] - first["seq"]) - 0.05

    def test_a_failing_backend_is_said_and_the_last_cards_stay(
        self, page: Page, fake: FakeScript
    ) -> None:
        page.say("hello")
        wait_until(lambda: page.state() and page.state()["gpus"], what="the first reading")
        fake.raw('{"problem": "driver lost"}')
        page.wait_state(problem="driver lost")
        wait_until(lambda: page.of("tick")[-1]["problem"] == "driver lost", what="in the tick")
        assert len(page.state()["gpus"]) == 1

    def test_a_machine_without_gpus_is_no_failure(self, page: Page) -> None:
        none = Settings.load({"backend": "nvidia-smi", "nvidia_smi": "/nonexistent/nvidia-smi"})
        monitor = Monitor(none)
        other = Page(page.queue, monitor, none)
        other.say("hello")
        state = wait_until(lambda: other.state().get("problem") and other.state(), what="said")
        assert state["absent"]
        assert "no GPU can be read" in state["problem"]
        other.loop.close()
        monitor.stop()

    def test_buttons(self, page: Page) -> None:
        page.say("hello")
        one = submit(page.queue, "one").id
        show = page.queue.show
        assert page.click("hold", one)[1]
        assert show(one).held
        page.wait_state(counts={"running": 0, "waiting": 0, "held": 1})
        assert page.click("release", one)[1]
        assert not show(one).held
        assert page.click("priority", one, 5000)[1]
        assert show(one).priority == 1000
        assert page.click("drain")[1]
        assert page.queue.drained
        page.wait_state(drained=True)
        assert page.click("resume")[1]
        assert not page.queue.drained
        assert page.click("cancel", one)[1]
        assert show(one).state is JobState.CANCELLED
        page.wait_state(total=0)

    def test_a_click_is_obeyed_once_and_a_bad_one_is_answered(self, page: Page) -> None:
        page.say("hello")
        one = submit(page.queue, "one").id
        page.click("priority", one, 4)
        page.queue.set_priority([one], 9)
        page.loop.receive({"t": "do", "c": "c1", "verb": "priority", "id": one, "value": 4})
        assert page.click("hold", 999)[1:] == [False, str(_not_found(page.queue))]
        assert page.queue.show(one).priority == 9
        for verb, number in (("erase", one), ("cancel", "1; DROP"), ("cancel", True)):
            good, text = page.click(verb, number)[1:]
            assert not good
            assert "unknown" in text

    def test_a_long_queue_is_sent_a_page_at_a_time(self, page: Page) -> None:
        with page.queue.store.writing():
            for number in range(450):
                submit(page.queue, f"job {number}")
        page.say("hello")
        state = page.wait_state(total=450)
        assert len(state["jobs"]) == PAGE
        assert len(json.dumps(state)) < 60_000
        page.click("page", None, 400)
        state = page.wait_state(offset=400)
        assert state["jobs"][0]["name"] == "job 400"
        page.click("page", None, 5000)
        assert len(page.wait_state(offset=400)["jobs"]) == 50

    def test_a_sweep_is_one_row_that_unfolds_and_obeys_as_a_whole(self, page: Page) -> None:
        before = submit(page.queue, "before")
        sweep = {"lr": [0.1, 0.2, 0.3]}
        grid = page.queue.submit_all(["true"], name="grid", sweep=sweep, hold=True).jobs
        after = submit(page.queue, "after")
        page.say("hello")
        rows = page.wait_state(total=3)["jobs"]
        assert [row["name"] for row in rows] == ["before", "after", "grid \u00d73"]
        ids = [job.id for job in grid]
        row = rows[-1]
        assert (row["label"], row["id"], row["held"]) == (f"#{ids[0]}-{ids[-1]}", ids[0], True)
        assert row["reason"].startswith("3 pending (3 held)")
        assert page.click("priority", ids[0], 7, sweep=True)[2].startswith("The sweep of job")
        assert {page.queue.show(number).priority for number in ids} == {7}
        assert page.queue.show(after.id).priority == 0
        page.click("fold", ids[0], sweep=True)
        rows = page.wait_state(total=6)["jobs"]
        assert [row["id"] for row in rows] == [before.id, after.id, ids[0], *ids]
        assert [row.get("member", False) for row in rows] == [*[False] * 3, *[True] * 3]
        assert len({row.get("key", row["id"]) for row in rows}) == 6
        page.click("cancel", ids[1])
        assert [page.queue.show(number).state for number in ids].count(JobState.CANCELLED) == 1
        page.click("fold", ids[0], sweep=True)
        assert "1 cancelled" in page.wait_state(total=3)["jobs"][-1]["reason"]
        page.click("cancel", ids[0], sweep=True)
        assert {page.queue.show(number).state for number in ids} == {JobState.CANCELLED}
        page.wait_state(total=2)

    def test_expected_starts_are_said_of_jobs_that_wait(self, page: Page, fake: FakeScript) -> None:
        one = submit(page.queue, "one").id
        held = submit(page.queue, "held", hold=True).id
        now = time.time()
        start = ExpectedStart(at=now + 720, low=now + 300, high=now + 1800, runs=6)
        loop = PanelLoop(
            page.queue,
            page.monitor,
            page.queue.settings,
            lambda *message: page.sent.append(message),
            starts=lambda: {one: start, held: start},
        )
        loop.receive({"t": "hello", "v": "a"})
        jobs = page.wait_state(total=2)["jobs"]
        loop.close()
        told = {entry["id"]: entry["expected"] for entry in jobs}
        assert told[held] is None
        assert told[one].startswith("about ")
        assert told[one].endswith("; 6 past runs)")

    @pytest.mark.parametrize(("most", "asked"), [(1, 1), (0, 0)])
    def test_no_forecast_is_made_of_more_jobs_than_a_screen_can_wait_for(
        self, page: Page, monkeypatch: pytest.MonkeyPatch, most: int, asked: int
    ) -> None:
        submit(page.queue, "one")
        assert page.monitor.read_now().problem is None
        monkeypatch.setattr(paced, "_MOST", most)
        starts, calls = paced.PacedStarts(page.queue, page.monitor), []
        monkeypatch.setattr(starts._source, "now", lambda *_, **more: calls.append(more) or {})
        assert starts.renew() == {}
        assert len(calls) == asked

    def test_what_is_saved_is_renewed_when_jobs_have_moved_and_not_otherwise(
        self, page: Page, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("FIRST_S", "KEPT_S"):
            monkeypatch.setattr(panel_loop, name, 0.0)
        ran: list[Job] = []
        renewed: list[int] = []
        monkeypatch.setattr(page.queue, "ran_since", lambda _wall: tuple(ran))
        loop = PanelLoop(
            page.queue,
            page.monitor,
            page.queue.settings,
            lambda *message: page.sent.append(message),
            moved=lambda: renewed.append(len(ran)),
        )
        loop.receive({"t": "hello", "v": "a"})
        wait_until(lambda: renewed, what="renewed once there is a reading")
        ticks = len(page.of("tick"))
        wait_until(lambda: len(page.of("tick")) >= ticks + 3, what="beats")
        assert renewed == [0], "nothing has run: once is enough, the notebook is left alone"
        ran.append(job(1, state=JobState.RUNNING, gpus=("GPU-0",), started_at=time.time()))
        submit(page.queue, "another")  # the queue is read again
        wait_until(lambda: renewed == [0, 1], what="renewed once")
        ticks = len(page.of("tick"))
        loop.receive({"t": "beat", "v": "a"})
        wait_until(lambda: len(page.of("tick")) >= ticks + 4, what="more beats")
        loop.close()
        assert renewed == [0, 1]

    def test_an_unreadable_queue_is_said_and_heals(
        self, page: Page, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> Mapping[str, int]:
            raise StoreError("the disk is full")

        page.say("hello")
        wait_until(lambda: page.of("tick"), what="a beat")
        with monkeypatch.context() as patch:
            patch.setattr(page.queue, "counts", broken)
            submit(page.queue, "one")
            page.wait_state(trouble="the disk is full")
        page.wait_state(trouble=None, total=1)

    def test_a_page_that_could_not_be_served_once_is_served_the_next_time(
        self, page: Page, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tried = []

        def broken(_changed: object) -> Callable[[], None]:
            tried.append(1)
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(page.queue, "subscribe", broken)
            page.say("hello")
            wait_until(lambda: tried and not page.loop.working, what="it has given up")
        page.say("hello")
        wait_until(lambda: page.of("tick"), what="a beat")

    @pytest.mark.parametrize("word", ["bye", "hide"])
    def test_it_stops_when_nobody_looks(self, page: Page, word: str) -> None:
        page.say("hello")
        page.say("hello", "b")
        wait_until(lambda: page.of("tick"), what="a beat")
        page.say(word)
        beats = len(page.of("tick"))
        wait_until(lambda: len(page.of("tick")) > beats + 1, what="b still looks")
        page.say(word, "b")
        wait_until(lambda: not page.loop.working, what="the thread has ended")
        sent = len(page.sent)
        submit(page.queue, "unseen")
        assert not page.loop.working
        assert len(page.sent) == sent
        page.say("beat")  # a page that was thought gone speaks again
        wait_until(lambda: page.state()["total"] == 1, what="everything, anew")

    def test_silence_ends_it_unless_pages_cannot_speak(
        self, page: Page, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(panel_loop, "SILENCE_S", 0.3)
        page.kernel.busy = True
        page.loop.expect()
        wait_until(lambda: len(page.of("tick")) >= 4, what="beats while a cell runs")
        assert page.of("past"), "a page that opens meanwhile gets everything"
        page.kernel.busy = False
        wait_until(lambda: not page.loop.working, what="the thread has ended")

    def test_where_pages_can_speak_beside_a_cell_silence_counts_at_once(
        self, page: Page, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(panel_loop, "SILENCE_S", 0.3)
        page.kernel.busy = True
        page.say("hello")
        wait_until(lambda: page.of("tick"), what="a beat")
        wait_until(lambda: not page.loop.working, what="the thread has ended")

    def test_closing_ends_the_thread_for_good(self, page: Page) -> None:
        page.say("hello")
        wait_until(lambda: page.of("tick"), what="a beat")
        page.loop.close()
        assert not page.loop.working
        sent = len(page.sent)
        page.say("hello")
        assert not page.loop.working
        assert len(page.sent) == sent


def _not_found(queue: Queue) -> Exception:
    with pytest.raises(Exception, match="999") as caught:
        queue.show(999)
    return caught.value


class TestStill:
    PAGE = JobPage(rows=rows_of(job(7, EVIL)), total=1, waiting=1)
    AT = Instant(mono=5000.0, wall=NOW)

    def test_text_for_a_terminal(self) -> None:
        text = still_text(snapshot(NOW, gpu(0.97, power_w=250.0)), self.PAGE, self.AT)
        assert "utilization 97 % · memory 10.0 GiB / 40.0 GiB" in text
        assert "0 running · 1 waiting · 0 held" in text
        assert "#7 <script>" in text
        assert "\x1b" not in text

    def test_html_holds_a_picture_and_nothing_that_runs(self) -> None:
        history = [snapshot(NOW - 600 + i, gpu(0.5)) for i in range(600)]
        ran = job(3, EVIL, state=JobState.RUNNING, gpus=("GPU-0",), started_at=NOW - 60)
        html = still_html(history[-1], history, replace(self.PAGE, spans=(ran,)), self.AT)
        assert html.count("<svg") == 1
        assert html.count("<path") == 2
        assert "#3 &lt;script&gt;" in html
        assert "<script" not in html
        assert "\x1b" not in html

    def test_a_gap_in_the_readings_is_a_gap_in_the_line(self) -> None:
        history = [snapshot(NOW - 100 + at, gpu(0.5)) for at in (0, 1, 2, 60, 61)]
        html = still_html(history[-1], history, JobPage(), self.AT)
        path = html.split('<path d="')[1].split('"')[0]
        assert path.count("M") == 2

    @pytest.mark.parametrize(
        ("reading", "text"),
        [(None, "no reading yet"), (snapshot(problem="driver lost"), "driver lost")],
    )
    def test_no_reading_is_said(self, reading: Snapshot | None, text: str) -> None:
        assert text in still_text(reading, JobPage(), self.AT)
        assert text in still_html(reading, [], JobPage(trouble="full"), self.AT)

    def test_without_a_kernel_the_panel_is_its_still_picture(self, page: Page) -> None:
        panel = GpuPanel(page.queue, page.monitor)
        bundle = panel._repr_mimebundle_()
        assert set(bundle) == {"text/plain", "text/html"}
        assert not panel.working
        panel.close()


def test_importing_the_panel_is_cheap() -> None:
    heavy = "matplotlib", "anywidget", "ipywidgets", "IPython"
    code = f"import sys, gpusched_ipy.panel; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_never_makes_markup_of_text() -> None:
    static = Path(panel_feed.__file__).parent / "static"
    for script in static.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "eval(",
            "document.write",
        ):
            assert forbidden not in text, (script.name, forbidden)
