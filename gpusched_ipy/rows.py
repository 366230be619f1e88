"""How a job stands in a row of the record, and back. It speaks no SQL beyond column names."""

from __future__ import annotations

import json
from collections.abc import KeysView, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

from gpusched_ipy.errors import DamagedJobError, UserError
from gpusched_ipy.job import (
    MAX_ENVIRONMENT_BYTES,
    MAX_SPEC_BYTES,
    ArrayPlace,
    Job,
    JobKind,
    JobSpec,
    JobState,
    Place,
    Request,
    WaitCode,
    WaitReason,
)
from gpusched_ipy.rowsum import LATER, PLAIN, checksum

_NAMES: dict[type, KeysView[str]] = {
    kind: dict.fromkeys(item.name for item in fields(kind)).keys()
    for kind in (JobSpec, Request, ArrayPlace, Place)
}
_plain = itemgetter(*PLAIN)


def to_row(job: Job, boot: str) -> dict[str, Any]:
    """The columns of ``job``, crc included; its monotonic times belong to ``boot``."""
    row: dict[str, Any] = {name: getattr(job, name) for name in PLAIN}
    row |= {
        "uid": job.spec.uid,
        "kind": str(job.kind),
        "name": job.name,
        "spec": spec_text(job.spec),
        "home": job.spec.home,
        "state": str(job.state),
        "held": int(job.held),
        "cancel_requested": int(job.cancel_requested),
        "gpus": json.dumps(job.gpus),
        "boot": boot,
        "retried": job.retried,
        "requeued": job.requeued,
        "oom": int(job.oom),
        "oom_retried": int(job.oom_retried),
        "not_before": job.not_before_mono,
        "hold_reason": job.hold_reason,
        "place": None if job.place is None else json.dumps(asdict(job.place)),
        "array_id": job.spec.array.id if job.spec.array else None,
        "job_key": key_of(job.spec),
    }
    return row | {"crc": checksum(row)}


def to_job(row: Mapping[str, Any], *, newer: bool = False) -> Job:
    """The job of a row.

    Args:
        newer: a newer version has written it, whose checksum may cover more than we know.

    Raises:
        DamagedJobError: the row is not as it was written.
    """
    if not newer and checksum(row) != row["crc"]:
        raise DamagedJobError(row["id"])
    found = dict(zip(PLAIN, _plain(row), strict=True))
    found["id"] = row["id"]
    found["spec"] = parse_spec(row["spec"])
    found["state"] = JobState(row["state"])
    found["held"] = bool(row["held"])
    found["cancel_requested"] = bool(row["cancel_requested"])
    if row["gpus"] != "[]":
        found["gpus"] = tuple(json.loads(row["gpus"]))
    if row["reason"] is not None:
        found["reason"] = WaitReason(code=WaitCode(row["reason_code"]), text=row["reason"])
    found["reason_since"] = row["reason_since"]
    if LATER[0] in row.keys():  # noqa: SIM118 - a row of SQLite looks among its values
        found["retried"] = row["retried"]
        found["requeued"] = row["requeued"]
        found["oom"] = bool(row["oom"])
        found["oom_retried"] = bool(row["oom_retried"])
        found["not_before_mono"] = row["not_before"]
        found["hold_reason"] = row["hold_reason"]
    if "place" in row.keys() and row["place"] is not None:  # noqa: SIM118
        found["place"] = parse_place(row["place"])
    return Job(**found)


def key_of(spec: JobSpec) -> str | None:
    """What no two jobs may share while they stand: the key, of a sweep's member with its values."""
    if spec.key is None or spec.array is None:
        return spec.key
    return json.dumps([spec.key, sorted(spec.sweep.items())], ensure_ascii=True)


def parse_place(text: str | None) -> Place | None:
    """The place that :func:`to_row` wrote."""
    return None if text is None else Place(**_known(Place, json.loads(text)))


def in_this_boot(job: Job, row_boot: str, boot: str, *, wall: float, mono: float) -> Job:
    """``job`` with its monotonic times on this boot's clock; an older boot's are estimated."""
    if row_boot == boot:
        return job
    # Another boot: only the wall clock spans both. Such a job has waited at least since this boot.
    waited = max(0.0, wall - job.submitted_at)
    return replace(job, queued_mono=mono - waited, started_mono=None, not_before_mono=None)


def spec_text(spec: JobSpec) -> str:
    """The JSON of a spec.

    Raises:
        UserError: it is larger than the record takes.
    """
    record = _record(spec)
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":"))
    variables = len(json.dumps(record["env"], ensure_ascii=True))
    if variables > MAX_ENVIRONMENT_BYTES:
        raise UserError(
            f"the environment of job {spec.name!r} has {variables} bytes; at most "
            f"{MAX_ENVIRONMENT_BYTES} are taken: unset large variables first"
        )
    size = len(text) - variables
    if size > MAX_SPEC_BYTES:
        raise UserError(
            f"job {spec.name!r} has {size} bytes of code and arguments; at most {MAX_SPEC_BYTES} "
            "are taken: put them into a file or a function"
        )
    return text


def parse_spec(text: str) -> JobSpec:
    """The spec that :func:`spec_text` wrote; keys of a newer version are passed over."""
    record = _known(JobSpec, json.loads(text))
    argv, array = record["argv"], record["array"]
    record["kind"] = JobKind(record["kind"])
    record["request"] = _request(record["request"])
    record["env_names"] = tuple(record.get("env_names", ()))
    if argv is not None:
        record["argv"] = tuple(argv)
    if array is not None:
        record["array"] = ArrayPlace(**_known(ArrayPlace, array))
    return JobSpec(**record)


def _record(spec: JobSpec) -> dict[str, Any]:
    """The spec as JSON has it; ``dataclasses.asdict`` takes ten times as long."""
    record = {name: getattr(spec, name) for name in _NAMES[JobSpec]}
    for name in ("env", "labels", "sweep"):
        record[name] = dict(record[name])
    for name in ("request", "array"):
        part = record[name]
        if part is not None:
            record[name] = {key: getattr(part, key) for key in _NAMES[type(part)]}
    return record


def _request(record: dict[str, Any]) -> Request:
    """The request of a spec. Of a long queue most ask the same, so they share one."""
    found = _known(Request, record)
    found["after"] = tuple(found["after"])
    found["after_any"] = tuple(found["after_any"])
    return _shared_request(*found.items())


@lru_cache(maxsize=1024)
def _shared_request(*items: tuple[str, Any]) -> Request:
    return Request(**dict(items))


def _known(kind: type, record: dict[str, Any]) -> dict[str, Any]:
    """Of a record what this version knows; the record itself where that is all of it."""
    names = _NAMES[kind]
    if record.keys() <= names:
        return record
    return {key: value for key, value in record.items() if key in names}
