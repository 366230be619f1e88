"""Rows, series and JSON; and that nothing a job has chosen acts on a screen."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched_ipy.config import Instant
from gpusched_ipy.job import (
    FINAL,
    ArrayPlace,
    ExpectedStart,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Place,
    Request,
    WaitCode,
    WaitReason,
)
from gpusched_ipy.snapshot import Gpu, GpuProcess, Health, Snapshot
from gpusched_ipy.text import format_number
from gpusched_ipy.view import (
    GPU_COLUMNS,
    JOB_COLUMNS,
    clean,
    escape,
    format_bytes,
    format_duration,
    format_percent,
    gpu_rows,
    gpus_json,
    gpus_note,
    html_table,
    job_json,
    job_rows,
    process_line,
)

GIB = 2**30
NOW = Instant(mono=1000.0, wall=1_800_000_000.0)
SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
PAYLOADS = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)",
    "<button data-commandlinker-command='notebook:run-all'>",
    "<a href='javascript:alert(1)'>",
    "<svg/onload=alert(1)>",
    "</td></tr></table><h1>",
    "<!-- ",
    "&lt;b&gt;",
    "$\\href{javascript:alert(1)}{x}$",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\",
    "\x9b2J",
    "\x9d0;title\x9c",
    "a\rb\nc\bd\x7f",
    "\u202egnp.exe\u2066",
    "\ud800 alone",
]


def make_job(**changes: Any) -> Job:
    spec: dict[str, Any] = {"uid": "u-1", "kind": JobKind.COMMAND, "name": "train"}
    spec |= changes.pop("spec", {})
    values: dict[str, Any] = {
        "id": 12,
        "state": JobState.PENDING,
        "priority": 3,
        "submitted_at": NOW.wall - 120,
        "queued_mono": NOW.mono - 120,
    }
    return Job(spec=JobSpec(**spec), **(values | changes))


def make_snapshot(*gpus: Gpu, **changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "backend": "nvml",
        "source": "libnvidia-ml.so.1",
        "driver": "580.95",
        "taken_at": NOW.wall - 0.5,
        "taken_mono": NOW.mono - 0.5,
    }
    return Snapshot(gpus=gpus, **(values | changes))


BUSY = Gpu(
    uuid="GPU-a",
    index=0,
    name="NVIDIA A100",
    vendor="nvidia",
    utilization=0.97,
    mem_used_bytes=30 * GIB,
    mem_total_bytes=40 * GIB,
    temperature_c=61.0,
    power_w=250.4,
    processes=(GpuProcess(pid=812, user="user1", name="python", mem_bytes=30 * GIB),),
)
BLIND = Gpu(uuid="MIG-b", parent="GPU-a", health=Health.LOST)


def test_instances_of_one_profile_are_told_apart_by_their_numbers() -> None:
    twins = tuple(Gpu(uuid=f"MIG-{n}", index=2, instance=n, name="A100 MIG 1g.5gb") for n in (0, 1))
    assert [row.number for row in gpu_rows(make_snapshot(*twins), NOW)] == ["2:0", "2:1"]


text = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)


def acts(character: str) -> bool:
    """Whether a character is none that a terminal or page may be sent."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(
        character
    ) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@given(text)
def test_nothing_that_acts_survives_cleaning(raw: str) -> None:
    shown = clean(raw)
    assert not any(acts(character) for character in shown)
    shown.encode("utf-8")
    assert clean(shown) == shown
    assert len(shown) >= len(raw)


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=40))
def test_ordinary_text_is_left_as_it_is(raw: str) -> None:
    assert clean(raw) == raw


def test_every_code_point_below_0x2070_and_every_surrogate_is_safe() -> None:
    for code in (*range(0x2070), *range(0xD800, 0xE000)):
        assert not any(acts(character) for character in clean(chr(code)))


@given(text, st.integers(0, 50))
def test_a_limit_is_kept(raw: str, limit: int) -> None:
    shown = clean(raw, limit)
    assert len(shown) <= limit
    assert shown == clean(raw) or limit == 0 or shown.endswith("…")


