"""Isolated cells in real kernels: a fresh Python under the cell, its variables brought back."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_until
from kernels import Cell, Kernel, Page, started

from gpusched_ipy.job import Job, JobState
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store

pytestmark = pytest.mark.kernel
# A fresh Python with IPython takes seconds where many tests run at once.
PATIENCE_S = 200.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel for the tests that leave it as it was."""
    with started(tmp_path_factory.mktemp("isolated")) as kernel:
        kernel.run("import os\n%gpuq")
        yield kernel


@pytest.fixture(scope="module")
def store(shared: Kernel) -> Iterator[Store]:
    found = Store(StateDir(shared.folder / "state"))
    yield found
    found.close()


def until(flag: Path, meanwhile: str = "time.sleep(0.01)") -> str:
    """Code that defines ``wait()``: until the file is there, and not for ever."""
    return (
        "import os, time\ndeadline = time.time() + 280\n"
        f"def wait():\n    while not os.path.exists({str(flag)!r}):\n"
        f"        assert time.time() < deadline\n        {meanwhile}\n"
    )


def send(kernel: Kernel, options: str, body: str, **how: object) -> Cell:
    return kernel.run(f"%%gpuqueue --isolate {options}\n{body}", **how)


def ended(kernel: Kernel, cell: Cell, word: str) -> str:
    """The badge of a cell whose job is over, and whose outputs are here."""
    assert cell.errors == [], cell.traceback
    kernel.until(
        lambda: cell.badges and word in cell.badges[-1] and "once this" not in cell.badges[-1],
        f"its badge never said {word!r}",
        PATIENCE_S,
    )
    return cell.badges[-1]


def job_of(store: Store, cell: Cell) -> Job:
    return store.job(cell.job)


def names(store: Store) -> list[str]:
    return [job.name for job in store.jobs(ended=True)]


def test_it_takes_variables_along_and_brings_them_back(shared: Kernel, store: Store) -> None:
    shared.run(
        "class Point:\n    def __init__(self, x): self.x = x\n"
        "def double(x): return 2 * x\n"
        "points = [Point(1), Point(2)]; local = 'stays'"
    )
    body = (
        "import os\nassert 'local' not in globals()\n"
        "total = double(sum(point.x for point in points)); points.append(Point(total))\n"
        "seen = os.getpid(), os.environ['CUDA_VISIBLE_DEVICES']\ntotal"
    )
    cell = send(shared, "-n trip --in points,double,Point --out total,seen,points", body)
    badge = ended(shared, cell, "are here")
    assert badge.startswith(f"✓ done #{cell.job} trip · GPU 0 · waited ")
    assert cell.results == ["6"]
    got = shared.run(
        "total, seen[0] != os.getpid(), seen[1], len(points), type(points[2]) is Point"
    )
    assert got.results == ["(6, True, 'GPU-fake-0', 3, True)"]
    handle = f"from gpusched_ipy import JobHandle, Queue\nJobHandle(Queue(), {cell.job})"
    assert shared.run(f"{handle}.result()['total']").results == ["6"]
    job = job_of(store, cell)
    assert (job.kind, job.state, job.spec.home) == ("isolated", "completed", None)
    # Its process is gone, and with it all its memory.
    gone = Path(f"/proc/{shared.run('seen[0]').results[0]}")
    wait_until(lambda: not gone.exists(), what="its process is gone")
    kept = [*(store.state.root / "calls").iterdir(), store.state.transcript(job.spec.uid)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}


