"""The small process beside each command: it outlives notebook and agent and records the end.

It takes the claim over (or finds itself fenced and leaves without a trace), starts the command in a
session of its own, and from then on sees it through (:mod:`gpusched_ipy.supervision`). Whatever
happens to it, the job's own processes hold the locks that tell the truth.

Until the command runs it imports as little as it can; one that is started in advance imports the
rest while nothing is asked of it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpusched_ipy import environment, interpreter
from gpusched_ipy.errors import StateDirError, StoreError
from gpusched_ipy.interpreter import ParkedInterpreter
from gpusched_ipy.locks import Membership
from gpusched_ipy.logcap import LogCap
from gpusched_ipy.orders import Orders
from gpusched_ipy.process import ProcessId, become_subreaper, survive_signals
from gpusched_ipy.statedir import StateDir
from gpusched_ipy.takeover import TakeOver

# What of a request makes another try possible: what the next one needs must be kept.
_TRIED_AGAIN = ("retries", "requeue", "retry_oom")


class Order:
    """What the shim is to do: one claim of one job, as whoever started it has written it."""

    __slots__ = ("claimed_by", "env", "epoch", "gpu_fds", "job", "log_cap", "log_fd")

    def __init__(self, said: dict[str, Any], fds: Sequence[int]) -> None:
        self.job: int = said["job"]
        self.epoch: int = said["epoch"]
        self.claimed_by: str = said["claimed_by"]
        self.env: dict[str, str] = said["env"]
        self.log_cap: int = said["log_cap"]  # bytes
        self.log_fd = fds[0]
        self.gpu_fds = tuple(fds[1:])


def main(argv: Sequence[str]) -> int:
    """Wait for the order on the socket that stdin is, and run that job."""
    root = Path(argv[argv.index("--state-dir") + 1])
    survive_signals(signal.SIGINT, signal.SIGHUP)
    become_subreaper()
    record = TakeOver(StateDir(root))
    parked = ParkedInterpreter()
    with socket.socket(fileno=os.dup(0)) as channel:
        orders = Orders(channel)
        if not orders.there:
            record = _prepared(record)
        order = _receive(orders, parked)
        if order is None:
            parked.dismiss()
        else:
            _obey(record, order, channel, parked)
    return 0


def _prepared(record: TakeOver) -> TakeOver:
    """Nothing is asked yet: have ready whatever the job and its end will need."""
    # Nothing that is imported becomes garbage.
    gc.disable()
    from gpusched_ipy import supervision  # noqa: F401 - the job's end will need it
    from gpusched_ipy.store import Store

    store = Store.over(record)
    store.rehearse()
    with suppress(OSError):
        subprocess.Popen(["/nothing is here"], stdin=subprocess.DEVNULL, start_new_session=True)
    gc.freeze()
    gc.enable()
    return store


def _receive(orders: Orders, parked: ParkedInterpreter) -> Order | None:
    """The order, or None when whoever had started us is gone without needing us.

    Before it comes, whichever interpreter it may need is started.
    """
    while (said := orders.receive()) is not None:
        if "job" in said:
            return Order(said, orders.fds)
        parked.park(said["park"])
    _close(orders.fds)
    return None


def _obey(
    record: TakeOver, order: Order, channel: socket.socket, parked: ParkedInterpreter
) -> None:
    membership = Membership(record.state)
    with record.writing(rings=False):
        row = record.begin(
            order.job, epoch=order.epoch, claimed_by=order.claimed_by, member=membership.key
        )
    if row is None:
        _close((order.log_fd, *order.gpu_fds))
        parked.dismiss()
        membership.leave()
        _call_agent(record)
        return
    log, child = None, None
    failure: tuple[int | None, str] | None = None
    try:
        log = LogCap(record.state.log(row["attempt"]), order.log_cap)
        child = _start(record.state, row, order, parked)
    except FileNotFoundError as exc:
        failure = (127, f"cannot be run: {exc}")
    except (OSError, StateDirError) as exc:
        failure = (None if isinstance(exc, StateDirError) else 126, f"cannot be run: {exc}")
    leader = None if child is None else ProcessId.of(child.pid)
    # It runs; whether the record can say so at once or not.
    with suppress(StoreError), record.writing(durable=False):
        record.join(membership.key, "shim", f"job {order.job}")
        if leader is not None:
            record.set_process(row["attempt"], leader)
    record.ring()
    # Imported only now, where nothing was prepared: the job is running already.
    from gpusched_ipy.supervision import Supervision

    Supervision(record, row, membership, order.gpu_fds, channel).see_through(child, log, failure)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _start(
    state: StateDir, row: dict[str, Any], order: Order, parked: ParkedInterpreter
) -> subprocess.Popen[bytes]:
    spec = json.loads(row["spec"])
    again = any(spec["request"].get(name) for name in _TRIED_AGAIN)
    own = {"GPUSCHED_JOB_ID": str(row["id"]), "GPUSCHED_JOB_NAME": row["name"]}
    names = spec.get("env_names", ())
    named = environment.take(state, row["uid"], names, again=again)
    env = {**spec["env"], **named, **own, **order.env}
    child = parked.begin(
        interpreter.recipe(spec["kind"], spec["argv"], spec["env"], names),
        {"arguments": (spec["argv"] or ())[4:], "env": env, "cwd": spec["cwd"]},
        (order.log_fd, *order.gpu_fds),
    )
    if child is None:
        child = _popen(spec, env, order)
    # Only the job holds its log now: a free lock on it means that no process of the job lives.
    os.close(order.log_fd)
    return child


def _popen(spec: dict[str, Any], env: dict[str, str], order: Order) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", spec["argv"][0]] if spec["shell"] else spec["argv"],
        # Empty to whoever reads it. What a launcher starts keeps no other lock that is seen from
        # another container.
        stdin=order.gpu_fds[0] if order.gpu_fds else subprocess.DEVNULL,
        stdout=order.log_fd,
        stderr=order.log_fd,
        cwd=spec["cwd"],
        env=env,
        start_new_session=True,
        pass_fds=order.gpu_fds,
    )


def _call_agent(record: TakeOver) -> None:
    """The claim had fallen: whoever made it may be dead, and others wait."""
    from gpusched_ipy.store import Store
    from gpusched_ipy.supervision import call_agent

    call_agent(Store.over(record))
