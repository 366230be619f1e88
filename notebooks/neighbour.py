"""Another notebook, as the queue sees it: a kernel of its own, with cells that are run there."""

from __future__ import annotations

import os
import sys
from typing import Any

from jupyter_client.manager import start_new_kernel

TIMEOUT_S = 60


class Neighbour:
    """A second notebook of the same user.

    Args:
        name: of the notebook, as a notebook server tells it to its kernels.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._manager, self._client = start_new_kernel(
            startup_timeout=TIMEOUT_S,
            env=os.environ | {"JPY_SESSION_NAME": name},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        self.pid = int(self._value("__import__('os').getpid()"))

    def __repr__(self) -> str:
        return f"{self.name}, a notebook with a kernel of its own"

    def run(self, code: str) -> None:
        """Run a cell there, and show here what it shows until it gives the prompt back.

        Raises:
            RuntimeError: the cell has failed.
        """
        reply = self._client.execute_interactive(
            code, allow_stdin=True, output_hook=self._show, timeout=TIMEOUT_S
        )
        content = reply["content"]
        if content["status"] != "ok":
            raise RuntimeError(f"in {self.name}: {content.get('ename')}: {content.get('evalue')}")

    def close(self) -> None:
        """Shut its kernel down, as closing a notebook for good does."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()

    def _value(self, expression: str) -> str:
        reply = self._client.execute_interactive(
            "", user_expressions={"it": expression}, timeout=TIMEOUT_S
        )
        return str(reply["content"]["user_expressions"]["it"]["data"]["text/plain"])

    def _show(self, message: dict[str, Any]) -> None:
        content = message["content"]
        text = content.get("text") or content.get("data", {}).get("text/plain")
        for line in (text or "").splitlines():
            print(f"[{self.name}] {line}")
        sys.stdout.flush()
