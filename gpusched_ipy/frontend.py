"""What the IPython around us offers: a kernel or a terminal, who asked for the running cell, a way
to show something under a given cell. It knows nothing of jobs and imports no IPython by itself.

Everything here that differs between versions of ipykernel stands here and nowhere else.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A message of the wire protocol: header, parent_header, metadata, content.
Message = Mapping[str, Any]
MARK = "gpusched_ipy"  # our key in the metadata of the requests that we send to our own kernel


class FrontEnd:
    """One interactive shell and, where there is one, its kernel.

    Args:
        shell: the shell that ``%load_ext`` was called in.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.kernel: Any = getattr(shell, "kernel", None)
        self._session: Any = None
        self._mutex = threading.Lock()

    # -- what it is

    @property
    def connection_file(self) -> str | None:
        """The file that tells a client how to reach this kernel; None where nobody can."""
        if self.kernel is None:
            return None
        app = getattr(sys.modules.get("ipykernel.kernelapp"), "IPKernelApp", None)
        if app is None or not app.initialized():
            return None
        path = str(app.instance().abs_connection_file)
        return path if Path(path).is_file() else None

    @property
    def parent(self) -> Message:
        """The request that is being executed; empty outside of a kernel."""
        if self.kernel is None:
            return {}
        found: Message = self.kernel.get_parent("shell") or {}
        return found

    @property
    def attended(self) -> bool:
        """Whether somebody sits before it: headless runs send cells that may not ask for input."""
        return bool(self.parent.get("content", {}).get("allow_stdin"))

    @property
    def can_defer(self) -> bool:
        """Whether a cell can run later under the cell that queued it."""
        return self.attended and self.connection_file is not None

    @property
    def cell_id(self) -> str | None:
        """The notebook's own name for the running cell, where the front end tells it."""
        found = self.parent.get("metadata", {}).get("cellId")
        return None if found is None else str(found)

    @property
    def owner(self) -> str:
        """Where cells come from, for people."""
        if self.kernel is None:
            return f"terminal IPython (pid {os.getpid()})"
        path = os.environ.get("JPY_SESSION_NAME") or self.shell.user_ns.get("__vsc_ipynb_file__")
        return f"notebook {Path(str(path)).name}" if path else f"kernel (pid {os.getpid()})"

    @property
    def notebook(self) -> str | None:
        """One word for the notebook's file, for each of its kernels the same; None: not told."""
        path = os.environ.get("JPY_SESSION_NAME") or self.shell.user_ns.get("__vsc_ipynb_file__")
        if self.kernel is None or not path:
            return None
        from hashlib import sha256

        whole = os.path.join(self.shell.starting_dir, str(path))
        return sha256(os.fsencode(whole)).hexdigest()[:24]

    # -- the main thread

    def on_main(self, call: Callable[[], None], delay_s: float = 0.0) -> None:
        """Have the kernel's loop call that on the main thread; from any thread."""
        loop = self.kernel.io_loop
        if delay_s:
            loop.add_callback(loop.call_later, delay_s, call)
        else:
            loop.add_callback(call)

    # -- output

    def publish(
        self, kind: str, content: Mapping[str, Any], parent: Message, metadata: Any = None
    ) -> None:
        """Send an output message that belongs to the request ``parent``; from any thread."""
        with self._mutex:
            if self._session is None:
                from uuid import uuid4

                # Not the kernel's own session: two threads that share one send the same message id.
                self._session = self.kernel.session.clone()
                self._session.session = uuid4().hex
            self._session.send(
                self.kernel.iopub_socket,
                kind,
                content=dict(content),
                parent=dict(parent),
                metadata=metadata,
                ident=self.kernel._topic(kind),
            )

    def display(
        self, data: Mapping[str, str], display_id: str, parent: Message, *, update: bool = False
    ) -> None:
        """Show, or change, an output under the cell of ``parent``; from any thread."""
        content = {"data": dict(data), "metadata": {}, "transient": {"display_id": display_id}}
        kind = "update_display_data" if update else "display_data"
        self.publish(kind, content, parent)

    def show_here(self, data: Mapping[str, Any]) -> None:
        """Show an output under the running cell; in a terminal its text."""
        if self.kernel is None:
            print(data["text/plain"])
        else:
            self.publish(
                "display_data", {"data": dict(data), "metadata": {}, "transient": {}}, self.parent
            )

    def tell(self, text: str) -> None:
        """One line for the user, below what the running cell has shown so far."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def speaking_as(self, parent: Message) -> Iterator[None]:
        """Let everything that the main thread shows go to the cell of another request."""
        kernel = self.kernel
        before = kernel.get_parent("shell")
        ident = _shell_ident(kernel)
        _flush()
        kernel.set_parent(ident, dict(parent), channel="shell")
        try:
            yield
        finally:
            _flush()
            kernel.set_parent(ident, before, channel="shell")


def _shell_ident(kernel: Any) -> Any:
    """Who sent the running request; a ContextVar since ipykernel 7, a mapping before."""
    stored = kernel._shell_parent_ident if hasattr(kernel, "_shell_parent_ident") else None
    if stored is not None:
        return stored.get() if hasattr(stored, "get") else stored
    return kernel._parent_ident["shell"]


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
