"""Accounting for the Slurm of the tests: MariaDB on a socket of its own, and slurmdbd."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from helpers import wait_until

from gpusched_ipy.process import start_ticks

PARTS = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb", "mariadb-install-db")
_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounts
PidFile={root}/slurmdbd.pid
LogFile={root}/slurmdbd.log
"""
# For slurm.conf, in place of accounting_storage/none.
SLURM_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={root}/munge.sock"""


def missing() -> str:
    """The programs that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return ", ".join(part for part in PARTS if shutil.which(part, path=path) is None)


class SlurmAccounts:
    """The database and slurmdbd, up from their making until :meth:`stop`.

    Args:
        root: the folder of the cluster; its munge is up.
        ports: of slurmdbd (``dbd``) and of the database (``sql``).
        environ: of the cluster's daemons.
    """

    def __init__(self, root: Path, ports: dict[str, int], environ: dict[str, str]) -> None:
        self._root, self._environ = root, environ
        user = getpass.getuser()
        conf = root / "slurmdbd.conf"
        conf.write_text(_CONF.format(root=root, user=user, **ports))
        conf.chmod(0o600)
        self._log = (root / "mariadb.log").open("ab")
        data = root / "mysql"
        own = ("--no-defaults", f"--user={user}", f"--datadir={data}")
        self._run(
            "mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db"
        )
        self._database = subprocess.Popen(
            [
                "mariadbd", *own, f"--socket={root}/mysql.sock", f"--port={ports['sql']}",
                "--bind-address=127.0.0.1", f"--pid-file={root}/mariadbd.pid",
                "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0",
            ],
            env=environ, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: self._sql("SELECT 1") == 0, 120, "a database")
        assert self._sql("CREATE USER 'slurm'@'%' IDENTIFIED BY 'slurm'") == 0
        assert self._sql("GRANT ALL ON accounts.* TO 'slurm'@'%'") == 0
        self.start_daemon()
        wait_until(lambda: self._manager("-n", "list", "cluster") == 0, 120, "slurmdbd")
        assert self._manager("-i", "-Q", "add", "cluster", "gpusched") == 0

    def start_daemon(self) -> None:
        """Start slurmdbd."""
        self._run("slurmdbd")

    def _sql(self, text: str) -> int:
        argv = ["mariadb", "--no-defaults", f"--socket={self._root}/mysql.sock", "-u", "root"]
        return self._status(*argv, "-e", text)

    def _manager(self, *argv: str) -> int:
        return self._status("sacctmgr", *argv)

    def _status(self, *argv: str) -> int:
        return subprocess.run(
            argv, env=self._environ, stdout=self._log, stderr=self._log, timeout=60
        ).returncode

    def _run(self, *argv: str) -> None:
        subprocess.run(
            argv, env=self._environ, stdout=self._log, stderr=self._log, check=True, timeout=120
        )

    def stop_daemon(self) -> None:
        """Kill slurmdbd, and wait until it is gone."""
        pid = int((self._root / "slurmdbd.pid").read_text())
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: start_ticks(pid) is None, 30, "slurmdbd gone")

    def stop(self) -> None:
        """End both."""
        with suppress(FileNotFoundError, ValueError):
            self.stop_daemon()
        self._database.kill()
        self._database.wait(30)
        self._log.close()
