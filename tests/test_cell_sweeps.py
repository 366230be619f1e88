"""Sweeps and keys of notebook cells, in a real kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from kernels import Kernel, started

pytestmark = pytest.mark.kernel
PATIENCE_S = 200.0


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with started(tmp_path_factory.mktemp("sweeps")) as kernel:
        yield kernel


def headings(cell: object) -> list[str]:
    return [item["data"]["text/plain"] for item in cell.displays]  # type: ignore[attr-defined]


def test_each_member_sees_its_values_and_shows_its_output_below_a_heading(kernel: Kernel) -> None:
    kernel.run("seen = []; lr = 'before'")
    cell = kernel.run(
        "%%gpuqueue --sweep lr=0.1,1e-3 --sweep net=a,b -n grid\n"
        "print(lr, net)\nseen.append((lr, net))"
    )
    kernel.badge(cell, "4 completed", PATIENCE_S)
    assert "\u00d74" in cell.badges[-1]
    kernel.until(lambda: len(cell.text().splitlines()) == 4, "four lines", PATIENCE_S)
    assert cell.text().splitlines() == ["0.1 a", "0.1 b", "0.001 a", "0.001 b"]
    assert [text.split(" ", 2)[2] for text in headings(cell)] == [
        "lr=0.1 net=a",
        "lr=0.1 net=b",
        "lr=1e-3 net=a",
        "lr=1e-3 net=b",
    ]
    order = [
        m["header"]["msg_type"]
        for m in cell.messages
        if m["content"] in cell.displays or m["header"]["msg_type"] == "stream"
    ]
    assert order == ["display_data", "stream"] * 4
    told = kernel.run("(seen == [(0.1, 'a'), (0.1, 'b'), (0.001, 'a'), (0.001, 'b')], type(lr))")
    assert told.results == ["(True, float)"]

    # Each has a transcript of its own, although all answer to one message.
    listed = kernel.run("%gpuq list --all --json")
    jobs = [job for job in json.loads(listed.text()) if job["name"] == "grid"]
    logs = [kernel.run(f"%gpuq log {job['id']}").text().strip() for job in jobs]
    assert logs == ["0.1 a", "0.1 b", "0.001 a", "0.001 b"]
    assert kernel.run("%gpuq list --all").displays[0]["data"]["text/plain"].count("grid") == 1


def test_a_sweep_that_is_run_again_replaces_what_waits(kernel: Kernel) -> None:
    kernel.fake.take()
    code = "%%gpuqueue --sweep n=1..3 -n again\nprint(n)"
    first = kernel.run(code, cell_id="sweep")
    kernel.badge(first, "3 pending", PATIENCE_S)
    second = kernel.run(code, cell_id="sweep")
    assert "replaces 3 jobs" in second.badges[0]
    kernel.badge(first, "3 cancelled", PATIENCE_S)
    kernel.fake.free()
    kernel.badge(second, "3 completed", PATIENCE_S)


def test_a_keyed_sweep_cell_run_again_repeats_nothing_that_went_well(kernel: Kernel) -> None:
    kernel.run("ran = []; wrong = 2")
    code = "%%gpuqueue --sweep n=1..3 --key mine -n keyed\nran.append(n)\nassert n != wrong"
    first = kernel.run(code, cell_id="keyed")
    kernel.badge(first, "2 completed, 1 failed", PATIENCE_S)
    kernel.run("wrong = None")
    second = kernel.run(code, cell_id="keyed")
    assert "key mine: 2 of 3 jobs stand already; queued the other 1" in second.badges[0]
    kernel.badge(second, "3 completed", PATIENCE_S)
    assert kernel.run("ran").results == ["[1, 2, 3, 2]"]
    third = kernel.run(code, cell_id="keyed")
    assert "3 of 3 jobs stand already; nothing is queued" in third.badges[0]


def test_in_a_headless_run_all_members_run_in_place(kernel: Kernel) -> None:
    code = "%%gpuqueue --sweep n=1..2 -n here{}\nprint('n is', n)"
    cell = kernel.run(code.format(""), attended=False)
    assert cell.status == "ok"
    assert cell.text() == "n is 1\nn is 2\n"
    assert [text.split(" ", 2)[2] for text in headings(cell)] == ["n=1", "n=2"]
    again = kernel.run(code.format(" --key once"), attended=False)
    assert again.text() == "n is 1\nn is 2\n"
    again = kernel.run(code.format(" --key once"), attended=False)
    assert again.text() == ""
    assert "key once: 2 of 2 jobs stand already" in again.text("stderr")

    failing = kernel.run("%%gpuqueue --sweep n=1..9 -n fails\n1 / 0", attended=False)
    assert failing.status == "error"
    assert (
        "the other 6 jobs are held: 3 of its sweep failed one after the other" in failing.errors[-1]
    )
    kernel.run("%gpuq cancel fails")


def test_a_dry_run_of_a_cell_queues_nothing(kernel: Kernel) -> None:
    before = kernel.run("%gpuq list --all --json").text()
    for attended in (True, False):
        cell = kernel.run("%%gpuqueue --dry-run -n maybe\nprint('ran')", attended=attended)
        assert cell.text() == "maybe would start now on GPU 0 (Fake A100); nothing is queued\n"
    assert "would start now" in kernel.run("%gpurun --dry-run -- true").text()
    assert [job["id"] for job in json.loads(kernel.run("%gpuq list --all --json").text())] == [
        job["id"] for job in json.loads(before)
    ]


def test_the_names_of_a_sweep_are_not_those_of_the_notebook(kernel: Kernel) -> None:
    kernel.run("lr, mine = 'the notebook has one', 'hello'")
    shown = kernel.run(
        "%gpurun --sweep lr=0.1,0.2 -n echoed --hold -- echo {lr} {mine} $mine {{lr}}"
    )
    assert "queued #" in shown.text()
    jobs = [
        job for job in json.loads(kernel.run("%gpuq list --json").text()) if job["name"] == "echoed"
    ]
    assert [job["argv"][1:] for job in jobs] == [
        ["0.1", "hello", "hello", "{lr}"],
        ["0.2", "hello", "hello", "{lr}"],
    ]
    assert "cancelled" in kernel.run("%gpuq cancel echoed").text()


def test_isolated_members_get_their_values_as_inputs(kernel: Kernel) -> None:
    kernel.run("base = 100; n = 'of the notebook'")
    code = "%%gpuqueue --isolate --in base --sweep n=1..2 -n alone\nprint(base + n)"
    cell = kernel.run(code, cell_id="alone")
    kernel.until(lambda: sorted(cell.text().split()) == ["101", "102"], "both", PATIENCE_S)
    assert any("n=1" in text for text in cell.badges)
    assert kernel.run("n").results == ["'of the notebook'"]
    there = kernel.run(code, attended=False)
    assert there.status == "ok"
    assert there.text().split() == ["101", "102"]
    assert [text.split(" ", 2)[2] for text in headings(there)] == ["n=1", "n=2"]
    refused = kernel.run("%%gpuqueue --isolate --out n --sweep n=1..2\nn = 1")
    assert "each job of the sweep would bring it back" in refused.errors[-1]
