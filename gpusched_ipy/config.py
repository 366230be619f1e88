"""Settings, and where each came from.

Order, the first that speaks wins: an option of the call > ``%config GpuQueue`` or ``--set`` >
environment (``GPUSCHED_<SETTING>``) > ``config.toml`` in the user's configuration folder > default.
Nothing is ever read from the working directory.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpusched_ipy.clock import Clock as Clock
from gpusched_ipy.clock import Instant as Instant
from gpusched_ipy.clock import SystemClock as SystemClock
from gpusched_ipy.errors import UserError

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgtKMGT]?)(i?[bB])?\s*")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SPAN = re.compile(
    r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?"
)


def parse_bytes(text: object) -> int:
    """Bytes of a size like ``8G``, ``500MiB`` or ``1048576`` (powers of 1024, as in Slurm).

    Raises:
        UserError: it is not such a size, or it is negative.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = _SIZE.fullmatch(str(text))
    if found is None:
        raise UserError(
            f"{text!s} is not a size; write for example 8G, 500MiB or a number of bytes"
        )
    return int(float(found[1]) * 1024 ** _POWERS[found[2].lower()])


def parse_seconds(text: object) -> float:
    """Seconds of a span like ``2h``, ``90m``, ``1d12h``, ``1:30:00`` or ``45`` (seconds).

    Raises:
        UserError: it is not such a span, or it is not above zero.
    """
    seconds = _clock_span(str(text)) if ":" in str(text) else _unit_span(str(text))
    if seconds is None or seconds <= 0:
        raise UserError(f"{text!s} is not a time span; write for example 2h, 90m, 1:30:00 or 45s")
    return seconds


def _unit_span(text: str) -> float | None:
    found = _SPAN.fullmatch(text.strip().lower())
    if found is None or not any(found.groups()):
        return None
    return sum(
        float(part) * unit
        for part, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True)
        if part
    )


def _clock_span(text: str) -> float | None:
    parts = text.strip().split(":")
    if len(parts) not in (2, 3) or not all(part.isdigit() for part in parts):
        return None
    hours, minutes, seconds = (int(part) for part in [*parts, "0"][:3])
    return float(hours * 3600 + minutes * 60 + seconds) if minutes < 60 and seconds < 60 else None


def _ratio(text: object) -> float:
    raw = str(text).strip()
    try:
        value = float(raw[:-1]) / 100 if raw.endswith("%") else float(raw)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{text!s} is not a ratio; write 0.1 or 10%")
    return value


def _number(low: float, high: float) -> Callable[[object], float]:
    def parse(text: object) -> float:
        try:
            value = float(str(text))
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise UserError(f"{text!s} is not a number from {low:g} to {high:g}")
        return value

    return parse


def _count(low: int, high: int) -> Callable[[object], int]:
    def parse(text: object) -> int:
        try:
            value = int(str(text))
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise UserError(f"{text!s} is not a whole number from {low} to {high}")
        return value

    return parse


def _flag(text: object) -> bool:
    value = {"1": True, "true": True, "yes": True, "on": True}.get(str(text).strip().lower())
    if value is None and str(text).strip().lower() in ("0", "false", "no", "off"):
        return False
    if value is None:
        raise UserError(f"{text!s} is neither true nor false")
    return value


def _choice(*allowed: str) -> Callable[[object], str]:
    def parse(text: object) -> str:
        if str(text) not in allowed:
            raise UserError(f"{text!s} is not one of {', '.join(allowed)}")
        return str(text)

    return parse


# Where jobs run: on this machine, or with an engine of this package or of another one.
LOCAL = "local"
ENGINES = (LOCAL, "slurm", "ray")
ENGINE_GROUP = "gpusched.engines"


def parse_engine(text: object) -> str:
    """The name of an engine.

    Raises:
        UserError: there is no such engine here.
    """
    name = str(text)
    if name in ENGINES:
        return name
    from importlib.metadata import entry_points

    known = sorted({*ENGINES, *(point.name for point in entry_points(group=ENGINE_GROUP))})
    if name not in known:
        raise UserError(f"{name} is no engine; there are {', '.join(known)}")
    return name


