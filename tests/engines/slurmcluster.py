"""A real Slurm inside one folder: munged, slurmctld, a slurmd for each node with two GPUs in name.

It touches nothing outside its folder and ends exactly what it has started.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from helpers import wait_until

from gpusched_ipy.process import start_ticks
from tests.engines import slurmaccounts

PARTS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
GPUS = 2
_CONF = """\
ClusterName=gpusched
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctl}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounts}
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={node_timeout}
MessageTimeout=2
KillWait=5
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PriorityType=priority/basic
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4096 "
    "Gres=gpu:{gpus} State=UNKNOWN"
)


def missing() -> str:
    """The programs that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return ", ".join(part for part in PARTS if shutil.which(part, path=path) is None)


class SlurmCluster:
    """The cluster, up from its making until :meth:`stop`.

    Args:
        nodes: how many, each with two GPUs; they are called n1, n2 …
        accounting: with slurmdbd, whose parts are there (:func:`slurmaccounts.missing`).
        node_timeout: after how many seconds a silent node is down.
    """

    def __init__(self, *, nodes: int = 1, accounting: bool = False, node_timeout: int = 10) -> None:
        # Not below the tests' own folder: the path of a socket must be short.
        self.root = Path(tempfile.mkdtemp(prefix="gpusched-slurm-"))
        self.root.chmod(0o755)
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        for name in ("state", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True)
        for number in range(GPUS):
            # Any character device will do; the digit becomes CUDA_VISIBLE_DEVICES.
            (self.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        self.conf = self.root / "slurm.conf"
        ports = _ports("ctl", "dbd", "sql", *self.nodes)
        host = socket.gethostname().partition(".")[0]
        accounts = "AccountingStorageType=accounting_storage/none"
        if accounting:
            accounts = slurmaccounts.SLURM_CONF.format(root=self.root, dbd=ports["dbd"])
        self.conf.write_text(
            _CONF.format(
                host=host,
                user=getpass.getuser(),
                root=self.root,
                ctl=ports["ctl"],
                node_timeout=node_timeout,
                accounts=accounts,
                nodes="\n".join(
                    _NODE.format(name=node, host=host, port=ports[node], gpus=GPUS)
                    for node in self.nodes
                ),
            )
        )
        devices = f"{self.root}/dev/nvidia[0-{GPUS - 1}]"
        (self.root / "gres.conf").write_text(f"Name=gpu File={devices}\n")
        if self._version() >= (24, 5):
            (self.root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self.environ = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._start_munge()
        self.accounts: slurmaccounts.SlurmAccounts | None = None
        if accounting:
            self.accounts = slurmaccounts.SlurmAccounts(self.root, ports, self.environ)
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        wait_until(self._idle, 60, "idle nodes")

    def _version(self) -> tuple[int, ...]:
        said = subprocess.run(
            ["/usr/sbin/slurmd", "-V"], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
        return tuple(int(part) for part in said.split(".")[:2])

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemon(
            "munged",
            f"--socket={self.root}/munge.sock",
            f"--key-file={key}",
            f"--pid-file={self.root}/munged.pid",
            f"--log-file={self.root}/munged.log",
            f"--seed-file={self.root}/munge.seed",
            "--force",
        )

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self._daemon("slurmctld")
        wait_until(lambda: " UP" in self.run("scontrol", "ping"), 60, "a controller")

    def start_node(self, node: str = "n1", *, blind: Path | None = None) -> None:
        """Start a node's daemon.

        Args:
            blind: a folder of which the node sees nothing, as without a shared file system. As root
                alone, where mounts of one's own are allowed.
        """
        argv = ["slurmd", "-N", node]
        if blind is not None:
            hide = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            argv = ["unshare", "--mount", "sh", "-c", hide, str(blind), *argv]
        self._daemon(*argv)

    def _daemon(self, *argv: str) -> None:
        log = (self.root / "daemons.log").open("ab")
        with log:
            subprocess.run(argv, env=self.environ, stdout=log, stderr=log, check=True, timeout=60)

    def run(self, *argv: str) -> str:
        """What a command of Slurm prints; nothing where it fails."""
        done = subprocess.run(argv, env=self.environ, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def signal(self, daemon: str, number: signal.Signals) -> None:
        """Signal one of the daemons."""
        os.kill(self._pid(daemon), number)

    def kill_controller(self) -> None:
        """Kill slurmctld once it has saved what it knows.

        One that is killed sooner gives the numbers of the jobs that it has forgotten once more,
        and takes its node out of service when the node tells of them.
        """
        saved = self.root / "state" / "job_state"
        before = saved.stat().st_mtime_ns
        self.run("sbatch", "--hold", "--output=/dev/null", "--wrap=true")
        wait_until(lambda: saved.stat().st_mtime_ns != before, 60, "the state to be saved")
        self.kill("slurmctld")

    def kill_node(self, node: str, *jobs: int) -> None:
        """Kill a node's daemon with all that runs there, as where its power fails.

        Args:
            jobs: a process of each job that runs there.
        """
        self.kill(f"slurmd-{node}")
        for pid in jobs:
            step = psutil.Process(pid).parent()
            assert step is not None
            assert "slurmstepd" in step.name(), step
            for process in (step, *step.children(recursive=True)):
                process.kill()

    def forget(self) -> None:
        """Have the controller know no job any more, as after a state folder that was lost."""
        self.kill("slurmctld")
        for path in (self.root / "state").glob("job_state*"):
            path.unlink()
        self.start_controller()

    def kill(self, daemon: str) -> None:
        """Kill one of the daemons and wait until it is gone."""
        pid = self._pid(daemon)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: start_ticks(pid) is None, 30, f"{daemon} gone")
        (self.root / f"{daemon}.pid").unlink(missing_ok=True)

    def _pid(self, daemon: str) -> int:
        return int((self.root / f"{daemon}.pid").read_text())

    def empty(self) -> None:
        """End every job, and wait until none is left."""
        for number in self.run("squeue", "-h", "-o", "%i").split():
            self.run("scancel", number)
        wait_until(lambda: not self.run("squeue", "-h", "-o", "%i"), 60, "an empty Slurm")
        if not self._idle():
            self.run("scontrol", "update", f"NodeName={','.join(self.nodes)}", "State=RESUME")
            wait_until(self._idle, 60, "idle nodes")

    def _idle(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * len(self.nodes)

    def stop(self) -> None:
        """End the daemons and remove the folder."""
        for daemon in (*(f"slurmd-{node}" for node in self.nodes), "slurmctld"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                self.kill(daemon)
        if self.accounts is not None:
            self.accounts.stop()
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            self.kill("munged")
        shutil.rmtree(self.root, ignore_errors=True)


def _ports(*names: str) -> dict[str, int]:
    """A port of this machine for each, that nobody has now."""
    found = {}
    with ExitStack() as stack:
        for name in names:
            opened = stack.enter_context(socket.socket())
            opened.bind(("127.0.0.1", 0))
            found[name] = opened.getsockname()[1]
    return found
