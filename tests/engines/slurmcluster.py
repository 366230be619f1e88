"""A real Slurm of one node inside one folder: munged, slurmctld, slurmd, and two GPUs in name.

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
from contextlib import suppress
from pathlib import Path

from helpers import wait_until

from gpusched_ipy.process import start_ticks

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
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
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
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=8 RealMemory=4096 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 State=UP
"""


def missing() -> str:
    """The programs that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return ", ".join(part for part in PARTS if shutil.which(part, path=path) is None)


class SlurmCluster:
    """The cluster, up from its making until :meth:`stop`."""

    def __init__(self) -> None:
        # Not below the tests' own folder: the path of a socket must be short.
        self.root = Path(tempfile.mkdtemp(prefix="gpusched-slurm-"))
        self.root.chmod(0o755)
        for name in ("state", "spool", "dev"):
            (self.root / name).mkdir()
        for number in range(GPUS):
            # Any character device will do; the digit becomes CUDA_VISIBLE_DEVICES.
            (self.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        self.conf = self.root / "slurm.conf"
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            ports = {"ctl": one.getsockname()[1], "node": two.getsockname()[1]}
        self.conf.write_text(
            _CONF.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                root=self.root,
                gpus=GPUS,
                **ports,
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
        self.start_controller()
        self.start_node()
        wait_until(lambda: self._node_state() == "idle", 60, "an idle node")

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

    def start_node(self) -> None:
        """Start the node's daemon."""
        self._daemon("slurmd", "-N", "n1")

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
        if self._node_state() != "idle":
            self.run("scontrol", "update", "NodeName=n1", "State=RESUME")
            wait_until(lambda: self._node_state() == "idle", 60, "an idle node")

    def _node_state(self) -> str:
        return self.run("sinfo", "-h", "-N", "-o", "%t")

    def stop(self) -> None:
        """End the daemons and remove the folder."""
        for daemon in ("slurmd", "slurmctld", "munged"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                self.kill(daemon)
        shutil.rmtree(self.root, ignore_errors=True)