def _words(text: object) -> tuple[str, ...]:
    """A list of names: a TOML array, or text separated by commas."""
    if isinstance(text, (list, tuple)):
        return tuple(str(item) for item in text)
    return tuple(part.strip() for part in str(text).split(",") if part.strip())


def _argv(text: object) -> tuple[str, ...]:
    """An argument vector: a TOML array, or a line quoted as in a shell (which is never used)."""
    if isinstance(text, (list, tuple)):
        return tuple(str(item) for item in text)
    return tuple(shlex.split(str(text)))


def _optional_argv(text: object) -> tuple[str, ...] | None:
    return None if text is None else _argv(text) or None


def _share_or_bytes(text: object) -> float | int:
    """A share of the card (``50%`` becomes 0.5) or bytes (``8G``)."""
    return _ratio(text) if str(text).strip().endswith("%") else parse_bytes(text)


def _optional_span(high_s: float) -> Callable[[object], float]:
    """Seconds of a span up to a limit; 0 says no."""

    def parse(text: object) -> float:
        seconds = 0.0 if str(text).strip() == "0" else parse_seconds(text)
        if seconds > high_s:
            raise UserError(f"{text!s} is more than the {high_s:g} s that are allowed")
        return seconds

    return parse


def _optional_text(text: object) -> str | None:
    return str(text) if text not in (None, "") else None


def _optional_path(text: object) -> Path | None:
    return Path(str(text)).expanduser() if text not in (None, "") else None


def _setting(default: Any, parse: Callable[[object], Any], doc: str) -> Any:
    """A field of :class:`Settings`: its default as a user would write it, its parser, its help."""
    return field(default=parse(default), metadata={"parse": parse, "doc": doc, "shown": default})


