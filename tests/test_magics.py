"""The magics as a user types them: in a real kernel, and their lines by themselves."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels import Cell, Kernel, started

from gpusched_ipy import cellsyntax, transcript
from gpusched_ipy.completion import candidates
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.lines import parse_cell, parse_queue, parse_run


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel whose GPU a stranger uses: what is queued stays queued."""
    with started(tmp_path_factory.mktemp("magics")) as kernel:
        kernel.fake.take()
        yield kernel


def jobs(kernel: Kernel) -> list[dict[str, object]]:
    """Every job, as programs see it."""
    found: list[dict[str, object]] = json.loads(kernel.run("%gpuq list --all --json").text())
    return found


def table(cell: Cell) -> str:
    """The text of the table that a cell has shown."""
    return str(cell.displays[0]["data"]["text/plain"])


BAD = {
    "unknown option": ("%%gpuqueue --nonsense\n1", "unrecognized arguments: --nonsense"),
    "bad priority": ("%%gpuqueue --priority high\n1", "priority high is not a whole number"),
    "priority out of range": ("%%gpuqueue -p 1001\n1", "from -1000 to 1000"),
    "bad size": ("%%gpuqueue --mem much\n1", "much is not a size"),
    "open quotation": ('%%gpuqueue --name "x\n1', "no closing quotation"),
    "empty cell": ("%%gpuqueue\n", "the cell is empty"),
    "empty cell in place": ("%%gpuqueue --wait\n  \n", "the cell is empty"),
    "too many gpus": ("%%gpuqueue --gpus 9\n1", "--gpus 9: this machine has 1"),
    "too much memory": ("%%gpuqueue --wait --mem 900G\n1", "the largest GPU here has 40.0 GiB"),
    "unknown job to follow": ("%%gpuqueue --after nobody\n1", "there is no job nobody"),
    "no dashes": ("%gpurun python x.py", "write the command after --: %gpurun -- python x.py"),
    "no command": ("%gpurun", "there is no command to run"),
    "unknown program": ("%gpurun -- no-such-program", "there is no program 'no-such-program'"),
    "no directory": ("%gpurun --cwd /nowhere -- python -V", "/nowhere does not exist"),
    "unknown verb": ("%gpuq frobnicate", "%gpuq has no verb 'frobnicate'"),
    "unknown id": ("%gpuq show 4711", "there is no job 4711"),
    "cancel nobody": ("%gpuq cancel nobody", "there is no job nobody"),
    "no id": ("%gpuq cancel", "the following arguments are required: ID"),
    "priority without a number": ("%gpuq priority 1 x", "priority x is not a whole number"),
    "gpus option": ("%gpus --what", "unrecognized arguments: --what"),
    "panel option": ("%gpupanel 3", "unrecognized arguments: 3"),
}


