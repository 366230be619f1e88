"""A cell that waits for jobs lends the main thread to the queued cells of its own kernel.

Otherwise it would wait for ever: they can run on that thread only. Each runs as a cell inside the
one that waits, and shows its output where it was queued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpusched_ipy import cellsyntax
from gpusched_ipy.errors import UserError
from gpusched_ipy.frontend import MARK, FrontEnd
from gpusched_ipy.runners.cell import Cell, CellRunner


class Lending:
    """Runs cells of this kernel inside another one.

    Args:
        record: keeps what a cell shows from now on.
    """

    def __init__(self, front: FrontEnd, runner: CellRunner, record: Callable[[Cell], None]) -> None:
        self._front = front
        self._runner = runner
        self._record = record
        self._awaits: Cell | None = None
        self._number = 0  # of the cell that waits
        self.active = False  # main waits for jobs, so it is not busy

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for jobs, and calls :meth:`lend` again and again."""
        self._number = self._front.shell.execution_count
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def lend(self) -> None:
        """Run the cell whose turn it is now, if there is one.

        Raises:
            UserError: it can only run once the waiting cell has ended.
        """
        self._awaits = None
        cell = self._runner.lend_main()
        if self._awaits is not None:
            raise UserError(
                f"job {self._awaits.job_id} awaits at its top level, so it cannot run inside a "
                "wait; it runs now that this cell has ended"
            )
        if cell is None:
            return
        self._record(cell)
        shell = self._front.shell
        if shell.execution_count == self._number:
            shell.execution_count += 1  # the history takes each number once
        marked = {
            **cell.parent,
            "header": {**cell.parent["header"], MARK: cell.uid},
            "metadata": {**cell.parent.get("metadata", {}), MARK: cell.mark},
        }
        with self._front.speaking_as(marked):
            shell.run_cell(cell.code, store_history=True)

    def can_run(self, cell: Cell) -> bool:
        """Whether the body can run inside another cell: one that awaits at its top level cannot."""
        lines = cell.code.splitlines(keepends=True)
        place, _ = cellsyntax.split(lines) or (-1, "")
        body = "".join(lines[place + 1 :])
        shell = self._front.shell
        if shell.should_run_async(body, transformed_cell=shell.transform_cell(body)):
            self._awaits = cell
            return False
        return True
