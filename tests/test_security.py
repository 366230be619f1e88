"""What must hold against other users, hostile notebooks and hostile jobs: one test a rule.

R1 markup (with test_view and the browser tests), R2 control characters, R3 data only, R4 no
listener, R5 private files, R6 argv and no shell, R7 nothing from the working directory, R8 secrets,
R9 a store of ours alone, R10 root, R11 caps, R12 signals. R13 and R14 are in test_disks.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers import FakeScript, files_with, wait_until

import gpusched_ipy
from gpusched_ipy import environment
from gpusched_ipy import store as store_module
from gpusched_ipy.agent import running_agent
from gpusched_ipy.api import Queue
from gpusched_ipy.badge import Around, bundle
from gpusched_ipy.config import Settings, SystemClock
from gpusched_ipy.errors import StateDirError, UserError
from gpusched_ipy.job import JobState
from gpusched_ipy.locks import GpuLocks, alive_pid, is_alive, log_is_held
from gpusched_ipy.monitor.readings import SharedReadings
from gpusched_ipy.process import ProcessId, _signal, end_tree
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store

PACKAGE = Path(gpusched_ipy.__file__).parent
PYTHON = sys.executable
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="must change its uid: needs root")

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</td></table><script>alert(1)</script>",
    '<button data-commandlinker-command="notebook:run-all">x</button>',
    '" onmouseover="alert(1)',
    "$\\href{javascript:alert(1)}{x}$",
    "\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "\x9b2J\x9d0;owned\x9c",
    "\u202etxt.exe\u2066",
    "a\rb\nc\td\x00e",
    "; touch owned #",
    "$(touch owned)",
    "-rf",
]


@pytest.fixture
def queue(fake: FakeScript) -> Iterator[Queue]:
    found = Queue(Settings.load())
    yield found
    found.store.close()


def gpusched(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, "-m", "gpusched_ipy", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=60, check=False,
    )  # fmt: skip


def acting(text: str) -> set[str]:
    """The characters of ``text`` that do something to a terminal, but for ends of lines."""
    return {
        char
        for char in text
        if char != "\n"
        and (ord(char) < 32 or 0x7F <= ord(char) < 0xA0 or ord(char) in range(0x2028, 0x202F)
             or ord(char) in range(0x2066, 0x206A))
    }  # fmt: skip


# R1, R2: what others have chosen is shown, and does nothing


def test_no_hostile_text_acts_in_the_terminal(queue: Queue, fake: FakeScript) -> None:
    fake.busy()
    for text in HOSTILE:
        queue.submit(["/bin/echo", *([] if "\0" in text else [text])], name=_name(text), hold=True)
    fake.change(processes=[{"pid": 4242, "user": HOSTILE[5], "name": HOSTILE[6], "memory": "1GiB"}])
    for asked in ("list", "list --json", "show 1", "show 7", "show 7 --json", "history", "gpus",
                  "gpus --json", "cancel *"):  # fmt: skip
        done = gpusched(*asked.split())
        assert done.returncode == 0, done.stderr
        assert acting(done.stdout + done.stderr) == set(), asked
        assert "owned" not in os.listdir()


def _name(text: str) -> str:
    """A name as near to ``text`` as a submit takes one."""
    from gpusched_ipy.optionvalues import parse_name

    try:
        return parse_name(text)
    except UserError:
        return "job"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_hostile_text_is_markup_in_a_badge(queue: Queue, text: str) -> None:
    from dataclasses import replace

    job = queue.submit(["true"], hold=True)
    job = replace(job, spec=replace(job.spec, name=text), state=JobState.FAILED, error=text)
    shown = bundle(job, Around(gpus=[text], pinned=[text], note=text))
    html = shown["text/html"]
    inner = html.split(">", 1)[1].removesuffix("</div>").replace("<b>", "").replace("</b>", "")
    assert "<" not in inner
    assert '"' not in inner
    assert acting(html + shown["text/plain"]) == set()


def test_output_of_a_job_is_shown_and_does_nothing_on_a_terminal(queue: Queue) -> None:
    import pty

    code = "print('\\x1b]0;owned\\x07', '\\x9b2J', '\\u202e', '\\x1b[31mred')"
    job = queue.submit([PYTHON, "-c", code], env=["PYTHONIOENCODING=utf-8"])
    queue.wait(job.id, timeout=60)
    leader, terminal = pty.openpty()
    done = subprocess.run(
        [PYTHON, "-m", "gpusched_ipy", "log", str(job.id)],
        stdout=terminal, stderr=subprocess.PIPE, timeout=60, check=True,
    )  # fmt: skip
    os.close(terminal)
    text = os.read(leader, 4096).decode()
    os.close(leader)
    assert done.stderr == b""
    colours = text.replace("\x1b[31m", "").replace("\x1b[0m", "").replace("\r\n", "\n")
    assert acting(colours) == set()
    assert "\\x1b]0;owned\\x07" in text


# R3, R6: data and argument vectors, never objects and never a shell

# module → the calls it may make: cloudpickle files of isolated cells and executor calls will be
# here, each with its reason.
ALLOWED: dict[str, set[str]] = {}
BANNED = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load"),
    *("pickle.loads", "cloudpickle.load", "cloudpickle.loads", "marshal.load", "marshal.loads"),
    *("yaml.load", "shelve.open", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("tempfile.mktemp", "asyncio.create_subprocess_shell"),
}


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def _banned_in(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name in BANNED:
                found.add(name)
            for keyword in node.keywords:
                constant = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg == "shell" and name.startswith("subprocess") and not constant:
                    found.add(f"{name}(shell=…)")
        elif isinstance(node, ast.Import):
            found |= {
                item.name for item in node.names if item.name in ("yaml", "marshal", "shelve")
            }
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_code_from_data_and_no_shell(path: Path) -> None:
    module = path.relative_to(PACKAGE).with_suffix("").as_posix()
    assert _banned_in(path.read_text(encoding="utf-8")) <= ALLOWED.get(module, set())


def test_the_lint_itself_finds_what_is_banned() -> None:
    bad = (
        "import yaml\nimport pickle\npickle.loads(b'')\nsubprocess.run('x', shell=True)\n"
        "os.system('x')\neval('1')\nsubprocess.run(['x'], shell=False)"
    )
    assert _banned_in(bad) == {
        "yaml", "pickle.loads", "subprocess.run(shell=…)", "os.system", "eval",
    }  # fmt: skip


@pytest.mark.parametrize("text", [text for text in HOSTILE if "\0" not in text])
def test_arguments_arrive_as_they_are(queue: Queue, tmp_path: Path, text: str) -> None:
    got = tmp_path / "got"
    code = f"import sys; open({str(got)!r}, 'w', newline='').write(sys.argv[1])"
    job = queue.submit([PYTHON, "-c", code, text], cwd=tmp_path)
    queue.wait(job.id, timeout=60)
    assert got.read_bytes().decode() == text
    assert not (tmp_path / "owned").exists()


# R4: nobody listens


def test_no_process_of_ours_listens(queue: Queue, tmp_path: Path) -> None:
    job = queue.submit([PYTHON, "-c", "import time; time.sleep(600)"])
    wait_until(lambda: queue.show(job.id).state is JobState.RUNNING)
    kinds = queue.store.member_kinds()
    pids = {alive_pid(queue.state, key): kind for key, kind in kinds.items()}
    assert {"agent", "shim"} <= set(pids.values())
    for pid in filter(None, pids):
        assert _listeners(pid) == []
        for process in psutil.Process(pid).children():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                assert _listeners(process.pid) == []
    queue.cancel(job.id)


def _listeners(pid: int) -> list[str]:
    """Sockets of a process that accept connections (proc(5), net/unix and net/tcp)."""
    links: list[str] = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(entry))
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found: list[str] = []
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & 0x10000 and fields[6] in inodes:  # SO_ACCEPTCON
            found.append(line)
    for name in ("tcp", "tcp6", "udp", "udp6"):
        table = Path(f"/proc/{pid}/net/{name}")
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        found += [line for line in lines if line.split()[9] in inodes]
    return found


# R5: links and other things planted at every path we create


def _plant(path: Path, what: str, victim: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if what == "link":
        path.symlink_to(victim)
    elif what == "hard link":
        os.link(victim, path)
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    found = tmp_path / "victim"
    found.write_text('{"A": "precious"}')
    return found


PLANTS = ["link", "hard link", "fifo", "directory"]


@pytest.mark.parametrize("what", PLANTS)
def test_planted_files_are_neither_followed_nor_waited_for(
    tmp_path: Path, victim: Path, what: str
) -> None:
    state = open_state_dir(Settings.load())
    opened = [
        ("logs/a.log", lambda: log_is_held(state.log("a"))),
        ("alive/k", lambda: is_alive(state, "k")),
        ("env/u.json", lambda: environment.take(state, "u", ("A",))),
        ("gpu/G.lock", lambda: GpuLocks(state.root / "gpu").occupied("G")),
        ("queue.db-wal", lambda: Store(state)),
        ("queue.db-shm", lambda: Store(state)),
        ("queue.db-journal", lambda: Store(state)),
    ]
    for name, act in opened:
        path = state.root / name
        _plant(path, what, victim)
        if name == "gpu/G.lock" and what == "hard link":
            path.unlink()  # a lock may have several names: it holds nothing
            continue
        with pytest.raises(StateDirError, match=path.name.replace(".", r"\.")):
            act()
        assert victim.read_text() == '{"A": "precious"}'
        path.rmdir() if what == "directory" else path.unlink()


@pytest.mark.parametrize("what", PLANTS)
def test_planted_readings_are_not_believed(tmp_path: Path, victim: Path, what: str) -> None:
    settings = Settings.load()
    state = open_state_dir(settings)
    for name in ("readings.json", "sampler.lock", "sampler.wanted"):
        _plant(state.root / "readings" / name, what, victim)
    shared = SharedReadings(state.root, settings, SystemClock())
    assert shared.newest() is None
    assert not shared.take_lock()
    shared.ask()
    assert shared.problem is not None
    assert victim.read_text() == '{"A": "precious"}'
    assert not victim.stat().st_mode & 0o111


@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_agent_log_stops_the_agent(queue: Queue, victim: Path, what: str) -> None:
    _plant(queue.state.root / "agent.log", what, victim)
    done = subprocess.run(
        [PYTHON, "-c", "import sys; from gpusched_ipy.agent import main; main(sys.argv[1:])",
         "--state-dir", str(queue.state.root)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "agent.log" in done.stderr
    assert victim.read_text() == '{"A": "precious"}'


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "", "a\0b"])
def test_no_name_leaves_its_folder(name: str) -> None:
    state = open_state_dir(Settings.load())
    for path in (state.log, state.transcript, state.environment, state.alive):
        with pytest.raises(StateDirError):
            path(name)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_folders_made_on_the_way_are_private_too(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        open_state_dir(Settings.load({"state_dir": str(tmp_path / "a" / "b" / "c")}))
    finally:
        os.umask(before)
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"):
        assert path.stat().st_mode & 0o777 == 0o700


# R7: nothing is executed or configured because it lies in the working directory


def test_nothing_in_the_working_directory_is_run_or_read(
    queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    bad = f"open({str(tmp_path / 'owned')!r}, 'a').write(__name__)\nraise SystemExit(99)\n"
    for name in ("gpusched_ipy", "sitecustomize", "usercustomize", "json", "sqlite3", "psutil",
                 "socket", "watchdog"):  # fmt: skip
        (trap / f"{name}.py").write_text(bad)
    for name in ("gpusched.toml", "config.toml", ".gpusched.toml", "gpusched_ipy.toml"):
        (trap / name).write_text('order = "nonsense"\n')
    for name in ("true", "nvidia-smi", "sh"):
        (trap / name).write_text(f"#!/bin/sh\ntouch {tmp_path / 'owned'}\n")
        (trap / name).chmod(0o755)
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PYTHONPATH", str(trap))  # for what is started from here
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}")
    job = queue.submit(["true"])
    (end,) = queue.wait(job.id, timeout=60)
    assert (end.state, end.error) == (JobState.COMPLETED, None)
    # Every backend looks for its tools, and a reading runs those that it finds.
    for tool in ("nvidia-smi", "xpu-smi", "macmon", "ioreg", "sudo", "sysctl"):
        shutil.copy(trap / "true", trap / tool)
    monkeypatch.delenv("PYTHONPATH")
    looked = subprocess.run(
        [PYTHON, "-P", "-m", "gpusched_ipy", "doctor"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "nvidia-smi" in looked.stdout
    assert not (tmp_path / "owned").exists()


# R8: secrets stay out of the store


def test_secrets_are_found_nowhere(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GPUSCHED_PASSWORD", "CUDA_AUTH", "XDG_COOKIE",
             "MY_CREDENTIALS", "WANDB_API_KEY", "CONDA_TOKEN", "SOMETHING_ELSE"]  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "canary-7c1f")
    code = f"import os; print([name for name in {names} if name in os.environ])"
    job = queue.submit([PYTHON, "-c", code], env=["HF_TOKEN"])
    queue.submit(["false"], env=["WANDB_API_KEY"], hold=True)
    queue.cancel("false")
    queue.wait(timeout=60)
    path = queue.log_path(job.id)
    assert path is not None
    assert path.read_text() == "['HF_TOKEN']\n"
    assert "canary" not in gpusched("show", str(job.id), "--json").stdout
    assert files_with(queue.state.root, "canary") == []


# R9, R10: the state directory is its user's own


def test_an_agent_refuses_a_store_that_others_may_write(queue: Queue) -> None:
    queue.state.root.chmod(0o720)
    done = gpusched("agent", "run")
    queue.state.root.chmod(0o700)
    assert done.returncode == 1
    assert "chmod 700" in done.stderr


@as_root
def test_root_refuses_the_state_directory_of_another(tmp_path: Path) -> None:
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    os.chown(root, 4001, 4001)
    with pytest.raises(StateDirError, match="not a folder of yours"):
        open_state_dir(Settings.load({"state_dir": str(root)}))


@as_root
def test_a_record_of_another_user_is_refused(tmp_path: Path) -> None:
    state = open_state_dir(Settings.load())
    Store(state).close()
    os.chown(state.database, 4001, 4001)
    with pytest.raises(StateDirError, match=r"queue\.db"):
        Store(state)


def test_a_forged_row_is_never_run(queue: Queue, tmp_path: Path) -> None:
    import sqlite3

    job = queue.submit(["true"], hold=True)
    forger = sqlite3.connect(queue.state.database, isolation_level=None)
    before = forger.execute("SELECT spec FROM jobs").fetchone()[0]
    forged = json.loads(before) | {"argv": ["/bin/touch", str(tmp_path / "owned")]}
    forger.execute("UPDATE jobs SET spec = ?", (json.dumps(forged),))
    with pytest.raises(UserError, match=f"job {job.id} is damaged"):
        queue.release(job.id)
    assert not (tmp_path / "owned").exists()
    forger.execute("UPDATE jobs SET spec = ?", (before,))
    forger.close()


# R11: caps, refused at submit with one line


def test_caps(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    big = "x" * (2 * 2**20)
    cases = [
        ({"name": "n" * (1 << 20)}, "at most 256"),
        ({"argv": ["/bin/echo", "y" * 70_000]}, "at most 65536"),
        ({"env": [f"A={big}", "B=1"]}, "at most 2097152"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            queue.submit(**{"argv": ["true"], "hold": True, **fields})
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("LD_LIBRARY_PATH", big)
    with pytest.raises(UserError, match="environment"):
        queue.submit(["true"], hold=True)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    monkeypatch.setattr(store_module, "MAX_QUEUED", 3)
    for _ in range(3):
        queue.submit(["true"], hold=True)
    with pytest.raises(UserError, match="holds 3 jobs"):
        queue.submit(["true"], hold=True)
    queue.cancel(1)
    queue.submit(["true"], hold=True)
    assert not list((queue.state.root / "env").iterdir())


# R12: signals go to what is provably ours


def _next_pid_is(pid: int) -> bool:
    """Ask the kernel to give that pid next (root, proc(5) ns_last_pid)."""
    try:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    except OSError:
        return False
    return True


def test_a_stranger_with_the_same_pid_survives() -> None:
    ours = subprocess.Popen(["sleep", "60"])
    known, handle = ProcessId.of(ours.pid), psutil.Process(ours.pid)
    assert known is not None
    assert known.alive
    ours.kill()
    ours.wait()
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # a start in the same tick needs a forced pid as well
    stranger = None
    for _ in range(200):
        if not _next_pid_is(ours.pid):
            pytest.skip("pids cannot be chosen here (ns_last_pid is not writable)")
        born = subprocess.Popen(["sleep", "60"])
        if born.pid == ours.pid:
            stranger = born
            break
        born.kill()
        born.wait()
    assert stranger is not None
    try:
        assert not known.alive
        _signal([handle], signal.SIGKILL)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_ending_a_tree_spares_everybody_else() -> None:
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    root = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"], start_new_session=True)
    wait_until(lambda: psutil.Process(root.pid).children())
    end_tree(root.pid, grace_s=0.2)
    assert stranger.poll() is None
    for child in (root, stranger):
        child.kill()
        child.wait()


def test_stopping_the_agent_never_signals_whoever_has_its_pid_now(queue: Queue) -> None:
    from gpusched_ipy.agent import ask_to_leave

    stranger = subprocess.Popen(["sleep", "60"])
    assert running_agent(queue.state, queue.store) is None
    ask_to_leave(stranger.pid, queue.state)
    with pytest.raises(subprocess.TimeoutExpired):
        stranger.wait(0.2)
    stranger.kill()
    stranger.wait()


def test_r2_what_a_cell_has_shown_cannot_steer_a_terminal(fake: FakeScript) -> None:
    lines = """
from IPython.terminal.interactiveshell import TerminalInteractiveShell
shell = TerminalInteractiveShell.instance()
shell.run_line_magic("load_ext", "gpusched_ipy")
body = "print('\\\\x1b]0;owned\\\\x07 \\\\x1b[31mred\\\\x1b[0m')"
shell.run_cell("%%gpuqueue --isolate --name shown\\n" + body)
print("again:")
shell.run_line_magic("gpuq", "show shown")
"""
    done = subprocess.run([PYTHON, "-c", lines], capture_output=True, text=True, check=True)
    shown = done.stdout.partition("again:")[2]
    assert "\\x1b]0;owned\\x07 \x1b[31mred\x1b[0m\n" in shown
    assert "\x1b]" not in shown
