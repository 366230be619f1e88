"""Queued cells in a real kernel: deferred ones and those that hold their place."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import wait_until
from kernels import PYTHON, Cell, Kernel, started

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings

pytestmark = pytest.mark.kernel

# What cells do that is easily broken: each must look the same queued as it looks unqueued.
BODIES = {
    "exception": "print('before')\n{}['missing']",
    "syntax_error": "print('never')\nfor in",
    "sys_exit": "import sys\nsys.exit(3)",
    "bash": "%%bash\necho from bash; echo on stderr >&2",
    "capture": "%%capture taken\nprint('captured')",
    "capture_shown": "print(taken.stdout)",
    "timeit": "%%timeit -n1 -r1\npass",
    "shell_command": "!echo from the shell",
    "fd_level": "import os\nos.system('echo from a child'); os.write(1, b'from fd 1\\n')",
    "clear_output": (
        "from IPython.display import clear_output\n"
        "print('gone')\nclear_output(wait=True)\nprint('stays')"
    ),
    "progress_bar": (
        "import sys\nfor i in range(3):\n    sys.stderr.write(f'\\r{i}/3')\nsys.stderr.write('\\n')"
    ),
    "input": "input('name? ')",
    "question_mark": "len?",
    "child_thread": (
        "import threading\n"
        "t = threading.Thread(target=print, args=('from a thread',)); t.start(); t.join()"
    ),
    "warnings": "import warnings\nwarnings.warn('careful')",
    "logging": "import logging\nlogging.getLogger('some').warning('logged')",
    "nested_display_id": (
        "from IPython.display import display\n"
        "handle = display('first', display_id=True)\nhandle.update('second')"
    ),
    "rich": "from IPython.display import HTML\nHTML('<b>bold</b>')",
    "await": "import asyncio\nawait asyncio.sleep(0.01)\n'awaited'",
    "line_magic": "%precision 3\n22 / 7",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel for the tests that leave it as it was."""
    with started(tmp_path_factory.mktemp("shared")) as kernel:
        # Python says each warning once a place; here the same cell is run twice.
        kernel.run("import warnings\nwarnings.simplefilter('always')")
        yield kernel


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel of its own."""
    with started(tmp_path) as kernel:
        yield kernel


def ended(kernel: Kernel, cell: Cell, word: str = "") -> Cell:
    """Wait until the job of that cell is over and everything it has shown is here."""
    kernel.until(lambda: cell.badges and re.match("[✓✗⊘?] " + word, cell.badges[-1]), "no end")
    if "ran" in cell.badges[-1]:  # a body has run: its output ends with the second idle
        idle = {"execution_state": "idle"}
        kernel.until(lambda: cell.of("status").count(idle) >= 2, "the body never went idle")
    return cell


def deferred(kernel: Kernel, body: str, options: str = "", **send: object) -> Cell:
    """Queue a cell, and wait for its end."""
    return ended(kernel, kernel.run(f"%%gpuqueue {options}\n{body}", **send))


def looks(cell: Cell) -> dict[str, object]:
    """What a reader sees of a cell, without what differs from run to run."""
    stderr = re.sub(r"ipykernel_\d+/\d+\.py", "cell.py", cell.text("stderr"))
    stderr = re.sub(r"cell\.py:\d+", "cell.py", stderr)
    stdout = re.sub(r"[\d.]+ [nµm]?s ±.*", "some time", cell.text())
    return {
        "stdout": stdout,
        "stderr": stderr,
        "results": cell.results,
        "errors": [re.sub(r"\d+\.py, line \d+", "cell.py", error) for error in cell.errors],
        "displays": [sorted(item["data"]) for item in cell.displays],
        "updates": len(cell.of("update_display_data")) - max(0, len(cell.badges) - 1),
        "clears": len(cell.of("clear_output")),
    }


@pytest.mark.parametrize("name", BODIES)
def test_a_deferred_cell_looks_like_an_ordinary_one(shared: Kernel, name: str) -> None:
    body = BODIES[name]
    ordinary = shared.run(body, attended=False, stop=False)
    queued = deferred(shared, body)

    expected = looks(ordinary)
    if name == "question_mark":  # an ordinary cell's pager text comes in the reply
        pages = [item["data"] for item in ordinary.replies[-1]["content"]["payload"]]
        expected["displays"] = [sorted(data) for data in pages]
        shared.until(lambda: queued.displays, "the help was not shown")
    if name == "clear_output":  # the badge had been cleared as well, and was put up again
        expected["updates"] = 0
        assert len(queued.badges) >= 2
        assert "done" in queued.badges[-1]
    seen = looks(queued)
    if name == "clear_output":
        seen["updates"] = 0
        seen["displays"] = []
        expected["displays"] = []
    assert seen == expected
    wanted = "failed" if expected["errors"] else "done"
    assert wanted in queued.badges[-1]
    assert shared.run("print('alive')").text() == "alive\n"


@pytest.mark.parametrize("name", BODIES)
def test_a_cell_in_its_place_looks_like_an_ordinary_one(shared: Kernel, name: str) -> None:
    body = BODIES[name]
    ordinary = shared.run(body, attended=False, stop=False)
    queued = shared.run(f"%%gpuqueue --name p-{name}\n{body}", attended=False, stop=False)

    assert looks(queued) == looks(ordinary)
    assert queued.status == ordinary.status
    record = shared.run(f"%gpuq show p-{name} --json", stop=False)
    if name == "syntax_error":  # nothing of it ran, so it never asked for its turn
        assert record.errors[0].startswith("JobNotFoundError: there is no job p-syntax_error")
    else:
        state = "completed" if ordinary.status == "ok" else "failed"
        assert json.loads(record.text())["state"] == state


def test_out_and_history_hold_what_a_deferred_cell_gave(kernel: Kernel) -> None:
    cell = deferred(kernel, "6 * 7")
    assert cell.results == ["42"]
    number = cell.of("execute_result")[0]["execution_count"]
    after = kernel.run(f"print(_, Out[{number}], repr(In[{number}]))")
    assert after.text() == "42 42 '# %%gpuqueue\\n6 * 7'\n"


@pytest.mark.parametrize("attended", [True, False])
def test_tracebacks_name_the_line_of_the_cell(kernel: Kernel, attended: bool) -> None:
    code = "\n%%gpuqueue\n\nfirst = 1\n1 / 0"
    cell = kernel.run(code, attended=attended, stop=False)
    if attended:
        ended(kernel, cell)
    assert "----> 5 1 / 0" in re.sub(r"[^\S\n]+", " ", cell.traceback)
    assert "line 5" in cell.traceback


@pytest.mark.parametrize("attended", [True, False])
def test_future_imports_and_indented_cells_work(kernel: Kernel, attended: bool) -> None:
    body = (
        "# a comment\nfrom __future__ import annotations  # why\nprint(annotations.compiler_flag)"
    )
    cell = kernel.run(f"%%gpuqueue\n{body}", attended=attended)
    other = kernel.run("%%gpuqueue\n    indented = 3\n    print(indented)", attended=attended)
    if attended:
        ended(kernel, cell)
        ended(kernel, other)
    assert (cell.errors, other.errors) == ([], [])
    assert cell.text().strip().isdigit()
    assert other.text() == "3\n"


def test_the_badge_tells_the_whole_story(kernel: Kernel, tmp_path: Path) -> None:
    kernel.fake.take()
    body = "import os, time\nprint('ran')\nwhile not os.path.exists('go'): time.sleep(0.01)"
    cell = kernel.run(f"%%gpuqueue --priority 3 --name 'a <b>'\n{body}")
    assert cell.results == []
    waiting = kernel.badge(cell, "97 %")
    assert waiting.startswith("◷ queued #1 a <b> · priority 3 · GPU 0: 97 % used by python")
    assert kernel.run("print('usable')").text() == "usable\n"
    assert cell.text() == ""
    kernel.fake.free()
    kernel.badge(cell, "running #1")
    (tmp_path / "go").touch()
    done = ended(kernel, cell, "done").badges[-1]
    assert re.fullmatch(
        r"✓ done #1 a <b> · GPU 0 · waited [\d.]+ s · ran [\d.]+ s · kernel pinned to GPU 0", done
    )
    assert cell.text() == "ran\n"
    html = [item["data"]["text/html"] for item in cell._badges()]
    assert all("&lt;b&gt;" in text and "a <b>" not in text for text in html)
    ids = {item["transient"]["display_id"] for item in cell._badges()}
    assert len(ids) == 1


def test_a_waiting_badge_changes_at_most_once_a_second(kernel: Kernel) -> None:
    kernel.fake.take()
    cell = kernel.run("%%gpuqueue\n1")
    kernel.badge(cell, "pid 4242")
    before = len(cell.badges)

    def changed() -> bool:
        kernel.fake.take(pid=5000 + int(time.monotonic() * 20) % 1000)
        return len(cell.badges) >= before + 4

    kernel.until(changed, "the badge did not follow")
    # By the kernel's own dates: when they arrive here is another matter.
    dates = cell.badge_dates[before:]
    assert len(dates) - 1 <= (dates[-1] - dates[0]).total_seconds() + 1.5


def test_cells_run_in_order_and_higher_priorities_first(kernel: Kernel) -> None:
    kernel.run("order = []")
    kernel.fake.take()
    cells = [
        kernel.run(f"%%gpuqueue -p {priority}\norder.append({number})")
        for number, priority in enumerate([0, 0, 5, 0, -1])
    ]
    kernel.fake.free()
    for cell in cells:
        ended(kernel, cell)
    assert kernel.run("print(order)").text() == "[2, 0, 1, 3, 4]\n"


def test_run_all_is_not_cut_into(kernel: Kernel) -> None:
    kernel.run("order = []")
    cells = []
    for number in range(4):
        cells.append(kernel.send(f"%%gpuqueue\norder.append('queued {number}')"))
        cells.append(kernel.send(f"order.append({number})"))
    for cell in cells[::2]:
        ended(kernel, cell)
    expected = [0, 1, 2, 3, *(f"queued {number}" for number in range(4))]
    assert kernel.run("print(order)").text() == f"{expected}\n"


def test_a_busy_kernel_holds_no_gpu_and_blocks_nobody(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with started(first) as busy:
        state = {"GPUSCHED_STATE_DIR": str(first / "state"), "GPUSCHED_FAKE": str(busy.fake.path)}
        with started(second, **state) as other:
            long = busy.send(
                "%%time\nimport time\nprint('in', flush=True)\n"
                "while not globals().get('stop'): time.sleep(0.01)"
            )
            busy.until(lambda: long.text() == "in\n", "not busy")
            queued = busy.send("%%gpuqueue -p 9\nprint('late')")
            cell = deferred(other, "print('early')")
            assert cell.text() == "early\n"
            assert queued.badges == []
            busy.interrupt()
            busy.until(lambda: long.errors, "not interrupted")


def test_a_cell_queued_before_a_long_one_waits_for_its_kernel_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with started(first) as busy:
        state = {"GPUSCHED_STATE_DIR": str(first / "state"), "GPUSCHED_FAKE": str(busy.fake.path)}
        with started(second, **state) as other:
            busy.fake.take()
            queued = busy.run("%%gpuqueue -p 9\nprint('late')")
            long = busy.send("import time\nprint('in', flush=True)\ntime.sleep(600)")
            busy.until(lambda: long.text() == "in\n", "not busy")
            busy.badge(queued, "its kernel is busy")
            busy.fake.free()
            assert deferred(other, "print('early')").text() == "early\n"
            assert queued.text() == ""
            busy.interrupt()
            busy.until(lambda: long.errors, "not interrupted")
            assert ended(busy, queued).text() == "late\n"


RACE = """
import time, pathlib
session = get_ipython()._gpusched.session
real = session.send
def send(cell):
    pathlib.Path('sending').write_text('')
    while not pathlib.Path('go').exists():
        time.sleep(0.01)
    real(cell)