class Seen(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.comments: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.words += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


@given(text)
def test_escaped_text_is_never_markup(raw: str) -> None:
    seen = Seen(f"<p>{escape(raw)}</p>")
    assert seen.tags == ["p"]
    assert seen.comments == []
    assert seen.words == clean(raw)
    quoted = Seen(f'<p title="{escape(raw)}"></p>')
    assert quoted.attributes == {"title"}
    assert quoted.words == ""


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_acts_in_any_view(payload: str) -> None:
    job = make_job(
        spec={"name": payload, "owner": payload},
        reason=WaitReason(code=WaitCode.GPU_BUSY, text=payload),
        gpus=(payload,),
        state=JobState.PENDING,
    )
    ended = replace(job, state=JobState.FAILED, error=payload)
    gpu = replace(
        BUSY,
        name=payload,
        health=Health.UNKNOWN,
        health_text=payload,
        processes=(
            GpuProcess(pid=1, user=payload, name=payload),
            GpuProcess(pid=2, job=12),
            GpuProcess(pid=3, member="m"),
        ),
    )
    snapshot = make_snapshot(gpu, source=payload, problem=payload, driver=payload)
    queue = job_rows([job, ended], NOW)
    gpus = gpu_rows(snapshot, NOW, jobs={12: payload}, members={"m": payload})
    note = gpus_note(snapshot, NOW, payload)
    for line in [*(cell for row in queue for cell in row), *gpus[0].processes, *gpus[0][:-1], note]:
        assert not any(acts(character) for character in line)
    for page in (
        html_table(JOB_COLUMNS, queue, caption=payload),
        html_table(GPU_COLUMNS, gpus, caption=note),
        html_table([payload], [[payload]]),
    ):
        seen = Seen(page)
        assert set(seen.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "br"}
        assert seen.attributes <= {"class", "style", "scope"}
        assert seen.comments == []
        assert "mathjax_ignore" in page
        assert not any(acts(character) for character in page)


def test_a_table_is_accessible_and_takes_the_colours_of_its_page() -> None:
    page = html_table(["id", "lines"], [["1", ("a", "b")]], caption="what it is", numeric={"id"})
    seen = Seen(page)
    assert seen.tags == [
        "table",
        "caption",
        *("thead", "tr", "th", "th"),
        "tbody",
        "tr",
        "td",
        "td",
        "br",
    ]
    assert page.count('scope="col"') == 2
    assert page.count("text-align:right") == 2
    assert "#" not in page
    assert "rgb" not in page
    assert "currentColor" in page
    with pytest.raises(ValueError, match="zip"):
        html_table(["id", "name"], [["1"]])


def validate(value: Any, schema: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    rules = json.loads((SCHEMAS / schema).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.Draft202012Validator(rules).validate(json.loads(json.dumps(value)))


KEYS = [
    "id",
    "uid",
    "name",
    "kind",
    "engine",
    "array",
    "labels",
    "after",
    "state",
    "held",
    "priority",
    "effective_priority",
    "reason",
    "gpus",
    "place",
    "request",
    "argv",
    "cwd",
    "owner",
    "submitted_at",
    "started_at",
    "ended_at",
    "wait_s",
    "run_s",
    "gpu_s",
    "exit_code",
    "signal",
    "error",
    "attempts",
    "retried",
    "requeued",
    "oom",
    "log",
    "expected_start",
    "expected_start_range",
    "expected_start_runs",
    "usage",
]


def test_the_json_of_a_waiting_job() -> None:
    job = make_job(
        spec={"argv": ("python", "train.py"), "cwd": "/work", "owner": "notebook a.ipynb"},
        reason=WaitReason(code=WaitCode.GPU_BUSY, text="GPU 0: 97 % used by python"),
        started_at=NOW.wall - 500,  # of an earlier attempt
    )
    shown = job_json(job, NOW, aging_s=60.0)
    validate(shown, "job.json")
    assert list(shown) == KEYS
    assert shown["effective_priority"] == 5.0
    assert shown["reason"] == "GPU 0: 97 % used by python"
    assert shown["submitted_at"] == "2027-01-15T07:58:00.000+00:00"
    assert (shown["wait_s"], shown["run_s"], shown["usage"]) == (120.0, None, None)
    assert shown["request"]["gpus"] == 1
    assert shown["argv"] == ["python", "train.py"]


def test_the_json_of_a_job_that_ended() -> None:
    place = ArrayPlace(id="a", index=1, size=3)
    job = make_job(
        spec={
            "array": place,
            "labels": {"k": "v"},
            "request": Request(mem_bytes=8 * GIB, after=(1,), after_any=(2,), begin_at=NOW.wall),
        },
        state=JobState.FAILED,
        reason=WaitReason(code=WaitCode.PRIORITY, text="an old reason"),
        started_at=NOW.wall - 100,
        ended_at=NOW.wall - 40,
        gpus=("GPU-a",),
        signal=9,
        attempts=1,
        peak_mem_bytes=GIB,
    )
    expected = ExpectedStart(at=NOW.wall, low=NOW.wall - 60, high=NOW.wall + 60, runs=6)
    shown = job_json(job, NOW, log="/state/12.log", expected=expected)
    validate(shown, "job.json")
    assert (shown["wait_s"], shown["run_s"], shown["gpu_s"]) == (20.0, 60.0, 60.0)
    assert shown["expected_start"] == "2027-01-15T08:00:00.000+00:00"
    assert shown["expected_start_range"][0] == "2027-01-15T07:59:00.000+00:00"
    assert shown["expected_start_runs"] == 6
    assert (shown["signal"], shown["reason"], shown["effective_priority"]) == ("SIGKILL", None, 3.0)
    assert shown["after"] == [1, 2]
    assert shown["array"] == {"id": "a", "index": 1, "size": 3}
    assert shown["usage"] == {"peak_mem_bytes": GIB, "mean_utilization": None, "energy_j": None}
    assert shown["request"]["begin_at"] == "2027-01-15T08:00:00.000+00:00"


@pytest.mark.parametrize(
    ("named", "uuids"), [("0,1", []), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]), (None, [])]
)
def test_the_json_says_where_a_job_of_an_engine_ran(named: str | None, uuids: list[str]) -> None:
    job = make_job(
        spec={"engine": "slurm", "request": Request(gpus=2)},
        state=JobState.RUNNING,
        started_at=NOW.wall - 10,
        place=Place(engine="slurm", count=2, host="n1", gpus=named),
    )
    shown = job_json(job, NOW)
    validate(shown, "job.json")
    assert (shown["gpus"], shown["place"]) == (uuids, {"host": "n1", "gpus": named})
    assert shown["gpu_s"] == 20.0


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("kind", list(JobKind))
def test_the_json_of_any_job_keeps_its_promise(state: JobState, kind: JobKind) -> None:
    started = None if state is JobState.PENDING else NOW.wall - 10
    ended = NOW.wall if state in FINAL else None
    job = make_job(spec={"kind": kind}, state=state, started_at=started, ended_at=ended, signal=64)
    shown = job_json(job, NOW)
    validate(shown, "job.json")
    assert shown["run_s"] == (None if started is None else 10.0)


def test_a_job_cancelled_before_its_start_has_waited_until_then() -> None:
    job = make_job(state=JobState.CANCELLED, ended_at=NOW.wall - 100)
    shown = job_json(job, NOW)
    assert (shown["wait_s"], shown["run_s"]) == (20.0, None)


def test_the_json_of_the_gpus() -> None:
    shown = gpus_json(make_snapshot(BUSY, BLIND), NOW)
    validate(shown, "gpus.json")
    assert shown["age_s"] == 0.5
    assert shown["taken_at"] == "2027-01-15T07:59:59.500+00:00"
    busy, blind = shown["gpus"]
    assert busy["utilization"] == 0.97
    assert busy["processes"] == [
        {"pid": 812, "user": "user1", "name": "python", "mem_bytes": 30 * GIB, "job": None}
    ]
    assert (blind["utilization"], blind["processes"], blind["health"]) == (None, None, "lost")
    assert blind["parent"] == "GPU-a"


def test_the_json_of_a_reading_that_failed() -> None:
    shown = gpus_json(make_snapshot(problem="driver lost", driver=None), NOW)
    validate(shown, "gpus.json")
    assert (shown["problem"], shown["gpus"]) == ("driver lost", [])


def test_gpu_rows_read_like_nvidia_smi_and_unknown_is_a_dash() -> None:
    busy, blind = gpu_rows(make_snapshot(BUSY, BLIND), NOW)
    assert busy == (
        "0",
        "NVIDIA A100",
        "97 %",
        "30.0 GiB / 40.0 GiB",
        "61 °C",
        "250 W",
        ("python (pid 812, user user1): 30.0 GiB",),
    )
    dash = "\u2013"
    assert blind == (
        dash,
        "unknown GPU (lost: it has fallen off the bus)",
        *(dash, dash, dash, dash),
        ("unknown",),
    )
    (quiet,) = gpu_rows(make_snapshot(replace(BUSY, processes=())), NOW)
    assert quiet.processes == ()


def test_a_reading_that_is_not_of_this_moment_says_so() -> None:
    old = make_snapshot(BUSY, taken_mono=NOW.mono - 130, problem="the driver is lost")
    assert gpu_rows(old, NOW)[0].utilization == "97 % (2 min ago)"
    assert gpus_note(old, NOW) == (
        "read 2 min ago by nvml (libnvidia-ml.so.1), driver 580.95; the driver is lost"
    )


@pytest.mark.parametrize(
    ("process", "line"),
    [
        (GpuProcess(pid=7), "unknown program (pid 7): memory unknown"),
        (GpuProcess(pid=7, name="python", mem_bytes=0), "python (pid 7): 0 B"),
        (
            GpuProcess(pid=7, name="python", job=12, mem_bytes=GIB),
            "job 12 train (pid 7): 1.0 GiB",
        ),
        (GpuProcess(pid=7, job=13), "job 13 (pid 7): memory unknown"),
        (
            GpuProcess(pid=7, member="m", mem_bytes=13_207_024_435, idle_s=41 * 60 + 5),
            "notebook train.ipynb (pid 7): idle 41 min, holds 12.3 GiB",
        ),
        (
            GpuProcess(pid=7, name="python", member="x", user="u"),
            "a notebook's python (pid 7, user u): memory unknown",
        ),
        (GpuProcess(pid=7, name="x", visible=False), "x (pid 7 elsewhere): memory unknown"),
    ],
)
def test_process_lines(process: GpuProcess, line: str) -> None:
    assert process_line(process, {12: "train"}, {"m": "notebook train.ipynb"}) == line


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        (
            {"reason": WaitReason(code=WaitCode.HELD, text="held"), "held": True},
            ("held", "\u2013", "2 min", "held"),
        ),
        (
            {"state": JobState.RUNNING, "started_at": NOW.wall - 5, "gpus": ("GPU-a", "GPU-z")},
            ("running", "1, GPU-z", "5 s", ""),
        ),
        (
            {"state": JobState.RUNNING, "started_at": NOW.wall, "cancel_requested": True},
            ("running (cancelling)", "\u2013", "0 s", ""),
        ),
        (
            {"state": JobState.FAILED, "ended_at": NOW.wall - 7200, "exit_code": 3},
            ("failed", "\u2013", "2 h 00", "exit status 3"),
        ),
        (
            {"state": JobState.FAILED, "ended_at": NOW.wall, "signal": 9},
            ("failed", "\u2013", "0 s", "ended by SIGKILL"),
        ),
        (
            {"state": JobState.COMPLETED, "ended_at": NOW.wall, "exit_code": 0, "gpus": ("GPU-a",)},
            ("completed", "1", "0 s", ""),
        ),
        ({"gpus": ("GPU-a",)}, ("pending", "\u2013", "2 min", "")),  # of an earlier attempt
    ],
)
def test_job_rows(changes: dict[str, Any], row: tuple[str, ...]) -> None:
    (shown,) = job_rows([make_job(**changes)], NOW, numbers={"GPU-a": "1", "GPU-z": None})
    assert (shown.state, shown.gpus, shown.since, shown.why) == row
    assert (shown.id, shown.name, shown.priority) == ("12", "train", "3")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "\u2013"),
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1.0 KiB"),
        (500 * 2**20, "500 MiB"),
        (1023 * 2**20, "1.0 GiB"),
        (13_207_024_435, "12.3 GiB"),
        (99.97 * GIB, "100 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes(count: float | None, shown: str) -> None:
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "\u2013"),
        (-1, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (41 * 60 + 59, "41 min"),
        (2 * 3600 + 5 * 60, "2 h 05"),
        (76 * 3600, "3 d 04 h"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_ratios_and_numbers() -> None:
    assert [format_percent(value) for value in (None, 0.0, 0.97, 1)] == [
        "\u2013",
        "0 %",
        "97 %",
        "100 %",
    ]
    assert [format_number(value, "W") for value in (None, 250.4)] == ["\u2013", "250 W"]
