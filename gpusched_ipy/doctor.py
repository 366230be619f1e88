"""``gpusched doctor``: what works on this machine, what does not, and what to do about it.

It changes nothing but making the state directory where that is missing, and it goes on after each
fault: a broken setting must not hide a broken driver.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpusched_ipy._version import __version__
from gpusched_ipy.agent import running_agent
from gpusched_ipy.backends import Backend, Detail, Detected, detect
from gpusched_ipy.bell import Bell
from gpusched_ipy.config import BACKENDS, Settings, config_path
from gpusched_ipy.devicefiles import closed_to_us, device_files, group_of
from gpusched_ipy.errors import UserError
from gpusched_ipy.snapshot import Gpu, Health, Snapshot
from gpusched_ipy.statedir import StateDir, network_file_system, open_state_dir
from gpusched_ipy.store import Store
from gpusched_ipy.terminal import DONE, FAILED
from gpusched_ipy.view import clean, format_bytes

_PACKAGES = (
    *("ipython", "ipykernel", "jupyter_client", "jupyterlab", "ipywidgets", "anywidget"),
    *("nvidia-ml-py", "psutil", "watchdog", "matplotlib"),
)
# Variables of this name that are no settings: a job's own, and those of the tests.
_NO_SETTINGS = frozenset(
    {
        *("GPUSCHED_JOB_ID", "GPUSCHED_JOB_NAME"),
        *("GPUSCHED_CAPTURES", "GPUSCHED_TRACES", "GPUSCHED_REQUIRE"),
    }
)
# For one backend, which gives a tool 10 s itself: a hung driver is a finding, not a hang.
_PATIENCE_S = 15.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. A fault says what to do; what is merely told has no advice."""

    text: str
    fault: bool = False
    advice: str | None = None


T = TypeVar("T")
Section = tuple[str, Iterator[Finding]]


def examine(explicit: Mapping[str, object]) -> int:
    """Print the report; the status is 1 where a fault was found."""
    faults = 0
    for title, findings in _sections(explicit):
        print(title)
        for finding in findings:
            faults += finding.fault
            print(f"  {'FAULT' if finding.fault else '     '} {clean(finding.text)}")
            if finding.advice:
                print(f"        -> {clean(finding.advice)}")
    print(f"\n{faults} fault{'' if faults == 1 else 's'} found" if faults else "\nno fault found")
    return FAILED if faults else DONE


