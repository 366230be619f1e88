"""Run a notebook as a person would, cell by cell, and print what happened.

On a machine without a GPU the notebooks practise on a scripted one, and say so. The queue is a
private one in a temporary folder: the user's own is left alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CELL_TIMEOUT_S = 300


def main() -> int:
    """Run the notebook that is named; the status is 1 when one of its cells fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebook")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpusched-demo-") as folder:
        os.environ["GPUSCHED_STATE_DIR"] = folder
        # The kernel of this environment, whatever the user has installed elsewhere.
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
        # As a notebook server tells its kernels.
        os.environ["JPY_SESSION_NAME"] = asked.notebook.name
        try:
            return run(asked.notebook, save=asked.save)
        finally:
            agent = [sys.executable, "-m", "gpusched_ipy", "agent", "stop"]
            subprocess.run(agent, stdout=subprocess.DEVNULL, check=False)


def run(path: Path, *, save: bool) -> int:
    """Execute, print each cell as it is done, and save when all went well."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        startup_timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_executed=lambda cell, cell_index, execute_reply: show(cell),
        on_cell_start=lambda cell, cell_index: show_prose(cell),
        record_timing=False,
        # The kernel's own start-up notes are no part of what the notebook shows.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    print(f"== {path}", flush=True)
    try:
        client.execute()
    except CellExecutionError as exc:
        print(f"\n== {path} failed\n{exc}", file=sys.stderr)
        return 1
    if save:
        nbformat.write(notebook, path)
    print(f"\n== {path}: all cells ran{', outputs saved' if save else ''}")
    return 0


def show_prose(cell: Any) -> None:
    """The text between the cells."""
    if cell.cell_type == "markdown":
        print(f"\n{cell.source}", flush=True)


def show(cell: Any) -> None:
    """A cell that has run, and what it has shown."""
    if cell.cell_type != "code":
        return
    print()
    for line in cell.source.splitlines():
        print(f"    >>> {line}")
    for text in outputs(cell):
        for line in text.rstrip("\n").splitlines():
            print(f"    {line}")
    sys.stdout.flush()


def outputs(cell: Any) -> Iterator[str]:
    """The outputs of a cell as plain text."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        elif output.output_type in ("display_data", "execute_result"):
            yield output.data.get("text/plain", "")
        elif output.output_type == "error":
            yield f"{output.ename}: {output.evalue}"


if __name__ == "__main__":
    sys.exit(main())
