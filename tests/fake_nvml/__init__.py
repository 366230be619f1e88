"""A libnvidia-ml.so.1 without a GPU, for tests and benchmarks: built with cc, steered by a file.

In this process ``FakeNvml.load`` puts it under nvidia-ml-py; for a child, ``FakeNvml.env`` does.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from requires import require

SOURCE = Path(__file__).with_name("fake_nvml.c")
Value = int | str | Iterable[str]


def need_cc() -> str:
    """The C compiler; without one the test is skipped, or fails where it is required."""
    found = shutil.which("cc")
    require("cc", found, "there is no C compiler (cc) for the fake libnvidia-ml.so.1")
    assert found is not None
    return found


@cache
def build(variant: str = "") -> Path:
    """The folder of the built library.

    Args:
        variant: "" (a current driver), "DRIVER_470" or "DRIVER_535_54".
    """
    compiler = need_cc()
    folder = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    library = folder / "libnvidia-ml.so.1"
    argv = [compiler, *options, f"-Wl,-soname,{library.name}", "-o", str(library), str(SOURCE)]
    subprocess.run([*argv, f"-D{variant or 'DRIVER_CURRENT'}"], check=True, timeout=60)
    return folder


class FakeNvml:
    """One scripted machine.

    Args:
        folder: where its state file lies.
        variant: which generation of driver it plays, see :func:`build`.
    """

    def __init__(self, folder: Path, variant: str = "") -> None:
        self.state_file = folder / "fake_nvml.state"
        self.library = build(variant) / "libnvidia-ml.so.1"
        self.state: dict[str, Any] = {}
        self.env = {
            "FAKE_NVML_STATE": str(self.state_file),
            "LD_LIBRARY_PATH": str(self.library.parent),
        }
        self.set({"gpu.0.uuid": "GPU-fake-0"})

    def set(self, state: Mapping[str, Value]) -> None:
        """Replace the machine; a value that is a list becomes one line for each item."""
        self.state = dict(state)
        lines: list[str] = []
        for key, value in self.state.items():
            items = [value] if isinstance(value, (int, str)) else list(value)
            lines += [f"{key}={item}\n" for item in items]
        fresh = self.state_file.with_suffix(".new")
        fresh.write_text("".join(lines), encoding="utf-8")
        os.replace(fresh, self.state_file)

    def change(self, **changes: Value | None) -> None:
        """Change single keys, ``__`` for the dot (``gpu__0__util=97``); None takes one away."""
        named = {key.replace("__", "."): value for key, value in changes.items()}
        state = {**self.state, **named}
        self.set({key: value for key, value in state.items() if value is not None})

    def load(self, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
        """Put this library under nvidia-ml-py of this process for the length of a test."""
        import pynvml

        library = ctypes.CDLL(str(self.library))
        monkeypatch.setenv("FAKE_NVML_STATE", str(self.state_file))
        monkeypatch.setattr(pynvml, "nvmlLib", library)
        monkeypatch.setattr(pynvml, "_nvmlLib_refcount", 0)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        while library.fake_nvml_refcount() > 0:
            library.nvmlShutdown()
        self.calls(reset=True)
        return library

    def calls(self, function: str = "", *, reset: bool = False) -> int:
        """How often ``function`` (empty: any) was called in this process since the last reset."""
        library = ctypes.CDLL(str(self.library))
        library.fake_nvml_calls.restype = ctypes.c_ulonglong
        count = int(library.fake_nvml_calls(function.encode()))
        if reset:
            library.fake_nvml_calls(b"reset")
        return count

    def refcount(self) -> int:
        """How many initialisations stand."""
        return int(ctypes.CDLL(str(self.library)).fake_nvml_refcount())