session.send = send
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_cell_that_loses_the_race_for_main_gives_its_gpu_back(
    kernel: Kernel, tmp_path: Path, fails: bool
) -> None:
    kernel.run(RACE)
    for patience_s in (0.2, 1.0, 5.0, 25.0):
        for name in ("go", "sending"):
            (tmp_path / name).unlink(missing_ok=True)
        queued = kernel.run("%%gpuqueue\nprint('mine')")
        kernel.until((tmp_path / "sending").exists, "nothing was sent")
        # These arrive before the request of the queued cell; failing makes the kernel drop it.
        foreign = kernel.send(
            "print(session.store.jobs(ended=True)[-1].state)" + ("\n1/0" if fails else "")
        )
        time.sleep(patience_s)  # nobody tells that it has arrived; if not, it came second
        (tmp_path / "go").write_text("")
        ended(kernel, queued, "done")
        kernel.until(lambda foreign=foreign: foreign.replies and foreign.text(), "it did not run")
        if foreign.text() != "completed\n":
            break
    assert foreign.text() == "pending\n"
    # The request that lost went idle as well, so counting idles is not enough here.
    kernel.until(lambda: queued.text() == "mine\n", "its output is missing")
    assert queued.errors == []


def test_a_failing_deferred_cell_takes_nothing_along(kernel: Kernel) -> None:
    kernel.fake.take()
    failing = kernel.run("%%gpuqueue\n1/0")
    good = kernel.run("%%gpuqueue\nprint('good')")
    kernel.fake.free()
    ended(kernel, failing, "failed")
    assert ended(kernel, good, "done").text() == "good\n"


