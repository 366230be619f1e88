"""NVIDIA GPUs by NVML, through nvidia-ml-py: the first choice wherever NVIDIA's driver is loaded.

It initialises NVML for itself, keeps that working handle (through a driver upgrade too), takes back
only its own initialisation, and starts again with a growing pause where the driver is gone. It
never wakes a suspended card and never shows an older value as a new one.
"""

from __future__ import annotations

import time
from typing import Any

from gpusched_ipy.backends import Detail
from gpusched_ipy.backends._nvidia_pci import PciBus, sysfs_bus_id
from gpusched_ipy.backends._nvidia_processes import Identities
from gpusched_ipy.backends._nvml_calls import Calls
from gpusched_ipy.backends._nvml_library import (
    DEAD,
    DRIVER_NOT_LOADED,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    OK,
    RESTART,
    UNINITIALIZED,
    Library,
    NvmlError,
    explain,
    health_of,
    load_pynvml,
    why_not_loaded,
)
from gpusched_ipy.backends._nvml_unit import COMPUTE_MODES, Facts, Unit
from gpusched_ipy.config import Clock, Instant, Settings, SystemClock
from gpusched_ipy.errors import BackendUnavailableError
from gpusched_ipy.snapshot import Gpu, Health, Snapshot

# Cards and instances are looked for again so often, and at once when a handle stops working.
_ENUMERATE_S = 10.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class NvmlBackend:
    """The NVIDIA GPUs of this machine.

    With MIG on, the instances are the GPUs and the card is not listed: nothing can run on it. A
    card with MIG on and no instance is listed with health ``unknown`` and says so.

    Args:
        clock: stamps the readings and measures the pauses between attempts.
        bus: the kernel's view of the cards.
        identities: who the listed pids are.
        nvml: the module of nvidia-ml-py; None imports it.

    Raises:
        BackendUnavailableError: nvidia-ml-py is missing or another package stands in its place.
    """

    name = "nvml"
    source = "NVML (libnvidia-ml through nvidia-ml-py)"
    authoritative_pids = False

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        bus: PciBus | None = None,
        identities: Identities | None = None,
        nvml: Any = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._bus = bus or PciBus()
        self._identities = identities or Identities()
        self._library = Library(nvml or load_pynvml())
        self._calls: Calls | None = None
        self._driver: str | None = None
        self._watching = False  # for the length of a reading
        self._units: tuple[Unit, ...] = ()
        self._fixed: tuple[Gpu, ...] = ()  # cards that answer nothing but who they are
        self._sleepers: dict[str, str] = {}  # UUID to bus address of cards that may be suspended
        self._facts: dict[int, Facts] = {}  # by NVML's index: a lost card no longer tells its name
        self._listed = 0
        self._enumerated_at: float | None = None
        self._pause_s = 0.0
        self._retry_at = 0.0
        self._failed: int | None = None  # the code that ended the last attempt

    def watch(self, detail: Detail = Detail.FULL) -> Snapshot:
        """As :meth:`read`, for a reading that starts nothing by itself.

        The process list of a card whose used memory is to the byte what it was at its last list is
        taken from there for up to 5 s: a process that comes or goes takes or frees some, and asking
        is the dearest call there is, for the users of the card as well.
        """
        return self.read(detail, watching=True)

    def read(self, detail: Detail = Detail.FULL, *, watching: bool = False) -> Snapshot:
        """The GPUs now; what went wrong as a whole is the problem of the snapshot."""
        self._watching = watching
        self._identities.begin()
        began = time.perf_counter()
        now = self._clock.now()
        problem: str | None = None
        gpus: tuple[Gpu, ...] = ()
        try:
            if not self._library.held and self._bus.all_asleep():
                gpus = self._bus.sleeping_gpus()
            else:
                gpus = self._read(detail, now)
                problem = None if gpus else self._nothing_visible()
        except (NvmlError, ValueError) as exc:
            # ValueError: a text of the driver that nvidia-ml-py cannot decode.
            problem = str(exc)
        return Snapshot(
            backend=self.name,
            source=self.source,
            taken_at=now.wall,
            taken_mono=now.mono,
            driver=self._driver,
            read_s=time.perf_counter() - began,
            problem=problem,
            gpus=gpus,
        )

    def open(self) -> int:
        """Initialise NVML unless every card is asleep; the code of the library (0: done)."""
        if self._bus.all_asleep():
            return OK
        try:
            self._start(self._clock.now())
        except NvmlError as exc:
            return exc.code
        return OK

    def close(self) -> None:
        """Let go of NVML, so that a card that may sleep can; a later reading opens it again."""
        self._library.shutdown()
        self._forget()
        self._failed, self._pause_s = None, 0.0

    def _read(self, detail: Detail, now: Instant) -> tuple[Gpu, ...]:
        """One attempt and, where the library or the cards have changed under us, a second one."""
        try:
            return self._attempt(detail, now)
        except NvmlError as exc:
            if self._calls is None:
                raise
            self._renew(exc.code)
        try:
            return self._attempt(detail, now)
        except NvmlError as exc:
            if self._calls is not None:
                self._renew(exc.code)
                self._rest(exc.code, now)
            raise

    def _renew(self, code: int) -> None:
        """Let go of what ``code`` says no longer works."""
        if code in RESTART:
            self._library.shutdown(lost=code == UNINITIALIZED)
            self._forget()
        else:
            self._enumerated_at = None

    def _attempt(self, detail: Detail, now: Instant) -> tuple[Gpu, ...]:
        if self._calls is None:
            self._start(now)
        due = self._enumerated_at
        if due is None or now.mono - due >= _ENUMERATE_S:
            self._enumerate()
            self._enumerated_at = now.mono
        if not self._sleepers:
            again = self._watching
            read = tuple([unit.read(detail, now.wall, again) for unit in self._units])
        else:
            read = tuple([self._read_or_leave(unit, detail, now.wall) for unit in self._units])
        if not self._fixed:
            return read
        return tuple(sorted((*read, *self._fixed), key=lambda gpu: gpu.index or 0))

    def _read_or_leave(self, unit: Unit, detail: Detail, wall: float) -> Gpu:
        bus_id = self._sleepers.get(unit.facts.uuid)
        if bus_id is not None and self._bus.asleep(bus_id):
            text = "suspended to save power; it is not woken only to be looked at"
            return unit.facts.gpu(Health.ASLEEP, text)
        return unit.read(detail, wall, self._watching)

    def _start(self, now: Instant) -> None:
        """Initialise, or fail at once while the pause after the last failure lasts."""
        if self._failed is not None and now.mono < self._retry_at:
            raise NvmlError(self._failed)
        code = self._library.init()
        if code:
            self._rest(code, now)
            raise NvmlError(code)
        self._failed, self._pause_s = None, 0.0
        self._driver = self._library.driver()
        self._calls = Calls(self._library)

    def _rest(self, code: int, now: Instant) -> None:
        """Leave the driver alone for a while, longer with each failure."""
        self._failed = code
        self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2 or _FIRST_PAUSE_S)
        self._retry_at = now.mono + self._pause_s

    def _forget(self) -> None:
        self._calls = None
        self._units = self._fixed = ()
        self._enumerated_at = None

    def _enumerate(self) -> None:
        units: list[Unit] = []
        fixed: list[Gpu] = []
        self._sleepers = {}
        nvml = self._library.nvml
        try:
            self._listed = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as exc:
            raise NvmlError(exc.value) from exc
        for index in range(self._listed):
            try:
                units += self._found(index)
            except nvml.NVMLError as exc:
                if exc.value in RESTART:
                    raise NvmlError(exc.value) from exc
                if exc.value != NO_PERMISSION:
                    fixed.append(self._broken(index, exc.value))
            except _NoInstanceError as exc:
                fixed.append(self._facts[index].gpu(Health.UNKNOWN, str(exc)))
        self._units, self._fixed = tuple(units), tuple(fixed)

    def _found(self, index: int) -> list[Unit]:
        handle = self._library.nvml.nvmlDeviceGetHandleByIndex(index)
        return self._instances(handle, self._card(handle, index))

    def _card(self, handle: Any, index: int) -> Facts:
        nvml = self._library.nvml
        bus_id = _text(nvml.nvmlDeviceGetPciInfo(handle).busId)
        facts = Facts(
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            index=index,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            bus_id=bus_id,
            compute_mode=COMPUTE_MODES.get(self._optional(nvml.nvmlDeviceGetComputeMode, handle)),
        )
        self._facts[index] = facts
        address = sysfs_bus_id(bus_id)
        if self._bus.may_sleep(address):
            self._sleepers[facts.uuid] = address
        return facts

    def _broken(self, index: int, code: int) -> Gpu:
        """A card that does not even tell its name: the one that was last known at this index."""
        unknown = Facts(f"nvidia:index:{index}", index, "NVIDIA GPU", None)
        return self._facts.get(index, unknown).gpu(health_of(code), explain(code))

    def _instances(self, handle: Any, card: Facts) -> list[Unit]:
        """The card itself or, with MIG on, its instances.

        Raises:
            _NoInstanceError: MIG is on and there is none, or none that we may see.
        """
        assert self._calls is not None
        nvml = self._library.nvml
        mode = self._optional(nvml.nvmlDeviceGetMigMode, handle)
        if mode is None or mode[0] != 1:
            return [Unit(handle, card, self._calls, self._identities)]
        found: list[Unit] = []
        for slot in range(self._optional(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            instance = self._optional(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)
            facts = None if instance is None else self._instance(instance, card, slot)
            if facts is not None:
                found.append(Unit(instance, facts, self._calls, self._identities, handle))
        if not found:
            raise _NoInstanceError(
                f"MIG is on and GPU {card.index} has no instance that this user can see; "
                "`nvidia-smi mig -cgi PROFILE -C` (as root) makes one"
            )
        return found

    def _instance(self, handle: Any, card: Facts, slot: int) -> Facts | None:
        nvml = self._library.nvml
        uuid = self._optional(nvml.nvmlDeviceGetUUID, handle)
        if uuid is None:
            return None
        name = _text(self._optional(nvml.nvmlDeviceGetName, handle) or card.name)
        return Facts(
            uuid=_text(uuid),
            index=card.index,
            name=name if "MIG" in name else f"{name} MIG {slot}",
            bus_id=card.bus_id,
            parent=card.uuid,
            instance=slot,
            compute_mode=card.compute_mode,
        )

    def _optional(self, getter: Any, *args: Any) -> Any:
        """A value that older drivers or other cards do not have; None where it is not given."""
        nvml = self._library.nvml
        try:
            return getter(*args)
        except nvml.NVMLError as exc:
            if exc.value in RESTART or exc.value in DEAD:
                raise
            return None

    def _nothing_visible(self) -> str:
        if self._listed:
            return f"NVML lists {self._listed} GPUs and this process may use none of them"
        return (
            "the NVIDIA driver answers but shows no GPU to this process (a container without its "
            "GPUs, or a card that fell off the bus); `nvidia-smi -L` on the host shows them"
        )


class _NoInstanceError(Exception):
    """MIG is on, and there is no instance to read."""


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def open_nvml(settings: Settings, clock: Clock) -> NvmlBackend:
    """NVML of this machine; a driver that is there and not well is opened and reports its problem.

    Raises:
        BackendUnavailableError: no NVIDIA driver is installed or loaded, or no nvidia-ml-py.
    """
    backend = NvmlBackend(clock)
    code = backend.open()
    if code == LIBRARY_NOT_FOUND:
        raise BackendUnavailableError(why_not_loaded())
    if code == DRIVER_NOT_LOADED:
        raise BackendUnavailableError(explain(code))
    return backend
