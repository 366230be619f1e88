"""Two versions on one record: an old one opens for ever, an older member only looks."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gpusched_ipy import dbfile
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StoreError
from gpusched_ipy.job import JobKind, JobSpec, JobState, Request, WaitCode
from gpusched_ipy.locks import Membership
from gpusched_ipy.repair import faults
from gpusched_ipy.statedir import StateDir, create_private, open_state_dir
from gpusched_ipy.store import Store

DATA = Path(__file__).parent / "data"
NEXT = "ALTER TABLE jobs ADD COLUMN colour TEXT NOT NULL DEFAULT 'green';\n"


def spec(uid: str) -> JobSpec:
    return JobSpec(uid=uid, kind=JobKind.COMMAND, name=uid, argv=("true",))


@pytest.fixture
def state() -> StateDir:
    return open_state_dir(Settings.load())


@pytest.fixture(params=[1, 2, 3])
def schema(request: pytest.FixtureRequest) -> int:
    """Every schema that there was; the record of each was written by its own version."""
    return int(request.param)


@pytest.fixture
def old(state: StateDir, schema: int) -> StateDir:
    """A record as an old version has left it."""
    import os

    os.close(create_private(state.database))
    with sqlite3.connect(state.database) as db:
        db.executescript((DATA / f"record_schema_{schema}.sql").read_text(encoding="utf-8"))
    db.close()
    return state


@pytest.fixture
def next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of this package that knows one schema more."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    for script in dbfile.MIGRATIONS.iterdir():
        (folder / script.name).write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    number = dbfile.SCHEMA_VERSION + 1
    (folder / f"{number:04d}_colour.sql").write_text(NEXT)
    monkeypatch.setattr(dbfile, "MIGRATIONS", folder)
    monkeypatch.setattr(dbfile, "SCHEMA_VERSION", number)
    monkeypatch.setattr("gpusched_ipy.database.SCHEMA_VERSION", number)
    monkeypatch.setattr(dbfile, "__version__", "next")
    monkeypatch.setattr("gpusched_ipy.takeover.__version__", "next")


def test_the_first_records_ever_open_and_nothing_of_it_is_lost(old: StateDir) -> None:
    assert faults(old) == []
    store = Store(old)
    jobs = {job.name: job for job in store.jobs(ended=True)}
    assert {name: str(job.state) for name, job in jobs.items()} == {
        "done": "completed", "failed": "failed", "timeout": "timeout", "lost": "lost",
        "cancelled": "cancelled", "running": "running", "starting": "starting",
        "pending": "pending", "held": "pending", "cell": "pending",
    }  # fmt: skip
    done, failed, pending = jobs["done"], jobs["failed"], jobs["pending"]
    assert (done.exit_code, done.peak_mem_bytes, done.energy_j) == (0, 2**30, 12.5)
    assert (done.spec.labels, done.spec.env) == ({"a": "b"}, {"PATH": "/bin"})
    assert (failed.exit_code, failed.error) == (3, "naïve ☃")
    assert pending.request == Request(after=(1,), after_any=(2,), begin_at=2e9)
    assert pending.reason is not None
    assert pending.reason.code is WaitCode.DEPENDENCY
    assert jobs["held"].spec.array is not None
    assert (jobs["cell"].spec.code, jobs["cell"].spec.home) == ("print(1)", "m2")
    assert [(lease.gpu, lease.job_id) for lease in store.leases()] == [
        ("GPU-0", jobs["running"].id), ("GPU-0", jobs["starting"].id),
        ("GPU-1", jobs["running"].id),
    ]  # fmt: skip
    assert store.drained == "drained by its user"
    whats = [event.what for event in store.events(done.id)]
    assert whats == ["submitted", "claimed", "started", "ended", "usage"]
    assert store.submit(spec("new")).id == max(job.id for job in jobs.values()) + 1
    store.close()


@pytest.mark.usefixtures("next_version")
def test_the_next_version_brings_it_up_and_keeps_a_copy(old: StateDir, schema: int) -> None:
    store = Store(old)
    assert len(store.jobs(ended=True)) == 10
    assert store._query("SELECT DISTINCT colour FROM jobs")[0][0] == "green"
    store.close()
    (copy,) = old.root.glob(f"queue.db.schema-{schema}-*")
    with sqlite3.connect(copy) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == schema
        assert db.execute("SELECT count(*) FROM jobs").fetchone()[0] == 10
    db.close()
    assert copy.stat().st_mode & 0o777 == 0o600


OLDER = """
import sys
from gpusched_ipy.config import Settings
from gpusched_ipy.errors import StoreError
from gpusched_ipy.job import JobKind, JobSpec
from gpusched_ipy.locks import Membership
from gpusched_ipy.statedir import open_state_dir
from gpusched_ipy.store import Store
state = open_state_dir(Settings.load())
store = Store(state)
membership = Membership(state)
if sys.argv[1] == "member":
    store.join(membership.key, "kernel", "notebook old.ipynb")
