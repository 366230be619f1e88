"""The Jobs REST API of a Ray head, as one speaks it without the ``ray`` package.

Each call ends within its time limit, whatever the head does. The token is read anew for every call
and goes to the head alone: no proxy, no redirection, and never into a message. Nothing here knows
our queue.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from gpusched_ipy.errors import GpuSchedError, UserError
from gpusched_ipy.text import clean

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_TOKEN_FILE = Path("~/.ray/auth_token")
_GCS = 6379  # of a cluster's own protocol, which is not HTTP
# What an answer may hold: Ray lists every job it has ever had, a failed one with 20 kB of its log.
MAX_ANSWER_BYTES = 64 * 2**20
# A failed job's message goes on with the last lines of its log.
_LOG = ", last available logs"
_WORDS = 300  # characters of Ray's own words that are quoted
_AGENT = re.compile(r"Request failed with status code (\d{3})")
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception): *(.+)$")


class RefusedError(GpuSchedError):
    """The head has certainly not heard what was asked."""


class SilentError(GpuSchedError):
    """The head was asked and has not answered: nobody knows what it has done."""


class AnswerError(GpuSchedError):
    """The head has answered that it will not; the message holds its own words.

    Args:
        status: of HTTP; where the head has asked a node's agent, the one that the agent gave.
        words: one line.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status

    @property
    def exists_already(self) -> bool:
        """Whether Ray has a job of that id."""
        return "already exists" in str(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJob:
    """What Ray says of one job."""

    id: str  # the submission id
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    words: str  # Ray's own, one line
    error_type: str | None = None
    where: str | None = None  # the address of its node


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is handed to Ray."""

    id: str
    entrypoint: str  # a line for the shell of the node
    gpus: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Talk:
    """How far one exchange has come."""

    sent: bool = False
    status: int = 0
    text: bytes = b""
    failure: Exception | None = None


def dashboard_url(text: str) -> str:
    """The base address of a head's dashboard: ``http://host:8265``.

    Raises:
        UserError: it is not one; ``ray://`` and the port 6379 are other doors of a cluster.
    """
    url = text if "://" in text else f"http://{text}"
    if not _is_dashboard(url):
        raise UserError(
            f"{_without_password(text)} is not the address of a Ray dashboard; "
            "set ray_address to one like http://head:8265"
        )
    return url.rstrip("/")


def _is_dashboard(url: str) -> bool:
    """Whether it can be one, and holds no name or password."""
    if not re.fullmatch(r"https?://[^@?#\s]+", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.port != _GCS and parts.hostname not in (None, "auto", "local")
    except ValueError:  # no port, or no host
        return False


def _without_password(text: str) -> str:
    return clean(re.sub(r"//[^/@]*@", "//…@", text), _WORDS)


def read_token(file: Path | None = None, environ: Mapping[str, str] | None = None) -> str | None:
    """The token, from where Ray itself looks for it; None where there is none.

    Args:
        file: looked into first.
        environ: instead of this process's; ``RAY_AUTH_TOKEN``, then ``RAY_AUTH_TOKEN_PATH``.

    Raises:
        UserError: the named file cannot be read, or what was found cannot be a token.
    """
    environ = os.environ if environ is None else environ
    if file is None and (token := environ.get("RAY_AUTH_TOKEN", "").strip()):
        return _checked(token, "RAY_AUTH_TOKEN")
    named = file or environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or DEFAULT_TOKEN_FILE).expanduser()
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as exc:
        if not named:
            return None
        raise UserError(f"the Ray token {path} cannot be read ({exc.strerror})") from None
    return _checked(text, str(path)) if text else None


def _checked(token: str, where: str) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"{where} holds no Ray token: it has spaces, lines or foreign letters")
    return token


class RayJobs:
    """One head.

    Args:
        url: as :func:`dashboard_url` makes it.
        token: sent with every call; None: none is.
        limit_s: seconds in which every call ends.
    """

    def __init__(self, url: str, token: str | None, *, limit_s: float) -> None:
        self.url = url
        self._token = token
        self._limit_s = limit_s

    def version(self) -> str:
        """Which Ray it is. Its web server alone answers this: the cluster may be dead behind it."""
        found = self._object("GET", "/api/version")
        if "ray_version" not in found:
            raise self._stranger()
        return str(found["ray_version"])

    def gpus_by_node(self) -> list[int]:
        """The GPUs of each living node."""
        found = self._object("GET", "/api/v0/nodes?detail=1&limit=10000")
        nodes = _path(found, "data", "result", "result")
        if not isinstance(nodes, list):
            raise AnswerError(200, f"{self.url} names no nodes: {self._words(str(found))}")
        alive = [node for node in nodes if isinstance(node, dict) and node.get("state") == "ALIVE"]
        return [int((node.get("resources_total") or {}).get("GPU") or 0) for node in alive]

    def submit(self, what: Submission) -> None:
        """Hand a job over; an id that Ray has already is refused."""
        body: dict[str, Any] = {
            "entrypoint": what.entrypoint,
            "submission_id": what.id,
            "metadata": dict(what.metadata),
        }
        if what.gpus:
            body["entrypoint_num_gpus"] = what.gpus
        if what.resources:
            body["entrypoint_resources"] = dict(what.resources)
        if what.env:
            body["runtime_env"] = {"env_vars": dict(what.env)}
        self._object("POST", "/api/jobs/", body)

    def jobs(self) -> dict[str, RayJob]:
        """Every job that was handed over through this API and is still known, by its id."""
        found = self._ask("GET", "/api/jobs/")
        if not isinstance(found, list):
            raise AnswerError(200, f"{self.url} lists no jobs: {self._words(str(found))}")
        jobs = [self._job(raw) for raw in found if isinstance(raw, dict)]
        return {job.id: job for job in jobs if job is not None}

    def stop(self, job_id: str) -> bool:
        """Ask it to end; False: it is over, or not known. One that is pending ends only later."""
        try:
            found = self._object("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")
        except AnswerError as exc:
            if exc.status == 404:
                return False
            raise
        return bool(found.get("stopped"))

    # -- the exchange

    def _job(self, raw: Mapping[str, Any]) -> RayJob | None:
        if not raw.get("submission_id"):
            return None  # a driver that somebody has started by hand
        return RayJob(
            id=str(raw["submission_id"]),
            status=str(raw.get("status")),
            words=self._words(str(raw.get("message") or "")),
            error_type=raw.get("error_type"),
            where=urlsplit(raw.get("driver_agent_http_address") or "").hostname,
        )

    def _object(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        found = self._ask(method, path, body)
        if not isinstance(found, dict):
            raise self._stranger()
        return found

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON.

        Raises:
            RefusedError: the head was not reached.
            SilentError: it was, and there is no whole answer.
            AnswerError: it says no.
        """
        talk = _Talk()
        # A name that is not resolved, or an answer that drips, knows no time-out of a socket.
        thread = threading.Thread(
            target=self._talk, args=(talk, method, path, body), name="gpusched-ray", daemon=True
        )
        thread.start()
        thread.join(self._limit_s)
        if thread.is_alive():
            raise self._unheard(talk.sent, f"no answer within {self._limit_s:g} s")
        if talk.failure is not None:
            raise self._unheard(talk.sent, str(talk.failure) or type(talk.failure).__name__)
        return self._understood(talk)

    def _talk(self, talk: _Talk, method: str, path: str, body: object) -> None:
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        headers = {"Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection = kind(str(parts.hostname), parts.port, timeout=self._limit_s)
            try:
                connection.connect()
                talk.sent = True
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, parts.path + path, data, headers)
                answer = connection.getresponse()
                talk.text = answer.read(MAX_ANSWER_BYTES + 1)
                talk.status = answer.status
            finally:
                connection.close()
        except (OSError, HTTPException) as exc:
            talk.failure = exc

    def _unheard(self, sent: bool, why: str) -> GpuSchedError:
        if sent:
            return SilentError(f"{self.url} does not answer: {self._words(why)}")
        return RefusedError(f"{self.url} cannot be reached: {self._words(why)}")

    def _understood(self, talk: _Talk) -> Any:
        text = talk.text.decode(errors="replace")
        if len(talk.text) > MAX_ANSWER_BYTES:
            raise AnswerError(talk.status, f"{self.url} answers with more than 64 MiB")
        if talk.status != 200:
            behind = _AGENT.search(text)
            status = int(behind[1]) if behind else talk.status
            raise AnswerError(status, self._words(text) or f"HTTP status {status}")
        try:
            return json.loads(text)
        except ValueError:
            raise self._stranger() from None

    def _stranger(self) -> AnswerError:
        return AnswerError(200, f"{self.url} answers, but not as a Ray dashboard does")

    def _words(self, text: str) -> str:
        """The one line of it that says what is wrong, and never the token."""
        line = _one_line(text)
        return clean(line if self._token is None else line.replace(self._token, "…"), _WORDS)


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .\t")]
    if not lines:
        return ""
    raised = [found[1] for line in lines if (found := _RAISED.match(line))]
    if lines[0].startswith("Traceback") and raised:
        return raised[-1]
    said, log, _ = lines[0].partition(_LOG)
    if log and len(lines) > 1:
        return f"{said}: {lines[-1]}"
    return said.split(" Full traceback")[0]


def _path(found: object, *keys: str) -> object:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
