"""What each command of the terminal does: one function a verb, each returns the exit status."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gpusched_ipy.api import Queue
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import UserError
from gpusched_ipy.facts import facts
from gpusched_ipy.folding import ranges, told
from gpusched_ipy.job import FINAL, Job, JobState
from gpusched_ipy.options import job_fields
from gpusched_ipy.terminal import DONE, FAILED, LogWriter, note, show_table
from gpusched_ipy.view import JOB_COLUMNS, clean

if TYPE_CHECKING:
    from gpusched_ipy.ledger import Table


class Terminal:
    """One call of a command: what was asked for, and the queue once it is needed."""

    def __init__(self, asked: argparse.Namespace, explicit: Mapping[str, object]) -> None:
        self.asked = asked
        self.settings = Settings.load(explicit)

    @cached_property
    def queue(self) -> Queue:
        """The queue, opened when first used."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # said below, in the terminal's own way
            queue = Queue(self.settings)
        if queue.state.note:
            note(queue.state.note)
        return queue


def call(asked: argparse.Namespace, explicit: Mapping[str, object]) -> int:
    """Run the verb that was asked for.

    Raises:
        UserError: it failed for a reason that the user can mend.
    """
    if asked.verb == "doctor" and not asked.fix:
        from gpusched_ipy.doctor import examine

        return examine(explicit)
    if asked.verb in ("doctor", "purge", "export", "admin"):
        from gpusched_ipy import upkeep

        settings = Settings.load(explicit)
        return upkeep.fix(settings) if asked.verb == "doctor" else upkeep.call(asked, settings)
    return _VERBS[asked.verb](Terminal(asked, explicit))


def _submit(terminal: Terminal) -> int:
    asked = terminal.asked
    wanted = _wanted(asked)
    if wanted.pop("dry_run", False):
        return _preview(terminal, wanted, as_json=asked.json)
    queue = terminal.queue
    done = queue.submit_all(**wanted)
    try:
        _print_submitted(queue, done.jobs, as_json=asked.json)
    except BrokenPipeError:
        raise
    except OSError as exc:  # a full disk: who reads only the status must not submit once more
        numbers = ranges(job.id for job in done.jobs)
        raise UserError(f"queued as {numbers}, which cannot be written: {exc.strerror}") from None
    for remark in filter(None, (done.note, done.caution)):
        note(remark)
    if queue.drained and done.queued:
        which = f"job {done.queued[0].id} waits" if len(done.queued) == 1 else "the jobs wait"
        note(f"{which}: the queue is drained; `gpusched resume` starts jobs again")
    return DONE


def _print_submitted(queue: Queue, jobs: Sequence[Job], *, as_json: bool) -> None:
    if as_json:
        from gpusched_ipy.look import job_record

        _print_json([job_record(queue, job) for job in jobs])
    else:
        for job in jobs:
            print(job.id)
    sys.stdout.flush()


def _preview(terminal: Terminal, wanted: dict[str, Any], *, as_json: bool) -> int:
    found = terminal.queue.preview(**wanted)
    if as_json:
        _print_json(found.record())
    else:
        print(found)
    return DONE


def _run(terminal: Terminal) -> int:
    from gpusched_ipy.foreground import run_here

    wanted = _wanted(terminal.asked)
    if wanted.pop("dry_run", False):
        return _preview(terminal, wanted, as_json=False)
    job = run_here(terminal.queue, tell=note, **wanted)
    if job.state is not JobState.COMPLETED:
        note(how_it_ended(job))
    return exit_status(job)


def _wanted(asked: argparse.Namespace) -> dict[str, Any]:
    """A command and its options under the names that ``Queue.submit`` takes."""
    line = asked.shell is not None
    return {
        "argv": [asked.shell] if line else asked.argv,
        "shell": line,
        "cwd": asked.cwd,
        "env": asked.env,
        **job_fields(asked),
    }