@pytest.mark.parametrize(
    "body",
    [
        "import time\nprint('go')\ntime.sleep(600)",
        "import asyncio\nprint('go')\nawait asyncio.sleep(600)",
    ],
    ids=["sync", "await"],
)
def test_a_running_cell_is_cancelled_by_an_interrupt_of_its_kernel(
    kernel: Kernel, body: str, tmp_path: Path
) -> None:
    queued = kernel.run(f"%%gpuqueue\n{body}")
    behind = None
    kernel.until(lambda: queued.text() == "go\n", "it never began")
    behind = kernel.send("print('behind')")
    cancel_from_outside(tmp_path, queued.job)
    ended(kernel, queued, "cancelled")
    kernel.until(lambda: behind.text() == "behind\n", "the cell behind it was hit")
    assert behind.errors == []
    assert kernel.run("print('alive')").text() == "alive\n"


def test_an_interrupt_of_a_running_cell_is_its_failure(kernel: Kernel) -> None:
    queued = kernel.run("%%gpuqueue\nimport time\nprint('go')\ntime.sleep(600)")
    kernel.until(lambda: queued.text() == "go\n", "it never began")
    kernel.interrupt()
    assert "KeyboardInterrupt" in ended(kernel, queued, "failed").badges[-1]
    assert queued.errors == ["KeyboardInterrupt: "]