BACKENDS = ("auto", "nvml", "nvidia-smi", "powermetrics", "ioreg", "amd", "intel", "fake")
DESKTOP = (
    "Xorg,Xwayland,gnome-shell,kwin_x11,kwin_wayland,plasmashell,mutter,sway,Hyprland,weston,"
    "cosmic-comp,xfwm4,cinnamon,picom,WindowServer"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, parsed; ``sources`` says for each name where its value came from."""

    max_utilization: float = _setting(0.10, _ratio, "above it a card with a stranger is busy")
    max_foreign_memory: int = _setting(
        "500MiB",
        parse_bytes,
        "strangers' memory that an exclusive job tolerates (or 5 % of the card)",
    )
    ignore_processes: tuple[str, ...] = _setting(
        DESKTOP, _words, "names or paths of processes that never count"
    )
    quiet_s: float = _setting(2.0, _number(0, 3600), "the quiet window: for how many seconds …")
    quiet_samples: int = _setting(3, _count(1, 1000), "… and in how many readings in a row")
    sample_interval_s: float = _setting(1.0, _number(0.05, 3600), "seconds between two readings")
    sampling: bool = _setting(
        True, _flag, "false: read the GPUs once, for their names; leases alone decide"
    )
    memory_margin: int = _setting("512MiB", parse_bytes, "kept clear when jobs share a card")
    default_memory: float | int = _setting(
        "50%", _share_or_bytes, "what a job that declares no memory is booked with"
    )
    end_over_memory: bool = _setting(
        False, _flag, "true: end a job that uses far more memory than it declared with --mem"
    )
    order: str = _setting("fair", _choice("fair", "shortest"), "which pending job goes first")
    aging_s: float = _setting(
        600, _number(1, 1e9), "one priority step per so many seconds of waiting"
    )
    aging_backlog: float = _setting(
        0.0, _number(0, 10), "a step is at least this share of the time that all which waits takes"
    )
    retry_delay_s: float = _setting(
        10, _number(0, 600), "seconds before a failed job is tried again; doubled for each next try"
    )
    park_python: bool = _setting(
        True, _flag, "false: isolated cells and calls start their Python only with their turn"
    )
    wait: bool = _setting(False, _flag, "true: every queued cell holds its place")
    release_caches: str = _setting(
        "when_others_wait",
        _choice("when_others_wait", "always", "never"),
        "when an idle kernel, or one after a cell, gives cached GPU memory back",
    )
    warn_unqueued: bool = _setting(False, _flag, "warn when an ordinary cell uses the GPU")
    engine: str = _setting("local", parse_engine, "where jobs run: local, slurm, ray, …")
    engine_dir: Path | None = _setting(
        None, _optional_path, "the folder of jobs at engines, which every node sees as well"
    )
    slurm_options: tuple[str, ...] = _setting(
        "", _argv, "options of sbatch for every job there: --partition=gpu --account=lab"
    )
    slurm_keep: float = _setting(
        0,
        _optional_span(3600),
        "how long what a job has had at Slurm is kept idle, like 10m; 0: not",
    )
    ray_address: str | None = _setting(
        None, _optional_text, "the dashboard of the Ray head, like http://head:8265"
    )
    ray_token_file: Path | None = _setting(
        None, _optional_path, "a file with Ray's token; else where Ray itself looks for it"
    )
    log_cap: int = _setting("100MB", parse_bytes, "size of a job's log: its head and tail are kept")
    keep_days: int = _setting(30, _count(0, 36500), "days that ended jobs and their logs are kept")
    keep_size: int = _setting("5GB", parse_bytes, "size up to which logs and transcripts are kept")
    panel_hz: float = _setting(1.0, _number(0.1, 4), "updates of the panel a second, at most 4")
    notify: tuple[str, ...] | None = _setting(
        None, _optional_argv, "argv of a hook that is run when a batch is done, or bell"
    )
    backend: str = _setting("auto", _choice(*BACKENDS), "how the GPUs are read")
    fake: Path | None = _setting(None, _optional_path, "the script of the fake GPUs (a JSON file)")
    nvidia_smi: tuple[str, ...] = _setting(
        "nvidia-smi", _argv, "argv of nvidia-smi, for example ssh host nvidia-smi"
    )
    state_dir: Path | None = _setting(None, _optional_path, "the private folder of the queue")
    lock_dir: Path | None = _setting(
        None, _optional_path, "a folder of GPU locks shared between containers or users"
    )
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All settings, in the order of the documentation."""
        return tuple(item.name for item in fields(cls) if "parse" in item.metadata)

    @classmethod
    def load(
        cls,
        explicit: Mapping[str, object] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        config_file: Path | None = None,
    ) -> Settings:
        """The settings in force now; ``explicit`` (``%config`` or ``--set``) wins over all others.

        Raises:
            UserError: an unknown setting or a bad value; the message names where it stands.
        """
        environ = os.environ if environ is None else environ
        path = config_path() if config_file is None else config_file
        values: dict[str, Any] = {}
        sources = dict.fromkeys(cls.names(), "default")
        layers = (
            (str(path), _from_file(path)),
            ("environment", _from_environment(environ)),
            ("set", dict(explicit or {})),
        )
        for source, layer in layers:
            for name, raw in layer.items():
                values[name] = cls.parse(name, raw, source)
                sources[name] = source
        return cls(**values, sources=MappingProxyType(sources))

    @classmethod
    def parse(cls, name: str, raw: object, source: str = "set") -> Any:
        """The value of one setting.

        Raises:
            UserError: there is no such setting, or ``raw`` is not a value for it.
        """
        known = {item.name: item for item in fields(cls) if "parse" in item.metadata}
        if name not in known:
            raise UserError(
                f"there is no setting {name!r} ({source}); `gpusched doctor` lists them all"
            )
        try:
            return known[name].metadata["parse"](raw)
        except UserError as exc:
            raise UserError(f"setting {name} ({source}): {exc}") from None


def config_path() -> Path:
    """Where ``config.toml`` is looked for."""
    from platformdirs import user_config_path

    return user_config_path("gpusched_ipy", appauthor=False) / "config.toml"


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Settings among the variables; an empty variable counts as not set."""
    wanted = {f"GPUSCHED_{name.upper()}": name for name in Settings.names()}
    return {name: environ[key] for key, name in wanted.items() if environ.get(key)}


def _from_file(path: Path) -> dict[str, object]:
    import tomllib

    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise UserError(f"{path} cannot be read ({exc.strerror}); mend its permissions") from exc
    except tomllib.TOMLDecodeError as exc:
        raise UserError(f"{path} is not valid TOML: {exc}") from exc
