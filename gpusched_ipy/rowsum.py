"""The checksum of a job's row: what it covers. It knows columns by name, and no job."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

# Columns that stand in Job under the same name and need no conversion.
PLAIN = (
    *("priority", "member", "epoch", "attempt", "attempts", "submitted_at", "queued_mono"),
    *("started_at", "started_mono", "ended_at", "run_s", "exit_code", "signal", "error"),
    *("peak_mem_bytes", "mean_utilization", "energy_j"),
)
# Every column that crc covers, in the order in which it is computed.
COLUMNS = (
    *("uid", "kind", "name", "spec", "home", "state", "held", "cancel_requested", "gpus", "boot"),
    *PLAIN,
)
# Columns of later schemas. crc covers those that have a value, so that older rows keep theirs.
LATER = ("retried", "requeued", "oom", "oom_retried", "not_before", "hold_reason")
PLACE = "place"  # of schema 4; the same holds for it

_values = itemgetter(*COLUMNS)
_later = itemgetter(*LATER)
_encode = json.JSONEncoder(ensure_ascii=True).encode


def checksum(row: Mapping[str, Any]) -> int:
    """CRC-32 of the columns that must never change by accident."""
    values = [*_values(row)]
    columns = row.keys()  # a row of SQLite itself looks among its values
    if LATER[0] in columns and any(_later(row)):
        values += [[name, row[name]] for name in LATER if row[name]]
    if PLACE in columns and row[PLACE]:
        values.append([PLACE, row[PLACE]])
    return zlib.crc32(_encode(values).encode("ascii"))