def test_what_it_shows_looks_like_a_cell(shared: Kernel) -> None:
    body = (
        "%config InlineBackend.figure_formats = ['png']\n"
        "import asyncio, os, sys, subprocess, warnings\n"
        "await asyncio.sleep(0.01)\n"
        "print('printed', flush=True)\n"
        "_ = subprocess.run(['echo', 'from a process'])\n"
        "!echo from the shell\n"
        "for i in range(3):\n    sys.stderr.write(f'\\r{i}/3')\n"
        "sys.stderr.write('\\n')\n"
        "import matplotlib.pyplot as plt\n"
        "plt.plot([1, 2]); plt.show()\n"
        "from IPython.display import HTML, display\n"
        "handle = display(HTML('<b>first</b>'), display_id=True)\n"
        "handle.update(HTML('<b>second</b>'))\n"
        "len?\n"
        "{'a': 1}"
    )
    cell = send(shared, "-n looks", body)
    ended(shared, cell, "done")
    assert cell.text().replace("\r", "") == "printed\nfrom a process\nfrom the shell\n"
    assert cell.text("stderr") == "\r0/3\r1/3\r2/3\n"
    kinds = [sorted(item["data"]) for item in cell.displays]
    assert kinds[0] == ["image/png", "text/plain"]
    assert kinds[1] == ["text/html", "text/plain"]
    assert "Return the number of items" in cell.displays[2]["data"]["text/plain"]
    updates = [item["data"].get("text/html") for item in cell.of("update_display_data")]
    assert "<b>second</b>" in updates
    assert cell.results == ["{'a': 1}"]
    # Once more, in another cell, as after a reload of the page.
    again = shared.run("%gpuq show looks")
    assert "from a process" in again.text()
    assert "2/3" in again.text("stderr")
    assert "1/3" not in again.text("stderr")
    shown = [item["data"] for item in again.of("display_data")]
    assert any("image/png" in data for data in shown)
    assert any(data.get("text/html") == "<b>second</b>" for data in shown)
    log = shared.run("%gpuq log looks").text()
    order = ["printed", "from a process", "from the shell", "2/3", "{'a': 1}"]
    assert [log.index(text) for text in order] == sorted(log.index(text) for text in order)


def test_its_output_appears_while_the_notebook_computes(shared: Kernel, tmp_path: Path) -> None:
    flag = tmp_path / "go"
    body = f"{until(flag)}print('begun')\nwait()\nprint('went on'); got = 1"
    shared.run("got = 0")
    cell = send(shared, "--out got", body)
    busy = shared.send(f"{until(tmp_path / 'leave', 'pass')}wait()\ngot")
    shared.until(lambda: "begun\n" in cell.text(), "it did not begin", PATIENCE_S)
    assert cell.text() == "begun\n"
    flag.touch()
    shared.until(lambda: "went on\n" in cell.text(), "its output did not appear", PATIENCE_S)
    shared.badge(cell, "got once this kernel is idle", PATIENCE_S)
    assert busy.replies == []
    (tmp_path / "leave").touch()
    # No name changes under code that runs; afterwards it is there.
    shared.badge(cell, "got is here", PATIENCE_S)
    shared.until(lambda: busy.replies, "the busy cell did not end")
    assert busy.results == ["0"]
    assert shared.run("got").results == ["1"]


def test_a_name_that_was_bound_anew_is_kept(shared: Kernel, tmp_path: Path) -> None:
    flag = tmp_path / "go"
    wait = f"{until(flag)}wait()\n"
    shared.run("first = 'old'")
    cell = send(shared, "-n rebound --out first,second", f"{wait}first = second = 'from the job'")
    shared.run("first = 'mine'")
    flag.touch()
    badge = ended(shared, cell, "here")
    kept = (
        f"second is here; first was bound anew meanwhile and kept: %gpuq fetch {cell.job} replaces"
    )
    assert kept in badge
    assert shared.run("first, second").results == ["('mine', 'from the job')"]
    assert shared.run("%gpuq fetch rebound").text() == f"first, second from job {cell.job}\n"
    assert shared.run("first").results == ["'from the job'"]
    # What a job has brought was not bound by the user: the next job may replace it.
    again = send(shared, "--out first", "first = 'newer'")
    ended(shared, again, "first is here")
    assert shared.run("first").results == ["'newer'"]


def test_waiting_for_it_brings_its_outputs_to_the_next_line(shared: Kernel) -> None:
    send(shared, "-n early --out early", "early = 5")
    cell = shared.send("%gpuq wait early\nprint('early is', early)")
    shared.until(lambda: cell.replies, "it never ended", PATIENCE_S)
    assert cell.errors == []
    assert "early is 5" in cell.text()