def _list(terminal: Terminal) -> int:
    asked = terminal.asked
    return _show_jobs(terminal, terminal.queue.list(all=asked.all), fold=not asked.members)


def _history(terminal: Terminal) -> int:
    from gpusched_ipy import ledger

    if terminal.asked.json:
        _print_json(ledger.history_json(terminal.queue, terminal.asked))
        return DONE
    return _show_ledger(ledger.history_table(terminal.queue, terminal.asked))


def _stats(terminal: Terminal) -> int:
    from gpusched_ipy import ledger

    if terminal.asked.json:
        _print_json(ledger.stats_json(terminal.queue, terminal.asked))
        return DONE
    return _show_ledger(ledger.stats_table(terminal.queue, terminal.asked))


def _show_ledger(table: Table) -> int:
    show_table(table.columns, table.rows)
    note(table.caption)
    return DONE


def _show_jobs(terminal: Terminal, jobs: list[Job], *, fold: bool = False) -> int:
    from gpusched_ipy.look import damage, job_records, job_table

    queue = terminal.queue
    if damaged := queue.store.damaged:
        note(damage(damaged))
    if terminal.asked.json:
        _print_json(job_records(queue, jobs))
        return DONE
    show_table(JOB_COLUMNS, job_table(queue, jobs, fold=fold))
    if drained := queue.drained:
        note(f"the queue is drained ({drained}); `gpusched resume` starts jobs again")
    return DONE


def _show(terminal: Terminal) -> int:
    from gpusched_ipy.look import job_record

    queue = terminal.queue
    job = queue.show(terminal.asked.id)
    record = job_record(queue, job)
    if terminal.asked.json:
        _print_json(record)
        return DONE
    for name, text in facts(record):
        print(f"{name:<20} {text}")
    for event in queue.events(job.id):
        at = terminal_time(event.at)
        data = "; ".join(f"{name} {_said(value)}" for name, value in event.data.items() if value)
        print(f"{at}  {clean(event.what)}{f': {clean(data)}' if data else ''}")
    return DONE


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def terminal_time(wall: float) -> str:
    """A moment on this machine's own clock, for people."""
    from datetime import datetime

    return datetime.fromtimestamp(wall).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _log(terminal: Terminal) -> int:
    from gpusched_ipy.joblog import follow, written

    queue, asked = terminal.queue, terminal.asked
    job = queue.show(asked.id)
    writer = LogWriter()
    try:
        for chunk in follow(queue, job.id) if asked.follow else written(queue, job):
            writer.write(chunk)
    finally:
        writer.close()
    return DONE


def _cancel(terminal: Terminal) -> int:
    queue = terminal.queue
    states = queue.store.states(queue.resolve(terminal.asked.ids))
    ended = {job_id for job_id, state in states.items() if state in FINAL}
    status = DONE
    jobs = queue.cancel(*terminal.asked.ids)
    new = [job for job in jobs if job.id not in ended]
    _tell("cancelled", [job for job in new if job.ended])
    _tell("is being ended", [job for job in new if not job.ended])
    named = {part.strip() for asked in terminal.asked.ids for part in asked.split(",")}
    for job in jobs:
        # Of a sweep those are meant that are not over yet.
        meant = str(job.id) in named or not new
        if job.id in ended and job.state is not JobState.CANCELLED and meant:
            note(f"job {job.id} is over already ({job.state})")
            status = FAILED
    return status


def _hold(terminal: Terminal) -> int:
    return _tell("held", terminal.queue.hold(*terminal.asked.ids))


def _release(terminal: Terminal) -> int:
    return _tell("released", terminal.queue.release(*terminal.asked.ids))


def _requeue(terminal: Terminal) -> int:
    return _tell("waits again", terminal.queue.requeue(*terminal.asked.ids))


def _priority(terminal: Terminal) -> int:
    asked = terminal.asked
    jobs = terminal.queue.set_priority(asked.ids, asked.priority)
    return _tell(f"has priority {asked.priority}", jobs)


