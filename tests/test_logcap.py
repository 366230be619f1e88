"""A log stays within its cap, byte for byte at both ends, while its job writes and others read."""

from __future__ import annotations

import fcntl
import os
import random
import sys
import threading
from pathlib import Path

import pytest
from helpers import wait_until

from gpusched_ipy import logcap
from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StateDirError
from gpusched_ipy.job import JobState
from gpusched_ipy.joblog import written
from gpusched_ipy.locks import log_is_held
from gpusched_ipy.logcap import LogCap, find_mark, mark
from gpusched_ipy.output import LogReader, create_log, follow_log, read_log

CAP = 64 * 1024
HEAD = CAP // 2


def disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def numbered(first: int, last: int) -> bytes:
    return b"".join(b"line %09d\n" % number for number in range(first, last))


def split(text: bytes) -> tuple[bytes, int, bytes]:
    """Head, number of bytes cut, tail."""
    found = logcap._MARK.search(text)
    assert found is not None
    return text[: found.start()], int(found[1]), text[found.end() :]


@pytest.fixture(params=["holes", "no holes"])
def holes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a file system that knows holes, and on one that does not."""
    if request.param == "no holes":
        monkeypatch.setattr(logcap, "_punch", lambda *_: False)
    return request.param == "holes"


def test_a_small_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    cap = LogCap(path, CAP)
    os.write(fd, b"x" * CAP)
    cap.trim()
    os.close(fd)
    cap.settle()
    assert path.read_bytes() == b"x" * CAP


@pytest.mark.usefixtures("holes")
def test_head_and_tail_are_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    cap = LogCap(path, CAP)
    whole = b""
    for step in range(20):
        piece = numbered(step * 5000, (step + 1) * 5000)
        whole += piece
        os.write(fd, piece)
        cap.trim()
        assert disk(path) <= CAP + 12288
        head, cut, tail = split(read_log(path))
        assert head == whole[:HEAD]
        assert len(tail) >= HEAD
        assert whole == head + whole[HEAD : HEAD + cut] + tail
    os.close(fd)
    cap.settle()
    head, cut, tail = split(path.read_bytes())
    assert (head, tail) == (whole[:HEAD], whole[HEAD + cut :])
    assert len(tail) >= HEAD
    assert path.stat().st_size <= CAP + 12288


def test_the_lock_of_the_job_and_its_place_survive_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    cap = LogCap(path, CAP)
    os.write(fd, b"x" * 10 * CAP)
    cap.trim()
    assert log_is_held(path)
    os.write(fd, b"the end")
    assert read_log(path).endswith(b"the end")
    # Somebody still writes, so nothing may move yet: the hole stays, and is understood.
    cap.settle()
    assert path.stat().st_size == 10 * CAP + 7
    os.close(fd)
    assert not log_is_held(path)
    head, cut, tail = split(read_log(path))
    assert len(head) + cut + len(tail) == 10 * CAP + 7


def test_a_full_disk_leaves_the_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    cap = LogCap(path, CAP)
    os.write(fd, b"x" * 4 * CAP)
    os.close(fd)
    cap.trim()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    cap.settle()
    assert mark(4 * CAP - 2 * HEAD) in read_log(path)


def test_a_job_that_cuts_its_own_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    cap = LogCap(path, CAP)
    os.write(fd, b"x" * 4 * CAP)
    cap.trim()
    os.ftruncate(fd, 0)
    os.write(fd, b"anew")
    cap.trim()
    os.close(fd)
    cap.settle()
    assert path.read_bytes() == b"anew"


@pytest.mark.parametrize("plant", ["link", "fifo", "directory", "hard link"])
def test_nothing_else_is_ever_cut(tmp_path: Path, plant: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "log"
    victim.write_bytes(b"x" * 10 * CAP)
    if plant == "link":
        path.symlink_to(victim)
    elif plant == "fifo":
        os.mkfifo(path)
    elif plant == "directory":
        path.mkdir()
    else:
        os.link(victim, path)
    with pytest.raises(StateDirError, match="log"):
        LogCap(path, CAP)
    assert victim.read_bytes() == b"x" * 10 * CAP


@pytest.mark.parametrize("seed", range(30))
def test_readers_at_any_pace_see_what_was_written(tmp_path: Path, seed: int) -> None:
    """Whatever a reader is given is the text in order, each gap said with its true size."""
    dice = random.Random(seed)
    path = tmp_path / "log"
    fd = create_log(path)
    cap = LogCap(path, CAP)
    whole, seen = b"", [b"", b""]
    readers = [LogReader(path), LogReader(path)]
    for step in range(60):
        piece = numbered(step * 1000, step * 1000 + dice.randrange(1000))
        whole += piece
        os.write(fd, piece)
        if dice.random() < 0.5:
            cap.trim()
        for place, pace in ((0, 1.0), (1, 0.2)):
            if dice.random() < pace:
                seen[place] += readers[place].read(dice.randrange(1, 200_000))
    os.close(fd)
    cap.settle()
    for place, reader in enumerate(readers):
        seen[place] += b"".join(iter(lambda reader=reader: reader.read(9999), b""))
        reader.close()
        at = 0
        parts = logcap._MARK.split(seen[place])
        for text, gap in zip(parts[::2], [*parts[1::2], b"0"], strict=True):
            assert whole[at : at + len(text)] == text
            at += len(text) + int(gap)
        assert at == len(whole)


def test_the_last_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    os.write(fd, numbered(0, 100_000))
    LogCap(path, CAP).trim()
    os.close(fd)
    assert read_log(path, last_bytes=15) == b"line 000099999\n"


def test_find_mark_only_where_nothing_can_move(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    assert find_mark(fd) is None
    os.write(fd, b"a" + mark(5) + b"b")
    assert find_mark(fd) == (1, 1 + len(mark(5)), 5)
    os.ftruncate(fd, 10 * CAP)
    assert find_mark(fd) is None
    os.close(fd)


@pytest.fixture
def queue(fake: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GPUSCHED_LOG_CAP", "1MiB")
    found = Queue(Settings.load())
    yield found
    found.store.close()


def test_a_job_that_writes_for_ever_harms_nobody(queue: Queue) -> None:
    """A real job writes 300 MB through its shim; the disk never holds more than a burst of it."""
    code = (
        "import sys\n"
        "for n in range(20_000_000): sys.stdout.write('line %08d\\n' % n)\n"
        "print('the end')"
    )
    job = queue.submit([sys.executable, "-c", code])
    wait_until(lambda: queue.log_path(job.id))
    path = queue.log_path(job.id)
    assert path is not None
    most, followed = 0, 0
    over = threading.Event()

    def follow() -> None:
        nonlocal followed
        for chunk in follow_log(path, lambda: not over.wait(0.05)):
            followed += len(chunk)

    reader = threading.Thread(target=follow)
    reader.start()
    while not queue.show(job.id).ended:
        most = max(most, disk(path))
        over.wait(0.01)
    over.set()
    reader.join()
    end = queue.show(job.id)
    assert (end.state, end.error) == (JobState.COMPLETED, None)
    assert most < 200 * 2**20
    text = b"".join(written(queue, end))
    head, cut, tail = split(text)
    assert head.startswith(b"line 00000000\n")
    assert tail.endswith(b"line 19999999\nthe end\n")
    assert len(head) + cut + len(tail) == 20_000_000 * 14 + 8
    assert path.stat().st_size <= 1.2 * 2**20
    assert followed >= len(head) + len(tail)


def test_the_log_lock_falls_with_the_job_though_the_cap_looks_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = create_log(path)
    LogCap(path, CAP).trim()
    os.close(fd)
    probe = os.open(path, os.O_RDONLY)
    fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(probe)