spec = JobSpec(uid="older", kind=JobKind.COMMAND, name="older", argv=("true",))
print("ready", flush=True)
sys.stdin.readline()
try:
    store.submit(spec)
    print("written")
except StoreError as exc:
    print(exc)
print(len(store.jobs(ended=True)), flush=True)
"""


def older(kind: str) -> subprocess.Popen[str]:
    """Another process with this very version, which is the older one in these tests."""
    child = subprocess.Popen(
        [sys.executable, "-c", OLDER, kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_migration_waits_for_older_members(
    state: StateDir, request: pytest.FixtureRequest
) -> None:
    child = older("member")
    request.getfixturevalue("next_version")
    with pytest.raises(StoreError, match=r"older gpusched_ipy: notebook old\.ipynb \(pid \d+\)"):
        Store(state)
    out, _ = child.communicate("\n")
    assert out == "written\n1\n"
    store = Store(state)
    assert [job.name for job in store.jobs()] == ["older"]
    store.close()


def test_an_older_process_reads_on_and_writes_no_more(
    state: StateDir, request: pytest.FixtureRequest
) -> None:
    child = older("script")
    request.getfixturevalue("next_version")
    store = Store(state)
    store.submit(spec("newer"))
    store.close()
    out, _ = child.communicate("\n")
    said, count = out.splitlines()
    assert "written by a newer gpusched_ipy" in said
    assert "upgrade this environment" in said
    assert count == "1"


def test_an_older_member_looks_at_a_newer_record(state: StateDir) -> None:
    store = Store(state)
    job = store.submit(spec("newer"))
    store.close()
    with sqlite3.connect(state.database) as db:
        db.execute("ALTER TABLE jobs ADD COLUMN colour TEXT DEFAULT 'red'")
        db.execute("UPDATE jobs SET crc = 1")  # a newer checksum covers more
        db.execute("PRAGMA user_version = 99")
    db.close()
    shown = subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", "list", "--json"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert [record["id"] for record in json.loads(shown.stdout)] == [job.id]
    refused = subprocess.run(
        [sys.executable, "-m", "gpusched_ipy", "cancel", "1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "schema 99" in refused.stderr


def test_a_newer_agent_and_an_older_shim_agree_on_what_they_know(state: StateDir) -> None:
    """A spec with keys that this version does not know is read without them."""
    from gpusched_ipy.rows import parse_spec, spec_text

    record = json.loads(spec_text(spec("u")))
    record["colour"] = "green"
    record["request"]["shade"] = 3
    assert parse_spec(json.dumps(record)) == spec("u")


def test_members_of_the_same_version_do_not_wait(state: StateDir) -> None:
    store = Store(state)
    membership = Membership(state)
    store.join(membership.key, "kernel", "notebook a.ipynb")
    Store(state).close()
    assert store.job(store.submit(spec("u")).id).state is JobState.PENDING
    membership.leave()
    store.close()
