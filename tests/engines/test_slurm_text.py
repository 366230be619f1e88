"""Slurm's side in words: batch scripts against golden files, and what its commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpusched_ipy.engines import (
    AmbiguousError,
    EngineJob,
    EngineState,
    RejectedError,
    UnreachableError,
    _slurm_text,
)
from gpusched_ipy.engines.folder import JobFolder

GOLDEN = Path(__file__).parents[1] / "data" / "slurm"


def job(**more: object) -> EngineJob:
    folder = JobFolder(Path("/shared/engines/f0-1-ab"))
    return EngineJob(key="f0-1-ab", folder=folder, name="train", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("plain", job()),
        ("everything", job(gpus=4, gpu_type="a100_80gb", time_s=3601.0, rank=3)),
        (
            "odd-path",
            EngineJob(
                key="f0-2-cd",
                folder=JobFolder(Path("/shared/it's 100% ours/f0-2-cd")),
                name="☃",
            ),
        ),
    ],
)
def test_a_script_is_as_it_was(name: str, asked: EngineJob) -> None:
    text = _slurm_text.script(asked, python="/opt/python/bin/python3")
    assert text == (GOLDEN / f"{name}.sh").read_text()


@pytest.mark.parametrize("gpu", ["a100 --account=root", "x\n#SBATCH --uid=0", "GPU-1,GPU-2", ""])
def test_a_type_is_one_word_or_refused(gpu: str) -> None:
    with pytest.raises(RejectedError, match="gres"):
        _slurm_text.script(job(gpu_type=gpu))


def test_a_folder_that_a_script_cannot_name_is_refused() -> None:
    folder = JobFolder(Path('/shared/"\n#SBATCH --uid=0'))
    with pytest.raises(RejectedError, match="engine_dir"):
        _slurm_text.script(EngineJob(key="k", folder=folder, name="n"))


def test_of_a_name_that_is_listed_twice_the_living_one_counts() -> None:
    found = _slurm_text.rows(
        "7|gpuq-a|CANCELLED|None|\n"
        "5|gpuq-a|RUNNING|None|n1\n"
        "9|gpuq-b|FAILED|NonZeroExitCode|n2\n"
        "8|gpuq-b|COMPLETED|None|n1\n"
        "a line of something else\n"
    )
    assert found["gpuq-a"].state is EngineState.RUNNING
    assert found["gpuq-a"].where == "n1"
    assert (found["gpuq-b"].state, found["gpuq-b"].native) == (EngineState.FAILED, "9")


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("Priority", "other jobs are ahead (Priority)"),
        ("(Resources)", "no GPU or node is idle (Resources)"),
        ("QOSMaxGRESPerUser", "a limit of the site is reached (QOSMaxGRESPerUser)"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "a node that it needs is not available"),
        ("SomethingNew", "SomethingNew"),
        ("None", "not looked at yet"),
    ],
)
def test_why_a_job_waits_in_plain_words(reason: str, text: str) -> None:
    assert _slurm_text.waiting(reason).startswith(text)


def test_a_job_that_its_node_cannot_start_has_failed() -> None:
    (status,) = _slurm_text.rows("3|gpuq-a|PENDING|launch failed requeued held|\n").values()
    assert status.state is EngineState.FAILED


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv",
            AmbiguousError,
        ),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", UnreachableError),
        (
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Submission failed",
            UnreachableError,
        ),
        ("sbatch: error: invalid partition specified: nope", RejectedError),
        ("", RejectedError),
    ],
)
def test_what_a_refusal_means(said: str, kind: type[Exception]) -> None:
    found = _slurm_text.refusal(said)
    assert type(found) is kind
    assert "sbatch: error" not in str(found)


def test_gpus_are_counted_once_and_only_where_nodes_are_up() -> None:
    listed = (
        "n1|gpu:a100:4(S:0-1),shard:8|idle\nn1|gpu:a100:4(S:0-1)|idle\n"
        "n2|gpu:2,gpu:v100:1|mixed\nn3|gpu:8|down*\nn4|(null)|allocated\n"
    )
    assert _slurm_text.gpus(listed) == 7
    assert _slurm_text.gpus("") is None


def test_what_sbatch_prints_is_an_id() -> None:
    assert _slurm_text.native_id("12\n") == "12"
    assert _slurm_text.native_id("a warning\n12;cluster\n") == "12"
    assert _slurm_text.native_id("") == ""


def test_the_time_that_a_site_gives_a_message() -> None:
    assert _slurm_text.message_timeout_s("A = 1\nMessageTimeout          = 30 sec\n") == 30.0
    assert _slurm_text.message_timeout_s("") == 10.0
