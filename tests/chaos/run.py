"""One chaos run: start the members, let the nemesis at them, let the queue drain, check.

A long run does so in rounds, on the same records: what has been reached by then is checked in full
after each, and counts even where the run ends early.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from gpusched_ipy import summon
from gpusched_ipy.config import Settings
from gpusched_ipy.job import Job
from gpusched_ipy.process import become_subreaper
from gpusched_ipy.statedir import StateDir, open_state_dir
from gpusched_ipy.store import Store
from tests.chaos import check, failpoints, launch, members
from tests.chaos.ledger import Ledger
from tests.chaos.nemesis import Nemesis
from tests.chaos.tree import Process, processes, send

# The members of a run, in turn: what they are, and in which box.
_CAST = (
    ("submitter", 0), ("kernel", 0), ("kernel", 1), ("commander", 0), ("submitter", 1),
    ("kernel", 0), ("commander", 1), ("kernel", 1),
)  # fmt: skip
_SWEEP_RATE = 3.0  # enough to replace those who never come by their failpoint
_SWEEP_LEFT = 5  # points that are rare; they are still looked for afterwards
_LOOK_EVERY = 25  # actions between two looks at the leases
_SAY_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is to do.

    Attributes:
        rate: bad things a second.
        failpoints: share of the processes that is to die at a failpoint, after the sweep.
        sweep_s: the longest that the failpoints are waited for first; 0: not at all.
        patience_s: with no nemesis and no change for so long, the queue is stuck.
        round_kills: after so many kills the queue drains and all is checked; 0: once, at the end.
        until: the violation that is waited for, whatever else is found; None: any ends the run.
        limit_s: how long the nemesis is at work at most; 0: as long as it takes.
    """

    kills: int
    seed: int
    members: int = 6
    gpus: int = 3
    rate: float = 12.0
    failpoints: float = 0.2
    sweep_s: float = 60.0
    mutant: str | None = None
    patience_s: float = 20.0
    round_kills: int = 0
    until: str | None = None
    limit_s: float = 0.0


