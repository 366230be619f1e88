"""Several users, or containers, on one machine: GPUs are never given twice, turns are taken, and
nobody reads, cancels or runs anything of another. Real uids and namespaces where allowed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import FakeScript, wait_until

from gpusched_ipy.errors import UserError
from gpusched_ipy.job import Job, JobKind, JobSpec, JobState
from gpusched_ipy.locks import GpuLocks
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.store import Store
from gpusched_ipy.turns import Ticket, Turns
from gpusched_ipy.upkeep import make_shared

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="must act as two users: needs root"),
]
ONE, TWO = 4001, 4002
PROJECT = Path(__file__).parents[1]


class User:
    """One user with a queue of their own, who shares the GPUs."""

    def __init__(self, uid: int, folder: Path, locks: Path, fake: FakeScript, python: str) -> None:
        self.uid = uid
        self.python = python
        self.root = folder / f"home{uid}"
        self.root.mkdir()
        os.chown(self.root, uid, uid)
        self.state = self.root / "state"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "PYTHONPATH": str(PROJECT),
            "GPUSCHED_STATE_DIR": str(self.state),
            "GPUSCHED_LOCK_DIR": str(locks),
            "GPUSCHED_FAKE": str(fake.path),
            "GPUSCHED_SAMPLE_INTERVAL_S": "0.1",
            "GPUSCHED_QUIET_S": "0.2",
        }

    def run(self, *argv: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, user=self.uid, group=self.uid, extra_groups=[], env=self.environ, cwd="/",
            capture_output=True, text=True, timeout=200, check=check, **more,
        )  # fmt: skip

    def gpusched(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(self.python, "-m", "gpusched_ipy", *arguments, check=check)

    def submit(self, *arguments: str) -> int:
        return int(self.gpusched("submit", *arguments).stdout)

    def job(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.gpusched("show", str(number), "--json").stdout)
        return record


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The lock files that an administrator has made."""
    for path in (tmp_path, *tmp_path.parents):
        # Folders of pytest are its own user's alone; the users of this test must pass.
        if path.stat().st_mode & 0o001 == 0:
            path.chmod(path.stat().st_mode | 0o011)
    folder = tmp_path / "locks"
    make_shared(folder, ["GPU-fake-0"])
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that any user may run, with this package and all that it needs."""
    folder = tmp_path_factory.mktemp("python")
    for path in (folder, folder.parent, folder.parent.parent):
        path.chmod(path.stat().st_mode | 0o055)
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    places = [sys.executable, shutil.which(name, path="/usr/local/bin:/usr/bin")]
    for base in filter(None, places):
        venv = folder / str(len(list(folder.iterdir())))
        subprocess.run([base, "-m", "venv", "--without-pip", str(venv)], check=True)
        (packages,) = venv.glob("lib/*/site-packages")
        paths = [str(PROJECT), *(path for path in sys.path if path.endswith("-packages"))]
        (packages / "all.pth").write_text("\n".join(paths))
        found = str(venv / "bin" / "python")
        if _runs(found):
            return found
    pytest.skip("no Python here can be run by another user (its folders are closed to them)")


def as_user(uid: int, *argv: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(
        argv, user=uid, group=uid, extra_groups=[], env=environ, cwd="/",
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _runs(found: str) -> bool:
    try:
        done = as_user(ONE, found, "-c", "import gpusched_ipy.cli, psutil, watchdog, platformdirs")
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.fixture
def users(tmp_path: Path, shared: Path, python: str) -> Iterator[tuple[User, User, FakeScript]]:
    fake = FakeScript(tmp_path / "fake.json")
    fake.path.chmod(0o644)
    pair = tuple(User(uid, tmp_path, shared, fake, python) for uid in (ONE, TWO))
    yield (*pair, fake)
    for user in pair:
        if user.state.exists():
            user.gpusched("cancel", "*", check=False)
            user.gpusched("agent", "stop", check=False)
            wait_until(lambda user=user: not any((user.state / "alive").iterdir()), what="all gone")


def test_admin_init_makes_what_nobody_can_replace(shared: Path, python: str) -> None:
    lock = shared / "GPU-fake-0.lock"
    assert (lock.stat().st_uid, lock.stat().st_mode & 0o777) == (0, 0o444)
    assert shared.stat().st_mode & 0o7777 == 0o755
    assert (shared / "tickets").stat().st_mode & 0o7777 == 0o1777
    for attempt in (
        f"import os; os.unlink({str(lock)!r})",
        f"open({str(lock)!r}, 'w')",
        f"open({str(shared / 'GPU-new.lock')!r}, 'w')",
        f"import os; os.rename({str(shared / 'tickets')!r}, {str(shared / 'x')!r})",
    ):
        tried = as_user(ONE, python, "-c", attempt)
        assert "PermissionError" in tried.stderr
    make_shared(shared, ["GPU-fake-0", "GPU-fake-1"])  # once more changes nothing
    assert lock.exists()
    os.chown(shared, ONE, ONE)
    with pytest.raises(UserError, match="not a folder of root's"):
        make_shared(shared, ["GPU-fake-0"])


def test_admin_init_in_the_terminal(tmp_path: Path, fake: FakeScript, python: str) -> None:
    folder = tmp_path / "run"
    command = ["-m", "gpusched_ipy", "admin", "init", "--lock-dir", str(folder)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    assert "locks for 1 GPU" in done.stdout
    assert (folder / "GPU-fake-0.lock").exists()
    refused = as_user(ONE, python, *command)
    assert refused.returncode == 1
    assert "run it as root" in refused.stderr


def witness(path: Path, python: str = sys.executable) -> list[str]:
    """The argv of a job that fails when another one is on its GPU."""
    code = (
        "import fcntl, os, sys, time\n"
        f"fd = os.open({str(path)!r}, os.O_RDONLY)\n"
        "try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(77)\n"
        "time.sleep(0.15)"
    )
    return [python, "-c", code]


def ends(user: User, jobs: Sequence[int]) -> list[tuple[str, int | None]]:
    user.gpusched("wait", *(str(job) for job in jobs), check=False)
    return [(record["state"], record["exit_code"]) for record in map(user.job, jobs)]


def test_two_users_never_share_an_exclusive_gpu(
    users: tuple[User, User, FakeScript], tmp_path: Path
) -> None:
    one, two, _ = users
    on_it = tmp_path / "witness"
    on_it.touch(mode=0o644)
    jobs = {
        user.uid: [user.submit("--", *witness(on_it, user.python)) for _ in range(5)]
        for user in (one, two)
    }
    for user in (one, two):
        assert ends(user, jobs[user.uid]) == [("completed", 0)] * 5


def test_users_take_turns_by_priority(users: tuple[User, User, FakeScript], tmp_path: Path) -> None:
    """While one user's jobs fill the line, another's with a higher priority goes before them."""
    one, two, fake = users
    for user in (one, two):  # so long one waits for the other's start
        user.environ["GPUSCHED_QUIET_S"] = "10"
    fake.busy()
    low = [one.submit("--priority", "0", "--", "sleep", "0.2") for _ in range(4)]
    high = two.submit("--priority", "9", "--", "sleep", "0.2")
    wait_until(lambda: one.job(low[0])["reason"] and two.job(high)["reason"])
    wait_until(lambda: len(list((tmp_path / "locks" / "tickets").iterdir())) == 2)
    fake.free()
    assert ends(two, [high]) == [("completed", 0)]
    assert ends(one, low) == [("completed", 0)] * 4
    started = two.job(high)["started_at"]
    assert started < one.job(low[0])["started_at"]


def test_nobody_reads_cancels_or_runs_anything_of_another(
    users: tuple[User, User, FakeScript], tmp_path: Path
) -> None:
    one, two, fake = users
    fake.busy()
    job = one.submit("--name", "private", "--", "true")
    owned = tmp_path / "home4002" / "owned"
    for argv in (
        ["cat", str(one.state / "queue.db")],
        ["ls", str(one.state)],
        ["touch", str(one.state / "logs" / "x")],
    ):
        assert "Permission denied" in two.run(*argv, check=False).stderr
    environ = two.environ
    two.environ = {**environ, "GPUSCHED_STATE_DIR": str(one.state)}
    for verb in (["cancel", str(job)], ["list"], ["submit", "--", "touch", str(owned)]):
        refused = two.gpusched(*verb, check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "private" not in refused.stderr
    two.environ = environ
    agent = one.gpusched("agent", "status").stdout
    pid = next(word for word in agent.replace(",", " ").split() if word.isdigit())
    denied = two.run("kill", pid, check=False)
    assert denied.returncode != 0
    assert one.job(job)["state"] == "pending"
    assert two.gpusched("list", "--json").stdout.strip() == "[]"


# Tickets: data of strangers


def ticket(folder: Path, name: str, text: str, uid: int = ONE) -> Path:
    path = folder / name
    path.write_text(text)
    os.chown(path, uid, uid)
    return path


@pytest.fixture
def turns(shared: Path) -> Turns:
    from gpusched_ipy.config import SystemClock

    return Turns(shared / "tickets", "k" * 32, SystemClock(), patience_s=5.0)


def test_only_a_living_writers_own_small_file_is_a_ticket(
    shared: Path, turns: Turns, tmp_path: Path
) -> None:
    folder = shared / "tickets"
    good = json.dumps({"priority": 5, "since": 100.0})
    alive = ticket(folder, f"{ONE}-a", good)
    bad = [
        ticket(folder, f"{TWO}-forged", good),  # says it is another user's
        ticket(folder, f"{ONE}-big", good + " " * 5000),
        ticket(folder, f"{ONE}-text", "{'not json'"),
        ticket(folder, f"{ONE}-pickle", "cos\nsystem\n(S'touch owned'\ntR."),
        ticket(folder, f"{ONE}-types", json.dumps({"priority": [], "since": {}})),
        ticket(folder, f"{ONE}-huge", '{"priority": 1e999, "since": 1}'),
        ticket(folder, f"{ONE}-deep", "[" * 4000),
    ]
    linked = ticket(tmp_path, "elsewhere", good)
    os.link(linked, folder / f"{ONE}-hard")
    (folder / f"{ONE}-link").symlink_to(linked)
    os.mkfifo(folder / f"{ONE}-fifo")
    (folder / f"{ONE}-dir").mkdir()
    held = [os.open(path, os.O_RDONLY) for path in (alive, linked, *bad)]
    for fd in held:
        fcntl.flock(fd, fcntl.LOCK_EX)
    assert list(turns.others()) == [Ticket(ONE, 5, 100.0)]
    for fd in held:
        os.close(fd)
    assert list(turns.others()) == []  # its writer is dead


def test_somebody_ahead_is_waited_for_and_not_for_ever(shared: Path) -> None:
    from gpusched_ipy.config import Instant

    class FakeClock:
        mono = 0.0

        def now(self) -> Instant:
            return Instant(mono=self.mono, wall=1e9)

    clock = FakeClock()
    turns = Turns(shared / "tickets", "k" * 32, clock, patience_s=5.0)
    spec = JobSpec(uid="u", kind=JobKind.COMMAND, name="u", argv=("true",))
    job = Job(id=1, spec=spec, state=JobState.PENDING, priority=3, submitted_at=500.0)
    fds = []
    for name, priority, since, ahead in (
        ("lower", 2, 1.0, False), ("later", 3, 501.0, False), ("earlier", 3, 499.0, True),
        ("higher", 4, 900.0, True),
    ):  # fmt: skip
        path = ticket(
            shared / "tickets", f"{ONE}-{name}", json.dumps({"priority": priority, "since": since})
        )
        fds.append(os.open(path, os.O_RDONLY))
        fcntl.flock(fds[-1], fcntl.LOCK_EX)
        assert (turns.ahead_of(job) is not None) is ahead, name
    clock.mono = 4.9
    assert "priority 4" in (turns.ahead_of(job) or "")
    clock.mono = 5.1
    assert turns.ahead_of(job) is None
    for fd in fds:
        os.close(fd)


def test_a_ticket_is_left_and_taken_back(shared: Path, turns: Turns) -> None:
    spec = JobSpec(uid="u", kind=JobKind.COMMAND, name="u", argv=("true",))
    jobs = [
        Job(
            id=number,
            spec=spec,
            state=JobState.PENDING,
            priority=priority,
            submitted_at=10.0 + number,
        )
        for number, priority in ((1, 0), (2, 7), (3, 7))
    ]
    turns.announce(jobs)
    (path,) = (shared / "tickets").iterdir()
    assert json.loads(path.read_text()) == {"priority": 7, "since": 12.0}
    assert path.stat().st_mode & 0o777 == 0o644
    turns.announce(jobs[:1])
    assert json.loads(path.read_text()) == {"priority": 0, "since": 11.0}
    turns.announce([])
    assert list((shared / "tickets").iterdir()) == []


def test_a_lock_of_a_stranger_is_refused(shared: Path, tmp_path: Path) -> None:
    from gpusched_ipy.errors import StateDirError

    folder = tmp_path / "open"
    folder.mkdir(mode=0o777)
    planted = folder / "GPU-x.lock"
    planted.touch()
    os.chown(planted, ONE, ONE)
    with pytest.raises(StateDirError, match="not a plain file of ours or of root's"):
        GpuLocks(folder).try_lock("GPU-x", shared=False)


# Containers: namespaces of their own, one folder of locks


def container(tmp_path: Path, name: str, fake: FakeScript, locks: Path) -> list[str]:
    """A shell line's prefix that runs in mount and pid namespaces of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here")
    begin = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*begin, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here")
    state = tmp_path / name
    variables = {
        "GPUSCHED_STATE_DIR": str(state), "GPUSCHED_LOCK_DIR": str(locks),
        "GPUSCHED_FAKE": str(fake.path), "GPUSCHED_SAMPLE_INTERVAL_S": "0.1",
        "GPUSCHED_QUIET_S": "0.2", "PYTHONPATH": str(PROJECT),
    }  # fmt: skip
    return [*begin, "env", *(f"{key}={value}" for key, value in variables.items())]


