"""What the extension costs a notebook's kernel, held against the limits of the project.

Real kernels, everything in one run: `%load_ext` beside an extension with one empty magic; 300 cells
of `pass` with and without the extension, in turns in one kernel; the panel at 1 Hz with 8 GPUs; the
hand-off between commands while the kernel computes (Python, then one long call into C) and while it
is idle. CPU time is counted by the kernel's own accounts, so that other work on the machine shifts
it little; times on the clock are shown beside it.

    python benchmarks/kernel_cost.py [--cells 300] [--loads 15] [--panel 20] [--jobs 50]
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "tests"), str(ROOT)]

EMPTY = """
from IPython.core.magic import Magics, line_magic, magics_class
@magics_class
class Empty(Magics):
    @line_magic
    def empty_magic(self, line):
        pass
def load_ipython_extension(shell):
    shell.register_magics(Empty)
"""
LOAD = """
import sys, time
import ipykernel.ipkernel
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.init_completer()
shell.run_cell("pass")
cpu, wall = time.thread_time(), time.perf_counter()
shell.run_line_magic("load_ext", sys.argv[1])
print((time.thread_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
"""
PYTHON = "import time\nend = time.monotonic() + {s}\nwhile time.monotonic() < end: sum(range(1000))"
C_CALL = "_ = sum(range({n}))"  # one call: no other thread of the kernel runs before it returns


def load_ext(folder: Path, rounds: int) -> tuple[float, float]:
    """Milliseconds of CPU that `%load_ext` takes: ours, and the empty magic. The least of all."""
    (folder / "empty_magic.py").write_text(EMPTY)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env |= {
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),  # as installed: compiled once
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    found: dict[str, list[float]] = {"gpusched_ipy": [], "empty_magic": []}
    for _ in range(rounds + 1):
        for name, values in found.items():
            argv = [sys.executable, "-W", "ignore", "-c", LOAD, name]
            out = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
            values.append(float(out.split()[-2]))
    ours, empty = (values[1:] for values in found.values())  # the first has compiled
    print(
        f"`%load_ext`, ms of CPU, {rounds} fresh processes each: "
        f"ours {min(ours):.2f} (median {statistics.median(ours):.2f}), "
        f"one empty magic {min(empty):.2f} (median {statistics.median(empty):.2f})"
    )
    return min(ours), min(empty)


@contextmanager
def kernel(folder: Path, **environment: str) -> Iterator[Any]:
    """A real kernel."""
    from kernels import Kernel

    folder.mkdir()
    made = Kernel(folder, **environment)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def cpu_s(made: Any) -> float:
    """CPU seconds of the kernel and all its threads."""
    tasks = Path(f"/proc/{made.manager.provisioner.pid}/task")
    spent = 0
    for task in tasks.iterdir():
        try:
            spent += int((task / "schedstat").read_text().split()[0])
        except OSError:  # a thread that has ended
            continue
    return spent / 1e9


def block(made: Any, cells: int) -> tuple[list[float], float]:
    """Milliseconds of each of some cells of `pass`, and of CPU for each of them."""
    client, times = made.client, []
    cpu = cpu_s(made)
    for _ in range(cells):
        began = time.perf_counter()
        msg_id = client.execute("pass")
        while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != msg_id:
            pass
        times.append((time.perf_counter() - began) * 1e3)
    spent = (cpu_s(made) - cpu) * 1e3 / cells
    drain(client)
    return times, spent


def drain(client: Any) -> None:
    """Throw away what the cells have said."""
    while True:
        try:
            client.get_iopub_msg(timeout=0)
        except queue.Empty:
            return


def interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The median ratio of the pairs, and its 95 % confidence interval by the bootstrap."""
    dice = random.Random(1)
    ratios = [ours / bare for ours, bare in pairs]
    drawn = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), drawn[50], drawn[1949]


def passes(folder: Path, cells: int, each: int = 25) -> tuple[float, float, float]:
    """Cells of `pass` with and without the extension, in turns in one kernel."""
    wall: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    with kernel(folder) as made:
        block(made, 50)  # warm
        for turn in range(max(2, cells // each)):
            found: dict[bool, tuple[list[float], float]] = {}
            for loaded in ((True, False), (False, True))[turn % 2]:
                if loaded:
                    made.run("%load_ext gpusched_ipy")
                found[loaded] = block(made, each)
                if loaded:
                    made.run("%unload_ext gpusched_ipy")
            wall.append((statistics.median(found[True][0]), statistics.median(found[False][0])))
            cpu.append((found[True][1], found[False][1]))
    for title, pairs in (("on the clock", wall), ("CPU", cpu)):
        ratio, low, high = interval(pairs)
        ours, bare = (statistics.median(part) for part in zip(*pairs, strict=True))
        print(
            f"{cells} cells of `pass`, {title}: {ours:.3f} ms with, {bare:.3f} without: "
            f"{ratio:.3f} x ({low:.3f}-{high:.3f})"
        )
    return interval(cpu)


def panel(folder: Path, seconds: float) -> float:
    """The share of a core that the panel adds to its kernel: 1 Hz, 8 GPUs, one page."""
    from monitoring import machine

    folder.mkdir()
    environment = machine(folder)
    environment |= {"GPUSCHED_BACKEND": "nvml", "GPUSCHED_SAMPLE_INTERVAL_S": "1.0"}
    with kernel(folder / "kernel", **environment) as made:
        made.run("%load_ext gpusched_ipy")
        made.run("%gpuq")
        before = rate(made, seconds / 2, None)
        shown = made.run("%gpupanel")
        opened = [item for item in shown.of("comm_open") if "_esm" in json.dumps(item["data"])]
        comm = opened[0]["comm_id"]
        say(made, comm, "hello")
        rate(made, 3, comm)
        after = rate(made, seconds, comm)
        drawn = [item for item in updates(made, comm) if item.get("t") == "tick"]
    print(
        f"panel at 1 Hz, 8 GPUs: {after:.3%} of a core, {before:.3%} without it "
        f"({len(drawn)} updates seen in {seconds + 3:.0f} s)"
    )
    return after - before


def say(made: Any, comm: str, what: str) -> None:
    """What the page of a panel sends."""
    data = {"method": "custom", "content": {"t": what, "v": "page"}}
    message = made.client.session.msg("comm_msg", {"comm_id": comm, "data": data})
    made.client.shell_channel.send(message)


def updates(made: Any, comm: str) -> list[dict[str, Any]]:
    """What the panel has sent to its page."""
    made.receive()
    return [
        item["data"].get("content", {})
        for cell in made.cells.values()
        for item in cell.of("comm_msg")
        if item["comm_id"] == comm
    ]


def rate(made: Any, seconds: float, comm: str | None) -> float:
    """CPU per second of the kernel while a page (None: nobody) looks."""
    cpu, began = cpu_s(made), time.monotonic()
    while (left := began + seconds - time.monotonic()) > 0:
        if comm is not None:
            say(made, comm, "beat")
        time.sleep(min(2.0, left))
    return (cpu_s(made) - cpu) / (time.monotonic() - began)


def dispatches(folder: Path, jobs: int) -> float:
    """The p99 of the hand-off while a member kernel computes, over that while it is idle."""
    from handoff import argv, gaps

    from gpusched_ipy.agent import ask_to_leave, running_agent
    from gpusched_ipy.api import Queue

    found: dict[str, list[float]] = {"idle": [], "computes": []}
    with kernel(folder) as made:
        made.run("%load_ext gpusched_ipy")
        # A queued cell of its own keeps the kernel's loop going; it never gets its turn here.
        made.run("%%gpuqueue --hold\n1")
        # The agent is told by the environment, as in a terminal.
        ours = {key: text for key, text in made.environment.items() if key.startswith("GPUSCHED_")}
        os.environ.update(ours)
        own = Queue()
        for turn in range(4):
            label = ("idle", "computes")[turn % 2]
            trace = folder / f"trace-{turn}"
            own.drain("the benchmark fills the queue")
            ids = [own.submit(argv(trace)).id for _ in range(jobs // 2)]
            cell = None
            if label == "computes":
                code = PYTHON.format(s=jobs) if turn == 1 else C_CALL.format(n=10**12)
                cell = made.send(code)
            own.resume()
            own.wait(*ids, timeout=120 + 2 * jobs)
            found[label] += gaps(trace)
            if cell is not None:
                made.manager.signal_kernel(9) if turn == 3 else made.interrupt()
        agent = running_agent(own.state, own.store)
        if agent is not None:
            ask_to_leave(agent, own.state)
    p99 = {label: statistics.quantiles(values, n=100)[-1] for label, values in found.items()}
    for label, values in found.items():
        print(
            f"hand-off, kernel {label}: median {statistics.median(values):.1f} ms, "
            f"p99 {p99[label]:.1f} ms ({len(values)} hand-offs)"
        )
    return p99["computes"] / p99["idle"]


def verdict(title: str, value: float, limit: float) -> bool:
    """One line of the table."""
    within = value <= limit
    print(f"{title:52} {value:7.3f}  limit {limit:g}  {'within' if within else 'MISSED'}")
    return within


def main() -> int:
    """Measure, print; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--loads", type=int, default=15)
    parser.add_argument("--panel", type=float, default=20.0, help="seconds")
    parser.add_argument("--jobs", type=int, default=50, help="of each kind; 0 leaves them out")
    given = parser.parse_args()
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, empty = load_ext(folder, given.loads)
        ratio, low, high = passes(folder / "passes", given.cells)
        added = panel(folder / "panel", given.panel)
        results = [
            verdict("%load_ext over one empty magic (CPU)", ours / empty, 2.0),
            verdict(f"cells of pass (CPU), 95 % in {low:.3f}-{high:.3f}", ratio, 1.02),
            verdict("panel, per cent of a core", 100 * added, 1.0),
        ]
        if given.jobs:
            slower = dispatches(folder / "dispatches", given.jobs)
            results.append(verdict("hand-off p99, kernel computes over idle", slower, 1.5))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
