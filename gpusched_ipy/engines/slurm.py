"""Slurm by its own commands: sbatch, squeue, scancel, scontrol, sinfo. No library, no REST, and no
accounting is needed. It keeps nothing: a job is found again by its name alone.

Written for Slurm 20.11 and later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpusched_ipy.config import Settings
from gpusched_ipy.engines import (
    NAME_PREFIX,
    AmbiguousError,
    Capabilities,
    EngineJob,
    EngineState,
    Health,
    RejectedError,
    Status,
    UnreachableError,
    _slurm_script,
    _slurm_text,
    parted,
)
from gpusched_ipy.engines._slurm_accounts import Accounts
from gpusched_ipy.engines._slurm_keep import SlurmKeeper
from gpusched_ipy.engines._slurm_run import TooLateError, asked, cancel_named, run
from gpusched_ipy.engines._slurm_text import RECORD_ROW, ROW
from gpusched_ipy.engines.kept import KeptFolder
from gpusched_ipy.text import clean

# sbatch gives up by itself after ten seconds, or what the site has set.
_SUBMIT_S = 60.0
_CALL_S = 20.0
# Letters of one argument; Linux takes 128 KiB.
_ARGUMENT = 100_000
_OPEN = frozenset({EngineState.QUEUED, EngineState.RUNNING})


class SlurmEngine:
    """One Slurm cluster, as its commands on this machine reach it.

    Args:
        options: further options of sbatch: partition, account and the like.
        keep_s: how long what a job has had is kept idle for the next one; 0: not at all.
    """

    name = "slurm"

    def __init__(self, options: Sequence[str] = (), keep_s: float = 0.0) -> None:
        self._options = tuple(options)
        self._keep_s = keep_s
        self._keeper: SlurmKeeper | None = None
        self._settle_s: float | None = None
        self._array_max = 1
        self._accounts = Accounts(there=False)

    def capabilities(self) -> Capabilities:
        """It ends jobs after their time, and refuses what no node could ever run."""
        settle_s = 20.0 if self._settle_s is None else self._settle_s
        return Capabilities(
            time_limit=True,
            refuses_impossible=True,
            settle_s=settle_s,
            array_max=self._array_max,
        )

    def ping(self, timeout: float) -> Health:
        """Whether a controller answers, its version, and how many GPUs its nodes have."""
        try:
            answer = run("scontrol", "ping", limit_s=timeout)
        except UnreachableError as exc:
            return Health(up=False, text=str(exc))
        if " UP" not in answer.stdout:
            why = _slurm_text.words(answer.stdout + answer.stderr)
            return Health(up=False, text=f"its controller does not answer: {clean(why, 300)}")
        try:
            if self._settle_s is None:
                config = asked("scontrol", "show", "config", limit_s=timeout)
                self._settle_s = 2 * _slurm_text.message_timeout_s(config)
                self._array_max = _slurm_text.array_max(config)
                self._accounts = Accounts(there=_slurm_text.has_accounts(config))
            nodes = asked("sinfo", "-h", "-N", "-o", _slurm_text.NODE_ROW, limit_s=timeout)
            version = asked("scontrol", "-V", limit_s=timeout).split()
        except UnreachableError as exc:
            return Health(up=False, text=str(exc))
        gpus = _slurm_text.gpus(nodes)
        text = f"{gpus} GPUs" if gpus else "none of its nodes has a GPU (gres gpu)"
        return Health(up=True, text=text, version=version[-1] if version else None, gpus=gpus)

    def keeper(self, root: Path) -> SlurmKeeper:
        """What keeps what jobs have had here."""
        self._keeper = SlurmKeeper(root, self._keep_s, self._options)
        return self._keeper

    def submit(self, job: EngineJob) -> str:
        """Start the job in what is kept, or hand it to sbatch.

        Raises:
            RejectedError, UnreachableError, AmbiguousError: as every engine.
            GoneError: what was kept for it is not there any more.
        """
        keeper = self._keeper
        if keeper is None or job.place is not None:
            return self.submit_array([job])[0]
        native = keeper.give(job)
        if native is not None:
            return native
        kept = keeper.prepare(job)
        if kept is None:
            return self._batch([job])
        try:
            return self._batch([job], kept)
        except RejectedError:
            # Perhaps only the time on top of its own was too much.
            kept.remove()
            return self._batch([job])

    def submit_array(self, jobs: Sequence[EngineJob]) -> Sequence[str]:
        """Hand these to one sbatch, as the tasks of an array.

        Raises:
            RejectedError, UnreachableError, AmbiguousError: as every engine.
        """
        native = self._batch(jobs)
        return [native if one.place is None else f"{native}_{one.place}" for one in jobs]

    def _batch(self, jobs: Sequence[EngineJob], kept: KeptFolder | None = None) -> str:
        """The id that sbatch gives these."""
        text = _slurm_script.script(jobs, kept=kept, idle_s=self._keep_s)
        try:
            argv = ("sbatch", "--parsable", *self._options)
            done = run(*argv, limit_s=_SUBMIT_S, script=text)
        except TooLateError as exc:
            raise AmbiguousError(str(exc)) from exc
        native = _slurm_text.native_id(done.stdout)
        if done.returncode == 0 and native:
            return native
        raise _slurm_text.refusal(done.stderr)

    def status(self, keys: Sequence[str]) -> Mapping[str, Status]:
        """One squeue for all; those that have ended are listed for a few minutes, and after that
        one sacct for all where the site has accounts."""
        keeper = self._keeper
        there = {key: key if keeper is None else keeper.there(key) for key in keys}
        listed = self._listed("-t", "all", *_named(list(there.values())))
        rows = {key: _slurm_text.of_key(listed, NAME_PREFIX + name) for key, name in there.items()}
        ended = self._accounts.ended([there[key] for key, row in rows.items() if row is None])
        unknown = Status(state=EngineState.UNKNOWN)
        found = {key: row or ended.get(there[key], unknown) for key, row in rows.items()}
        return found if keeper is None else {key: keeper.told(key, found[key]) for key in keys}

    def rank(self, ranks: Mapping[str, int]) -> None:
        """Give our own waiting jobs the nice that orders them."""
        by_name = {NAME_PREFIX + key: rank for key, rank in ranks.items()}
        listed = self._listed("-t", "pending", *_named(list(ranks)))
        for native, nice in _slurm_text.ranks_of(by_name, listed).items():
            # One that has begun meanwhile refuses it: then its order is of no matter.
            run("scontrol", "update", f"JobId={native}", f"Nice={nice}", limit_s=_CALL_S)

    def cancel(self, keys: Sequence[str]) -> None:
        """End them, by name; with what was kept and is theirs now."""
        if self._keeper is not None:
            keys = [self._keeper.there(key) for key in keys if self._keeper.ends(key)]
        for key in keys:
            if parted(key)[1] is None:
                cancel_named(NAME_PREFIX + key, _CALL_S)
        members = [key for key in keys if parted(key)[1] is not None]
        if members:
            self._cancel_members(members)

    def _cancel_members(self, keys: list[str]) -> None:
        """End these of arrays, by the name and the id of each.

        The tasks of an array that wait share one record, and scancel with a name ends a record as a
        whole: each is given one of its own first. One for which that fails is left to wait; its
        folder is taken back, so it leaves as soon as it starts.
        """
        found = self._records(keys)
        shared = [native for key in keys for native, shares in found.get(key, ()) if shares]
        for native in shared:
            run("scontrol", "update", f"JobId={native}", "Nice=0", limit_s=_CALL_S)
        for key, records in (self._records(keys) if shared else found).items():
            for native, shares in records:
                if key in keys and not shares:
                    cancel_named(NAME_PREFIX + parted(key)[0], _CALL_S, native)

    def _records(self, keys: list[str]) -> dict[str, list[tuple[str, bool]]]:
        listed = asked("squeue", "-r", "-h", *_named(keys), "-o", RECORD_ROW, limit_s=_CALL_S)
        found = _slurm_text.shares(listed)
        return {key: found[NAME_PREFIX + key] for key in keys if NAME_PREFIX + key in found}

    def reattach(self) -> Sequence[str]:
        """Our jobs that wait or run there, whoever has submitted them."""
        listed = self._listed("-u", str(os.geteuid()))
        return [
            name.removeprefix(NAME_PREFIX)
            for name, status in listed.items()
            if name.startswith(NAME_PREFIX) and status.state in _OPEN
        ]

    def _listed(self, *wanted: str) -> dict[str, Status]:
        return _slurm_text.rows(asked("squeue", "-r", "-h", *wanted, "-o", ROW, limit_s=_CALL_S))


def _named(keys: Sequence[str]) -> tuple[str, str]:
    """What picks these jobs at squeue; where one argument cannot hold them, all of the user's."""
    text = _slurm_text.names(keys)
    return ("-n", text) if len(text) <= _ARGUMENT else ("-u", str(os.geteuid()))


def make(settings: Settings) -> SlurmEngine:
    """The Slurm of this machine, with the user's options of sbatch."""
    return SlurmEngine(settings.slurm_options, settings.slurm_keep)
