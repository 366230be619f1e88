"""The state directory is private whatever the umask and whatever was planted there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StateDirError
from gpusched_ipy.statedir import (
    create_private,
    network_file_system,
    open_private,
    open_state_dir,
)
from gpusched_ipy.store import Store


def _settings(root: Path) -> Settings:
    return Settings.load({"state_dir": str(root)}, environ={})


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_everything_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(open_state_dir(_settings(tmp_path / "state")))
        store.set_drained("to write something")
    finally:
        os.umask(before)
    paths = list((tmp_path / "state").rglob("*"))
    assert {"queue.db", "queue.db-wal", "bell", "q.lock"} <= {path.name for path in paths}
    for path in [tmp_path / "state", *paths]:
        assert _mode(path) == (0o700 if path.is_dir() else 0o600), path
    store.close()


def test_others_may_not_write_it(tmp_path: Path) -> None:
    root = tmp_path / "state"
    open_state_dir(_settings(root))
    root.chmod(0o770)
    with pytest.raises(StateDirError, match="chmod 700"):
        open_state_dir(_settings(root))


def test_a_file_in_its_place_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(StateDirError, match=str(tmp_path / "state")):
        open_state_dir(_settings(tmp_path / "state"))


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateDirError):
        open_state_dir(_settings(tmp_path / "state"))


@pytest.mark.parametrize("plant", ["link", "dangling", "directory", "fifo", "hard link"])
@pytest.mark.parametrize("name", ["queue.db", "ring/bell", "q.lock"])
def test_planted_files_are_refused_and_not_touched(tmp_path: Path, plant: str, name: str) -> None:
    state = open_state_dir(_settings(tmp_path / "state"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    at = state.root / name
    if plant == "link":
        at.symlink_to(victim)
    elif plant == "dangling":
        at.symlink_to(tmp_path / "nothing")
    elif plant == "directory":
        at.mkdir()
    elif plant == "fifo":
        os.mkfifo(at)
    else:
        os.link(victim, at)
    with pytest.raises(StateDirError, match=name):
        Store(state)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_create_private_never_takes_what_stands_there(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_private(tmp_path / "log")
    assert not (tmp_path / "elsewhere").exists()


def test_open_private_makes_and_reopens(tmp_path: Path) -> None:
    os.close(open_private(tmp_path / "file"))
    os.close(open_private(tmp_path / "file"))
    assert _mode(tmp_path / "file") == 0o600


def test_local_folders_are_local() -> None:
    assert network_file_system(Path("/proc")) is None
