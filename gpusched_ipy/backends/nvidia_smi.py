"""NVIDIA GPUs by nvidia-smi: where NVML cannot be loaded, and for a wrapped or remote command.

Utilization and memory come from one long-lived looping nvidia-smi, so that a light reading starts
no process; its newest round is stamped with its own arrival. A reading with processes, which is
what a start is decided on, never uses the loop: it asks once, now, so that every value in it is
newer than the call. What nvidia-smi says in place of data is a health or a problem, never a number.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Sequence

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends._child import find, run_any
from gpusched_ipy.backends._nvidia_faults import Fault, FaultKind, unknown_text
from gpusched_ipy.backends._nvidia_loop import Loop
from gpusched_ipy.backends._nvidia_mig import instances
from gpusched_ipy.backends._nvidia_pci import PciBus
from gpusched_ipy.backends._nvidia_processes import Identities
from gpusched_ipy.backends._nvidia_text import Answer, App, Row, ended, parse_apps, parse_query
from gpusched_ipy.backends._nvidia_unified import unified_memory
from gpusched_ipy.backends._nvidia_xml import parse_list, parse_xml
from gpusched_ipy.config import Clock, Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendReadError, BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, GpuProcess, MemoryKind, Snapshot

MINIMAL = ("index", "uuid", "name", "utilization.gpu", "memory.total", "memory.used")
LIGHT = (
    *("count", "index", "uuid", "pci.bus_id", "name", "driver_version", "utilization.gpu"),
    *("memory.total", "memory.used", "memory.reserved", "compute_mode", "mig.mode.current"),
)
FULL = (
    *LIGHT,
    *("temperature.gpu", "power.draw", "enforced.power.limit", "clocks.current.sm"),
    *("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
)
APPS = ("gpu_uuid", "pid", "used_gpu_memory", "process_name")
_TOLD = (0, 14)  # 14: it told all, and that the infoROM of a card is corrupt
_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_ABSENT = (FaultKind.NO_DRIVER, FaultKind.NO_LIBRARY)
_KINDS = {"C": "compute", "G": "graphics", "M": "compute", "M+C": "compute", "C+G": "both"}


class NvidiaSmiBackend:
    """The NVIDIA GPUs that an nvidia-smi command shows.

    A command of more than one word (``ssh host nvidia-smi``) may speak of another machine: its pids
    are never looked up here, and memory that GPU and CPU share is unknown.

    Args:
        argv: the command; the options are added to it.
        clock: stamps the readings and measures the pauses after a hang.
        interval_s: between two rounds of the loop.
        timeout_s: after so long a single answer counts as hung.
        bus: the kernel's view of the cards.
        identities: who the listed pids are.
    """

    name = "nvidia-smi"
    authoritative_pids = False

    def __init__(
        self,
        argv: Sequence[str],
        clock: Clock | None = None,
        *,
        interval_s: float = 1.0,
        timeout_s: float = _TIMEOUT_S,
        bus: PciBus | None = None,
        identities: Identities | None = None,
    ) -> None:
        self.argv = tuple(argv)
        self.local = len(self.argv) == 1
        self.source = shlex.join(self.argv)
        self._clock = clock or SystemClock()
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._bus = bus or PciBus()
        self._identities = identities or Identities()
        self._refused: set[str] = set()
        self._minimal = False
        self._loop: Loop | None = None
        self._loop_at = 0.0
        self._loop_pause_s = 0.0
        self._driver: str | None = None
        self._pause_s = 0.0
        self._retry_at = 0.0
        self._hung: str | None = None

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        """The GPUs now (with ``LOAD``: at the newest round); never older data as new."""
        self._identities.begin()
        began = time.perf_counter()
        now = self._clock.now()
        mono, problem = now.mono, None
        gpus: tuple[Gpu, ...] = ()
        try:
            if self._asleep():
                gpus = self._bus.sleeping_gpus()
            elif detail is Detail.LOAD:
                mono, gpus = self._light(now)
            else:
                gpus = self._ask(detail, now)
        except BackendReadError as exc:
            problem = str(exc)
        return Snapshot(
            backend=self.name,
            source=self.source,
            taken_at=now.wall - (now.mono - mono),
            taken_mono=mono,
            driver=self._driver,
            read_s=time.perf_counter() - began,
            problem=problem,
            gpus=gpus,
        )

    def close(self) -> None:
        """End the looping nvidia-smi; a later reading starts another one."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def fault(self) -> Fault | None:
        """Why nvidia-smi gives no data now; None: it does.

        Raises:
            BackendReadError: it cannot be started or gives no answer.
        """
        if self._asleep():
            return None
        answer, fault = self._heard(LIGHT)
        return None if answer.rows else fault

    def _asleep(self) -> bool:
        return self.local and self._loop is None and self._bus.all_asleep()

    def _light(self, now: Instant) -> tuple[float, tuple[Gpu, ...]]:
        """The newest round; before the first one a single answer."""
        if self._loop is None:
            answer = self._answer(LIGHT, now)  # also learns which fields this nvidia-smi knows
            if now.mono >= self._loop_at:
                self._loop = Loop(self.argv, self._fields(LIGHT), self._interval_s, self._clock)
            return now.mono, self._gpus(answer, None)
        newest = self._loop.newest()
        problem = self._loop.problem
        if problem is not None:
            self.close()
            self._loop_pause_s = _longer(self._loop_pause_s)
            self._loop_at = now.mono + self._loop_pause_s
            raise BackendReadError(problem)
        if newest is None:
            return now.mono, self._gpus(self._answer(LIGHT, now), None)
        self._loop_pause_s = 0.0
        return newest.mono, self._gpus(Answer(newest.rows, newest.faults, None), None)

    def _ask(self, detail: Detail, now: Instant) -> tuple[Gpu, ...]:
        self._leave_alone(now)
        apps: list[tuple[App, ...] | None] = []
        asking = threading.Thread(
            target=lambda: apps.append(self._apps()), name="gpusched-nvidia-smi", daemon=True
        )
        asking.start()
        try:
            answer = self._answer(FULL if detail is Detail.FULL else LIGHT, now)
        finally:
            asking.join(self._timeout_s + 1)
        return self._gpus(answer, apps[0] if apps else None)

    def _answer(self, fields: tuple[str, ...], now: Instant) -> Answer:
        """An answer with data.

        Raises:
            BackendReadError: there is none; after a hang also for a pause that grows.
        """
        self._leave_alone(now)
        answer, fault = self._heard(fields)
        if not answer.rows:
            raise BackendReadError(fault.text)
        return answer

    def _heard(self, fields: tuple[str, ...]) -> tuple[Answer, Fault]:
        """As :meth:`_query`; remembers a hang."""
        try:
            heard = self._query(fields)
        except BackendReadError as exc:
            self._hung = str(exc)
            self._pause_s = _longer(self._pause_s)
            self._retry_at = self._clock.now().mono + self._pause_s
            raise
        self._hung, self._pause_s = None, 0.0
        return heard

    def _leave_alone(self, now: Instant) -> None:
        """Start nothing for a while after a hang: processes that cannot die must not pile up."""
        if self._hung is not None and now.mono < self._retry_at:
            raise BackendReadError(self._hung)

    def _query(self, fields: tuple[str, ...]) -> tuple[Answer, Fault]:
        """One answer, and what it says where it has no data; fields unknown to it are given up."""
        while True:
            asked = self._fields(fields)
            status, text = self._run(f"--query-gpu={','.join(asked)}", "--format=csv")
            answer = parse_query(text)
            fault = answer.faults[0] if answer.faults else unknown_text(text, status)
            if answer.rows or fault.kind is not FaultKind.BAD_FIELD or asked == MINIMAL:
                return answer, fault
            if fault.field in asked:
                self._refused.add(str(fault.field))
            else:
                self._minimal = True

    def _fields(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        if self._minimal:
            return MINIMAL
        return tuple(field for field in wanted if field not in self._refused)

    def _apps(self) -> tuple[App, ...] | None:
        """The compute processes; None where they cannot be had."""
        try:
            status, text = self._run(f"--query-compute-apps={','.join(APPS)}", "--format=csv")
        except BackendReadError:
            return None  # unknown, which is what the snapshot then says
        return parse_apps(text) if status in _TOLD else None

    def _run(self, *options: str) -> tuple[int, str]:
        status, output, errors = run_any((*self.argv, *options), self._timeout_s)
        text = output.decode("utf-8", "replace")
        said = text if text.strip() else errors.decode("utf-8", "replace")
        return status, ended(said) if status in _TOLD else said

    def _gpus(self, answer: Answer, apps: tuple[App, ...] | None) -> tuple[Gpu, ...]:
        rows = tuple(row for row in answer.rows if row.uuid is not None)
        cards = tuple(fault for fault in answer.faults if fault.bus_id is not None)
        counts = [row.count for row in answer.rows if row.count is not None]
        if len(rows) < len(answer.rows) or (counts and max(counts) > len(rows) + len(cards)):
            missing = max([*counts, len(answer.rows)]) - len(rows)
            raise BackendReadError(f"{self.source} did not answer for {missing} of the GPUs")
        self._driver = next((row.driver for row in rows if row.driver), self._driver)
        divided = self._divided() if any(row.mig for row in rows) else {}
        found: list[Gpu] = []
        for row in rows:
            found += divided.get(str(row.uuid)) or [self._gpu(row, apps, len(rows) == 1)]
        return (*found, *(_broken(fault) for fault in cards))

    def _gpu(self, row: Row, apps: tuple[App, ...] | None, alone: bool) -> Gpu:
        used, total, pressure = row.mem_used_bytes, row.mem_total_bytes, None
        unified = row.mem_unsupported and row.health == "ok"
        if unified and self.local:
            used, total, pressure = unified_memory()
        return Gpu(
            uuid=str(row.uuid),
            index=row.index,
            name=row.name or "NVIDIA GPU",
            vendor="nvidia",
            bus_id=row.bus_id,
            health=row.health,
            health_text=row.health_text,
            utilization=row.utilization,
            utilization_window_s=None if row.utilization is None else 1.0,
            mem_used_bytes=used,
            mem_total_bytes=total,
            mem_reserved_bytes=row.mem_reserved_bytes,
            mem_kind=MemoryKind.UNIFIED if unified else MemoryKind.DEDICATED,
            mem_pressure=pressure,
            temperature_c=row.temperature_c,
            power_w=row.power_w,
            power_limit_w=row.power_limit_w,
            sm_clock_mhz=row.sm_clock_mhz,
            throttled=row.throttled,
            compute_mode=row.compute_mode,
            processes=self._processes(row, apps, alone),
        )

    def _processes(
        self, row: Row, apps: tuple[App, ...] | None, alone: bool
    ) -> tuple[GpuProcess, ...] | None:
        if apps is None or row.health != "ok":
            return None
        listed = [app for app in apps if app.uuid == row.uuid or (app.uuid is None and alone)]
        if not listed and self.local and not self._identities.host_pids:
            return None  # in a container the list is empty whoever uses the card
        return tuple(self._process(app.pid, "C", app.mem_bytes, app.name) for app in listed)

    def _process(
        self, pid: int, kind: str | None, mem_bytes: int | None, name: str | None
    ) -> GpuProcess:
        kind = _KINDS.get(kind or "")
        if not self.local:
            return GpuProcess(pid=pid, name=name, mem_bytes=mem_bytes, kind=kind, visible=False)
        who = self._identities.find(pid)
        return GpuProcess(
            pid=pid,
            user=who.user,
            name=who.name or (name if who.visible else None),
            mem_bytes=mem_bytes,
            kind=kind,
            started_at=who.started_at,
            visible=who.visible,
        )

    def _divided(self) -> dict[str, list[Gpu]]:
        """The instances of each card that is divided, by the UUID of the card."""
        xml = parse_xml(self._run("-q", "-x")[1])
        listed = parse_list(self._run("-L")[1])
        return {
            str(card.row.uuid): list(instances(card, number, listed, self._process))
            for number, card in enumerate(xml.gpus)
            if card.row.mig
        }


def _longer(pause_s: float) -> float:
    return min(_LONGEST_PAUSE_S, pause_s * 2 or _FIRST_PAUSE_S)


def _broken(fault: Fault) -> Gpu:
    return Gpu(
        uuid=f"nvidia:{fault.bus_id}",
        name="NVIDIA GPU",
        vendor="nvidia",
        bus_id=fault.bus_id,
        health=fault.health,
        health_text=fault.text,
    )


def open_nvidia_smi(settings: Settings, clock: Clock) -> NvidiaSmiBackend:
    """The nvidia-smi of the settings; one that is there and not well is opened and reports it.

    Raises:
        BackendUnavailableError: there is no such command, or no NVIDIA driver behind it.
    """
    argv = settings.nvidia_smi
    if not argv or find(argv[0]) is None:
        raise BackendUnavailableError(
            f"there is no command {argv[0] if argv else ''!r} (setting nvidia_smi)"
        )
    backend = NvidiaSmiBackend(argv, clock, interval_s=settings.sample_interval_s)
    try:
        fault = backend.fault()
    except BackendReadError:
        return backend  # it hangs: there is a driver, and the first reading says what is wrong
    if fault is not None and fault.kind in _ABSENT:
        raise BackendUnavailableError(fault.text)
    return backend
