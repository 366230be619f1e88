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
    _slurm_script,
    _slurm_text,
    member_key,
    parted,
)
from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.engines.kept import KeptFolder

GOLDEN = Path(__file__).parents[1] / "data" / "slurm"


def job(**more: object) -> EngineJob:
    folder = JobFolder(Path("/shared/engines/f0-1-ab"))
    return EngineJob(key="f0-1-ab", folder=folder, name="train", **more)  # type: ignore[arg-type]


def member(place: int, folder: str, **more: object) -> EngineJob:
    return EngineJob(
        key=member_key("5eed-0a0b", place),
        folder=JobFolder(Path("/shared") / folder),
        name="train",
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("plain", [job()]),
        ("type", [job(gpus=2, gpu_type="a100_80gb")]),
        ("time", [job(time_s=61.0)]),
        ("everything", [job(gpus=4, gpu_type="a100_80gb", time_s=3601.0, rank=3)]),
        (
            "odd-path",
            [
                EngineJob(
                    key="f0-2-cd",
                    folder=JobFolder(Path("/shared/it's 100% ours/f0-2-cd")),
                    name="☃",
                )
            ],
        ),
        ("array", [member(at, f"f{at}-1-ab", time_s=60.0) for at in range(3)]),
        ("array-odd-path", [member(0, "it's 100% ours/f0"), member(1, 'a "b"; $c/f1')]),
        ("one-of-an-array", [member(7, "f7-1-ab", gpus=2)]),
    ],
)
def test_a_script_is_as_it_was(name: str, asked: list[EngineJob]) -> None:
    text = _slurm_script.script(asked, python="/opt/python/bin/python3")
    assert text == (GOLDEN / f"{name}.sh").read_text()


def test_the_script_of_what_is_kept_is_as_it_was() -> None:
    kept = KeptFolder(Path("/shared/engines/kept/f0-1-ab"))
    asked, python = [job(time_s=600.0)], "/opt/python/bin/python3"
    text = _slurm_script.script(asked, python=python, kept=kept, idle_s=600.0)
    assert text == (GOLDEN / "kept.sh").read_text()


def test_how_long_what_runs_still_lasts() -> None:
    assert _slurm_text.left(
        "7|gpuq-a|1-02:03:04|2-00:00:00\n8|gpuq-b|9:08|10:00\n9|gpuq-c|UNLIMITED|UNLIMITED\n"
        "10|gpuq-d|INVALID|1:00\nno row\n"
    ) == {
        "gpuq-a": ("7", 93784.0, 172800.0),
        "gpuq-b": ("8", 548.0, 600.0),
        "gpuq-c": ("9", None, None),
        "gpuq-d": ("10", 0.0, 60.0),
    }


@pytest.mark.parametrize("gpu", ["a100 --account=root", "x\n#SBATCH --uid=0", "GPU-1,GPU-2", ""])
def test_a_type_is_one_word_or_refused(gpu: str) -> None:
    with pytest.raises(RejectedError, match="gres"):
        _slurm_script.script([job(gpu_type=gpu)])


def test_a_folder_that_a_script_cannot_name_is_refused() -> None:
    folder = JobFolder(Path('/shared/"\n#SBATCH --uid=0'))
    with pytest.raises(RejectedError, match="engine_dir"):
        _slurm_script.script([EngineJob(key="k", folder=folder, name="n")])


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


def test_the_tasks_of_an_array_are_told_apart() -> None:
    found = _slurm_text.rows(
        "12_0|gpuq-a|COMPLETED|None|n1\n12_1|gpuq-a|RUNNING|None|n1\n"
        "12_2|gpuq-a|PENDING|Priority|\n12|gpuq-a|CANCELLED|Priority|\n"
    )
    assert {name: status.state for name, status in found.items()} == {
        "gpuq-a_0": EngineState.ENDED,
        "gpuq-a_1": EngineState.RUNNING,
        "gpuq-a_2": EngineState.QUEUED,
        "gpuq-a": EngineState.CANCELLED,
    }
    assert found["gpuq-a_2"].native == "12_2"


def test_which_tasks_share_a_record() -> None:
    found = _slurm_text.shares(
        "12_0|gpuq-a|13\n12_2|gpuq-a|12\n12_3|gpuq-a|12\n12_4|gpuq-a|15\n9|gpuq-b|9\n"
    )
    assert found == {
        "gpuq-a_0": [("12_0", False)],
        "gpuq-a_2": [("12_2", True)],
        "gpuq-a_3": [("12_3", True)],
        "gpuq-a_4": [("12_4", False)],
        "gpuq-b": [("9", False)],
    }


@pytest.mark.parametrize(
    ("key", "parts"),
    [("5eed-0a0b_3", ("5eed-0a0b", 3)), ("f0-1-ab", ("f0-1-ab", None)), ("_4", ("_4", None))],
)
def test_the_key_of_a_member_names_its_array_and_its_place(
    key: str, parts: tuple[str, int | None]
) -> None:
    assert parted(key) == parts


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
    (status,) = _slurm_text.rows("3|gpuq-a|FAILED|JobLaunchFailure|n1\n").values()
    assert status.text == "its node could not start it (JobLaunchFailure)"


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


def test_what_accounts_say_of_jobs_that_have_ended() -> None:
    found = _slurm_text.rows(
        "7|gpuq-a|CANCELLED by 1000|0:15|None assigned\n8_1|gpuq-b|NODE_FAIL|0:0|n1\n"
        "8_[2-3]|gpuq-b|CANCELLED by 0|0:0|None assigned\n9|gpuq-c|OUT_OF_MEMORY|0:125|n2\n"
    )
    assert (found["gpuq-a"].state, found["gpuq-a"].where) == (EngineState.CANCELLED, None)
    member = _slurm_text.of_key(found, "gpuq-b_1")
    assert member is not None
    assert member.text == "its node failed (NODE_FAIL)"
    together = _slurm_text.of_key(found, "gpuq-b_3")
    assert together is not None
    assert together.state is EngineState.CANCELLED
    assert found["gpuq-c"].text == "it used more memory than Slurm gave it (OUT_OF_MEMORY)"
    assert _slurm_text.of_key(found, "gpuq-d_1") is None


def test_whether_a_site_has_accounts() -> None:
    line = "AccountingStorageType   = accounting_storage/{}\n"
    assert _slurm_text.has_accounts("A = 1\n" + line.format("slurmdbd"))
    assert not _slurm_text.has_accounts(line.format("none"))
    assert not _slurm_text.has_accounts("")


def test_how_many_jobs_a_site_gives_an_array() -> None:
    assert _slurm_text.array_max("A = 1\nMaxArraySize            = 1001\n") == 1001
    assert _slurm_text.array_max("MaxArraySize = 0\n") == 1
    assert _slurm_text.array_max("") == 1


def test_the_time_that_a_site_gives_a_message() -> None:
    assert _slurm_text.message_timeout_s("A = 1\nMessageTimeout          = 30 sec\n") == 30.0
    assert _slurm_text.message_timeout_s("") == 10.0
