"""What loading costs: heavy libraries are imported when they are first used, and not before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    *("matplotlib", "numpy", "ipywidgets", "anywidget", "IPython", "ipykernel", "traitlets"),
    *("jupyter_client", "zmq", "nbformat", "sqlite3", "pynvml", "psutil", "watchdog"),
    *("platformdirs", "rich", "cloudpickle", "torch", "multiprocessing", "asyncio"),
)


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after ``code``, beyond its own."""
    script = (
        "import json, sys\nbefore = set(sys.modules)\n"
        f"{code}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & set(HEAVY)


def test_importing_the_package_loads_nothing_but_itself() -> None:
    loaded = loaded_by("import gpusched_ipy")
    assert "gpusched_ipy" in loaded
    assert heavy(loaded) == set()
    assert {name for name in loaded if name.startswith("gpusched_ipy.")} <= {
        "gpusched_ipy._version"
    }


def test_the_check_would_see_a_heavy_import() -> None:
    assert heavy(loaded_by("import gpusched_ipy, sqlite3")) == {"sqlite3"}


def test_loading_the_extension_adds_nothing_heavy_to_ipython() -> None:
    # What IPython brings along is its own; sqlite3 is its history's.
    shell = "from IPython.core.interactiveshell import InteractiveShell\n"
    shell += "shell = InteractiveShell.instance()\n"
    own = loaded_by(shell)
    with_extension = loaded_by(f"{shell}shell.run_line_magic('load_ext', 'gpusched_ipy')")
    assert heavy(with_extension) - heavy(own) == set()
    assert "gpusched_ipy.magics" in with_extension
    for name in ("gpusched_ipy.store", "gpusched_ipy.monitor", "gpusched_ipy.panel"):
        assert name not in with_extension


def test_the_command_line_loads_no_jupyter() -> None:
    loaded = loaded_by("import gpusched_ipy.cli, gpusched_ipy.verbs, gpusched_ipy.doctor")
    jupyter = {"IPython", "ipykernel", "jupyter_client", "traitlets", "zmq", "ipywidgets"}
    assert heavy(loaded) & (jupyter | {"matplotlib", "anywidget", "torch"}) == set()


def test_help_and_version_open_nothing() -> None:
    loaded = loaded_by("import gpusched_ipy.cli as cli; cli.main(['--version'])")
    assert heavy(loaded) == set()


@pytest.mark.parametrize("name", ["Queue", "UserError", "__version__"])
def test_public_names_are_loaded_when_they_are_used(name: str) -> None:
    assert loaded_by(f"from gpusched_ipy import {name}; assert {name}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import gpusched_ipy

    with pytest.raises(AttributeError, match="nonsense"):
        gpusched_ipy.nonsense  # noqa: B018 - the access is the test
    assert "Queue" in dir(gpusched_ipy)


def test_a_shim_begins_a_job_without_knowing_what_one_is() -> None:
    """It starts cold beside each command that finds none waiting: every import is waited for."""
    loaded = loaded_by("import gpusched_ipy.shim")
    assert "gpusched_ipy.takeover" in loaded
    assert not loaded & {"dataclasses", "inspect", "psutil", "logging", "ctypes"}
    assert not loaded & {f"gpusched_ipy.{name}" for name in ("job", "store", "supervision")}
