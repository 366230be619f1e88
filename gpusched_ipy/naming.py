"""Which jobs ``12``, ``14-16``, ``prep``, ``prep*`` or ``array:3f9a`` stand for. It only looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from gpusched_ipy.errors import JobNotFoundError, UserError
from gpusched_ipy.store import Store

_LONGEST = 1000  # characters of a reference; no name and no number is longer
ARRAY = "array:"  # in front of the id of a sweep, its beginning, or the number of a member


class Named(NamedTuple):
    """What one reference stands for."""

    ids: tuple[int, ...]
    exact: bool  # one job by its number; otherwise those are meant to which a wish applies


def resolve(store: Store, references: Iterable[object]) -> tuple[int, ...]:
    """The ids of the jobs that are named, in the order given.

    Raises:
        JobNotFoundError: a reference stands for no job.
    """
    return tuple(dict.fromkeys(number for one in named(store, references) for number in one.ids))


def named(store: Store, references: Iterable[object]) -> Iterator[Named]:
    """Each reference by itself.

    Raises:
        JobNotFoundError: it stands for no job.
    """
    for reference in references:
        for part in str(getattr(reference, "id", reference)).split(","):
            yield _named(store, part.strip())


def _named(store: Store, part: str) -> Named:
    if not part:
        raise UserError("a job is named by 12, 14-16, its name, prep* or array:12; this is empty")
    try:
        part.encode()
    except UnicodeEncodeError:
        raise JobNotFoundError(ascii(part)) from None
    if len(part) > _LONGEST:
        raise JobNotFoundError(f"{part[:_LONGEST]}…")
    if part.isdecimal():
        return Named((store.job(int(part)).id,), True)
    if part.startswith(ARRAY):
        ids = store.array_ids(_array(store, part.removeprefix(ARRAY)))
        return Named(tuple(ids), False)
    low, dash, high = part.partition("-")
    if dash and low.isdecimal() and high.isdecimal():
        ids = store.ids_between(int(low), int(high))
    else:
        ids = _by_name(store, part)
    if not ids:
        raise JobNotFoundError(part)
    return Named(tuple(ids), False)


def _by_name(store: Store, name: str) -> list[int]:
    """A pattern's jobs; a name stands for its newest job, and where that is in a sweep for all."""
    jobs = store.named(name)
    if not jobs or any(mark in name for mark in "*?"):
        return [job.id for job in jobs]
    array = jobs[-1].spec.array
    return [jobs[-1].id] if array is None else store.array_ids(array.id)


def _array(store: Store, text: str) -> str:
    found = store.arrays_like(text) if text else []
    if text.isdecimal() and text not in found:
        with suppress(JobNotFoundError):  # then it may be the beginning of an id, of digits alone
            array = store.job(int(text)).spec.array
            if array is None:
                raise UserError(f"job {text} is no member of a sweep")
            return array.id
    if len(found) > 1:
        raise UserError(f"{ARRAY}{text} stands for {len(found)} sweeps; give more of the id")
    if not found:
        raise JobNotFoundError(f"{ARRAY}{text}")
    return found[0]
