"""What is asked for becomes specs: one for a job, one for each member of a sweep.

It checks and composes; the store records. Nothing is queued here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from gpusched_ipy import environment, secrecy, sweep
from gpusched_ipy.config import LOCAL
from gpusched_ipy.errors import UserError
from gpusched_ipy.job import BOUND_KINDS, ArrayPlace, Job, JobKind, JobSpec, Request
from gpusched_ipy.options import python_fields
from gpusched_ipy.optionvalues import own_name
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.text import clean

_ARRAY_ID = 12  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a job runs, apart from the options of its submit."""

    argv: Sequence[str] | None = None  # with ``shell`` one line for /bin/sh
    kind: JobKind = JobKind.COMMAND
    code: str | None = None  # the body of a cell
    shell: bool = False
    cwd: str | os.PathLike[str] | None = None
    env: Iterable[str] = ()  # NAME or NAME=VALUE; values never enter the record
    uid: str | None = None
    home: str | None = None
    cell_id: str | None = None
    in_place: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Jobs that could be queued now."""

    specs: tuple[JobSpec, ...]
    values: tuple[Mapping[str, Any], ...]  # of each, as Python has them; empty without a sweep
    named: Mapping[str, str] = field(default_factory=dict, repr=False)  # secret variables


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What came of a submit: for each spec the job that stands for it."""

    jobs: tuple[Job, ...]
    specs: tuple[JobSpec, ...]

    @property
    def again(self) -> tuple[Job, ...]:
        """Those that an earlier submit had queued under the same key."""
        return tuple(job for job, new in zip(self.jobs, self._new, strict=True) if not new)

    @property
    def queued(self) -> tuple[Job, ...]:
        """Those that this submit has queued."""
        return tuple(job for job, new in zip(self.jobs, self._new, strict=True) if new)

    @property
    def _new(self) -> tuple[bool, ...]:
        return tuple(
            job.spec.uid == spec.uid for job, spec in zip(self.jobs, self.specs, strict=True)
        )

    @property
    def array(self) -> str | None:
        """The id of the sweep, the newest one where its members stand in several."""
        places = [job.spec.array for job in self.jobs]
        return places[-1].id if places[-1] is not None else None

    @property
    def caution(self) -> str | None:
        """One line about what looks like a secret in the arguments; None where nothing does."""
        return secrecy.warning(self.specs[0].argv or ()) if self.queued else None

    @property
    def note(self) -> str | None:
        """One line about jobs that stood already; None: all are new."""
        again = self.again
        if not again:
            return None
        key = clean(self.specs[0].key or "", 80)
        if len(self.jobs) == 1:
            job = again[0]
            return f"key {key}: job {job.id} stands already ({job.state}); nothing is queued"
        rest = f"queued the other {len(self.queued)}" if self.queued else "nothing is queued"
        return f"key {key}: {len(again)} of {len(self.jobs)} jobs stand already; {rest}"


