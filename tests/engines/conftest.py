"""Real engines for the tests, each started once; every test finds them empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import FakeScript
from requires import require

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from tests.engines import slurmcluster
from tests.engines.ray_head import RayHead

# Every engine that the conformance suite is run with; each name is that of a fixture as well.
ENGINES = ("local", "slurm", "ray")


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[slurmcluster.SlurmCluster]:
    """A Slurm of our own."""
    lacks = slurmcluster.missing()
    require("slurm", not lacks, f"Slurm is not installed: there is no {lacks}")
    cluster = slurmcluster.SlurmCluster()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A Ray of our own."""
    head = RayHead(gpus=2)
    try:
        head.start()
        yield head
    finally:
        head.close()


@pytest.fixture
def ray(ray_head: RayHead, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RayHead:
    """That Ray, found by what the test starts."""
    monkeypatch.setenv("GPUSCHED_RAY_ADDRESS", ray_head.url)
    monkeypatch.setenv("GPUSCHED_RAY_TOKEN_FILE", str(ray_head.token_file))
    return ray_head


@pytest.fixture
def local() -> None:
    """The queue's own GPUs: two, as the engines have."""


@pytest.fixture
def slurm(
    slurm_cluster: slurmcluster.SlurmCluster, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[slurmcluster.SlurmCluster]:
    """That Slurm, empty, and found by what the test starts."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.conf))
    yield slurm_cluster
    slurm_cluster.empty()


@pytest.fixture
def two_gpus(fake: FakeScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeScript:
    """Two scripted GPUs, and folders of jobs that the test can look into."""
    monkeypatch.setenv("GPUSCHED_ENGINE_DIR", str(tmp_path / "engines"))
    return FakeScript(fake.path, 2)


@pytest.fixture
def queue(two_gpus: FakeScript) -> Iterator[Queue]:
    """The queue as programs use it."""
    opened = Queue(Settings.load())
    yield opened
    opened.store.close()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, two_gpus: FakeScript) -> str:
    """Each engine in turn, by its name."""
    name: str = request.param
    request.getfixturevalue(name)
    return name


@pytest.fixture
def counted(tmp_path: Path) -> Callable[[], list[str]]:
    """What jobs have written into the file ``ran``, line by line: how often each has run."""
    path = tmp_path / "ran"

    def lines() -> list[str]:
        return path.read_text().splitlines() if path.exists() else []

    return lines
