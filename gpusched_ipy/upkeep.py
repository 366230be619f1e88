"""Verbs that keep a queue in order: purge, export, doctor --fix; for root admin init."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.look import job_record
from gpusched_ipy.monitor import Monitor
from gpusched_ipy.repair import repair, summary
from gpusched_ipy.retention import purge
from gpusched_ipy.statedir import SHARED_LOCKS, open_state_dir
from gpusched_ipy.terminal import DONE
from gpusched_ipy.text import clean, format_bytes

_DAY_S = 86400.0


def call(asked: argparse.Namespace, settings: Settings) -> int:
    """Run one of these verbs.

    Raises:
        UserError: it failed for a reason that the user can mend.
    """
    return {"purge": _purge, "export": _export, "admin": _admin}[asked.verb](asked, settings)


def fix(settings: Settings) -> int:
    """``doctor --fix``: repair the record if it is damaged."""
    for line in summary(repair(open_state_dir(settings))):
        print(clean(line))
    return DONE


def _purge(asked: argparse.Namespace, settings: Settings) -> int:
    queue = Queue(settings)
    days = settings.keep_days if asked.older_than is None else asked.older_than / _DAY_S
    done = purge(
        queue.store,
        wall=queue.clock.now().wall,
        keep_days=0 if asked.all else days,
        keep_size=settings.keep_size,
        dry=asked.dry_run,
    )
    verb = "would go" if asked.dry_run else "removed"
    print(f"{verb}: {done.jobs} ended jobs, {done.files} files ({format_bytes(done.bytes)})")
    return DONE


def _export(asked: argparse.Namespace, settings: Settings) -> int:
    queue = Queue(settings)
    with ExitStack() as stack:
        stream = sys.stdout
        if asked.file is not None:
            stream = stack.enter_context(_new_file(Path(asked.file)))
        for job in queue.store.ended():
            record = job_record(queue, job)
            record["events"] = [
                {"at": event.at, "what": event.what, "data": dict(event.data)}
                for event in queue.store.events(job.id)
            ]
            stream.write(json.dumps(record) + "\n")
    return DONE


def _new_file(path: Path) -> TextIO:
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except OSError as exc:
        raise UserError(f"{path} cannot be made ({exc.strerror}); name a new file") from exc


def _admin(asked: argparse.Namespace, settings: Settings) -> int:
    if os.geteuid() != 0:
        raise UserError("`gpusched admin init` makes files of root's: run it as root, once a boot")
    folder = Path(asked.lock_dir).absolute() if asked.lock_dir else SHARED_LOCKS
    monitor = Monitor(settings)
    snapshot = monitor.read_now(5.0)
    monitor.stop()
    if snapshot.problem is not None or not snapshot.gpus:
        raise UserError(f"no GPU can be read ({snapshot.problem or 'none here'}): nothing to lock")
    make_shared(folder, [gpu.uuid for gpu in snapshot.gpus])
    print(f"{folder}: locks for {len(snapshot.gpus)} GPUs, and a folder for tickets")
    if folder != SHARED_LOCKS:
        print(f"users find it by GPUSCHED_LOCK_DIR={folder}")
    print("after a reboot run it again, for example by a systemd unit before the users' logins")
    return DONE


def make_shared(folder: Path, gpus: list[str]) -> None:
    """Make the lock files that every user may lock and nobody but root can replace.

    Raises:
        UserError: what stands there is not root's alone.
    """
    from gpusched_ipy.locks import lock_name

    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        _require_root_alone(folder)
        folder.chmod(0o755)
        for gpu in gpus:
            path = folder / lock_name(gpu)
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
            os.fchmod(fd, 0o444)
            os.close(fd)
        tickets = folder / "tickets"
        tickets.mkdir(mode=0o755, exist_ok=True)
        _require_root_alone(tickets)
        tickets.chmod(0o1777)
    except OSError as exc:
        raise UserError(f"{exc.filename or folder} cannot be made ({exc.strerror})") from exc


def _require_root_alone(folder: Path) -> None:
    status = os.lstat(folder)
    sticky = bool(status.st_mode & stat.S_ISVTX)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != 0:
        raise UserError(f"{folder} is not a folder of root's; remove what stands there")
    if status.st_mode & 0o022 and not sticky:
        raise UserError(f"{folder} can be written by others; run: chmod go-w {folder}")
