"""The panel as text of one screenful: GPUs with bars and a short history, the queue, the keys.

Pure: what is shown comes in, what rich draws comes out. No string of a job or a process is markup,
and all of them are cleaned of control characters. No meaning hangs on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gpusched_ipy.config import Instant
from gpusched_ipy.entries import Entry
from gpusched_ipy.folding import entry_rows
from gpusched_ipy.job import ExpectedStart
from gpusched_ipy.snapshot import Gpu, Snapshot
from gpusched_ipy.text import UNKNOWN, clean
from gpusched_ipy.view import GpuRow, JobRow, gpu_rows, gpus_note

WINDOW_S = 600.0  # what the history of a GPU spans
KEYS = (
    "↑↓ move · f fold · c cancel · h hold · r release · + - priority · t top · d drain · u resume"
    " · q quit"
)
_KEYS_ASCII = KEYS.replace("↑↓", "arrows").replace(" · ", ", ")
_FRAME = 5  # title, the line about the GPUs, the queue's title, its heading, the keys
_OLD_S = 10.0
_REASONS_FROM = 60  # columns
_WIDE = 150
_STYLES = {
    "running": "green",
    "starting": "cyan",
    "pending": "",
    "held": "magenta",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that one screenful shows."""

    now: Instant
    width: int
    height: int
    snapshot: Snapshot | None = None
    gpus: tuple[Gpu, ...] = ()  # those of the last good reading
    history: Sequence[Snapshot] = ()
    names: Mapping[int, str] | None = None  # what our running jobs are called
    members: Mapping[str, str] | None = None
    explanation: str | None = None
    entries: Sequence[Entry] = ()  # the rows of the queue that are shown, in order
    starts: Mapping[int, ExpectedStart] | None = None  # when jobs are expected to start
    offset: int = 0
    total: int = 0
    counts: Mapping[str, int] | None = None
    drained: str | None = None
    trouble: str | None = None  # why the queue cannot be read
    selected: str | None = None  # the key of a row
    message: str = ""
    unicode: bool = True