@pytest.mark.kernel
@pytest.mark.parametrize("attended", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_queues_nothing(
    kernel: Kernel, name: str, attended: bool
) -> None:
    code, message = BAD[name]
    before = jobs(kernel)
    cell = kernel.run(code, attended=attended, stop=False)
    assert cell.status == "error"
    assert message in cell.errors[0]
    assert cell.traceback.count("\n") == 0
    assert (cell.text(), cell.badges, cell.displays) == ("", [], [])
    assert jobs(kernel) == before


@pytest.mark.kernel
def test_the_verbs_do_what_they_say(kernel: Kernel) -> None:
    kernel.run("%gpuq cancel *", stop=False)
    first = kernel.run("%%gpuqueue -p 2 --name prep --label run=7\n1").job
    second = kernel.run("%%gpuqueue --name prep2\n2").job
    assert kernel.run(f"%gpuq hold {first}").text() == f"job {first} held\n"
    kernel.badge(kernel.run("%%gpuqueue --hold\n3"), "held")
    listed = table(kernel.run("%gpuq"))
    assert "prep2" in listed
    assert "held" in listed
    assert "higher priority runs first" in listed
    assert "text/html" in kernel.run("%gpuq list").displays[0]["data"]
    assert kernel.run("%gpuq release prep").text() == f"job {first} released\n"
    assert kernel.run(f"%gpuq priority {second} 7").text() == f"job {second} has priority 7\n"
    assert kernel.run(f"%gpuq top {first}").text() == f"job {first} has priority 8\n"
    record = json.loads(kernel.run("%gpuq show prep --json").text())
    assert (record["id"], record["priority"], record["labels"]) == (first, 8, {"run": "7"})
    assert "prep" in table(kernel.run("%gpuq show prep"))
    log = kernel.run("%gpuq log prep", stop=False)
    assert f"job {first} has not begun" in log.errors[0]
    assert "drained" in kernel.run("%gpuq drain").text()
    assert "the queue is drained" in table(kernel.run("%gpuq"))
    assert kernel.run("%gpuq resume").text() == "resumed\n"
    timeout = kernel.run("%gpuq wait prep --timeout 0.2")
    assert "not ended in time" in timeout.traceback, "it is an error: Run All stops here"
    cancelled = kernel.run("%gpuq cancel prep*").text()
    assert cancelled == f"job {first} cancelled\njob {second} cancelled\n"
    assert kernel.run("%gpuq cancel prep").text() == f"job {first} is over already (cancelled)\n"
    assert "prep2" in table(kernel.run("%gpuq history"))
    sums = json.loads(kernel.run("%gpuq history --by name --json").text())
    assert [entry["jobs"] for entry in sums if entry["name"] == "prep2"] == [1]
    assert json.loads(kernel.run("%gpuq stats --json").text())["gpus"] == 1
    kernel.run("%gpuq requeue prep")
    again = json.loads(kernel.run("%gpuq show prep --json").text())
    assert (again["id"], again["state"]) == (first, "pending")
    kernel.run("%gpuq cancel *")
    assert json.loads(kernel.run("%gpuq list --json").text()) == []


@pytest.mark.kernel
def test_a_long_queue_is_shown_by_its_first_rows(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        kernel.fake.take()
        kernel.run("%gpurun --sweep n=1..300 --name grid -- true {n}")
        shown = table(kernel.run("%gpuq"))
        assert "grid \u00d7300" in shown
        assert "0 running, 300 waiting" in shown
        assert "rows" not in shown, "a sweep is one row"
        kernel.run(
            "from gpusched_ipy import Queue\n"
            "queue = Queue()\n"
            "with queue.store.writing():\n"
            "    for number in range(250):\n"
            "        queue.submit(['true'], name=f'job{number}')"
        )
        shown = table(kernel.run("%gpuq"))
        assert "job0 " in shown
        assert "job249" not in shown
        assert "0 running, 550 waiting" in shown
        assert "the first 200 of 251 rows" in shown
        assert "job249" in table(kernel.run("%gpuq list --members"))
        kernel.run("%gpuq cancel grid job*")


def test_gpus_as_a_table_and_as_json(kernel: Kernel) -> None:
    shown = kernel.run("%gpus").displays[0]["data"]
    assert "Fake A100" in shown["text/plain"]
    assert "97 %" in shown["text/html"]
    record = json.loads(kernel.run("%gpus --json").text())
    assert record["backend"] == "fake"
    assert record["gpus"][0]["processes"][0]["pid"] == 4242


@pytest.mark.kernel
def test_a_command_runs_and_its_log_is_shown(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        kernel.run("word = 'from python'")
        queued = kernel.run("%gpurun -p 1 --name hello -- echo {word} '$CUDA_VISIBLE_DEVICES'")
        assert queued.text().startswith("queued #1 hello · priority 1 ·")
        wait = kernel.run("%gpuq wait hello")
        assert "completed" in table(wait)
        assert kernel.run("%gpuq log hello").text() == "from python $CUDA_VISIBLE_DEVICES\n"
        kernel.run('%gpurun --name line --shell "echo $CUDA_VISIBLE_DEVICES | tr a-z A-Z"')
        assert kernel.run("%gpuq log -f line").text() == "GPU-FAKE-0\n"
        # Longer than one piece, with a character on the border.
        kernel.run("word = '$other'; other = 'not this'")
        kernel.run("%gpurun --name long -- python -c \"print('a' + '\\u00fc' * 50000)\"")
        assert kernel.run("%gpuq log -f long").text() == "a" + "\u00fc" * 50_000 + "\n"
        said = kernel.run("%%gpuqueue --name $word --dry-run\npass").text()
        assert said.startswith("$other would start"), "a value is not expanded once more"


@pytest.mark.kernel
def test_python_is_the_notebooks_own(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        kernel.run("import os; os.environ['PATH'] = '/usr/bin:/bin'")
        kernel.run('%gpurun --name who -- python -c "import sys; print(sys.prefix)"')
        shown = kernel.run("%gpuq log -f who").text()
        assert shown == kernel.run("import sys; print(sys.prefix)").text()


@pytest.mark.kernel
def test_help_shows_options_and_examples(kernel: Kernel) -> None:
    for magic in ("%%gpuqueue", "%gpurun", "%gpuq", "%gpus", "%gpuplot"):
        cell = kernel.run(f"{magic}?")
        (page,) = [item["data"]["text/plain"] for item in cell.replies[-1]["content"]["payload"]]
        assert magic in page, magic
    page = kernel.run("%%gpuqueue?").replies[-1]["content"]["payload"][0]["data"]["text/plain"]
    assert "--priority N" in page
    assert "%%gpuqueue --wait" in page
    assert "higher runs first" in page
    asked = kernel.run("%%gpuqueue --help\n1")
    assert "--priority N" in asked.text()
    assert (asked.errors, asked.badges) == ([], [])
    assert "--wait" in kernel.run("%gpuqueue").text()


@pytest.mark.kernel
def test_completion_in_a_kernel_gives_ours_alone(kernel: Kernel) -> None:
    kernel.run("%%gpuqueue --name prepare\n1")

    def complete(text: str) -> list[str]:
        kernel.client.complete(text, len(text))
        while True:
            reply = kernel.client.get_shell_msg(timeout=120)
            if reply["msg_type"] == "complete_reply":
                return list(reply["content"]["matches"])

    assert complete("%%gpuqueue --pri") == ["--priority"]
    assert "drain" in complete("%gpuq ")
    assert complete("%gpuq cancel prep") == ["prepare"]
    assert "--priority" not in complete("%%gpuqueue\n--pri")
    kernel.run("%gpuq cancel prepare")


@pytest.mark.kernel
def test_settings_are_configured_like_anything_else(tmp_path: Path) -> None:
    with started(tmp_path, GPUSCHED_PANEL_HZ="2") as kernel:
        kernel.run("s = lambda: get_ipython()._gpusched.session.settings")
        assert kernel.run("s().panel_hz").results == ["2.0"]
        assert kernel.run("%config GpuQueue.panel_hz = 3").errors == []
        assert kernel.run("s().panel_hz, s().sources['panel_hz']").results == ["(3.0, 'set')"]
        bad = kernel.run("%config GpuQueue.panel_hz = 99", stop=False)
        assert "99 is not a number from 0.1 to 4" in bad.text("stderr") + str(bad.errors)
        assert "panel_hz" in kernel.run("%config GpuQueue").text()
        assert kernel.run("%reload_ext gpusched_ipy").errors == []
        assert kernel.run("get_ipython()._gpusched.session.settings.quiet_s").errors == []
        kernel.run("%config GpuQueue.wait = True")
        cell = kernel.run("%%gpuqueue\n1 + 1")
        assert (cell.results, cell.badges) == (["2"], [])


@pytest.mark.kernel
def test_an_unusable_state_directory_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with started(tmp_path, GPUSCHED_STATE_DIR=str(blocked)) as kernel:
        for code in ("%gpuq", "%%gpuqueue\n1", "%%gpuqueue --wait\n1", "%gpurun -- echo"):
            cell = kernel.run(code, stop=False)
            assert "state directory" in cell.errors[0]
            assert cell.traceback.count("\n") == 0


@pytest.mark.kernel
def test_no_error_carries_a_strangers_control_characters(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        kernel.fake.take()
        kernel.fake.gpus[0]["processes"][0]["name"] = "py\x1b[31mthon"
        kernel.fake.write()
        kernel.run("import gpusched_ipy\ngpusched_ipy.submit(['true'])")
        waits = kernel.run("with gpusched_ipy.gpuqueue(timeout=1): pass")
        log = kernel.run("%gpuq log 1")
        unknown = kernel.run("%gpuq cancel \x1b]0;x\x07")
        assert "py\\x1b[31mthon" in log.errors[0]
        assert "there is no job \\x1b]0;x\\x07" in unknown.errors[0]
        for cell in (waits, log, unknown):
            (error,) = cell.errors
            assert not {"\x1b", "\x07"} & set(error), "what programs show of it"
        for cell in (log, unknown):
            assert not {"\x1b", "\x07"} & set("".join(cell.of("error")[0]["traceback"]))


@pytest.mark.kernel
def test_a_panel_whose_widget_somebody_has_closed_is_made_anew(kernel: Kernel) -> None:
    view = "application/vnd.jupyter.widget-view+json"
    first = kernel.run("%gpupanel").displays[0]["data"][view]
    kernel.run("import ipywidgets\nipywidgets.Widget.close_all()")
    second = kernel.run("%gpupanel")
    assert second.errors == []
    assert second.displays[0]["data"][view]["model_id"] != first["model_id"]


@pytest.mark.kernel
def test_the_panel_and_the_plot_are_shown(kernel: Kernel) -> None:
    panel = kernel.run("%gpupanel")
    data = panel.of("execute_result", "display_data")[0]["data"]
    assert "application/vnd.jupyter.widget-view+json" in data
    # Below it the picture that stays; shown again, it is the same panel, which works once.
    picture = panel.displays[1]
    assert "text/html" in picture["data"]
    again = kernel.run("%gpupanel")
    assert again.displays[0]["data"] == data
    assert again.displays[1]["transient"] == picture["transient"]
    still = kernel.run("%gpupanel", attended=False)
    (result,) = still.of("execute_result", "display_data")
    assert "application/vnd.jupyter.widget-view+json" not in result["data"]
    assert "text/html" in result["data"]
    # What is saved is renewed when the panel ends.
    kernel.run("%unload_ext gpusched_ipy")
    kernel.until(lambda: again.of("update_display_data"), "the last picture")
    assert again.of("update_display_data")[0]["transient"] == picture["transient"]
    kernel.run("%load_ext gpusched_ipy")
    plot = kernel.run("%gpuplot --last 5m")
    assert plot.errors == []
    assert "image/png" in plot.of("execute_result", "display_data")[0]["data"]
    freed = "no framework of this kernel holds GPU memory that it could give back\n"
    assert kernel.run("%gpufree").text() == freed


def test_lines_are_parsed_by_the_one_definition_of_options() -> None:
    fields, wait = parse_cell("-p 3 --name 'my job' --mem 8G --label a=b --label c=d --wait")
    assert wait
    assert fields == {
        "priority": 3,
        "name": "my job",
        "mem": 8 * 2**30,
        "label": [("a", "b"), ("c", "d")],
    }
    run = parse_run("--env A=1 --env B -- python x.py --priority 9 -- y")
    assert run["argv"] == ["python", "x.py", "--priority", "9", "--", "y"]
    assert run["env"] == ["A=1", "B"]
    assert parse_queue("")[0] == "list"
    verb, asked = parse_queue("priority 12,14-16 prep 5")
    assert (verb, asked.ids, asked.priority) == ("priority", ["12,14-16", "prep"], 5)
    with pytest.raises(UserError, match="both"):
        parse_run("--shell x -- y")


def job(number: int, name: str) -> Job:
    """A waiting job."""
    spec = JobSpec(uid=str(number), kind=JobKind.CELL, name=name)
    return Job(id=number, spec=spec, state=JobState.PENDING, priority=0)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%%gpuqueue --pri", ["--priority"]),
        ("%%gpuqueue --w", ["--wait"]),
        ("%gpurun --sh", ["--shell"]),
        ("%gpuq re", ["release", "requeue", "resume"]),
        ("%gpuq list --a", ["--all"]),
        ("%gpuq cancel ", ["train", "prep", "2", "1"]),
        ("%gpuq cancel pr", ["prep"]),
        ("%%gpuqueue --after pr", ["prep"]),
        ("%gpurun -- python --pri", None),
        ("print --pri", None),
        ("%gpuqx --pri", None),
    ],
)
def test_completion_of_lines(line: str, expected: list[str] | None) -> None:
    known = [job(1, "prep"), job(2, "train")]
    assert candidates(line, lambda _ended: known) == expected


def test_the_magic_is_found_only_where_it_is_the_first_line() -> None:
    assert cellsyntax.split(["\n", "%%gpuqueue -p 3\n", "x\n"]) == (1, "-p 3")
    assert cellsyntax.split(["%%gpuqueue"]) == (0, "")
    assert cellsyntax.split(["%%gpuqueues\n"]) is None
    assert cellsyntax.split(["x\n", "%%gpuqueue\n"]) is None
    assert cellsyntax.split([]) is None


def test_the_gate_stands_behind_imports_from_the_future() -> None:
    lines = ["# %%gpuqueue\n", "# why\n", "from __future__ import annotations  # so\n", "x\n"]
    gated = cellsyntax.with_gate(lines, 0, "gate()")
    assert gated == [*lines[:2], "from __future__ import annotations; gate()\n", "x\n"]
    assert cellsyntax.with_gate(["# %%gpuqueue\n", "x\n"], 0, "gate()") == ["gate()\n", "x\n"]


def test_a_stream_reads_the_same_in_whatever_pieces_it_came(tmp_path: Path) -> None:
    text = "one\r\ntwo\rTW\n\n0%\r50%\r100%\nlast\rL"
    whole = transcript.rewritten(text)
    for size in (1, 2, 3, 7, len(text)):
        path = tmp_path / f"{size}.jsonl"
        recorder = transcript.Recorder(path, 100_000)
        for at in range(0, len(text), size):
            piece = {"name": "stdout", "text": text[at : at + size]}
            recorder.record("stream", piece)
        recorder.close()
        (output,) = transcript.read(path)
        assert output.text == whole


def test_a_transcript_is_read_as_it_stood_at_the_end(tmp_path: Path) -> None:
    recorder = transcript.Recorder(tmp_path / "cell.jsonl", 10_000)
    shown = {"data": {"text/plain": "first"}, "metadata": {}, "transient": {"display_id": "a"}}
    later = {**shown, "data": {"text/plain": "second"}}
    for kind, content in [
        ("stream", {"name": "stdout", "text": "gone\n"}),
        ("clear_output", {"wait": True}),
        ("stream", {"name": "stdout", "text": "  0%\r 50%"}),
        ("stream", {"name": "stdout", "text": "\r100%\nnext\n"}),
        ("display_data", shown),
        ("status", {"execution_state": "busy"}),
        ("update_display_data", later),
        ("error", {"ename": "E", "evalue": "v", "traceback": ["\x1b[31mE\x1b[0m: v"]}),
    ]:
        recorder.record(kind, content)
    recorder.close()
    recorder.record("stream", {"name": "stdout", "text": "too late"})
    assert transcript.read_text(tmp_path / "cell.jsonl") == "100%\nnext\nsecond\nE: v\n"
    assert (tmp_path / "cell.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_full_disk_has_cut_off_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "cell.jsonl"
    recorder = transcript.Recorder(path, 100_000)

    def show(text: str) -> None:
        recorder.record("stream", {"name": "stdout", "text": text})

    show("first\n")
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        show("second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    show("third\n")
    recorder.close()
    assert transcript.read_text(path) == "first\nthird\n"