class Run:
    """A run in a folder of its own. The process that makes it must have one thread only.

    Args:
        say: is told in a line how far it is.
        checked: is given the report after each round.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        say: Callable[[str], None] = lambda line: None,
        checked: Callable[[dict[str, Any]], None] = lambda report: None,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.enough = False  # set by whoever wants an early end, with all checks
        self._say = say
        self._checked = checked
        self._began = self._said = time.monotonic()
        self._drained_s = 0.0
        self.boxes = [folder / "box0", folder / "box1"]
        self._dice = random.Random(plan.seed)
        self._living: dict[int, str] = {}
        self._members: dict[int, tuple[str, int]] = {}
        self._wrong: list[str] = []
        self._prepare()
        self.ledger = Ledger(folder)
        self.nemesis = Nemesis(self._dice, self._look)

    def go(self) -> dict[str, Any]:
        """Do it all, and give the report; every process of the run is gone afterwards."""
        become_subreaper()
        summon.python_argv = launch.argv_of
        done = False
        while not done:
            try:
                done = self._round()
            finally:
                self._end_all()
            report = self._report()
            self._checked(report)
            done = done or bool(report["violations"])
        return report

    def _round(self) -> bool:
        """Let them work and die for a while, then let the queue drain; whether it was the last."""
        drain = self.folder / "drain"
        drain.unlink(missing_ok=True)
        first = self.nemesis.kills == 0
        os.environ["CHAOS_FAILPOINTS"] = "1" if first else str(self.plan.failpoints)
        for kind, box in islice(cycle(_CAST), self.plan.members):
            self._fork(kind, box)
        if first:
            self._sweep()
        step = self.plan.round_kills or self.plan.kills
        self._rage(min(self.plan.kills, self.nemesis.kills + step))
        self.enough = self.enough or self._over
        drain.touch()
        os.environ["CHAOS_FAILPOINTS"] = "0"
        began = time.monotonic()
        if not self._failed:
            self._drain()
            self._dismiss()
        self._drained_s += time.monotonic() - began
        return self.enough or self._failed or self.nemesis.kills >= self.plan.kills

    # -- the run

    def _prepare(self) -> None:
        cards = [
            {"uuid": f"GPU-fake-{n}", "memory_total": "40GiB", "memory_used": 0, "utilization": 0,
             "processes": []}
            for n in range(self.plan.gpus)
        ]  # fmt: skip
        # The first card is that of the first box alone; the boxes share all others.
        for box, seen in zip(self.boxes, (cards, cards[1:]), strict=True):
            box.with_suffix(".json").write_text(json.dumps({"gpus": seen}))
        for name in ("locks", "died"):
            (self.folder / name).mkdir(mode=0o700)
        for name in ("ledger", "witness", "members.log"):
            (self.folder / name).touch()
        for name in [name for name in os.environ if name.startswith("GPUSCHED_")]:
            del os.environ[name]
        os.environ |= {
            "CHAOS_FOLDER": str(self.folder),
            "CHAOS_MUTANT": self.plan.mutant or "",
            "GPUSCHED_LOCK_DIR": str(self.folder / "locks"),
            "GPUSCHED_SAMPLE_INTERVAL_S": "0.1",
            "GPUSCHED_QUIET_S": "0.1",
            "GPUSCHED_ORDER": "fair",
            "XDG_CONFIG_HOME": str(self.folder / "config"),
        }
        for box in self.boxes:
            members.see_gpus(str(box))
            Store(open_state_dir(Settings.load({"state_dir": str(box)}))).close()

    def _sweep(self) -> None:
        """Every process is to die at a failpoint, until somebody has died at nearly each."""
        limit = time.monotonic() + self.plan.sweep_s
        self._harass(
            _SWEEP_RATE,
            lambda: (
                time.monotonic() >= limit
                or len(failpoints.never_reached(self.folder)) <= _SWEEP_LEFT
            ),
        )
        os.environ["CHAOS_FAILPOINTS"] = str(self.plan.failpoints)

    def _rage(self, kills: int) -> None:
        self._harass(self.plan.rate, lambda: self.nemesis.kills >= kills)
        self.nemesis.wake_due(everybody=True)

    def _harass(self, rate: float, enough: Callable[[], bool]) -> None:
        actions = 0
        while not (enough() or self.enough or self._over or self._failed):
            time.sleep(min(1.0, self._dice.expovariate(rate)))
            self._bury_and_replace()
            self.nemesis.act()
            actions += 1
            if actions % _LOOK_EVERY == 0:
                self._look_at_leases()
                self.ledger.read()
                self._say_now_and_then()

    def _drain(self) -> None:
        """With nobody killed any more, every job must come to its end by itself."""
        seen: object = None
        since = time.monotonic()
        while True:
            self._bury_and_replace()
            opened = [self._open_jobs(box) for box in self.boxes]
            if not any(opened):
                return
            if opened != seen:
                seen, since = opened, time.monotonic()
            if time.monotonic() - since > self.plan.patience_s:
                self._wrong.append(f"I10 nothing moves any more: {_shortly(opened)}")
                return
            time.sleep(0.1)

    def _open_jobs(self, box: Path) -> list[str]:
        """How the open jobs stand; sees to it that an agent lives, as the next submit would."""
        store = Store(StateDir(box))
        for job in store.jobs():
            if job.held:  # its submitter was killed before it could release it
                store.set_held(job.id, False)
        found = [
            f"{job.id} {job.state} {job.epoch} {job.reason.text if job.reason else ''}"
            for job in store.jobs()
        ]
        store.close()
        if found:
            members.see_gpus(str(box))
            summon.ensure_agent(StateDir(box))
        return found

    def _dismiss(self) -> None:
        """Everybody leaves by himself; what then still lives is a stray."""
        for process in self._look():
            if process.kind in (*members.MEMBERS, "agent"):
                send(process, signal.SIGTERM)
        deadline = time.monotonic() + self.plan.patience_s
        while (left := self._look()) and time.monotonic() < deadline:
            self._bury()
            time.sleep(0.05)
        self._wrong += [f"I5 process left: {process}" for process in left]
        if left:
            self._show_where(left)

    def _show_where(self, left: list[Process]) -> None:
        """Let those who do not leave say what they are doing."""
        for process in left:
            if process.kind in (*members.MEMBERS, "agent", "shim"):
                send(process, signal.SIGUSR2)
        time.sleep(1.0)
        for log in (self.folder / "members.log", *(box / "agent.log" for box in self.boxes)):
            if log.exists():
                self._say(f"-- {log.name}\n" + "\n".join(log.read_text().splitlines()[-60:]))

    # -- processes

    def _look(self) -> list[Process]:
        kinds = {pid: kind for pid, (kind, _) in self._members.items()}
        return processes(os.getpid(), kinds)

    def _fork(self, kind: str, box: int) -> None:
        self._members[members.fork(kind, str(self.boxes[box]))] = (kind, box)

    def _bury(self) -> list[tuple[str, int]]:
        """Collect the dead; the members among them are given back."""
        gone: list[tuple[str, int]] = []
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return gone
            if pid == 0:
                return gone
            if pid in self._members:
                gone.append(self._members.pop(pid))

    def _bury_and_replace(self) -> None:
        self.nemesis.wake_due()
        for kind, box in self._bury():
            if kind != "submitter" or not (self.folder / "drain").exists():
                self._fork(kind, box)

    def _end_all(self) -> None:
        """Whatever happened, nothing of this run goes on."""
        while alive := self._look():
            for process in alive:
                send(process, signal.SIGKILL)
            time.sleep(0.02)
            self._bury()
        self._bury()

    # -- what came out

    @property
    def _failed(self) -> bool:
        found = [*self._wrong, *self.ledger.violations]
        until = self.plan.until
        return any(until is None or kind_of(text) == until for text in found)

    @property
    def _over(self) -> bool:
        return 0 < self.plan.limit_s <= time.monotonic() - self._began

    def _look_at_leases(self) -> None:
        for box in self.boxes:
            self._wrong += check.leases_match(StateDir(box))

    def _say_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_S:
            self._said = now
            self._say(
                f"{now - self._began:.0f} s: {self.nemesis.kills} kills, "
                f"{self.ledger.died.total()} deaths at failpoints, "
                f"{len(self.ledger.acknowledged)} jobs, {self.ledger.starts.total()} starts"
            )

    def _report(self) -> dict[str, Any]:
        self.ledger.read()
        jobs: list[Job] = []
        lost: list[str] = []
        if not self._failed:
            for box in self.boxes:
                wrong, found = check.drained_box(box, self.ledger)
                self._wrong += wrong
                jobs += found
            self._wrong += check.held_gpus(self.folder / "locks", self.plan.gpus)
            lost = check.lost(self.ledger, jobs)
        ledger = self.ledger
        return {
            "plan": asdict(self.plan),
            "seconds": round(time.monotonic() - self._began, 1),
            "drain_seconds": round(self._drained_s, 1),
            "kills": self.nemesis.kills,
            "killed": dict(self.nemesis.killed),
            "stops": self.nemesis.stopped,
            "failpoint_deaths": ledger.died.total(),
            "failpoints_never_reached": failpoints.never_reached(self.folder),
            "failpoints": dict(sorted(ledger.died.items())),
            "jobs": len(jobs),
            "acknowledged": len(ledger.acknowledged),
            "outcomes": check.outcomes(jobs),
            "given_up": sum("its shim ended" in (job.error or "") for job in jobs),
            "starts": ledger.starts.total(),
            "claims": sum(job.epoch for job in jobs),
            "gpus_given_twice": len(ledger.overlaps),
            "acknowledged_lost": len(lost),
            "started_twice": len(ledger.repeated),
            "violations": [*ledger.violations, *self._wrong, *(f"I2 lost: {uid}" for uid in lost)],
        }


def kind_of(violation: str) -> str:
    """Which check has found it."""
    return violation.partition(":")[0]


def _shortly(boxes: list[list[str]]) -> str:
    return "; ".join(f"{len(jobs)} open, first {jobs[:4]}" for jobs in boxes)


def report_text(report: dict[str, Any], say: Callable[[str], None]) -> None:
    """The report for people: the figures first, then at most 20 violations."""
    for name in (
        *(
            "seconds",
            "drain_seconds",
            "kills",
            "failpoint_deaths",
            "stops",
            "jobs",
            "acknowledged",
            "starts",
        ),
        *("gpus_given_twice", "acknowledged_lost", "started_twice"),
    ):
        say(f"{name.replace('_', ' '):>20}: {report[name]}")
    missed = report["failpoints_never_reached"]
    say(f"{'failpoints missed':>20}: {len(missed)} {', '.join(missed[:6])}")
    kinds: Counter[str] = Counter(map(kind_of, report["violations"]))
    say(f"{'violations':>20}: {len(report['violations'])} {dict(kinds) if kinds else ''}")
    for text in report["violations"][:20]:
        say(f"  {text}")
