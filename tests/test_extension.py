"""``%load_ext``, ``%unload_ext``, ``%reload_ext``: light, and without a trace afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import wait_until
from jupyter_client.connect import write_connection_file
from kernels import PYTHON, REPOSITORY, started

from gpusched_ipy.courier import Courier

HEAVY = (
    *("matplotlib", "ipywidgets", "anywidget", "pynvml", "sqlite3", "psutil", "nbformat", "numpy"),
    *("watchdog", "rich", "cloudpickle", "gpusched_ipy.kernel", "gpusched_ipy.store"),
)
TRACES = """
import gc, json, threading, weakref
def traces(shell):
    m = shell.magics_manager
    names = {"gpuqueue", "gpurun", "gpuq", "gpus", "gpupanel", "gpuplot", "gpufree"}
    def ours(items):
        return [x for x in items if "gpusched" in repr(x) + getattr(x, "__module__", "")]
    return {
        "magics": sorted(names & (set(m.magics["line"]) | set(m.magics["cell"]))),
        "registry": "GpuQueue" in m.registry,
        "configurables": len([c for c in shell.configurables if type(c).__name__ == "GpuQueue"]),
        "transformers": len(ours(shell.input_transformers_cleanup)),
        "events": len(ours(f for fs in shell.events.callbacks.values() for f in fs)),
        "matchers": len(ours(shell.Completer.custom_matchers)),
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("gpusched")),
        "state": hasattr(shell, "_gpusched"),
    }
"""
NOTHING = {
    "magics": [],
    "registry": False,
    "configurables": 0,
    "transformers": 0,
    "events": 0,
    "matchers": 0,
    "threads": [],
    "state": False,
}
LOADED = {
    "magics": ["gpufree", "gpupanel", "gpuplot", "gpuq", "gpuqueue", "gpurun", "gpus"],
    "registry": True,
    "configurables": 1,
    "transformers": 1,
    "events": 2,
    "matchers": 1,
    "threads": [],
    "state": True,
}


def in_ipython(script: str, folder: Path, **environment: str) -> str:
    """What a script prints that is given a fresh shell as ``shell``."""
    begin = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\nshell.init_completer()\n"
    )
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", TRACES + begin + script],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "IPYTHONDIR": str(folder / "ipython"),
            "GPUSCHED_STATE_DIR": str(folder / "state"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loading_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, json\nbefore = set(sys.modules)\n"
        "shell.extension_manager.load_extension('gpusched_ipy')\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    new = set(json.loads(in_ipython(script, tmp_path)))
    assert "gpusched_ipy.magics" in new
    assert sorted(new & set(HEAVY)) == []
    assert not (tmp_path / "state").exists()


def test_load_twice_unload_and_reload_leave_no_trace(tmp_path: Path) -> None:
    script = """
manager = shell.extension_manager
seen = [traces(shell)]
manager.load_extension("gpusched_ipy"); seen.append(traces(shell))
manager.load_extension("gpusched_ipy"); seen.append(traces(shell))
import gpusched_ipy; gpusched_ipy.load_ipython_extension(shell); seen.append(traces(shell))
manager.reload_extension("gpusched_ipy"); seen.append(traces(shell))
manager.unload_extension("gpusched_ipy"); seen.append(traces(shell))
gpusched_ipy.unload_ipython_extension(shell); seen.append(traces(shell))
manager.load_extension("gpusched_ipy")
extension = weakref.ref(shell._gpusched)
manager.unload_extension("gpusched_ipy")
import time
deadline = time.monotonic() + 60
while extension() is not None and time.monotonic() < deadline:  # a thread may be leaving
    gc.collect()
    time.sleep(0.05)
assert extension() is None, "atexit or something else still holds it"
print(json.dumps(seen))
"""
    seen = json.loads(in_ipython(script, tmp_path))
    assert seen == [NOTHING, LOADED, LOADED, LOADED, LOADED, NOTHING, NOTHING]


def test_a_bad_value_in_the_configuration_never_prevents_loading(tmp_path: Path) -> None:
    script = """
shell.config.GpuQueue.panel_hz = 99
shell.config.GpuQueue.quiet_s = 7
shell.config.GpuQueue.no_such = 1
shell.extension_manager.load_extension("gpusched_ipy")
print(traces(shell)["configurables"], shell._gpusched.magics.settings().quiet_s)
"""
    out = in_ipython(script, tmp_path).splitlines()
    assert any("panel_hz" in line and "passed over" in line for line in out)
    assert out[-1] == "1 7.0"


def test_a_terminal_shell_runs_queued_cells_in_their_place(tmp_path: Path) -> None:
    script = """
