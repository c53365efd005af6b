"""waitress, set up for this API: errors of HTTP itself as JSON, bodies that nobody wants read away and not
kept, slow and idle clients bounded.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error

from shared.api.replies import ErrorAnswer

MAX_BODY = 64 << 20  # bytes, of routes that take pictures
SMALL_BODY = 64 << 10  # bytes, of all others
MAX_DRAIN = (
    1 << 30
)  # bytes of a refused body that are read and discarded, so that its client reads the answer
PARSING = 4  # requests that may be read and checked beside those that wait or run
SPARE_THREADS = 4  # for /health, /progress and /cancel, whatever /generate does
MAX_WATCHERS = 16  # open streams of GET /events; each holds a thread
CHUNK_LINES = 4 << 10  # bytes that the lines of a chunked body may have beside as much as its content
NO_ROOM = "the host has no room for this body: its temporary folder is full"
HEADER_SECONDS = 20.0  # from the first byte of a request to the end of its headers
BODY_SECONDS = 60.0  # for a body or an answer, and what it takes at SLOWEST besides
SLOWEST = 16 << 10  # bytes a second
LINGER_SECONDS = 10.0  # for a refused body after its answer, and what it takes at SLOWEST besides
IDLE_CONNECTIONS = 256  # beside those whose requests wait or run; then the longest idle ones are closed
PER_ADDRESS = 192  # connections
OTHER_FILES = 64  # open ones of a process that are not connections

Bound = Callable[[str, str, dict[str, str]], int]
"""How many bytes of body a request of this method, path and headers (WSGI's names without HTTP_) may have."""

# `localhost` often names an IPv6 address that a container does not have.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class _TooSlow(Error):
    code = 408
    reason = "Request Timeout"


class _Parser(HTTPRequestParser):
    """Reads a request as far as its route takes it.

    One that is refused is complete then: the application answers it in its route's form, and the channel
    throws away what else comes. Closing a socket with unread data would reset the connection, and the client
    would lose its answer.
    """

    expect_continue: bool = False
    error: Error | None
    body_rcv: Any
    path: str | None = None
    refusal: tuple[int, str] | None = None
    """Status and reason, where the application is to refuse the request."""
    _most = MAX_BODY

    def __init__(self, adj: Any, channel: _Channel) -> None:
        super().__init__(adj)
        self.channel = channel
        self.began = time.monotonic()

    def received(self, data: bytes) -> int:
        in_headers = not self.headers_finished
        try:
            consumed = super().received(data)
        except OSError as error:
            # The receiver has not counted this piece, and the rest of the body is no longer needed.
            logging.getLogger("host").error("a body could not be kept: %s", error)
            self.refuse(507, NO_ROOM)
            return len(data)
        if self.error and self.path is not None:
            # waitress' only 501 is for a transfer coding that it does not have: an error of the client.
            code = self.error.code if self.error.code < 500 else 400
            self.refuse(code, f"{self.error.reason}: {self.error.body}")
        elif self.body_rcv is None:
            pass
        elif in_headers:
            self._most = self.channel.server.bound(self.command, self.path, self.headers)
            if self.content_length > self._most or (self.chunked and not self._most):
                self._refuse_size()
        elif len(self.body_rcv) > self._most or self.body_bytes_received > 2 * self._most + CHUNK_LINES:
            self._refuse_size()
        if self.completed:
            self.expect_continue = False
        return consumed if self.refusal is None else len(data)

    def _refuse_size(self) -> None:
        self.refuse(413, f"the body of this route may have at most {self._most} bytes")

    def refuse(self, status: int, reason: str) -> None:
        """The request ends here; whatever else comes on this connection is thrown away."""
        self.refusal, self.error = (status, reason), None
        self.headers["CONTENT_LENGTH"], self.headers["CONNECTION"] = "0", "close"
        if self.body_rcv is not None:
            self.body_rcv.getbuf().close()
        self.body_rcv, self.expect_continue = None, False
        self.completed = self.channel.discarding = True

    def too_slow(self) -> str:
        """Why the client has had its time for what is not complete, else nothing."""
        seconds = time.monotonic() - self.began
        if not self.headers_finished:
            return f"the headers took longer than {HEADER_SECONDS:g} s" if seconds > HEADER_SECONDS else ""
        if seconds > BODY_SECONDS + self.body_bytes_received / SLOWEST:
            return f"the body came slower than {SLOWEST >> 10} KiB a second"
        return ""


class _JsonErrorTask(ErrorTask):
    """Answers what never became a request: malformed HTTP, headers too large or too slow."""

    def execute(self) -> None:
        error = self.request.error
        text = f"{error.reason}: {error.body}"
        request_id = secrets.token_hex(8)
        logging.getLogger("host").info("id=%s status=%d %s", request_id, error.code, text)
        body = ErrorAnswer(message=text).model_dump_json().encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Request-Id", request_id)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):
    """Tells the application why it is to refuse, and how many bytes of its answer are still to be taken."""

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["host.unsent"] = lambda: self.channel.total_outbufs_len
        environ["host.refusal"] = self.request.refusal
        return environ


class _Channel(HTTPChannel):
    """One connection: bounded in time while it sends or takes something; idle ones make room for others."""

    task_class = _Task
    error_task_class = _JsonErrorTask
    request: _Parser | None
    discarding = False
    """What comes is thrown away: it belongs to a body that was refused."""
    _discarded = 0  # bytes
    _lingers_since: float | None = None
    _must_take_by: float | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._make_room()

    def parser_class(self, adj: Any) -> _Parser:
        return _Parser(adj, self)

    def received(self, data: bytes) -> bool:
        if self.discarding:
            self._discarded += len(data)
            return True
        return bool(super().received(data))

    def readable(self) -> bool:
        """Asked in each round of the loop, at least once a second."""
        now = time.monotonic()
        if self._lingers_since is not None:
            most = LINGER_SECONDS + self._discarded / SLOWEST
            if now > self._lingers_since + most or self._discarded > MAX_DRAIN:
                self.will_close = True
            return not self.will_close
        self._bound_request()
        self._bound_answer(now)
        if self.will_close and self.total_outbufs_len:
            # The socket of a client that reads nothing never becomes writable, when waitress would close it.
            super().handle_close()
            self.will_close = False
            return False
        return bool(super().readable())

    def writable(self) -> bool:
        return bool(self.will_close if self._lingers_since is not None else super().writable())

    def handle_close(self) -> None:
        if self.discarding and self.connected and self._lingers_since is None:
            # Closing with unread bytes would reset the connection, and the client would lose its answer.
            self._lingers_since = time.monotonic()
            self.will_close = self.close_when_flushed = False
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            return
        super().handle_close()

    def _bound_request(self) -> None:
        request = self.request
        if request is None or self.requests or not (why := request.too_slow()):
            return
        with self.requests_lock:
            if request.headers_finished:
                request.refuse(408, why)
            else:
                request.error = _TooSlow(why)
            request.completed = self.discarding = True
            self.requests.append(request)
            self.request = None
        self.server.add_task(self)

    def _bound_answer(self, now: float) -> None:
        if not self.total_outbufs_len:
            self._must_take_by = None
        elif self._must_take_by is None:
            self._must_take_by = now + BODY_SECONDS + self.total_outbufs_len / SLOWEST
        elif now > self._must_take_by:
            self.will_close, self.discarding = True, False

    def _make_room(self) -> None:
        """Close one connection without a request where there are too many.

        The address with the most goes first, there a half-sent request, there the one longest idle.
        """
        channels = list(self.server.active_channels.values())
        held = Counter(channel.addr[0] for channel in channels)
        if len(channels) <= self.server.most_connections and held[self.addr[0]] <= PER_ADDRESS:
            return
        if held[self.addr[0]] > PER_ADDRESS:
            channels = [channel for channel in channels if channel.addr[0] == self.addr[0]]
        idle = [c for c in channels if not (c is self or c.requests or c.will_close or c.total_outbufs_len)]
        if idle:
            first = min(idle, key=lambda c: (-held[c.addr[0]], c.request is None, c.last_activity))
            first.will_close, first.discarding = True, False


class Server:
    """Serves a WSGI application from a daemon thread until `close()`.

    Args:
        app: the application.
        host, port: where to serve; port 0 takes a free one.
        max_queue: requests that may wait; each holds one thread, and some are left for the quick routes.
        bound: how large the body of a request may be; 0 where it is refused by its headers.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """

    def __init__(
        self, app: Any, host: str, port: int, max_queue: int, bound: Bound = lambda *_: MAX_BODY
    ) -> None:
        self._sockets = _bind(host, port)
        self.host = host
        self.port: int = self._sockets[0].getsockname()[1]
        threads = max_queue + 1 + PARSING + SPARE_THREADS + MAX_WATCHERS
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most_connections = min(threads + IDLE_CONNECTIONS, max(files - OTHER_FILES, OTHER_FILES // 4))
        # A full queue is answered 503; waitress' own warning that tasks wait for a thread adds nothing.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self._map: dict[int, Any] = {}
        self._server = create_server(
            app,
            map=self._map,
            sockets=self._sockets,
            threads=threads,
            ident="",
            # One request is read ahead, for a client that leaves is noticed only while its socket is read.
            channel_request_lookahead=1,
            max_request_body_size=1 << 62,  # each route has its own bound
            max_request_header_size=64 << 10,
            # Reached only when so many are at work: idle ones are closed before.
            connection_limit=threads + 2 * IDLE_CONNECTIONS,
            # How often to look for connections that have been idle for long.
            cleanup_interval=10,
            asyncore_use_poll=True,
            recv_bytes=64 << 10,
            # No answer holds a thread until a slow client has read it, and none needs room on a disk.
            outbuf_overflow=1 << 30,
            outbuf_high_watermark=1 << 30,
            log_socket_errors=False,
        )
        self._listeners = [d for d in self._map.values() if isinstance(d, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = _Channel
            listener.bound = bound
            listener.most_connections = most_connections
        self._thread = threading.Thread(target=self._server.run, name="http", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 2.0) -> None:
        """Take no more requests, let those that have their answer send it, and end; at most `timeout` s."""
        deadline = time.monotonic() + timeout
        self._in_loop(lambda: [wasyncore.dispatcher.close(listener) for listener in self._listeners])
        self._listeners[0].task_dispatcher.shutdown(timeout=timeout)
        while time.monotonic() < deadline and any(
            getattr(channel, "total_outbufs_len", 0) for channel in list(self._map.values())
        ):
            time.sleep(0.01)
        self._in_loop(lambda: wasyncore.close_all(self._map, ignore_all=True))
        self._thread.join(timeout)

    def _in_loop(self, call: Any) -> None:
        with contextlib.suppress(OSError):
            self._listeners[0].trigger.pull_trigger(call)


def _bind(host: str, port: int) -> list[socket.socket]:
    """A bound socket for each address of the host that this machine has."""
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            sock = _listening(family, address, sockets[0].getsockname()[1] if sockets else port)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                for other in sockets:
                    other.close()
                raise
            missing = error
            continue
        sockets.append(sock)
    if not sockets:
        raise missing or OSError(f"{host!r} has no address")
    return sockets


def _listening(family: int, address: Any, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address[0], port, *address[2:]))
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock
