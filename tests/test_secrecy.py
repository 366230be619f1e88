"""Secrets: what looks like one is warned of, and none stays where anybody could read it later."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import files_with, wait_until
from kernels import started

from gpusched_ipy import secrecy, submit
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.repair import repair
from gpusched_ipy.statedir import open_state_dir

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    found = Queue(settings)
    yield found
    found.store.close()


def gpusched(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("python train.py --token=canary", "--token"),
        ("python train.py --api-key canary", "--api-key"),
        ("python train.py --hf-token canary", "--hf-token"),
        ("python train.py -db.password canary", "-db.password"),
        ("env WANDB_API_KEY=canary python train.py", "WANDB_API_KEY"),
        (f"python train.py {TOKEN}", "an argument"),
        ("curl https://user:canary@host/data", "an argument"),
        ("aws AKIAIOSFODNN7EXAMPLE", "an argument"),
    ],
)
def test_what_looks_like_a_secret_is_named_and_not_repeated(line: str, named: str) -> None:
    for argv in (line.split(), [line]):
        said = secrecy.warning(argv)
        assert said is not None
        assert said.startswith(f"{named} looks like a secret")
        assert "canary" not in said
        assert TOKEN not in said


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --tokenizer=gpt2 --max-tokens 512 --tokens=5 --key-dim 64",
        "python train.py --num-key-value-heads=8 --pad-token 0 --lr 0.1 --author=me",
        "curl --token $TOKEN --password=$PW",
        "python -m pip install git+https://github.com/a/b@main",
        "ssh host:22 python train.py --token-file /run/token --secret",
    ],
)
def test_the_words_of_the_trade_are_no_secrets(line: str) -> None:
    assert secrecy.warning(line.split()) is None
    assert secrecy.warning([line]) is None


def test_every_way_to_submit_warns(queue: Queue) -> None:
    told = gpusched("submit", "--hold", "--", "true", "--token", "canary")
    assert told.stdout == "1\n"
    assert told.stderr.count("looks like a secret") == 1
    ran = gpusched("run", "--", "true", "--token", "canary")
    assert (ran.returncode, ran.stderr.count("looks like a secret")) == (0, 1)
    with pytest.warns(UserWarning, match="--password looks like a secret"):
        submit(["true", "--password=canary"], queue=queue, hold=True)


CELLS = (
    "import os\nprint(sorted(name for name in os.environ if 'CANARY' in name))",
    "%%gpuqueue --name plain\nimport os\nprint(len(os.environ['CANARY_TOKEN']))",
    "%%gpuqueue --name isolated --isolate\nimport os\nprint('CANARY_TOKEN' in os.environ)",
    "%gpurun --name named --env CANARY_TOKEN -- sh -c 'echo ${#CANARY_TOKEN}'",
    "%gpurun --name unnamed -- sh -c 'echo ${#CANARY_TOKEN}'",
)


def test_a_secret_of_the_environment_is_found_nowhere(tmp_path: Path) -> None:
    """Not in record, logs, transcripts, inputs, exports, copies of a repair, or notebook."""
    value = "canary-7c1f"
    state = tmp_path / "state"
    with started(tmp_path, CANARY_TOKEN=value) as kernel:
        for code in CELLS:
            kernel.run(code)
        kernel.run("%gpuq wait")
        jobs = {
            job["name"]: job for job in json.loads(kernel.run("%gpuq list --all --json").text())
        }
        assert {job["state"] for job in jobs.values()} == {"completed"}
        logs = {name: kernel.run(f"%gpuq log {name}").text() for name in jobs}
        assert logs == {
            "plain": f"{len(value)}\n", "isolated": "False\n",
            "named": f"{len(value)}\n", "unnamed": "0\n",
        }  # fmt: skip
        # Everything that the kernel has sent is what a notebook could save.
        sent = json.dumps([cell.messages for cell in kernel.cells.values()], default=str)
        assert value not in sent
        environ = {**os.environ, "GPUSCHED_STATE_DIR": str(state), "CANARY_TOKEN": value}
        for verb in (["export"], ["list", "--all", "--json"], ["show", "named"], ["doctor"]):
            shown = subprocess.run(
                [sys.executable, "-m", "gpusched_ipy", *verb],
                env=environ, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert value not in shown.stdout + shown.stderr
    alive = state / "alive"
    wait_until(lambda: not any(alive.iterdir()), 60, "all have left")
    with sqlite3.connect(state / "queue.db") as db:
        db.execute("UPDATE jobs SET name = 'damaged' WHERE id = 1")
    db.close()
    kept = repair(open_state_dir(Settings.load({"state_dir": str(state)}, environ={}))).kept
    assert kept is not None
    assert kept.exists()
    assert files_with(state, value) == []
    shutil.rmtree(state)