def _top(terminal: Terminal) -> int:
    job = terminal.queue.top(terminal.asked.id)
    return _tell(f"has priority {job.priority}", [job])


def _tell(what: str, jobs: list[Job]) -> int:
    for line in told(what, [job.id for job in jobs]):
        print(line)
    return DONE


def _drain(terminal: Terminal) -> int:
    terminal.queue.drain()
    print("drained: what runs goes on, nothing more starts")
    return DONE


def _resume(terminal: Terminal) -> int:
    terminal.queue.resume()
    print("resumed")
    return DONE


def _wait(terminal: Terminal) -> int:
    from gpusched_ipy.notify import ring_here

    asked = terminal.asked
    try:
        jobs = terminal.queue.wait(*asked.ids, timeout=asked.timeout)
    except TimeoutError as exc:
        raise UserError(str(exc)) from None
    bad = [job for job in jobs if job.state is not JobState.COMPLETED]
    for job in bad:
        note(how_it_ended(job))
    ring_here(terminal.settings.notify)
    return exit_status(bad[0]) if bad else DONE


def exit_status(job: Job) -> int:
    """The status with which ``wait`` and ``run`` end: the job's own.

    128 + signal where one ended it; 1 when it never ran, or ended badly without a status.
    """
    if job.state is JobState.COMPLETED:
        return DONE
    if job.started_at is None:
        return FAILED
    if job.signal is not None:
        return 128 + job.signal
    return job.exit_code or FAILED


def how_it_ended(job: Job) -> str:
    """One line about a job that did not complete."""
    record = {"exit status": job.exit_code, "signal": job.signal}
    known = [f"{name} {value}" for name, value in record.items() if value is not None]
    details = ", ".join([*known, *([job.error] if job.error else [])])
    state = "cancelled" if job.state is JobState.CANCELLED else str(job.state)
    return f"job {job.id} ({job.name}): {state}{f' ({details})' if details else ''}"


def _engines(terminal: Terminal) -> int:
    from gpusched_ipy.engineslist import COLUMNS, listed, row

    found = listed(terminal.settings)
    if terminal.asked.json:
        _print_json(found)
    else:
        show_table(COLUMNS, [row(one) for one in found])
    return DONE


def _gpus(terminal: Terminal) -> int:
    from gpusched_ipy.gpuscreen import show_gpus, watch_gpus

    asked = terminal.asked
    if asked.watch:
        return watch_gpus(terminal.queue, asked.interval, as_json=asked.json)
    return show_gpus(terminal.queue, as_json=asked.json)


def _watch(terminal: Terminal) -> int:
    from gpusched_ipy.screen import watch

    return watch(terminal.queue)


def _agent(terminal: Terminal) -> int:
    from gpusched_ipy.agent import ask_to_leave, run_foreground, running_agent

    if terminal.asked.what == "run":
        note("the agent starts commands until it is interrupted (Ctrl-C); running jobs go on")
        run_foreground(terminal.settings)
        return DONE
    queue = terminal.queue
    pid = running_agent(queue.state, queue.store)
    if terminal.asked.what == "stop":
        if pid is not None:
            ask_to_leave(pid, queue.state)
        print("no agent runs" if pid is None else f"agent {pid} has left; running jobs go on")
        return DONE
    print("no agent runs; one starts with the next submit" if pid is None else f"agent {pid} runs")
    return DONE if pid is not None else FAILED


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


_VERBS: dict[str, Callable[[Terminal], int]] = {
    "submit": _submit,
    "run": _run,
    "list": _list,
    "show": _show,
    "log": _log,
    "cancel": _cancel,
    "hold": _hold,
    "release": _release,
    "priority": _priority,
    "top": _top,
    "wait": _wait,
    "requeue": _requeue,
    "drain": _drain,
    "resume": _resume,
    "history": _history,
    "stats": _stats,
    "gpus": _gpus,
    "watch": _watch,
    "engines": _engines,
    "agent": _agent,
}
