"""Calls to what is no Ray head, or no good one: each ends in time, and says in one line why."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gpusched_ipy.config import Settings
from gpusched_ipy.engines import AmbiguousError, EngineJob, RejectedError, UnreachableError
from gpusched_ipy.engines.folder import JobFolder
from gpusched_ipy.engines.ray import RayEngine, make
from gpusched_ipy.engines.rayjobs import (
    RayJobs,
    SilentError,
    dashboard_url,
    read_token,
)
from gpusched_ipy.errors import UserError

TOKEN = "c0ffee" * 8
NODES = (
    '{"data": {"result": {"result": [{"state": "ALIVE", "resources_total": {"GPU": 2.0}},'
    ' {"state": "ALIVE", "resources_total": {}}, {"state": "DEAD", "resources_total": {"GPU": 8}}'
    "]}}}"
)


class Server:
    """Answers every call in the same way, or as ``paths`` says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.paths: dict[str, tuple[int, str]] = {}
        self.drip = False
        self.heard: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            asked = connection.recv(65536).decode()
            self.heard.append(asked)
            found = self.paths.get(" ".join(asked.split()[:2]).split("?")[0])
            while found is None or self.drip:  # open, and never a whole answer
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: " if self.drip else b"")
                time.sleep(0.05)
            status, text = found
            more = "Location: http://127.0.0.1:9/\r\n" if status == 302 else ""
            head = f"HTTP/1.1 {status} OK\r\n{more}Content-Length: {len(text.encode())}\r\n\r\n"
            connection.sendall((head + text).encode())

    def close(self) -> None:
        with suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def engine(server: Server, tmp_path: Path) -> RayEngine:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return make(Settings.load({"ray_address": server.url, "ray_token_file": str(file)}))


JOB = EngineJob(key="k1", folder=JobFolder(Path("/shared/k1")), name="train")
TRACE = (
    "Traceback (most recent call last):\n  File ...\nRuntimeError: Request failed with status code "
    "{}: Traceback (most recent call last):\n  File ...\n{}\n.\n"
)


@pytest.mark.parametrize("drip", [False, True])
def test_a_call_ends_in_its_time_whatever_the_head_does(server: Server, drip: bool) -> None:
    server.drip = drip
    began = time.monotonic()
    with pytest.raises(SilentError, match=r"does not answer: (no answer within 0.5 s|timed out)"):
        RayJobs(server.url, TOKEN, limit_s=0.5).jobs()
    assert time.monotonic() - began < 30
    assert TOKEN in server.heard[0]


def test_a_head_that_is_silent_takes_nothing_that_is_certain(
    server: Server, engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpusched_ipy.engines.ray.SUBMIT_S", 0.5)
    monkeypatch.setattr("gpusched_ipy.engines.ray.CALL_S", 0.5)
    with pytest.raises(UnreachableError, match="does not answer"):
        engine.submit(JOB)  # its first call only looks
    assert not [asked for asked in server.heard if asked.startswith("POST")]
    server.paths["GET /api/v0/nodes"] = (200, NODES)
    with pytest.raises(AmbiguousError, match="does not answer"):
        engine.submit(JOB)
    assert not engine.ping(0.5).up


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((400, "Traceback\nTypeError: bad\n"), RejectedError, "Ray refuses it: bad"),
        ((500, TRACE.format(400, "ValueError: bad id")), RejectedError, "Ray refuses it: bad id"),
        ((500, "No available agent to submit job"), UnreachableError, "No available agent"),
        ((403, f"Forbidden: {TOKEN}"), UnreachableError, "Forbidden: …; see ray_token_file"),
        ((500, TRACE.format(500, "RpcError: lost")), AmbiguousError, "Ray says: lost"),
        ((302, ""), AmbiguousError, "HTTP status 302"),
        ((200, "<html>hello</html>"), AmbiguousError, "not as a Ray dashboard does"),
    ],
)  # fmt: skip
def test_each_answer_to_a_submit_is_one_of_three(
    server: Server, engine: RayEngine, answer: tuple[int, str], error: type, words: str
) -> None:
    server.paths = {"GET /api/v0/nodes": (200, NODES), "POST /api/jobs/": answer}
    with pytest.raises(error) as caught:
        engine.submit(JOB)
    assert words in str(caught.value)
    assert TOKEN not in f"{caught.value!r}{caught.value.__cause__!r}"
    assert "\n" not in str(caught.value)
    # A redirection is never followed: the token is for the head alone.
    assert len(server.heard) == 2


def test_a_job_that_is_there_is_as_good_as_taken(server: Server, engine: RayEngine) -> None:
    said = "ValueError: Job with submission_id gpuq-k1 already exists. Please use a different one."
    server.paths = {
        "GET /api/v0/nodes": (200, NODES),
        "POST /api/jobs/": (500, TRACE.format(400, said)),
    }
    assert engine.submit(JOB) == "gpuq-k1"


def test_what_is_no_ray_is_not_taken_for_one(server: Server, engine: RayEngine) -> None:
    server.paths = {
        "GET /api/version": (200, '{"hello": 1}'),
        "GET /api/v0/nodes": (200, "[]"),
        "GET /api/jobs/": (200, '{"a": 1}'),
    }
    health = engine.ping(30)
    assert not health.up
    assert health.text == f"Ray says: {server.url} answers, but not as a Ray dashboard does"
    with pytest.raises(UnreachableError, match="lists no jobs"):
        engine.status(["k1"])
    with pytest.raises(UnreachableError, match="not as a Ray dashboard does"):
        engine.submit(JOB)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("head:8265/", "http://head:8265"),
        ("https://ray.example.org/cluster/", "https://ray.example.org/cluster"),
        ("ray://head:10001", None),
        ("head:6379", None),
        ("http://head:port", None),
        ("auto", None),
        ("http://user:canary@head:8265", None),
    ],
)
def test_an_address_is_that_of_a_dashboard(text: str, url: str | None) -> None:
    if url is not None:
        assert dashboard_url(text) == url
        return
    with pytest.raises(UserError, match="is not the address of a Ray dashboard") as caught:
        dashboard_url(text)
    assert "canary" not in str(caught.value)


def test_the_token_is_looked_for_where_ray_does(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("from-one\n")
    other.write_text("two words")
    environ = {"RAY_AUTH_TOKEN": "from-env", "RAY_AUTH_TOKEN_PATH": str(one)}
    assert read_token(None, environ) == "from-env"
    assert read_token(one, {"RAY_AUTH_TOKEN": "from-env"}) == "from-one"
    assert read_token(None, {"RAY_AUTH_TOKEN_PATH": str(one)}) == "from-one"
    for file, said in ((other, "holds no Ray token"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(UserError, match=said) as caught:
            read_token(file, {})
        assert "two words" not in str(caught.value)


def test_nobody_there_is_certain(engine: RayEngine, server: Server) -> None:
    server.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.submit(JOB),
        lambda: engine.status(["k1"]),
        lambda: engine.cancel(["k1"]),
        engine.reattach,
    ]
    for call in calls:
        with pytest.raises(UnreachableError, match=r"refused; ray_address says where"):
            call()
    assert not engine.ping(5).up