def gpu_lines(scene: Scene) -> int:
    """How many GPUs are shown: at most about half of the screen is theirs."""
    return min(len(scene.gpus), max(1, (scene.height - _FRAME) // 2))


def queue_lines(scene: Scene) -> int:
    """How many jobs fit on the screen."""
    more = 1 if gpu_lines(scene) < len(scene.gpus) else 0
    return max(1, scene.height - _FRAME - gpu_lines(scene) - more - 1)


def draw(scene: Scene) -> RenderableType:
    """The screenful."""
    parts: list[RenderableType] = [_line(scene, _title(scene), "bold")]
    parts += _gpus(scene)
    parts.append(_line(scene, _note(scene), "yellow" if _ill(scene) else "dim"))
    parts.append(_line(scene, _queue_title(scene), "bold"))
    rows = scene.entries[: queue_lines(scene)]
    parts.append(_queue(scene, rows) if rows else _line(scene, _empty(scene), "dim"))
    parts += [Text("")] * (queue_lines(scene) - len(rows))
    parts.append(_line(scene, scene.message or _chosen(scene), "yellow" if scene.message else ""))
    parts.append(_line(scene, KEYS if scene.unicode else _KEYS_ASCII, "reverse"))
    return Group(*parts)


def _line(scene: Scene, text: str, style: str = "") -> Text:
    line = Text(clean(text), style=style, no_wrap=True, overflow="ellipsis")
    line.truncate(scene.width, overflow="ellipsis", pad=style == "reverse")
    return line


def _title(scene: Scene) -> str:
    count = len(scene.gpus)
    what = f"{count} GPU{'' if count == 1 else 's'}" if count else "GPUs"
    return f"{what} · the last 10 minutes" if scene.unicode else f"{what}, the last 10 minutes"


def _ill(scene: Scene) -> bool:
    snapshot = scene.snapshot
    return snapshot is not None and (
        snapshot.problem is not None or snapshot.age_s(scene.now.mono) > _OLD_S
    )


def _note(scene: Scene) -> str:
    if scene.snapshot is None:
        return "the first reading is on its way"
    note = gpus_note(scene.snapshot, scene.now, scene.explanation)
    if scene.snapshot.problem and scene.gpus:
        return f"NOT READABLE, numbers are unknown: {note}"
    return f"OLD READING: {note}" if _ill(scene) and not scene.snapshot.problem else note


def _gpus(scene: Scene) -> list[RenderableType]:
    shown = gpu_lines(scene)
    if not shown:
        return []
    table = Table(box=None, show_header=False, pad_edge=False, expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, ratio=2, overflow="ellipsis", min_width=9)
    for _ in range(2 if scene.width >= 60 else 1):
        table.add_column(no_wrap=True)
    if scene.width >= 80:
        table.add_column(no_wrap=True)
    if scene.width >= 110:
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True, ratio=4, overflow="ellipsis", min_width=12)
    fresh = scene.snapshot is not None and scene.snapshot.problem is None
    about = scene.snapshot if fresh else None
    rows = gpu_rows(about, scene.now, jobs=scene.names, members=scene.members) if about else []
    for place, gpu in enumerate(scene.gpus[:shown]):
        row = rows[place] if place < len(rows) else None
        table.add_row(*_gpu_cells(scene, gpu, row)[: len(table.columns)])
    left = len(scene.gpus) - shown
    more = [_line(scene, f"and {left} more GPUs: a taller screen shows them")] if left else []
    return [table, *more]


def _gpu_cells(scene: Scene, gpu: Gpu, row: GpuRow | None) -> list[Text]:
    title = "GPU" if gpu.number is None else f"GPU {gpu.number}"
    used, total = gpu.mem_used_bytes, gpu.mem_total_bytes
    share = used / total if used is not None and total else None
    fresh = row is not None
    utilization = row.utilization if row else UNKNOWN
    cells = [
        Text(title, style="bold"),
        Text(row.name if row else clean(gpu.name, 60)),
        _bar(scene, "use", gpu.utilization if fresh else None, utilization, "blue"),
        _bar(scene, "mem", share if fresh else None, row.memory if row else UNKNOWN, "yellow"),
        _spark(scene, gpu.uuid),
        Text(f"{row.temperature} {row.power}" if row else UNKNOWN),
        Text("; ".join(row.processes) or "no process" if row else "", style="dim"),
    ]
    if scene.width < 60:  # one bar, and both numbers
        cells[2] = _bar(scene, "", gpu.utilization if fresh else None, utilization, "blue")
    return cells


def _bar(scene: Scene, label: str, ratio: float | None, text: str, style: str) -> Text:
    """A bar with its number; an unknown ratio has no bar, never an empty one."""
    width = 10 if scene.width >= _WIDE else 6
    full, empty = ("█", "░") if scene.unicode else ("#", ".")
    line = Text(f"{label} " if label else "")
    if ratio is None:
        line.append("?" * width, style="dim")
    else:
        filled = round(min(1.0, max(0.0, ratio)) * width)
        line.append(full * filled, style=style)
        line.append(empty * (width - filled), style="dim")
    line.append(f" {text}")
    return line


def _spark(scene: Scene, uuid: str) -> Text:
    """Utilization over the window, the newest at the right; a blank where nothing is known."""
    width = 20 if scene.width >= _WIDE else 10
    steps = "▁▂▃▄▅▆▇█" if scene.unicode else "_.:-=+*#"
    highest: list[float | None] = [None] * width
    for snapshot in scene.history:
        place = int((1 - (scene.now.wall - snapshot.taken_at) / WINDOW_S) * width)
        gpu = snapshot.gpu(uuid)
        if gpu is None or gpu.utilization is None or not 0 <= place <= width:
            continue
        place = min(place, width - 1)
        highest[place] = max(highest[place] or 0.0, gpu.utilization)
    last = len(steps) - 1
    text = "".join(
        " " if value is None else steps[round(min(1.0, max(0.0, value)) * last)]
        for value in highest
    )
    return Text(f"|{text}|", style="blue")


def _queue_title(scene: Scene) -> str:
    if scene.trouble:
        return f"Queue: it cannot be read: {scene.trouble}"
    counts = scene.counts or {}
    told = " · ".join(f"{counts.get(key, 0)} {key}" for key in ("running", "waiting", "held"))
    if scene.drained:
        told += f" · DRAINED, nothing new starts ({scene.drained})"
    last = min(scene.total, scene.offset + queue_lines(scene))
    if scene.total > queue_lines(scene):
        told += f" · {scene.offset + 1}-{last} of {scene.total}"
    return f"Queue · {told}" if scene.unicode else f"Queue: {told}".replace(" · ", ", ")


def _empty(scene: Scene) -> str:
    return "" if scene.trouble else "nothing is queued"


def _chosen(scene: Scene) -> str:
    """Where the table has no room for reasons, that of the chosen job."""
    if scene.width >= _REASONS_FROM:
        return ""
    chosen = [entry for entry in scene.entries if entry.key == scene.selected]
    if not chosen:
        return ""
    (row,) = entry_rows(chosen, scene.now, starts=scene.starts)
    return f"#{row.id}: {row.why}"


# A column, its heading, and from which width of the screen on it is there.
_COLUMNS = (
    ("id", "job", 0),
    ("name", "name", 0),
    ("state", "state", 0),
    ("priority", "prio", 50),
    ("gpus", "GPU", 90),
    ("since", "since", 70),
    ("why", "why it waits, when it starts", _REASONS_FROM),
    ("owner", "from", 110),
)
_RATIO = {"name": 2, "why": 5, "owner": 2}


def _queue(scene: Scene, entries: Sequence[Entry]) -> Table:
    columns = [(key, head) for key, head, least in _COLUMNS if scene.width >= least]
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    table.add_column("", width=1, no_wrap=True)
    for key, head in columns:
        table.add_column(
            head,
            no_wrap=True,
            overflow="ellipsis",
            ratio=_RATIO.get(key),
            justify="right" if key in ("id", "priority") else "left",
        )
    numbers = {gpu.uuid: gpu.number for gpu in scene.gpus}
    rows = entry_rows(entries, scene.now, numbers=numbers, starts=scene.starts)
    for entry, row in zip(entries, rows, strict=True):
        chosen = entry.key == scene.selected
        if entry.member:
            row = row._replace(name=f"  {row.name}")
        cells = [Text(getattr(row, key), style=_style(key, row)) for key, _ in columns]
        mark = ("▶" if scene.unicode else ">") if chosen else ""
        table.add_row(Text(mark), *cells, style="reverse" if chosen else "")
    return table


def _style(key: str, row: JobRow) -> str:
    return _STYLES.get(row.state, "yellow") if key == "state" else ""
