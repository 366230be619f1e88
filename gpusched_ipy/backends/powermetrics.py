"""Apple GPUs: ioreg for what decides, powermetrics or macmon for what is nice to know.

``ioreg`` gives utilization, memory in use and GPU time per process without root. Power, clock and
temperature come from one long-lived ``sudo -n powermetrics`` (backend "powermetrics") or, where it
is installed, ``macmon pipe`` (backend "ioreg"). Both command lines are fixed: no text of a user's
reaches sudo. What the second source cannot give is unknown, and ``health_text`` says why; only a
failing ioreg makes a reading a problem.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends import _apple_text as text
from gpusched_ipy.backends import _values as values
from gpusched_ipy.backends._child import find, run_once
from gpusched_ipy.backends._feed import Feed
from gpusched_ipy.backends._owners import Owner, Owners
from gpusched_ipy.config import Clock, Settings
from gpusched_ipy.errors import BackendReadError, BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, GpuProcess, MemoryKind, Snapshot

INTERVAL_MS = 1000
POWERMETRICS = "/usr/bin/powermetrics"
# Without -n it goes on for ever (-n 0 is "no sample"); -b 0 turns its output buffer off.
POWERMETRICS_ARGV = (
    *("sudo", "-n", POWERMETRICS, "-b", "0", "-i", str(INTERVAL_MS)),
    *("--samplers", "gpu_power,thermal", "-f", "plist"),
)
MACMON_ARGV = ("macmon", "pipe", "-i", str(INTERVAL_MS))
IOREG_ARGV = ("ioreg", "-r", "-d", "1", "-w", "0", "-c", "IOAccelerator", "-a")
# The processes hang below the accelerator; matching by their class finds none of them.
IOREG_CLIENTS_ARGV = ("ioreg", "-l", "-r", "-d", "3", "-w", "0", "-c", "IOAccelerator", "-a")
PRESSURE_ARGV = ("sysctl", "-n", "kern.memorystatus_vm_pressure_level")
MEMSIZE_ARGV = ("sysctl", "-n", "hw.memsize")
_TIMEOUT_S = 5.0
_LONGEST_S = 60.0  # the mean of a longer pause says nothing of the present
_FRESH_S = INTERVAL_MS / 1000 + 3
_VENDORS = (("AGX", "apple"), ("AMD", "amd"), ("ATI", "amd"), ("Intel", "intel"), ("NV", "nvidia"))


@dataclass(slots=True)
class _Times:
    """GPU time of each client at one reading, to be compared with the next."""

    mono: float
    gpu_ns: dict[tuple[int, str | None], int]


class AppleBackend:
    """The GPUs of a Mac.

    Args:
        name: "powermetrics" or "ioreg".
        feed: the second source, or None.
        mem_total_bytes: the memory of the machine, which the GPU shares.
        clock: stamps the readings.
    """

    authoritative_pids = False

    def __init__(
        self, name: str, feed: Feed[text.Sample] | None, mem_total_bytes: int | None, clock: Clock
    ) -> None:
        self.name = name
        self.source = "ioreg" if feed is None else f"ioreg, {' '.join(feed.argv)}"
        self._feed = feed
        self._mem_total_bytes = mem_total_bytes
        self._clock = clock
        self._owners = Owners()
        self._times: dict[int, _Times] = {}

    def read(self, detail: Detail = Detail.FULL) -> Snapshot:
        """The GPUs now; an ioreg that fails or shows no GPU is a problem."""
        started = self._clock.now()
        gpus: tuple[Gpu, ...] = ()
        problem = None
        try:
            gpus = self._gpus(detail)
            problem = None if gpus else "ioreg shows no GPU"
        except (BackendReadError, ValueError) as exc:
            problem = str(exc)
        now = self._clock.now()
        return Snapshot(
            backend=self.name,
            source=self.source,
            taken_at=now.wall,
            taken_mono=now.mono,
            read_s=now.mono - started.mono,
            problem=problem,
            gpus=gpus,
        )

    def close(self) -> None:
        """End the second source; a later reading starts it again."""
        self._times.clear()
        if self._feed is not None:
            self._feed.close()

    def _gpus(self, detail: Detail) -> tuple[Gpu, ...]:
        with_clients = detail >= Detail.PROCESSES
        output = run_once(IOREG_CLIENTS_ARGV if with_clients else IOREG_ARGV, _TIMEOUT_S)
        found = text.parse_ioreg(output)
        sample = self._feed.latest() if self._feed is not None and detail >= Detail.FULL else None
        pressure = read_pressure()
        return tuple(
            self._gpu(position, item, sample if _is_apple(item) else None, pressure, with_clients)
            for position, item in enumerate(found)
        )

    def _gpu(
        self,
        position: int,
        item: text.Accelerator,
        sample: text.Sample | None,
        pressure: str | None,
        with_clients: bool,
    ) -> Gpu:
        dedicated = item.vram_total_bytes is not None
        sample = sample or text.Sample()
        return Gpu(
            uuid=f"apple:{position}",
            index=position,
            name=_name(item),
            vendor=_vendor(item),
            health_text=self._feed.problem if self._feed is not None else None,
            utilization=_either(item.utilization, sample.active),
            utilization_window_s=sample.elapsed_s if item.utilization is None else None,
            mem_used_bytes=item.mem_used_bytes,
            mem_total_bytes=item.vram_total_bytes if dedicated else self._mem_total_bytes,
            mem_kind=MemoryKind.DEDICATED if dedicated else MemoryKind.UNIFIED,
            mem_pressure=None if dedicated else pressure,
            temperature_c=_either(item.temperature_c, sample.temperature_c),
            power_w=_either(item.power_w, sample.power_w),
            sm_clock_mhz=_either(item.freq_mhz, sample.freq_mhz),
            throttled=text.is_throttled(sample.thermal_pressure),
            processes=self._processes(position, item) if with_clients else None,
        )

    def _processes(self, position: int, item: text.Accelerator) -> tuple[GpuProcess, ...]:
        """Every process with a connection to the GPU; how much memory each holds is not told."""
        now = self._clock.now().mono
        before = self._times.get(position)
        times = {(client.pid, client.name): client.gpu_ns for client in item.clients}
        self._times[position] = _Times(
            now, {key: ns for key, ns in times.items() if ns is not None}
        )
        return tuple(
            _process(client, self._owners.of(client.pid), _busy(client, before, now))
            for client in item.clients
        )


def read_pressure() -> str | None:
    """The memory pressure of the machine in words; None where sysctl does not tell it."""
    try:
        return text.parse_pressure(run_once(PRESSURE_ARGV, _TIMEOUT_S))
    except BackendReadError:
        return None  # unknown stays unknown: GPU readings do not depend on it


def open_powermetrics(settings: Settings, clock: Clock) -> AppleBackend:
    """ioreg and powermetrics by sudo; waits for the first reading of powermetrics (about 1 s).

    Raises:
        BackendUnavailableError: this is not a Mac, or sudo does not let powermetrics run without a
            password.
    """
    _require_ioreg()
    if find("sudo") is None:
        raise BackendUnavailableError("powermetrics needs root, and sudo is not on PATH")
    feed = Feed(
        POWERMETRICS_ARGV,
        text.parse_powermetrics,
        clock,
        separator=b"\0",
        end=b"</plist>",
        fresh_s=_FRESH_S,
    )
    if feed.wait_first(_FRESH_S) is None:
        reason = feed.problem or "it printed no reading"
        feed.close()
        raise BackendUnavailableError(
            f"`sudo -n {POWERMETRICS}` does not work ({reason}); "
            f"a sudoers line with NOPASSWD: {POWERMETRICS} allows it"
        )
    return AppleBackend("powermetrics", feed, _memory_total(), clock)


def open_ioreg(settings: Settings, clock: Clock) -> AppleBackend:
    """ioreg without root, and macmon where it is on PATH.

    Raises:
        BackendUnavailableError: this is not a Mac, or ioreg shows no GPU.
    """
    _require_ioreg()
    feed = None
    if find(MACMON_ARGV[0]) is not None:
        feed = Feed(MACMON_ARGV, text.parse_macmon, clock, separator=b"\n", fresh_s=_FRESH_S)
    return AppleBackend("ioreg", feed, _memory_total(), clock)


def _require_ioreg() -> None:
    if find(IOREG_ARGV[0]) is None:
        raise BackendUnavailableError("this is not a Mac (ioreg is not on PATH)")
    try:
        found = text.parse_ioreg(run_once(IOREG_ARGV, _TIMEOUT_S))
    except (BackendReadError, ValueError) as exc:
        raise BackendUnavailableError(str(exc)) from None
    if not found:
        raise BackendUnavailableError("ioreg shows no GPU")


def _memory_total() -> int | None:
    try:
        told = values.whole(run_once(MEMSIZE_ARGV, _TIMEOUT_S).decode("ascii", "replace"))
    except BackendReadError:
        told = None
    if told:
        return told
    import psutil

    return int(psutil.virtual_memory().total)


def _either(first: float | None, second: float | None) -> float | None:
    return second if first is None else first


def _is_apple(item: text.Accelerator) -> bool:
    return item.vram_total_bytes is None


def _vendor(item: text.Accelerator) -> str:
    said = f"{item.class_name} {item.name or ''}".upper()
    return next((vendor for mark, vendor in _VENDORS if mark.upper() in said), "apple")


def _name(item: text.Accelerator) -> str:
    base = item.name or item.class_name or "Apple GPU"
    return f"{base} ({item.cores}-core GPU)" if item.cores else base


def _process(client: text.Client, owner: Owner, utilization: float | None) -> GpuProcess:
    return GpuProcess(
        pid=client.pid,
        user=owner.user,
        name=owner.name or client.name,
        utilization=utilization,
        started_at=owner.started_at,
    )


def _busy(client: text.Client, before: _Times | None, now: float) -> float | None:
    """GPU time since the last reading over wall time; None without one or when it ran backwards."""
    if before is None or client.gpu_ns is None or not 0 < now - before.mono <= _LONGEST_S:
        return None
    earlier = before.gpu_ns.get((client.pid, client.name))
    if earlier is None or client.gpu_ns < earlier:
        return None
    return min(1.0, (client.gpu_ns - earlier) / 1e9 / (now - before.mono))
