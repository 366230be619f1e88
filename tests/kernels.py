"""A real kernel for tests: started through jupyter_client, with a queue and fake GPUs of its own.

``GPUSCHED_KERNEL_PYTHON`` names the Python that runs the kernel, so that the same tests run against
other versions of ipykernel and IPython.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import mkdtemp
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

PYTHON = os.environ.get("GPUSCHED_KERNEL_PYTHON", sys.executable)
REPOSITORY = Path(__file__).parent.parent
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@cache
def fonts() -> Path:
    """Matplotlib's list of fonts, which a new home lacks: to make it is said where it takes 5 s."""
    folder = Path(mkdtemp(prefix="gpusched-fonts-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    environment = {**os.environ, "MPLCONFIGDIR": str(folder)}
    code = "import matplotlib.font_manager"
    subprocess.run([PYTHON, "-c", code], env=environment, check=True, capture_output=True)
    return folder


class FakeGpus:
    """The script of the fake GPUs, rewritten whenever something changes."""

    def __init__(self, path: Path, count: int = 1) -> None:
        self.path = path
        self.gpus: list[dict[str, Any]] = [
            {
                "uuid": f"GPU-fake-{index}",
                "name": "Fake A100",
                "memory_total": "40GiB",
                "memory_used": 0,
                "utilization": 0.0,
                "processes": [],
            }
            for index in range(count)
        ]
        self.write()

    def write(self) -> None:
        """Put the script where the backend reads it, at once."""
        spare = self.path.with_suffix(".new")
        spare.write_text(json.dumps({"gpus": self.gpus, "problem": None}))
        spare.replace(self.path)

    def take(self, index: int = 0, pid: int = 4242) -> None:
        """A stranger uses that GPU."""
        self.gpus[index] |= {
            "utilization": 0.97,
            "memory_used": "30GiB",
            "processes": [{"pid": pid, "user": "user1", "name": "python", "memory": "30GiB"}],
        }
        self.write()

    def free(self, index: int = 0) -> None:
        """Nobody uses that GPU."""
        self.gpus[index] |= {"utilization": 0.0, "memory_used": 0, "processes": []}
        self.write()


@dataclass
class Cell:
    """What has come back for one request, until now."""

    msg_id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The contents of its messages of these kinds."""
        return [
            message["content"]
            for message in self.messages
            if message["header"]["msg_type"] in kinds
        ]

    def text(self, name: str = "stdout") -> str:
        """What it has written to a stream."""
        return "".join(item["text"] for item in self.of("stream") if item["name"] == name)

    @property
    def results(self) -> list[str]:
        """The text of its results."""
        return [item["data"]["text/plain"] for item in self.of("execute_result")]

    @property
    def errors(self) -> list[str]:
        """Its errors, ``name: value``."""
        return [f"{item['ename']}: {item['evalue']}" for item in self.of("error")]

    @property
    def traceback(self) -> str:
        """Its tracebacks without colours."""
        return _COLOUR.sub(
            "", "\n".join(line for item in self.of("error") for line in item["traceback"])
        )

    @property
    def badges(self) -> list[str]:
        """The texts of its badge, in the order in which they were shown."""
        return [item["data"]["text/plain"] for item in self._badges()]

    @property
    def badge_dates(self) -> list[datetime]:
        """When the kernel has shown each of them."""
        return [message["header"]["date"] for message in self._of_badge()]

    def _badges(self) -> list[dict[str, Any]]:
        return [message["content"] for message in self._of_badge()]

    def _of_badge(self) -> list[dict[str, Any]]:
        return [
            message
            for message in self.messages
            if message["header"]["msg_type"] in ("display_data", "update_display_data")
            and str(message["content"].get("transient", {}).get("display_id", "")).startswith(
                "gpusched-"
            )
        ]

    @property
    def displays(self) -> list[dict[str, Any]]:
        """What it has displayed besides its badge."""
        badges = self._badges()
        return [item for item in self.of("display_data") if item not in badges]

    @property
    def status(self) -> str | None:
        """How the last reply to it ended."""
        return self.replies[-1]["content"]["status"] if self.replies else None

    @property
    def job(self) -> int:
        """The number of the job that its badge names."""
        found = re.search(r"#(\d+)", self.badges[0])
        assert found is not None
        return int(found[1])


class Kernel:
    """A kernel and a front end that sorts what comes by the cell it belongs to."""

    def __init__(self, folder: Path, *, gpus: int = 1, **environment: str) -> None:
        self.folder = folder
        self.fake = FakeGpus(folder / "fake.json", gpus)
        self.environment = {
            **os.environ,
            "GPUSCHED_STATE_DIR": str(folder / "state"),
            "GPUSCHED_BACKEND": "fake",
            "GPUSCHED_FAKE": str(self.fake.path),
            "GPUSCHED_SAMPLE_INTERVAL_S": "0.1",
            "GPUSCHED_QUIET_S": "0",
            "GPUSCHED_QUIET_SAMPLES": "1",
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / ".cache"),
            "JUPYTER_PATH": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
        }
        copytree(fonts(), folder / ".cache" / "matplotlib", dirs_exist_ok=True)
        spec = folder / "kernels" / "tested"
        spec.mkdir(parents=True)
        argv = [PYTHON, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "tested", "language": "python"})
        )
        specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
        self.manager = KernelManager(kernel_name="tested", kernel_spec_manager=specs)
        self.cells: dict[str, Cell] = {}
        self.client: Any = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.launch()
        self.connect()

    def launch(self) -> None:
        """Start it, and wait for nothing."""
        with (self.folder / "err").open("wb") as log:
            self.manager.start_kernel(env=self.environment, cwd=str(self.folder), stderr=log)

    def connect(self) -> None:
        """Wait until it answers."""
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def stop(self) -> None:
        """Shut it down as a notebook server does."""
        if self.client is not None:
            self.client.stop_channels()
        self.manager.shutdown_kernel(now=False)

    def restart(self) -> None:
        """Restart it as the button of a notebook does."""
        with (self.folder / "err").open("ab") as log:
            self.manager.restart_kernel(stderr=log)
        self.client.wait_for_ready(timeout=120)

    def kill(self) -> None:
        """End it as an out-of-memory killer does."""
        self.client.stop_channels()
        self.client = None
        self.manager.shutdown_kernel(now=True)

    def send(
        self, code: str, *, attended: bool = True, cell_id: str | None = None, stop: bool = True
    ) -> Cell:
        """Run a cell without waiting for it."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": attended,
            "stop_on_error": stop,
        }
        metadata = {} if cell_id is None else {"cellId": cell_id}
        message = self.client.session.msg("execute_request", content, metadata=metadata)
        cell = Cell(message["header"]["msg_id"])
        self.cells[cell.msg_id] = cell
        self.client.shell_channel.send(message)
        return cell

    def run(self, code: str, **options: Any) -> Cell:
        """Run a cell and wait for its reply and everything it has shown."""
        cell = self.send(code, **options)
        self.until(lambda: cell.replies and self._idle(cell), f"no reply to {code!r}")
        return cell

    def interrupt(self) -> None:
        """As the stop button does."""
        self.manager.interrupt_kernel()

    def until(self, holds: Callable[[], Any], why: str, timeout_s: float = 120.0) -> None:
        """Receive until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"{why}; {self._seen()}"
            self.receive(0.05)

    def badge(self, cell: Cell, word: str, timeout_s: float = 120.0) -> str:
        """Wait until the badge of a cell says ``word``, and give it back."""
        self.until(
            lambda: cell.badges and word in cell.badges[-1],
            f"the badge never said {word!r}: {cell.badges}",
            timeout_s,
        )
        return cell.badges[-1]

    def receive(self, wait_s: float = 0.0) -> None:
        """Sort what has come."""
        with contextlib.suppress(queue.Empty):
            while True:
                message = self.client.get_iopub_msg(timeout=wait_s)
                self._of(message).messages.append(message)
                wait_s = 0
        with contextlib.suppress(queue.Empty):
            while True:
                reply = self.client.get_shell_msg(timeout=0)
                self._of(reply).replies.append(reply)

    def _of(self, message: dict[str, Any]) -> Cell:
        msg_id = message["parent_header"].get("msg_id", "")
        return self.cells.setdefault(msg_id, Cell(msg_id))

    def _idle(self, cell: Cell) -> bool:
        return any(item["execution_state"] == "idle" for item in cell.of("status"))

    def _seen(self) -> str:
        log = (self.folder / "err").read_text(errors="replace")[-3000:]
        shown = [
            (cell.badges[-1:], cell.text(), cell.text("stderr"), cell.errors)
            for cell in self.cells.values()
        ]
        return f"cells: {shown}; kernel: {log}"


class Page:
    """What the widgets of a kernel hold: state by state, as a page would have it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def states(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        cells = self._kernel.cells.values()
        sent = [message for cell in cells for message in cell.messages]
        for message in sorted(sent, key=lambda message: message["header"]["date"]):
            content = message["content"]
            if message["header"]["msg_type"] in ("comm_open", "comm_msg"):
                state = content["data"].get("state", {})
                found.setdefault(content["comm_id"], {}).update(state)
        return found

    def cells(self) -> list[dict[str, str]]:
        """Which output area belongs under which cell, with its badge."""
        held = [state["cells"] for state in self.states().values() if "cells" in state]
        return held[-1] if held else []

    def outputs(self, number: int = 0) -> list[dict[str, Any]]:
        cells = self.cells()
        return list(self.states()[cells[number]["area"]]["outputs"]) if cells else []

    def text(self, number: int = 0) -> str:
        return "".join(str(one.get("text", "")) for one in self.outputs(number))


@contextlib.contextmanager
def started(
    folder: Path, *, load: bool = True, gpus: int = 1, **environment: str
) -> Iterator[Kernel]:
    """A kernel with the extension loaded, shut down at the end."""
    kernel = Kernel(folder, gpus=gpus, **environment)
    kernel.start()
    try:
        if load:
            assert kernel.run("%load_ext gpusched_ipy").errors == []
        yield kernel
    finally:
        kernel.stop()