def test_an_error_is_shown_under_the_cell_and_in_the_record(shared: Kernel, store: Store) -> None:
    cell = send(shared, "-n fails --out x", "x = 1\n\nprint('before')\n{}['missing']")
    badge = ended(shared, cell, "failed")
    assert "KeyError: 'missing'" in badge
    assert cell.errors == ["KeyError: 'missing'"]
    # The line as it stands in the notebook, the magic being the first.
    assert "----> 5 {}['missing']" in " ".join(cell.traceback.split(" ")).replace("      ", " ")
    job = job_of(store, cell)
    assert (job.state, job.error, job.exit_code) == ("failed", "KeyError: 'missing'", 1)
    assert "KeyError" in shared.run("%gpuq show fails").text()
    refused = shared.run("%gpuq fetch fails", stop=False).errors
    assert refused == [
        f"UserError: job {cell.job} has no outputs, it is failed: KeyError: 'missing'"
    ]


def test_out_of_gpu_memory_is_recognised(shared: Kernel, store: Store) -> None:
    body = (
        "class OutOfMemoryError(RuntimeError): pass\n"
        "OutOfMemoryError.__module__ = 'torch'\n"
        "raise OutOfMemoryError('CUDA out of memory. Tried to allocate 80.00 GiB.')"
    )
    cell = send(shared, "-n oom", body)
    badge = ended(shared, cell, "failed")
    assert "out of GPU memory: OutOfMemoryError: CUDA out of memory" in badge
    assert cell.errors == ["OutOfMemoryError: CUDA out of memory. Tried to allocate 80.00 GiB."]
    assert job_of(store, cell).oom


def test_its_log_is_followed_from_before_its_begin(shared: Kernel) -> None:
    shared.fake.take()
    send(shared, "-n followed", "import os\nprint('line')\nos.write(1, b'raw\\n')\n1 + 1")
    cell = shared.send("%gpuq log -f followed")
    shared.fake.free()
    shared.until(lambda: cell.replies, "it was not followed to its end", PATIENCE_S)
    shared.until(lambda: "2\n" in cell.text(), "the end was not shown")
    assert (cell.errors, cell.text()) == ([], "line\nraw\n2\n")


def test_a_death_of_its_process_loses_nothing_that_was_written(shared: Kernel) -> None:
    body = (
        "import os, time\nprint('last words', flush=True); os.write(2, b'raw last words\\n')\n"
        "os.kill(os.getpid(), 9)"
    )
    cell = send(shared, "-n dies", body)
    assert "ended by SIGKILL" in ended(shared, cell, "failed")
    assert cell.text() == "last words\nraw last words\n"


def test_missing_and_broken_outputs_are_named(shared: Kernel, store: Store) -> None:
    cell = send(
        shared, "--out good,never,bad", "import threading\ngood = 1; bad = threading.Lock()"
    )
    ended(shared, cell, "failed")
    (error,) = cell.errors
    assert "--out never: the cell has not made it" in error
    assert "--out bad: it cannot be pickled (TypeError" in error
    assert "good" not in error
    assert shared.run(f"%gpuq fetch {cell.job}").text() == f"good from job {cell.job}\n"
    assert job_of(store, cell).error == error.removeprefix("UserError: ")