shell.extension_manager.load_extension("gpusched_ipy")
r = shell.run_cell("%%gpuqueue --name t\\nimport os\\nos.environ['CUDA_VISIBLE_DEVICES']")
assert r.result == "GPU-fake-0", r
shell.run_cell("%gpuq list --all")
bad = shell.run_cell("%%gpuqueue\\n1/0")
assert isinstance(bad.error_in_exec, ZeroDivisionError)
shell.run_cell("%gpus")
shell.extension_manager.unload_extension("gpusched_ipy")
print(json.dumps(traces(shell)))
"""
    (tmp_path / "fake.json").write_text(json.dumps({"gpus": [{"utilization": 0, "processes": []}]}))
    fake = {"GPUSCHED_FAKE": str(tmp_path / "fake.json"), "GPUSCHED_SAMPLE_INTERVAL_S": "0.1"}
    out = in_ipython(script, tmp_path, **fake)
    assert "completed" in out
    assert "Fake GPU" in out
    assert json.loads(out.splitlines()[-1]) == NOTHING


def test_a_home_of_another_host_is_said_once(tmp_path: Path) -> None:
    script = """
import gpusched_ipy.statedir as statedir
mounts = [line.partition(" - ")[2].split()[0] for line in statedir._mounts()]
statedir._NETWORK = tuple(mounts)  # every disk of this machine passes for one of another host
statedir.LOCAL = statedir.Path(HERE)
import sys; sys.stderr = sys.stdout
shell.extension_manager.load_extension("gpusched_ipy")
for _ in range(2):
    shell.run_cell("%gpuq list --json")
"""
    if sys.platform != "linux":
        pytest.skip("only Linux tells what is mounted")
    home = {
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "xdg"),
        "GPUSCHED_STATE_DIR": "",
    }
    out = in_ipython(script.replace("HERE", repr(str(tmp_path / "local"))), tmp_path, **home)
    assert out.count("is on a network file system") == 1
    assert str(tmp_path / "local") in out
    assert out.count("[]") == 2
    assert not (tmp_path / "xdg").exists()


@pytest.mark.kernel
def test_reloading_loses_no_queued_cell(tmp_path: Path) -> None:
    with started(tmp_path) as kernel:
        kernel.fake.take()
        kernel.run(TRACES)
        cell = kernel.run("%%gpuqueue\nprint('ran')")
        kernel.badge(cell, "97 %")  # whoever is needed for that is at work
        threads = threads_of(kernel)
        assert "gpusched-loop" in threads
        said = kernel.run("%reload_ext gpusched_ipy")
        assert said.errors == []
        wait_until(lambda: threads_of(kernel) == threads, what="the same threads as before")
        assert kernel.run("%unload_ext gpusched_ipy").errors == []
        wait_until(lambda: threads_of(kernel) == [], what="the threads gone")
        kernel.fake.free()
        assert cell.text() == ""
        kernel.run("%load_ext gpusched_ipy")
        kernel.badge(cell, "done")
        kernel.until(lambda: cell.text() == "ran\n", "its output is missing")
        kernel.run("import time\ntime.sleep(0)")
        assert kernel.run("%unload_ext gpusched_ipy").errors == []
        wait_until(lambda: threads_of(kernel) == [], what="the threads gone")
        left = json.loads(kernel.run("print(json.dumps(traces(get_ipython())))").text())
        assert left == NOTHING


def threads_of(kernel: Any) -> list[str]:
    """Our threads in the kernel."""
    found: list[str] = json.loads(
        kernel.run("print(json.dumps(traces(get_ipython())['threads']))").text()
    )
    return found


def test_the_package_itself_imports_nothing_heavy() -> None:
    script = (
        "import sys, gpusched_ipy\n"
        f"print([m for m in {(*HEAVY, 'IPython', 'traitlets')!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


class Nobody:
    """Listens to a courier that hears nothing."""

    def heard(self, mark: str, kind: str, content: object) -> None: ...
    def replied(self, uid: str, content: object) -> None: ...
    def pulse(self) -> float | None:
        return None


def test_a_courier_that_has_ended_writes_into_nobodys_file(tmp_path: Path) -> None:
    name, _ = write_connection_file(str(tmp_path / "kernel.json"), key=b"key")
    courier = Courier(name, Nobody())
    descriptor = courier._wake_w
    courier.stop()
    with ExitStack() as stack:
        paths = [tmp_path / str(number) for number in range(64)]
        files = [stack.enter_context(path.open("wb")) for path in paths]
        assert descriptor in [file.fileno() for file in files], "its number is used again"
        courier.look()
        courier.stop()
    assert not any(path.stat().st_size for path in paths)
