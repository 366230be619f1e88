"""What the line magics do: one function a verb. It shows, and hands wishes to the queue."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gpusched_ipy import framework, replay
from gpusched_ipy.errors import UserError
from gpusched_ipy.facts import facts
from gpusched_ipy.folding import ranges, told
from gpusched_ipy.job import FINAL, Job, JobKind, JobState
from gpusched_ipy.joblog import SHOWN_KINDS, follow, shown, written
from gpusched_ipy.kernel import KernelSession
from gpusched_ipy.lines import Arguments, parse_queue
from gpusched_ipy.look import Look, damage, first_rows, job_record, job_records, job_table
from gpusched_ipy.terminal import SafeText, plain_table, safe_text, show_table
from gpusched_ipy.view import (
    GPU_COLUMNS,
    JOB_COLUMNS,
    clean,
    format_bytes,
    gpu_rows,
    gpus_json,
    gpus_note,
    html_table,
)

MOST_ROWS = 200  # of a long queue that is shown without a wish for more
_RECORDED_S = 1.0  # the last output of a cell that has just ended may still be on its way


class Notebook:
    """The verbs, for one kernel."""

    def __init__(self, session: KernelSession) -> None:
        self._session = session
        self._queue = session.queue

    # -- %gpuq

    def queue(self, line: str) -> None:
        """``%gpuq``.

        Raises:
            UserError: the line cannot be understood, or the verb failed.
        """
        verb, asked = parse_queue(line)
        verbs: dict[str, Callable[[Arguments], None]] = {
            "list": self._list,
            "show": self._show,
            "log": self._log,
            "cancel": self._cancel,
            "hold": lambda asked: self._tell("held", self._queue.hold(*asked.ids)),
            "release": lambda asked: self._tell("released", self._queue.release(*asked.ids)),
            "priority": self._priority,
            "top": self._top,
            "wait": self._wait,
            "drain": self._drain,
            "resume": self._resume,
            "fetch": self._fetch,
            "history": self._history,
            "stats": self._stats,
            "requeue": self._requeue,
        }
        verbs[verb](asked)
        self._session.changed()

    def _list(self, asked: Arguments) -> None:
        counts = self._queue.counts()
        if not (asked.all or asked.json or asked.members) and sum(counts.values()) > MOST_ROWS:
            self._list_first(counts["running"], counts["waiting"] + counts["held"])
            return
        jobs = self._queue.list(all=asked.all)
        if asked.json:
            _print_json(job_records(self._queue, jobs, self._session.monitor))
            return
        running = sum(1 for job in jobs if job.state is JobState.RUNNING)
        waiting = sum(1 for job in jobs if job.state is JobState.PENDING)
        self._jobs(jobs, self._caption(running, waiting), fold=not asked.members)

    def _list_first(self, running: int, waiting: int) -> None:
        """A long queue: its first rows, at once; a notebook has no use for a hundred thousand."""
        rows, total = first_rows(self._queue, MOST_ROWS, self._session.monitor)
        caption = self._caption(running, waiting)
        if total > len(rows):
            caption += (
                f"; the first {len(rows)} of {total} rows: %gpupanel turns the pages, "
                "%gpuq list --members shows every job"
            )
        self._table(JOB_COLUMNS, rows, caption, numeric=("id", "priority"))

    def _caption(self, running: int, waiting: int) -> str:
        caption = f"{running} running, {waiting} waiting; higher priority runs first"
        if drained := self._queue.drained:
            caption += f"; the queue is drained ({drained}): %gpuq resume starts jobs again"
        if damaged := self._queue.store.damaged:
            caption += f"; {damage(damaged)}"
        return caption

    def _show(self, asked: Arguments) -> None:
        job = self._queue.show(asked.id)
        record = job_record(self._queue, job, self._session.monitor)
        if asked.json:
            _print_json(record)
            return
        self._table(("job", str(job.id)), facts(record), None)
        if self._transcript(job) is None:
            return
        for output in shown(self._queue, job):
            if self._session.front.kernel is None:
                print(safe_text(output.text), end="")
            else:
                replay.show(output.kind, output.content)

    def _fetch(self, asked: Arguments) -> None:
        job = self._queue.show(asked.id)
        names = self._session.isolated.fetch(job)
        print(f"{', '.join(names)} from job {job.id}" if names else f"job {job.id} brings nothing")

    def _transcript(self, job: Job) -> Path | None:
        if job.kind not in SHOWN_KINDS:
            return None
        cell = self._session.runner.cells.get(job.spec.uid)
        if cell is not None and job.ended and cell.recorder is not None:
            cell.recorded.wait(_RECORDED_S)
        return self._queue.log_path(job.id)

    def _log(self, asked: Arguments) -> None:
        job = self._queue.show(asked.id)
        own = job.spec.uid in self._session.runner.cells
        if asked.follow and own and not job.ended:
            self._session.cells.wait([str(job.id)])  # it can only run while this cell lets it
            job = self._queue.show(job.id)
        self._transcript(job)
        following = asked.follow and not own
        text = SafeText()
        for chunk in follow(self._queue, job.id) if following else written(self._queue, job):
            sys.stdout.write(text.more(chunk))
            sys.stdout.flush()
        sys.stdout.write(text.rest())

    def _cancel(self, asked: Arguments) -> None:
        states = self._queue.store.states(self._queue.resolve(asked.ids))
        before = {job_id for job_id, state in states.items() if state in FINAL}
        jobs = self._queue.cancel(*asked.ids)
        named = {part.strip() for text in asked.ids for part in text.split(",")}
        new = [job for job in jobs if job.id not in before]
        # Of a sweep those are meant that are not over yet.
        over = [job for job in jobs if job.id in before and (str(job.id) in named or not new)]
        for state in dict.fromkeys(job.state for job in over):
            self._tell(f"is over already ({state})", [job for job in over if job.state is state])
        self._tell("cancelled", [job for job in new if job.ended])
        self._tell("is being ended", [job for job in new if not job.ended])

    def _priority(self, asked: Arguments) -> None:
        jobs = self._queue.set_priority(asked.ids, asked.priority)
        self._tell(f"has priority {asked.priority}", jobs)

    def _top(self, asked: Arguments) -> None:
        job = self._queue.top(asked.id)
        self._tell(f"has priority {job.priority}", [job])

    def _wait(self, asked: Arguments) -> None:
        try:
            jobs = self._session.cells.wait(asked.ids, asked.timeout)
        except TimeoutError as exc:
            raise UserError(str(exc)) from None
        self._table(
            JOB_COLUMNS,
            job_table(self._queue, jobs, self._session.monitor, fold=True),
            None,
            numeric=("id", "priority"),
        )

    def _requeue(self, asked: Arguments) -> None:
        ids = self._queue.resolve(asked.ids)
        cells = {number for number in ids if self._queue.show(number).kind is JobKind.CELL}
        for number in ids:
            if number in cells:
                self._tell("waits again", [self._session.cells.requeue(self._queue.show(number))])
        others = [number for number in ids if number not in cells]
        if others:
            self._tell("waits again", self._queue.requeue(*(others if cells else asked.ids)))

    def _drain(self, asked: Arguments) -> None:
        self._queue.drain()
        print("drained: what runs goes on, nothing more starts")

    def _resume(self, asked: Arguments) -> None:
        self._queue.resume()
        print("resumed")

    def _history(self, asked: Arguments) -> None:
        from gpusched_ipy import ledger

        if asked.json:
            _print_json(ledger.history_json(self._queue, asked))
            return
        table = ledger.history_table(self._queue, asked)
        self._table(table.columns, table.rows, table.caption, numeric=table.numeric)

    def _stats(self, asked: Arguments) -> None:
        from gpusched_ipy import ledger

        if asked.json:
            _print_json(ledger.stats_json(self._queue, asked, self._session.monitor))
            return
        table = ledger.stats_table(self._queue, asked, self._session.monitor)
        self._table(table.columns, table.rows, table.caption, numeric=table.numeric)

    # -- the others

    def run(self, fields: dict[str, Any]) -> None:
        """``%gpurun``: queue a command."""
        if fields.pop("dry_run", False):
            print(self._queue.preview(**fields))
            return
        done = self._queue.submit_all(**fields)
        for remark in filter(None, (done.note, done.caution)):
            print(remark)
        if not done.queued:
            return
        job, count = done.queued[0], len(done.queued)
        what = f"#{job.id} {clean(job.name)}"
        if done.array is not None:
            what = f"#{ranges(job.id for job in done.queued)} {clean(job.name)} \u00d7{count}"
        drained = "; the queue is drained, %gpuq resume starts jobs again"
        print(
            f"queued {what} · priority {job.priority} · %gpuq log {job.id} "
            f"shows its output{drained if self._queue.drained else ''}"
        )

    def gpus(self, asked: Arguments) -> None:
        """``%gpus``: read the GPUs, and show them."""
        look = Look(self._queue, self._session.monitor)
        snapshot = look.now()
        now = self._queue.clock.now()
        if asked.json:
            _print_json(gpus_json(snapshot, now))
            return
        rows = gpu_rows(snapshot, now, jobs=look.jobs, members=look.members)
        note = gpus_note(snapshot, now, self._session.monitor.explanation)
        self._table(GPU_COLUMNS, rows, note, numeric=("index",))

    def panel(self) -> Any:
        """``%gpupanel``: the live panel, or its still picture in a headless run."""
        from gpusched_ipy.panel import panel_of

        session = self._session
        return panel_of(
            session.queue, session.monitor, session.settings, live=session.front.attended
        )

    def plot(self, asked: Arguments) -> Any:
        """``%gpuplot``: a figure of the last minutes."""
        from gpusched_ipy.panel.plots import plot_usage

        monitor = self._session.monitor
        job = None if asked.job is None else self._queue.show(asked.job)
        monitor.read_now()
        now = self._queue.clock.now().wall
        jobs = self._queue.ran_since(now - asked.last)
        return plot_usage(
            monitor.history(asked.last),
            jobs if job is None else [job],
            gpus=None if job is None or not job.gpus else job.gpus,
            now=now,
        )

    def free(self) -> None:
        """``%gpufree``: give cached GPU memory of this kernel back."""
        freed = framework.free_caches()
        if freed.bytes:
            each = [f"{name} {format_bytes(size)}" for name, size in freed.bytes.items()]
            print(f"given back: {format_bytes(freed.total_bytes)} ({', '.join(each)})")
        elif not (freed.keepers or freed.faults):
            print("no framework of this kernel holds GPU memory that it could give back")
        for name in freed.keepers:
            print(f"{name} keeps what it has taken of a GPU until the kernel ends")
        for fault in freed.faults:
            print(f"not emptied: {fault}")

    # -- showing

    def _jobs(self, jobs: list[Job], caption: str | None, *, fold: bool) -> None:
        rows = job_table(self._queue, jobs, self._session.monitor, fold=fold)
        self._table(JOB_COLUMNS, rows, caption, numeric=("id", "priority"))

    def _table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | Sequence[str]]],
        caption: str | None,
        numeric: Sequence[str] = (),
    ) -> None:
        rows = list(rows)
        if self._session.front.kernel is None:
            show_table(columns, rows)
            if caption:
                print(caption)
            return
        lines = [*plain_table(columns, rows), *([caption] if caption else [])]
        html = html_table(columns, rows, caption=caption, numeric=numeric)
        replay.show_data({"text/plain": "\n".join(lines), "text/html": html}, {})

    def _tell(self, what: str, jobs: list[Job]) -> None:
        for line in told(what, [job.id for job in jobs]):
            print(line)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
