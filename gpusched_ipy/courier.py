"""A front end of our own kernel: sends it a cell that was queued earlier, and hears what it shows.

One thread owns the sockets. The request carries the message id of the cell that queued it, so that
front ends show its output there although that cell ended long ago; the kernel itself sees an
ordinary cell. The thread knows no jobs: it passes on what it hears.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import zmq
from jupyter_client.connect import ConnectionFileMixin

from gpusched_ipy.frontend import MARK, Message

_log = logging.getLogger(__name__)

# Never terminated: a context that is collected while sockets are open blocks the main thread.
_CONTEXT: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
# Options of a socket must stand before it connects: what comes in a burst is kept, not dropped.
_CONTEXT.setsockopt(zmq.RCVHWM, 100_000)
_PROBE_S = 0.05
_AGAIN_S = 1.0
_PROBES = 60  # so often the kernel is asked for a sign that we hear it


class Listener(Protocol):
    """Who is told what the courier hears; always in its thread."""

    def heard(self, mark: str, kind: str, content: Mapping[str, Any]) -> None:
        """The kernel has shown something that belongs to the cell with that mark: the uid of one
        that was sent, of any other the id of its request."""
        ...

    def replied(self, uid: str, content: Mapping[str, Any]) -> None:
        """The request that was sent for that cell has been answered."""
        ...

    def pulse(self) -> float | None:
        """Look after what changes with time; seconds until the next look, None: when called."""
        ...


class Courier:
    """The thread and its sockets.

    Args:
        connection_file: of our own kernel.
        listener: is told what comes.
    """

    def __init__(self, connection_file: str, listener: Listener) -> None:
        self._file = connection_file
        self._listener = listener
        self._orders: deque[Callable[[], None]] = deque()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._waking = threading.Lock()
        self._closed = False
        self._stopping = False
        self._pulse_at: float | None = None
        self._probes = 0
        self._probe_at = 0.0
        self._probe_ids: set[str] = set()
        self.hearing = threading.Event()  # what the kernel shows reaches us
        self._want_to_hear = False
        self._client: Any = None
        self._shell: Any = None
        self._control: Any = None
        self._iopub: Any = None
        self._thread = threading.Thread(target=self._run, name="gpusched-courier", daemon=True)
        self._thread.start()

    # -- from any thread

    def call(self, order: Callable[[], None]) -> None:
        """Have the thread do that soon."""
        self._orders.append(order)
        with self._waking, suppress(BlockingIOError):
            if not self._closed:
                os.write(self._wake_w, b"x")

    def look(self) -> None:
        """Have the listener's pulse called soon."""
        self.call(self._pulse_now)

    def listen(self, on: bool) -> None:
        """Begin or end to hear what the kernel shows; while nobody listens it costs nothing."""
        self.call(self._begin_hearing if on else self._end_hearing)

    def send(self, parent: Message, code: str, mark: Mapping[str, Any]) -> None:
        """Have the kernel execute ``code`` as if the cell of ``parent`` were run once more."""
        self.call(lambda: self._send(parent, code, mark))

    def stop(self) -> None:
        """End the thread and close the sockets."""
        self._stopping = True
        self.call(lambda: None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    # -- the thread

    def _run(self) -> None:
        self._client = ConnectionFileMixin(context=_CONTEXT, connection_file=self._file)
        self._client.load_connection_file()
        self._shell = self._client.connect_shell()
        self._control = self._client.connect_control()
        poller = zmq.Poller()
        for source in (self._wake_r, self._shell, self._control):
            poller.register(source, zmq.POLLIN)
        try:
            while not self._stopping:
                self._once(poller)
        finally:
            for socket in (self._shell, self._control, self._iopub):
                if socket is not None:
                    socket.close(linger=0)
            with self._waking:  # afterwards these numbers may be somebody else's files
                self._closed = True
                for fd in (self._wake_r, self._wake_w):
                    os.close(fd)

    def _once(self, poller: zmq.Poller) -> None:
        ready = dict(poller.poll(self._patience_ms()))
        if self._wake_r in ready:
            with suppress(BlockingIOError):
                os.read(self._wake_r, 65536)
        had = self._iopub
        try:
            while self._orders:
                self._orders.popleft()()
            self._receive(ready)
            self._keep_up()
        except Exception:  # noqa: BLE001 - one bad message must not end the thread; it is logged
            _log.exception("the courier failed on one message")
        if self._iopub is not had:
            if had is not None:
                poller.unregister(had)
                had.close(linger=0)
            if self._iopub is not None:
                poller.register(self._iopub, zmq.POLLIN)

    def _patience_ms(self) -> int | None:
        dues = [at for at in (self._pulse_at, self._next_probe()) if at is not None]
        return max(0, math.ceil((min(dues) - time.monotonic()) * 1000)) if dues else None

    def _receive(self, ready: Mapping[Any, int]) -> None:
        if self._shell in ready:
            for message in self._messages(self._shell):
                uid = message["parent_header"].get(MARK, "")
                self._listener.replied(uid, message["content"])
        if self._control in ready:
            for _ in self._messages(self._control):
                pass  # the answer to a probe: that it was shown is what counts
        if self._iopub is not None and self._iopub in ready:
            for message in self._messages(self._iopub):
                self._hear(message)

    def _messages(self, socket: Any) -> list[Message]:
        found: list[Message] = []
        while True:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return found
            _, frames = self._client.session.feed_identities(parts)
            found.append(self._client.session.deserialize(frames))

    def _hear(self, message: Message) -> None:
        msg_id = message["parent_header"].get("msg_id", "")
        if msg_id in self._probe_ids:
            self._probe_ids.clear()
            self._probes = 0
            self.hearing.set()
            self._pulse_now()
            return
        mark = message["parent_header"].get(MARK, msg_id)
        self._listener.heard(mark, message["header"]["msg_type"], message["content"])

    def _keep_up(self) -> None:
        now = time.monotonic()
        probe = self._next_probe()
        if probe is not None and now >= probe:
            self._probe()
        if self._pulse_at is not None and now >= self._pulse_at:
            self._pulse_now()

    def _pulse_now(self) -> None:
        self._pulse_at = time.monotonic() + _AGAIN_S  # stands where the look fails
        wait_s = self._listener.pulse()
        self._pulse_at = None if wait_s is None else time.monotonic() + wait_s

    # -- hearing

    def _begin_hearing(self) -> None:
        if self._iopub is None:
            self._iopub = self._client.connect_iopub()
            self._probes, self._probe_at = _PROBES, time.monotonic()

    def _end_hearing(self) -> None:
        self.hearing.clear()
        self._iopub = None
        self._probes = 0
        self._probe_ids.clear()

    def _next_probe(self) -> float | None:
        return self._probe_at if self._probes else None

    def _probe(self) -> None:
        """Ask something harmless beside the main thread; its busy sign shows that we hear."""
        self._probes -= 1
        self._probe_at = time.monotonic() + _PROBE_S
        sent = self._client.session.send(self._control, "kernel_info_request", {})
        self._probe_ids.add(sent["header"]["msg_id"])
        if not self._probes:
            _log.warning("this kernel's output cannot be heard: cells will have no transcript")
            self.hearing.set()
            self._pulse_now()

    # -- sending

    def _send(self, parent: Message, code: str, mark: Mapping[str, Any]) -> None:
        session = self._client.session
        header = session.msg_header("execute_request")
        header |= {key: parent["header"][key] for key in ("msg_id", "session")}
        header[MARK] = mark["uid"]  # several members of a sweep answer to one message id
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            # A failure of this cell must not take along cells that the user has run meanwhile.
            "stop_on_error": False,
        }
        metadata = {**parent.get("metadata", {}), MARK: dict(mark)}
        session.send(
            self._shell,
            session.msg("execute_request", content=content, header=header, metadata=metadata),
        )