def _sections(explicit: Mapping[str, object]) -> Iterator[Section]:
    yield "Versions", _versions()
    try:
        settings = Settings.load(explicit)
    except UserError as exc:
        advice = "mend it there; GPUs and queue are examined once the settings can be read"
        yield "Settings", iter([Finding(str(exc), fault=True, advice=advice)])
        return
    yield "GPUs", _gpus(settings)
    yield "Queue", _queue(settings)
    yield f"Settings (file: {config_path()})", _settings(settings)


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding(f"gpusched_ipy {__version__}, Python {python} ({sys.executable})")
    yield Finding(f"{platform.platform()}")
    for name in _PACKAGES:
        try:
            yield Finding(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(f"{name}: not installed here")


def _gpus(settings: Settings) -> Iterator[Finding]:
    used: str | None = None
    for name in BACKENDS[1:]:
        wanted = _is_wanted(name, settings, used)
        found = _within(_PATIENCE_S, partial(detect, replace(settings, backend=name)))
        if isinstance(found, Detected) and found.backend is None:
            yield _refused(name, found, named=settings.backend == name)
            continue
        used = name if wanted else used
        if isinstance(found, Detected) and found.backend is not None:
            mark = "in use" if wanted else "works, not in use"
            yield Finding(f"{name} ({mark}): {found.backend.source}")
            yield from _reading(_within(_PATIENCE_S, partial(_read, found.backend)), wanted)
        else:
            yield _broken(f"{name}:", found, wanted)
    if used is None:
        yield Finding(
            "no GPU can be read: jobs wait",
            fault=True,
            advice="the lines above say why; on a machine without a GPU give a script of fake ones "
            "(GPUSCHED_FAKE=/path/to/fake.json)",
        )


def _refused(name: str, found: Detected, *, named: bool) -> Finding:
    reason = "; ".join(why for _, why in found.refused)
    advice = _advice(reason) or "choose another backend, or auto"
    return Finding(f"{name}: {reason}", fault=named, advice=advice if named else None)


def _broken(what: str, found: object, wanted: bool) -> Finding:
    """A backend that hangs (None) or raises what it must not."""
    if found is None:
        text = f"{what} no answer within {_PATIENCE_S:g} s"
        return Finding(text, wanted, "the driver hangs: look at `dmesg`; a reboot may be needed")
    text = f"{what} {type(found).__name__}: {found}"
    return Finding(text, wanted, "this is a fault of gpusched_ipy: please report it")


def _is_wanted(name: str, settings: Settings, used: str | None) -> bool:
    """Whether this is the backend that the queue uses."""
    if settings.backend != "auto":
        return settings.backend == name
    if settings.fake is not None:
        return name == "fake"
    return used is None


def _within(limit_s: float, call: Callable[[], T]) -> T | Exception | None:
    """What ``call`` gives or raises, or None when it does not come back in time."""
    answers: list[T | Exception] = []

    def ask() -> None:
        try:
            answers.append(call())
        except Exception as exc:  # noqa: BLE001 - whatever a backend does is a finding
            answers.append(exc)

    asked = threading.Thread(target=ask, daemon=True)
    asked.start()
    asked.join(limit_s)
    return answers[0] if answers else None


def _read(backend: Backend) -> Snapshot:
    try:
        return backend.read(Detail.FULL)
    finally:
        backend.close()


def _reading(snapshot: Snapshot | Exception | None, wanted: bool) -> Iterator[Finding]:
    if not isinstance(snapshot, Snapshot):
        yield _broken("    reading:", snapshot, wanted)
        return
    if snapshot.problem is not None:
        advice = _advice(snapshot.problem)
        yield Finding(f"    reading failed: {snapshot.problem}", wanted, advice)
    if snapshot.driver is not None:
        yield Finding(f"    driver {snapshot.driver}")
    for gpu in snapshot.gpus:
        number = gpu.number or "-"
        memory = format_bytes(gpu.mem_total_bytes)
        yield Finding(f"    GPU {number}: {gpu.name}, {memory}, {gpu.uuid}")
        yield from _gpu_faults(gpu, wanted)
    for vendor in sorted({gpu.vendor for gpu in snapshot.gpus}):
        yield from _device_files(vendor, wanted)


def _gpu_faults(gpu: Gpu, wanted: bool) -> Iterator[Finding]:
    if gpu.health in _HEALTH_ADVICE:
        text = f"    {gpu.health}{f' ({gpu.health_text})' if gpu.health_text else ''}"
        yield Finding(text, fault=wanted, advice=_HEALTH_ADVICE[gpu.health])
    elif gpu.health_text is not None:
        # It sleeps, or a source that only adds to the reading (macmon, xpu-smi) says nothing.
        yield Finding(f"    {gpu.health_text}")
    if gpu.health is not Health.OK:
        return
    if gpu.processes is None:
        yield Finding("    its processes cannot be seen here: utilization and memory decide")
    elif any(not process.visible for process in gpu.processes):
        yield Finding("    some of its processes belong to other containers: strangers")


def _device_files(vendor: str, wanted: bool) -> Iterator[Finding]:
    files = device_files(vendor)
    closed = closed_to_us(files)
    for path in closed:
        group = group_of(path)
        yield Finding(
            f"    {path} cannot be opened by this user: programs find no GPU",
            fault=wanted,
            advice=f"as root: usermod -aG {group} NAME, then log in again",
        )
    if files and not closed:
        yield Finding(f"    may be opened: {', '.join(map(str, files))}")


_HEALTH_ADVICE = {
    Health.UNKNOWN: "nothing is started on it; mend what is said there, or look at `dmesg`",
    Health.LOST: "it has fallen off the bus: reboot; if it comes back like this, look at `dmesg`",
    Health.RESET_REQUIRED: "end what uses it and ask an administrator for `nvidia-smi --gpu-reset`",
    Health.DRIVER_MISMATCH: "the driver was updated while it was loaded: reboot",
}
# What a reason speaks of, and what helps; the first that is found.
_ADVICE = (
    ("mismatch", "the driver was updated while it was loaded: reboot, or load its new modules"),
    ("permission", "ask for access to the GPU's files (groups video and render)"),
    ("no answer within", "the driver hangs: look at `dmesg`; a reboot may be needed"),
    ("printed nothing for", "the driver hangs: look at `dmesg`; a reboot may be needed"),
    ("not found", "install the GPU's driver; in a container give it the GPU (`--gpus all`)"),
    ("no such file", "install the GPU's driver, or mend the path in the settings"),
    ("script", "mend the script of the fake GPUs (setting fake)"),
)


def _advice(reason: str) -> str | None:
    return next((advice for word, advice in _ADVICE if word in reason.casefold()), None)


def _queue(settings: Settings) -> Iterator[Finding]:
    try:
        state = open_state_dir(settings)
        yield from _folder(state)
        store = Store(state)
    except UserError as exc:
        yield Finding(str(exc), fault=True, advice=_state_advice(str(exc)))
        return
    try:
        yield from _record(state, store)
    except UserError as exc:
        yield Finding(str(exc), fault=True, advice=_state_advice(str(exc)))
    finally:
        store.close()


def _folder(state: StateDir) -> Iterator[Finding]:
    mode = stat.S_IMODE(state.root.stat().st_mode)
    where = network_file_system(state.root) or "local file system"
    yield Finding(f"state directory {state.root} (mode {mode:04o}, {where})")
    if state.note:
        yield Finding(state.note)
    room = os.statvfs(state.root)
    free = room.f_bavail * room.f_frsize
    little = free < 100 * 2**20
    yield Finding(
        f"{format_bytes(free)} free there",
        fault=little,
        advice="make room: jobs and logs cannot be recorded on a full disk" if little else None,
    )


def _record(state: StateDir, store: Store) -> Iterator[Finding]:
    jobs = store.jobs()
    size = state.database.stat().st_size
    yield Finding(f"record {state.database}: {format_bytes(size)}, {len(jobs)} open jobs")
    for number in store.damaged:
        text = f"job {number} is damaged in the record: it is left out, the others go on"
        yield Finding(text, fault=True, advice=_state_advice(text))
    if store.drained:
        yield Finding(
            f"the queue is drained ({store.drained}): nothing starts",
            advice="`gpusched resume` starts jobs again",
        )
    agent = running_agent(state, store)
    yield Finding("no agent runs; a submit starts one" if agent is None else f"agent: pid {agent}")
    bell = Bell(state.bell, lambda: None)
    bell.close()
    if bell.polling:
        yield Finding(
            bell.polling,
            fault=True,
            advice="raise fs.inotify.max_user_instances; until then changes are seen 0.25 s later",
        )


def _state_advice(text: str) -> str:
    if "damaged" in text:
        return "end all notebooks and the agent, then `gpusched doctor --fix`; a backup is kept"
    return "or choose another local folder with GPUSCHED_STATE_DIR"


def _settings(settings: Settings) -> Iterator[Finding]:
    for name in Settings.names():
        yield Finding(f"{name} = {_shown(settings, name)}  ({settings.sources[name]})")
    known = {f"GPUSCHED_{name.upper()}" for name in Settings.names()} | _NO_SETTINGS
    for name in sorted(os.environ):
        if name.startswith("GPUSCHED_") and name not in known:
            yield Finding(
                f"the variable {name} is no setting: it has no effect",
                fault=True,
                advice="mend its name or remove it; the settings are listed above",
            )
    lock_dir: Path | None = settings.lock_dir
    if lock_dir is not None and not os.access(lock_dir, os.R_OK | os.X_OK):
        yield Finding(
            f"lock_dir {lock_dir} cannot be used",
            fault=True,
            advice="make the folder and let the users of these GPUs read it",
        )


def _shown(settings: Settings, name: str) -> object:
    """A value as its user would write it; a default as the documentation has it."""
    if settings.sources[name] == "default":
        return next(item.metadata["shown"] for item in fields(Settings) if item.name == name)
    value = getattr(settings, name)
    return ",".join(value) if isinstance(value, tuple) else value