def test_two_containers_never_share_an_exclusive_gpu(tmp_path: Path, fake: FakeScript) -> None:
    locks = tmp_path / "locks"
    make_shared(locks, ["GPU-fake-0"])
    on_it = tmp_path / "witness"
    on_it.touch()
    code = (
        "import sys\nfrom gpusched_ipy.api import Queue\n"
        "queue = Queue()\n"
        "jobs = [queue.submit(sys.argv[1:]).id for _ in range(5)]\n"
        "print([(job.state.value, job.exit_code) for job in queue.wait(*jobs, timeout=200)])"
    )
    running = [
        subprocess.Popen(
            [*container(tmp_path, name, fake, locks), sys.executable, "-c", code, *witness(on_it)],
            stdout=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    for child in running:
        out, _ = child.communicate(timeout=220)
        assert out.strip() == str([("completed", 0)] * 5)


def test_a_holder_in_another_container_is_seen(tmp_path: Path, fake: FakeScript) -> None:
    """Its pid is nobody's here; the lock says what is true."""
    locks = tmp_path / "locks"
    make_shared(locks, ["GPU-fake-0"])
    code = (
        "import sys\nfrom gpusched_ipy.api import Queue\n"
        "queue = Queue()\njob = queue.submit(['sleep', '600'])\n"
        "import time\n"
        "while queue.show(job.id).state != 'running': time.sleep(0.05)\n"
        "print('runs', flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen(
        [*container(tmp_path, "one", fake, locks), sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "runs\n"
    here = GpuLocks.of(StateDir(tmp_path / "state"), locks)
    assert here.occupied("GPU-fake-0")
    child.communicate()
    # The namespace has ended, and with it everything that was in it.
    wait_until(lambda: not here.occupied("GPU-fake-0"), what="the lock has fallen")
    store = Store(StateDir(tmp_path / "one"))
    assert [str(job.state) for job in store.jobs()] == ["running"]
    store.close()