class Composer:
    """Makes specs for one queue.

    Args:
        owner: where jobs come from, for people.
        own_python: programs beside this interpreter are found first.
        retry_delay_s: the setting.
        resolve: the ids that references stand for.
        read: a reading of the GPUs, taken when it matters whether a job could ever fit.
        engine: the setting.
    """

    def __init__(
        self,
        owner: str,
        own_python: bool,
        retry_delay_s: float,
        resolve: Callable[[Iterable[str]], tuple[int, ...]],
        read: Callable[[], Snapshot],
        engine: str = LOCAL,
    ) -> None:
        self._owner = owner
        self._own_python = own_python
        self._retry_delay_s = retry_delay_s
        self._resolve = resolve
        self._read = read
        self._default_engine = engine

    def compose(self, work: Work, options: Mapping[str, Any]) -> Draft:
        """The jobs that are asked for.

        Raises:
            UserError: something that was asked for cannot be.
        """
        fields = python_fields(options)
        axes = fields.get("sweep")
        if axes is None and fields.get("max_running") is not None:
            raise UserError("--max-running counts the jobs of a sweep; give --sweep as well")
        members = sweep.members_of(axes) if axes else ()
        if work.kind is JobKind.ALLOCATION:
            _refuse_for_a_block(fields)
        argv = work.argv
        if work.kind is JobKind.COMMAND or argv is not None:
            argv = _checked(work)
        named = environment.named(work.env, os.environ)
        request, engine = self._request(fields), self._engine(work.kind, fields)
        if engine == LOCAL:
            self._must_fit(request)
        elif request.shared:
            raise UserError(
                f"--mem shares a GPU of this machine; {engine} gives whole GPUs: leave it out"
            )
        fields["engine"] = engine
        spec = replace(self._spec(work, fields, request, argv), env_names=tuple(named))
        locate = cache(self._located)
        if not members:
            spec = spec if argv is None or spec.shell else _begun_by(spec, locate)
            return Draft(specs=(spec,), values=({},), named=named)
        size = len(members)
        specs = [_member(spec, sweep.texts(one), at, size) for at, one in enumerate(members)]
        if argv is not None and not spec.shell:
            specs = [_begun_by(one, locate) for one in specs]
        return Draft(
            specs=tuple(specs),
            values=tuple({name: it.value for name, it in member.items()} for member in members),
            named=named,
        )

    def _spec(
        self,
        work: Work,
        fields: Mapping[str, Any],
        request: Request,
        argv: Sequence[str] | None,
    ) -> JobSpec:
        return JobSpec(
            uid=work.uid or uuid.uuid4().hex,
            kind=work.kind,
            name=fields.get("name") or name_of(work.kind, argv),
            priority=fields.get("priority", 0),
            request=request,
            held=fields.get("hold", False),
            argv=tuple(argv) if argv is not None else None,
            shell=work.shell,
            code=work.code,
            cwd=str(Path(work.cwd or os.getcwd()).absolute()),
            env=self._environment() if work.kind not in BOUND_KINDS else {},
            labels=dict(fields.get("label", ())),
            key=fields.get("key"),
            engine=fields["engine"],
            owner=self._owner,
            home=work.home,
            cell_id=work.cell_id,
            in_place=work.in_place,
        )

    def _request(self, fields: Mapping[str, Any]) -> Request:
        return Request(
            gpus=fields.get("gpus", 1),
            mem_bytes=fields.get("mem"),
            on_gpu=fields.get("on_gpu"),
            after=self._resolve(fields.get("after") or ()),
            after_any=self._resolve(fields.get("after_any") or ()),
            begin_at=fields.get("begin"),
            time_s=fields.get("time"),
            retries=fields.get("retries", 0),
            retry_delay_s=self._retry_delay_s,
            requeue=fields.get("requeue", False),
            retry_oom=fields.get("retry_oom", False),
            max_running=fields.get("max_running"),
        )

    def _engine(self, kind: JobKind, fields: Mapping[str, Any]) -> str:
        """Where it runs; what lives in this process runs here, whatever the setting says."""
        asked: str | None = fields.get("engine")
        if kind not in BOUND_KINDS:
            return asked or self._default_engine
        if asked in (None, LOCAL):
            return LOCAL
        raise UserError(
            f"--engine {asked} is for commands, calls and isolated cells; this one runs in its "
            "own process: submit it as a command instead"
        )

    def _must_fit(self, request: Request) -> None:
        """Refuse what this machine could never run; without a reading nothing is known."""
        if (request.gpus, request.mem_bytes, request.on_gpu) == (1, None, None):
            return
        snapshot = self._read()
        if snapshot.problem is None:
            fits(request, snapshot.gpus)

    def _located(self, program: str) -> str:
        path = shutil.which(program, path=self._search_path())
        if path is None:
            raise UserError(f"there is no program {program!r}; give its path or mend PATH")
        return os.path.abspath(path)

    def _search_path(self) -> str:
        """PATH without its relative entries: nothing is run because it lies in some folder."""
        own = [os.path.dirname(sys.executable)] if self._own_python else []
        entries = [*own, *os.environ.get("PATH", os.defpath).split(os.pathsep)]
        return os.pathsep.join(entry for entry in entries if os.path.isabs(entry))

    def _environment(self) -> dict[str, str]:
        return {**environment.allowed(os.environ), "PATH": self._search_path()}