def test_cancelling_a_waiting_cell_leaves_the_running_one_alone(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.fake.take()
    queued = kernel.run("%%gpuqueue\nprint('never')")
    mine = kernel.send("import time\nfor _ in range(10): time.sleep(0.1)\nprint('mine')")
    cancel_from_outside(tmp_path, queued.job)
    ended(kernel, queued, "cancelled")
    kernel.until(lambda: mine.replies, "no reply")
    assert (mine.text(), mine.errors) == ("mine\n", [])
    kernel.fake.free()
    assert deferred(kernel, "print('next')").text() == "next\n"
    assert queued.text() == ""


def test_a_cell_is_interrupted_when_its_walltime_is_over(kernel: Kernel) -> None:
    queued = kernel.run("%%gpuqueue --time 1s\nimport time\nwhile True: time.sleep(0.05)")
    assert "its walltime ran out" in ended(kernel, queued, "timed out").badges[-1]
    assert deferred(kernel, "print('next')").text() == "next\n"


@contextmanager
def from_outside(folder: Path) -> Iterator[Queue]:
    """The queue as another notebook or a terminal has it."""
    queue = Queue(Settings.load({"state_dir": str(folder / "state")}, environ={}))
    try:
        yield queue
    finally:
        queue.store.close()


def cancel_from_outside(folder: Path, job: int) -> None:
    with from_outside(folder) as queue:
        queue.cancel(job)


def test_interrupting_a_cell_that_waits_in_its_place_gives_it_up(kernel: Kernel) -> None:
    kernel.fake.take()
    cell = kernel.send("%%gpuqueue --wait --name w\nprint('never')")
    kernel.badge(cell, "97 %")
    kernel.interrupt()
    kernel.until(lambda: cell.replies, "no reply")
    assert cell.status == "error"
    assert cell.errors == ["KeyboardInterrupt: "]
    assert cell.text() == ""
    kernel.badge(cell, "cancelled")
    assert json.loads(kernel.run("%gpuq show w --json").text())["state"] == "cancelled"
    kernel.fake.free()
    assert deferred(kernel, "print('next')").text() == "next\n"


def test_cancelling_a_cell_that_waits_in_its_place_fails_it_with_one_line(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.fake.take()
    cell = kernel.send("%%gpuqueue --wait\nprint('never')")
    kernel.badge(cell, "97 %")
    cancel_from_outside(tmp_path, cell.job)
    kernel.until(lambda: cell.replies, "no reply")
    assert cell.errors == [f"UserError: job {cell.job} was cancelled while it waited"]
    assert cell.traceback.count("\n") == 0


def test_headless_cells_wait_in_their_place_and_say_so_once(kernel: Kernel, tmp_path: Path) -> None:
    kernel.fake.take()
    cell = kernel.send("%%gpuqueue\nprint('ran')\n1 + 1", attended=False)
    behind = kernel.send("print('behind')", attended=False)
    with from_outside(tmp_path) as queue:

        def long_enough() -> bool:
            """For its time to be worth a line at the end."""
            since = [job.reason_since for job in queue.list() if job.reason_since is not None]
            return bool(since) and time.time() - since[0] > 1.5

        kernel.until(long_enough, "it does not wait for a GPU")
    assert (cell.replies, behind.text()) == ([], "")
    kernel.fake.free()
    kernel.until(lambda: behind.replies and behind.text(), "no reply")
    assert re.fullmatch(r"gpuqueue: job 1 waited \d+ s for GPU 0\n", cell.text("stderr"))
    assert (cell.text(), cell.results, cell.badges) == ("ran\n", ["2"], [])


def test_a_failing_cell_in_its_place_stops_run_all(kernel: Kernel) -> None:
    cell = kernel.send("%%gpuqueue\n1/0", attended=False)
    behind = kernel.send("print('behind')", attended=False)
    kernel.until(lambda: behind.replies, "no reply")
    assert cell.errors == ["ZeroDivisionError: division by zero"]
    assert behind.status == "aborted"
    job = json.loads(kernel.run("%gpuq show 1 --json").text())
    assert (job["state"], job["error"]) == ("failed", "ZeroDivisionError: division by zero")


def test_a_waiting_cell_goes_before_deferred_ones_of_its_kernel(kernel: Kernel) -> None:
    kernel.fake.take()
    kernel.run("order = []")
    queued = kernel.run("%%gpuqueue -p 9\norder.append('deferred')")
    place = kernel.send("%%gpuqueue --wait\norder.append('in place')")
    kernel.badge(queued, "its kernel is busy")
    kernel.fake.free()
    kernel.until(lambda: place.replies, "deadlock")
    ended(kernel, queued)
    assert kernel.run("print(order)").text() == "['in place', 'deferred']\n"


def test_running_a_cell_again_replaces_what_it_had_queued(kernel: Kernel) -> None:
    kernel.fake.take()
    old = kernel.run("%%gpuqueue\nprint('old')", cell_id="one")
    other = kernel.run("%%gpuqueue\nprint('other')", cell_id="two")
    new = kernel.run("%%gpuqueue\nprint('new')", cell_id="one")
    assert f"replaces #{old.job}" in new.badges[0]
    ended(kernel, old, "cancelled")
    kernel.fake.free()
    assert ended(kernel, new).text() == "new\n"
    assert ended(kernel, other).text() == "other\n"
    assert old.text() == ""


def test_a_name_that_is_not_there_yet_is_explained(kernel: Kernel) -> None:
    assert "gpuqueue" not in kernel.run("missing", stop=False).text("stderr")
    kernel.fake.take()
    queued = kernel.run("%%gpuqueue\nmodel = 1")
    hint = kernel.run("model", stop=False).text("stderr")
    assert f"(#{queued.job})" in hint
    assert "%gpuq wait" in hint
    assert hint.count("\n") == 1
    kernel.fake.free()
    ended(kernel, queued)
    assert kernel.run("model").results == ["1"]


def test_waiting_in_a_cell_lets_the_kernels_own_cells_run(kernel: Kernel) -> None:
    kernel.fake.take()
    first = kernel.run("%%gpuqueue\nmodel = 6\nprint('one')\nmodel")
    second = kernel.run("%%gpuqueue\n1/0")
    wait = kernel.send("%gpuq wait")
    use = kernel.send("model * 7")
    kernel.receive(0.3)
    assert use.replies == []
    kernel.fake.free()
    kernel.until(lambda: use.replies, "deadlock")
    kernel.badge(first, "done")
    kernel.badge(second, "failed")
    assert (first.text(), first.results) == ("one\n", ["6"])
    assert second.errors == ["ZeroDivisionError: division by zero"]
    assert (wait.errors, wait.text(), wait.results) == ([], "", [])
    assert "completed" in wait.displays[0]["data"]["text/plain"]
    assert use.results == ["42"]


def test_a_cell_that_awaits_cannot_run_inside_a_wait_and_says_so(kernel: Kernel) -> None:
    kernel.fake.take()
    queued = kernel.run("%%gpuqueue\nimport asyncio\nawait asyncio.sleep(0)\nprint('done it')")
    wait = kernel.send("%gpuq wait", stop=False)
    kernel.receive(0.3)
    kernel.fake.free()
    kernel.until(lambda: wait.replies, "no reply")
    assert "awaits at its top level" in wait.errors[0]
    assert ended(kernel, queued).text() == "done it\n"


def test_the_output_is_replayed_in_any_cell_and_any_kernel(kernel: Kernel, tmp_path: Path) -> None:
    png = (
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
        "RU5ErkJggg=="
    )
    body = (
        "import base64\nfrom IPython.display import Image, display\nprint('text')\n"
        f"display(Image(base64.b64decode('{png}')))\n'result'"
    )
    cell = deferred(kernel, body, "--name fig")
    assert [item["data"]["image/png"].strip() for item in cell.displays] == [png]
    shown = kernel.run("%gpuq show fig")
    assert shown.text() == "text\n"
    assert [item["data"].get("image/png", "").strip() for item in shown.displays[1:]] == [png, ""]
    assert shown.displays[-1]["data"]["text/plain"] == "'result'"
    log = kernel.run("%gpuq log fig").text()
    assert log == "text\n<IPython.core.display.Image object>\n'result'\n"
    path = Path(json.loads(kernel.run("%gpuq show fig --json").text())["log"])
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "second").mkdir()
    state = {"GPUSCHED_STATE_DIR": str(tmp_path / "state")}
    with started(tmp_path / "second", **state) as other:
        assert other.run("%gpuq log fig").text() == log


@pytest.mark.parametrize("attended", [True, False])
def test_a_cell_that_held_its_place_is_shown_once_more(shared: Kernel, attended: bool) -> None:
    name = f"kept-{attended}".lower()
    body = "from IPython.display import HTML\nprint('printed')\ndisplay(HTML('<b>b</b>'))\n6 * 7"
    cell = shared.run(f"%%gpuqueue --wait --name {name}\n{body}", attended=attended)
    assert (cell.errors, cell.results) == ([], ["42"])
    again = shared.run(f"%gpuq show {name}")
    assert again.text() == "printed\n"
    shown = [item["data"] for item in again.of("display_data")]
    assert [data["text/html"] for data in shown if "<b>b</b>" in str(data)] == ["<b>b</b>"]
    assert {"text/plain": "42"} in shown
    assert shared.run(f"%gpuq log {name}").text().startswith("printed\n")
    failing = shared.run(f"%%gpuqueue --wait --name {name}-x\n1 / 0", attended=attended, stop=False)
    assert failing.status == "error"
    assert "ZeroDivisionError" in shared.run(f"%gpuq log {name}-x").text()


def test_a_transcript_has_a_size_limit(tmp_path: Path) -> None:
    with started(tmp_path, GPUSCHED_LOG_CAP="10K") as kernel:
        deferred(kernel, "for i in range(3000): print('x' * 50, flush=True)")
        log = kernel.run("%gpuq log 1").text()
        assert len(log) < 12_000
        assert "log_cap" in log


def test_cells_of_a_killed_kernel_are_lost(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    dying = Kernel(first)
    dying.start()
    state = {"GPUSCHED_STATE_DIR": str(first / "state"), "GPUSCHED_FAKE": str(dying.fake.path)}
    with started(second, **state) as other:
        dying.run("%load_ext gpusched_ipy")
        running = dying.run("%%gpuqueue --name running\nimport time\nprint('go')\ntime.sleep(600)")
        dying.until(lambda: running.text() == "go\n", "it never began")
        queued = other.run("%%gpuqueue\nprint('mine now')")
        other.badge(queued, "priority 0 ·")
        dying.kill()
        assert ended(other, queued).text() == "mine now\n"
        job = json.loads(other.run("%gpuq show running --json").text())
        assert (job["state"], job["error"]) == ("lost", "kernel died")


def test_the_gpu_of_a_killed_kernel_waits_for_what_it_has_left_on_the_card(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    dying = Kernel(first)
    dying.start()
    state = {"GPUSCHED_STATE_DIR": str(first / "state"), "GPUSCHED_FAKE": str(dying.fake.path)}
    left_behind = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    with started(second, **state) as other:
        dying.run("%load_ext gpusched_ipy")
        running = dying.run(f"%%gpuqueue --name running\n{left_behind}")
        dying.until(lambda: running.text().endswith("\n"), "it never began")
        child = int(running.text())
        try:
            dying.fake.take(pid=child)  # as the driver shows a data loader, or a trainer's rank
            queued = other.run("%%gpuqueue\nprint('mine now')")
            other.badge(queued, "job 1 (running) is on it")
            dying.kill()
            other.badge(queued, f"97 % used by python (pid {child}")
            job = json.loads(other.run("%gpuq show running --json").text())
            assert (job["state"], job["error"]) == ("lost", "kernel died")
            assert queued.text() == ""
        finally:
            os.kill(child, signal.SIGKILL)
        dying.fake.free()
        assert ended(other, queued).text() == "mine now\n"


def test_a_kernel_that_shuts_down_loses_its_queued_cells_at_once(tmp_path: Path) -> None:
    from gpusched_ipy.api import Queue
    from gpusched_ipy.config import Settings

    with started(tmp_path) as kernel:
        kernel.fake.take()
        kernel.run("%%gpuqueue\nprint('never')")
    queue = Queue(Settings.load({"state_dir": str(tmp_path / "state")}, environ={}))
    try:
        (job,) = queue.list(all=True)
        assert (str(job.state), job.error) == ("lost", "its kernel was shut down")
        assert queue.store.members() == {}
    finally:
        queue.store.close()


def test_cells_that_a_restart_has_lost_are_offered_and_queued_again_by_one_call(
    tmp_path: Path,
) -> None:
    with started(tmp_path, JPY_SESSION_NAME="work/train.ipynb") as kernel:
        kernel.fake.take()
        for name in ("one", "two"):
            kernel.run(f"%%gpuqueue --name {name} --priority 3\nprint('ran {name}', x)")
        running = kernel.run("%gpurun --name command -- sleep 0.1")
        assert "#3" in running.text()
        kernel.restart()
        kernel.run("%load_ext gpusched_ipy\nx = 42")
        offer = kernel.run("%gpuq list --all --json")
        assert {job["name"]: job["state"] for job in json.loads(offer.text())} == {
            "one": "lost", "two": "lost", "command": "pending",
        }  # fmt: skip
        assert "2 queued cells of this notebook never ran" in offer.text("stderr")
        assert "%gpuq requeue 1,2 " in offer.text("stderr")
        again = kernel.run("%gpuq requeue 1,2")
        kernel.until(lambda: len(set(again.badges)) >= 2, "no badges")
        kernel.fake.free()
        kernel.until(
            lambda: again.text().endswith("ran one 42\nran two 42\n"), "they never ran", 60
        )
        kernel.run("%gpuq wait")
        listed = json.loads(kernel.run("%gpuq list --all --json").text())
        assert [job["state"] for job in listed] == ["completed"] * 3


def test_nobody_gets_the_gpu_of_a_stopped_kernel(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        running = kernel.run(
            "%%gpuqueue --name cell\nimport os, time\nprint(os.getpid(), flush=True)\n"
            "while not os.path.exists('go'): time.sleep(0.01)"
        )
        kernel.until(lambda: running.text().endswith("\n"), "it never began", 60)
        pid = int(running.text())
        os.kill(pid, signal.SIGSTOP)
        try:
            (tmp_path / "go").touch()
            command = [PYTHON, "-m", "gpusched_ipy"]
            other = subprocess.Popen(
                [*command, "run", "--name", "other", "true"],
                env=kernel.environment, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert other.stderr is not None
            # It says why it waits, which it does not do before it has tried.
            why = "GPU 0: job 1 (cell) is on it"
            assert any(why in line for line in iter(other.stderr.readline, ""))
            assert other.poll() is None
        finally:
            os.kill(pid, signal.SIGCONT)
        assert other.wait(60) == 0
        other.stderr.close()
        ends = json.loads(kernel.run("%gpuq list --all --json").text())
        assert [job["state"] for job in ends] == ["completed", "completed"]
        assert ends[1]["started_at"] >= ends[0]["ended_at"]


def test_an_interrupt_of_the_kernel_leaves_its_commands_alone(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        code = "import time; print('go', flush=True); time.sleep(2); print('through')"
        kernel.run(f'%gpurun --name command -- {PYTHON} -c "{code}"')
        kernel.until(lambda: "go" in kernel.run("%gpuq log command").text(), "it never began", 60)
        # Not before its first line: ipykernel itself never answers one that is hit ahead of it.
        busy = kernel.send("import time\nprint('in', flush=True)\ntime.sleep(600)")
        kernel.until(lambda: busy.text() == "in\n", "it never began")
        kernel.interrupt()
        kernel.until(lambda: busy.replies, "no reply")
        assert busy.status == "error"
        kernel.run("%gpuq wait command")
        assert kernel.run("%gpuq log command").text() == "go\nthrough\n"
        (job,) = json.loads(kernel.run("%gpuq list --all --json").text())
        assert (job["state"], job["exit_code"]) == ("completed", 0)


def test_a_forked_child_that_ends_takes_nothing_of_its_kernels_along(kernel: Kernel) -> None:
    kernel.fake.take()
    queued = kernel.run("%%gpuqueue\nprint('ran')")
    # As atexit does in a child that ends by sys.exit(); ipykernel's own hooks are none of ours.
    ends = "get_ipython()._gpusched._at_exit()\n    os._exit(0)"
    fork = f"import os\npid = os.fork()\nif pid == 0:\n    {ends}\nos.waitpid(pid, 0)[1]"
    assert kernel.run(fork).results == ["0"]
    kernel.fake.free()
    assert ended(kernel, queued, "done").text() == "ran\n"


def test_the_first_grant_pins_the_kernel(tmp_path: Path) -> None:
    with started(tmp_path, gpus=2) as kernel:
        kernel.fake.take(0)
        read = (
            "import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])"
        )
        assert deferred(kernel, read).text() == "GPU-fake-1 PCI_BUS_ID\n"
        kernel.fake.free(0)
        kernel.fake.take(1)
        cell = kernel.run(f"%%gpuqueue\n{read}")
        assert "pinned to GPU 1" in kernel.badge(cell, "97 %")
        kernel.fake.free(1)
        assert ended(kernel, cell).text() == "GPU-fake-1 PCI_BUS_ID\n"


def test_unqueued_use_is_said_once(tmp_path: Path) -> None:
    with started(tmp_path, GPUSCHED_WARN_UNQUEUED="1") as kernel:
        kernel.run("%gpus")
        pid = int(kernel.run("import os; print(os.getpid())").text())
        kernel.fake.take(pid=pid)
        wait = "import time\ntime.sleep(0.6)"
        # It is said of a cell during which a reading was taken.
        warning = wait_until(lambda: kernel.run(wait).text("stderr"), what="a warning")
        again = kernel.run(wait)
        assert "uses GPU 0 outside the queue" in warning
        assert warning.count("\n") == 1
        assert again.text("stderr") == ""


def test_nbconvert_gives_the_same_outputs_as_without_the_magic(tmp_path: Path) -> None:
    import nbformat

    outputs = []
    for folder, magic in (("plain", ""), ("queued", "%%gpuqueue --priority 2\n")):
        (tmp_path / folder).mkdir()
        kernel = Kernel(tmp_path / folder)
        path = tmp_path / folder / "book.ipynb"
        sources = [
            "%load_ext gpusched_ipy",
            f"{magic}x = 6\nprint('six')\nx",
            f"{magic}import asyncio\nawait asyncio.sleep(0)\n_ * 7",
            "x + 1",
        ]
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
        subprocess.run(
            [
                *(*command, "--ExecutePreprocessor.kernel_name=tested"),
                *("--ExecutePreprocessor.startup_timeout=200", str(path)),
            ],
            env=kernel.environment,
            check=True,
            capture_output=True,
        )
        outputs.append([cell.outputs for cell in nbformat.read(path, as_version=4).cells[1:]])
    assert outputs[0] == outputs[1]
    assert outputs[1][1][0]["data"]["text/plain"] == "42"


def test_ten_quick_cells_lose_no_turn(kernel: Kernel) -> None:
    cells = [kernel.run(f"%%gpuqueue\nprint({number})") for number in range(10)]
    texts = [ended(kernel, cell, "done").text() for cell in cells]
    assert texts == [f"{number}\n" for number in range(10)]


def test_a_job_that_somebody_purges_takes_no_other_badge_along(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        kernel.fake.take()
        gone = kernel.run("%%gpuqueue\nprint('never')")
        kernel.badge(gone, "queued")
        pid = kernel.manager.provisioner.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            for words in (["cancel", "1"], ["purge", "--all"]):
                command = [PYTHON, "-m", "gpusched_ipy", *words]
                subprocess.run(command, env=kernel.environment, check=True, capture_output=True)
        finally:
            os.kill(pid, signal.SIGCONT)
        kernel.fake.free()
        ran = kernel.run("%%gpuqueue\nprint('ran')")
        kernel.badge(ran, "done")
        assert "Traceback" not in (tmp_path / "state" / "kernel.log").read_text()
