"""What could not be recorded when it happened (a disk that stays full): it is recorded later.

It keeps the writes in this process and decides nothing; the locks of a job are given back at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from gpusched_ipy.errors import DamagedJobError, GpuSchedError, StoreError
from gpusched_ipy.job import Job

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Arrears:
    """The ends and returns of jobs that the record does not know yet. One thread at a time."""

    def __init__(self) -> None:
        self._owed: dict[tuple[int, int], Callable[[], object]] = {}

    def record(self, job: Job, write: Callable[[], T]) -> T:
        """Make that write of this attempt of ``job``, or keep it for :meth:`settle`.

        Args:
            job: as it was claimed.
            write: must change nothing where that claim has fallen meanwhile.

        Raises:
            StoreError: it cannot be made now.
        """
        try:
            return write()
        except DamagedJobError:
            raise  # and it never can be
        except StoreError:
            self._owed[job.id, job.epoch] = write
            raise

    def settle(self) -> None:
        """Make the writes that are owed, as far as they can be made by now."""
        for key, write in list(self._owed.items()):
            try:
                write()
            except DamagedJobError as exc:
                _log.error("%s", exc)
            except StoreError:
                return  # still: the next round tries again
            except GpuSchedError as exc:
                _log.error("how job %d ended cannot be recorded: %s", key[0], exc)
            del self._owed[key]