def _checked(work: Work) -> tuple[str, ...]:
    """The command as it was given."""
    argv = work.argv
    if isinstance(argv, str):
        raise UserError("a command is a list of arguments; for a shell line ask for shell=True")
    if not argv or not argv[0]:
        raise UserError("there is no command to run; write it after --")
    if work.cwd is not None and not Path(work.cwd).is_dir():
        raise UserError(f"the working directory {work.cwd} does not exist")
    return (" ".join(argv),) if work.shell else tuple(argv)


def _refuse_for_a_block(fields: Mapping[str, Any]) -> None:
    """What runs in its own process or block cannot be run again from outside, nor be many."""
    for name in ("retries", "requeue", "retry_oom", "sweep", "key"):
        if fields.get(name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} is for jobs that the queue starts; this one runs in its own process: "
                "submit it as a command instead"
            )


def _begun_by(spec: JobSpec, locate: Callable[[str], str]) -> JobSpec:
    """``spec`` with the path of its program."""
    assert spec.argv is not None
    return replace(spec, argv=(locate(spec.argv[0]), *spec.argv[1:]))


def _member(spec: JobSpec, values: Mapping[str, str], index: int, size: int) -> JobSpec:
    """The spec of one member: its uid follows from that of the submit, so a retry is the same."""
    array = ArrayPlace(id=_digest(spec.uid)[:_ARRAY_ID], index=index, size=size)
    uid = _digest(f"{spec.uid}/{index}")
    argv = spec.argv
    if argv is not None and spec.kind is JobKind.COMMAND:
        argv = tuple(sweep.filled(argv, values, shell=spec.shell))
    elif argv is not None:  # it names the job whose function or cell it is to run
        argv = tuple(uid if word == spec.uid else word for word in argv)
    env = spec.env
    if spec.kind not in BOUND_KINDS:
        env = {**env, **sweep.environment(values, array.id, index, size)}
    return replace(spec, uid=uid, array=array, sweep=values, argv=argv, env=env)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fits(request: Request, gpus: Sequence[Gpu]) -> None:
    """Check a request against the GPUs of a machine.

    Raises:
        UserError: the machine could never run it, even when idle.
    """
    parents = {gpu.parent for gpu in gpus}
    usable = [gpu for gpu in gpus if gpu.uuid not in parents]
    if request.gpus > len(usable):
        raise UserError(f"--gpus {request.gpus}: this machine has {len(usable)}")
    sizes = [gpu.mem_total_bytes for gpu in usable]
    if request.mem_bytes is None or None in sizes:
        return
    enough = sum(1 for size in sizes if size is not None and size >= request.mem_bytes)
    if enough < request.gpus:
        gib = 2**30
        largest = max((size for size in sizes if size is not None), default=0)
        raise UserError(
            f"--mem {request.mem_bytes / gib:.1f} GiB: the largest GPU here has "
            f"{largest / gib:.1f} GiB"
        )


def name_of(kind: JobKind, argv: Sequence[str] | None) -> str:
    """What a job is called that was given no name."""
    if not argv:
        return str(kind)
    # One word may be a whole line for the shell, with any quotes in it.
    words = (argv[0].split() if len(argv) == 1 else list(argv)) or [str(kind)]
    script = next((word for word in words[1:] if word.endswith((".py", ".sh"))), words[0])
    # A program may be called by bytes that are no text.
    name = Path(script).name.encode("utf-8", "backslashreplace").decode()
    return own_name(name[:64]) or str(kind)