@pytest.mark.parametrize(
    ("options", "body", "wanted"),
    [
        ("--isolate --in nowhere", "1", "--in nowhere: there is no variable nowhere"),
        ("--isolate --in lock", "1", "--in lock: it cannot be pickled (TypeError: cannot pickle"),
        ("--isolate --in small,large", "1", "--in large: 257 MiB pickled, and at most 256 MiB are"),
        ("--engine slurm --in small,large", "1", "--in large: 257 MiB pickled, and at most"),
        ("--engine ray --in half,more", "1", "the inputs together: 260 MiB pickled, and at most"),
        ("--isolate --in a-b", "1", "'a-b' is not the name of a variable"),
        ("--in small", "1", "--in is for isolated cells"),
        ("--isolate --out lr --sweep lr=1,2", "1", "each job of the sweep"),
        ("--isolate", "  ", "the cell is empty"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_queued(
    shared: Kernel, store: Store, options: str, body: str, wanted: str
) -> None:
    shared.run("import threading; lock = threading.Lock(); small = 1; large = bytes(257 * 2**20)")
    shared.run("half, more = bytes(130 * 2**20), bytes(130 * 2**20 + 1)")
    before, kept = names(store), sorted((store.state.root / "calls").iterdir())
    cell = shared.run(f"%%gpuqueue {options}\n{body}", stop=False)
    (error,) = cell.errors
    assert error.startswith("UserError: ")
    assert wanted in error
    assert "\n" not in error
    planned = shared.run(f"%%gpuqueue --dry-run {options}\n{body}", stop=False)
    assert planned.errors == [error], "--dry-run says the same"
    assert names(store) == before
    assert sorted((store.state.root / "calls").iterdir()) == kept
    shared.run("del large")


def test_a_cancel_ends_its_process_and_the_cell_says_so(
    shared: Kernel, store: Store, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    body = (
        f"import os, time, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(pid_file)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r})\n"
        "while True: time.sleep(0.1)"
    )
    cell = send(shared, "-n endless", body)
    wait_until(pid_file.exists, PATIENCE_S)
    pid = int(pid_file.read_text())
    shared.run("%gpuq cancel endless")
    ended(shared, cell, "⊘ cancelled")
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="its process is gone")
    assert job_of(store, cell).state is JobState.CANCELLED


def test_its_walltime_ends_it(shared: Kernel, store: Store) -> None:
    cell = send(shared, "--time 1s", "import time\nwhile True: time.sleep(0.1)")
    assert "its walltime ran out" in ended(shared, cell, "timed out")


def test_run_again_the_cell_replaces_what_it_has_queued(shared: Kernel, store: Store) -> None:
    shared.fake.take()
    try:
        first = send(shared, "--out value", "value = 1", cell_id="abc")
        second = send(shared, "--out value", "value = 2", cell_id="abc")
        assert f"replaces #{first.job}" in second.badges[0]
        ended(shared, first, "⊘ cancelled")
    finally:
        shared.fake.free()
    ended(shared, second, "value is here")
    assert shared.run("value").results == ["2"]


def test_the_same_key_again_shows_the_same_job(shared: Kernel, store: Store) -> None:
    first = send(shared, "--key once --out keyed", "print('once'); keyed = 1", cell_id="key")
    second = send(shared, "--key once --out keyed", "print('once'); keyed = 1", cell_id="key")
    assert second.job == first.job
    ended(shared, second, "keyed is here")
    ended(shared, first, "keyed is here")
    assert (first.text(), second.text()) == ("once\n", "once\n")
    kept = [path.suffix for path in (store.state.root / "calls").iterdir()]
    assert kept.count(".in") == len(store.jobs(ended=True))


def test_without_a_front_end_it_holds_its_place(shared: Kernel, store: Store) -> None:
    body = "print('in its place')\nfrom IPython.display import HTML\nmade = 7\nHTML('<i>x</i>')"
    cell = send(shared, "-n placed --out made", body, attended=False)
    assert (cell.text(), cell.errors, cell.status) == ("in its place\n", [], "ok")
    assert [item["data"].get("text/html") for item in cell.displays] == ["<i>x</i>"]
    assert shared.run("made").results == ["7"]
    failing = send(shared, "-n wrong", "\n1 / 0", attended=False, stop=False)
    assert failing.errors == ["ZeroDivisionError: division by zero"]
    assert "3 1 / 0" in failing.traceback.replace("----> ", "")
    assert failing.status == "error"


def test_an_interrupt_of_one_that_holds_its_place_ends_its_job(
    shared: Kernel, store: Store
) -> None:
    cell = shared.send(
        "%%gpuqueue --isolate --wait -n stopped\nimport time\nprint('in')\ntime.sleep(600)"
    )
    shared.until(lambda: "in\n" in cell.text(), "it never began", PATIENCE_S)
    shared.interrupt()
    shared.until(lambda: cell.replies, "it was not interrupted", PATIENCE_S)
    assert cell.errors == ["KeyboardInterrupt: "]
    wait_until(lambda: store.named("stopped")[-1].state is JobState.CANCELLED, PATIENCE_S)


def test_it_outlives_its_notebook_and_the_next_one_fetches(tmp_path: Path) -> None:
    flag = tmp_path / "go"
    body = (
        f"{until(flag)}print('begun')\nwait()\nprint('ended alone')\nfound = {{'weights': [1, 2]}}"
    )
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with started(tmp_path / "first") as first:
        environment = {
            name: first.environment[name] for name in ("GPUSCHED_STATE_DIR", "GPUSCHED_FAKE")
        }
        cell = send(first, "-n outlives --out found", body)
        first.until(lambda: "begun\n" in cell.text(), "it never began", PATIENCE_S)
        first.manager.signal_kernel(signal.SIGKILL)
        wait_until(lambda: not first.manager.is_alive())
        store = Store(StateDir(first.folder / "state"))
        assert store.named("outlives")[-1].state is JobState.RUNNING
        with started(tmp_path / "second", **environment) as second:
            early = second.run("%gpuq fetch outlives", stop=False).errors
            assert early == [
                f"UserError: job {cell.job} is running; `%gpuq wait {cell.job}` waits for its end"
            ]
            flag.touch()
            wait_until(lambda: store.named("outlives")[-1].ended, PATIENCE_S)
            assert second.run("'found' in dir()").results == ["False"]
            shown = second.run("%gpuq show outlives").text()
            assert shown.index("begun") < shown.index("ended alone")
            assert second.run("%gpuq fetch outlives").text() == f"found from job {cell.job}\n"
            assert second.run("found").results == ["{'weights': [1, 2]}"]
            record = json.loads(second.run("%gpuq show outlives --json").text())
            assert (record["kind"], record["state"]) == ("isolated", "completed")
            assert second.run("%gpuq fetch nothing", stop=False).errors[0].startswith("JobNotFound")
        store.close()


def test_its_files_go_as_the_record_grows_old(shared: Kernel, store: Store) -> None:
    from gpusched_ipy.retention import purge

    cell = send(shared, "-n old --out thing", "thing = 1")
    ended(shared, cell, "thing is here")
    job = job_of(store, cell)
    kept = [path for path in (store.state.root / "calls").iterdir() if job.spec.uid in path.name]
    assert len(kept) == 2
    purge(store, wall=(job.ended_at or 0) + 86400.0, keep_days=30, keep_size=0)
    assert not any(path.exists() for path in kept)
    assert not store.state.transcript(job.spec.uid).exists()
    gone = shared.run("%gpuq fetch old", stop=False).errors
    assert gone == [f"UserError: the outputs of job {job.id} are no longer kept"]
    assert os.path.isdir(store.state.root / "calls")


# After its kernel: the next one of the notebook shows it on


def test_a_restarted_kernel_shows_on_what_the_one_before_has_sent_off(tmp_path: Path) -> None:
    flag = tmp_path / "go"
    body = (
        f"{until(flag)}"
        "from IPython.display import HTML, display\nprint('before')\n"
        "display(HTML('<b>a figure</b>'))\nwait()\nprint('after')\nmodel = 42"
    )
    with started(tmp_path, JPY_SESSION_NAME="work/train.ipynb") as kernel:
        sent = send(kernel, "--out model -n train", body, cell_id="one")
        kernel.until(lambda: "before" in sent.text(), "it never began", PATIENCE_S)
        uid = sent.of("display_data")[0]["transient"]["display_id"].removeprefix("gpusched-")
        assert f"gpusched-of-{uid}" in sent.of("display_data")[0]["data"]["text/html"]
        kernel.restart()
        loaded = kernel.run("%load_ext gpusched_ipy")
        page = Page(kernel)
        kernel.until(lambda: "before" in page.text(), "what it had shown is not there", PATIENCE_S)
        (cell,) = page.cells()
        assert cell["uid"] == uid
        assert "running #1 train" in cell["badge"]
        assert "%gpuq show has the output" in loaded.displays[-1]["data"]["text/plain"]
        kernel.run("print('something else')")
        flag.touch()
        kernel.until(lambda: "after" in page.text(), "it does not go on", PATIENCE_S)
        assert [one["output_type"] for one in page.outputs()] == [
            "stream",
            "display_data",
            "stream",
        ]
        assert page.outputs()[1]["data"]["text/html"] == "<b>a figure</b>"
        assert page.text() == "before\nafter\n"
        kernel.until(lambda: "model is here" in page.cells()[0]["badge"], "not brought", PATIENCE_S)
        assert "done #1 train" in page.cells()[0]["badge"]
        assert kernel.run("model").results == ["42"]

        # Run again, the cell is this kernel's own.
        again = send(kernel, "-n train", "print('again')", cell_id="one")
        ended(kernel, again, "done")
        assert again.text() == "again\n"
        assert page.cells() == []
        kernel.restart()
        kernel.run("%load_ext gpusched_ipy\n%gpuq")
        assert page.cells() == []


def test_a_cell_that_failed_while_no_kernel_lived_is_shown_by_the_next(tmp_path: Path) -> None:
    flag = tmp_path / "go"
    with started(tmp_path, JPY_SESSION_NAME="work/train.ipynb") as kernel:
        sent = send(kernel, "-n bad", f"{until(flag)}print('before')\nwait()\n1 / 0")
        kernel.until(lambda: "before" in sent.text(), "it never began", PATIENCE_S)
        os.kill(kernel.manager.provisioner.pid, signal.SIGKILL)
        flag.touch()
        found = Store(StateDir(tmp_path / "state"))
        wait_until(lambda: found.job(1).ended, PATIENCE_S, "it has ended")
        found.close()
        kernel.restart()
        kernel.run("%load_ext gpusched_ipy")
        page = Page(kernel)
        kernel.until(lambda: page.outputs()[1:], "it is not shown", PATIENCE_S)
        assert page.text() == "before\n"
        assert page.outputs()[1]["ename"] == "ZeroDivisionError"
        kernel.until(lambda: "failed #1 bad" in page.cells()[0]["badge"], "its badge", PATIENCE_S)


def test_run_again_a_cell_replaces_what_it_had_queued_before_the_restart(tmp_path: Path) -> None:
    with started(tmp_path, JPY_SESSION_NAME="work/train.ipynb") as kernel:
        kernel.fake.take()
        kernel.badge(send(kernel, "", "print('old')", cell_id="one"), "queued")
        kernel.restart()
        kernel.run("%load_ext gpusched_ipy")
        page = Page(kernel)
        kernel.until(lambda: page.cells(), "it is not shown", PATIENCE_S)
        assert "queued #1" in page.cells()[0]["badge"]
        new = send(kernel, "", "print('new')", cell_id="one")
        assert "replaces #1" in kernel.badge(new, "queued")
        kernel.fake.free()
        ended(kernel, new, "done")
        assert new.text() == "new\n"
        listed = json.loads(kernel.run("%gpuq list --all --json").text())
        assert [job["state"] for job in listed] == ["cancelled", "completed"]


def test_another_notebook_of_the_same_name_shows_nothing_of_it(tmp_path: Path) -> None:
    with started(tmp_path, JPY_SESSION_NAME="work/train.ipynb") as kernel:
        kernel.fake.take()
        send(kernel, "", "print('mine')")
        places = {
            "GPUSCHED_STATE_DIR": str(tmp_path / "state"),
            "JPY_SESSION_NAME": "b/train.ipynb",
        }
        (tmp_path / "other").mkdir()
        with started(tmp_path / "other", **places) as other:
            other.run("%gpuq")
            assert Page(other).cells() == []
        kernel.run("%gpuq cancel 1")
