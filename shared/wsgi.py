"""waitress, set up for this API: errors of HTTP itself as JSON, and bodies too large read away, not kept."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
import threading
import time
from typing import Any

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import RequestEntityTooLarge

from shared.requests import ErrorAnswer

MAX_BODY = 64 << 20  # bytes
MAX_DRAIN = 1 << 30  # bytes of a body that is too large which are read and thrown away, before the answer
PARSING = 4  # requests that may be read and checked beside those that wait or run
SPARE_THREADS = 4  # for /health, /progress and /cancel, whatever /generate does
MAX_WATCHERS = 16  # open streams of GET /events; each holds a thread
TOO_LARGE = f"the body is larger than {MAX_BODY >> 20} MiB"

# `localhost` often names an IPv6 address that a container does not have.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class _Nowhere:
    """A buffer that keeps nothing but the count."""

    size = 0

    def append(self, data: bytes) -> None:
        self.size += len(data)

    def __len__(self) -> int:
        return self.size

    def close(self) -> None:
        pass


class _Parser(HTTPRequestParser):
    """Reads the rest of a body that is too large before it is answered.

    Closing a socket with unread data resets the connection, and the client would lose its 413. A client that
    sent `Expect: 100-continue` has not begun and is answered at once.
    """

    expect_continue: bool = False
    _drain: FixedStreamReceiver | ChunkedReceiver | None = None

    def received(self, data: bytes) -> int:
        if self._drain is not None:
            consumed = self._drain.received(data)
            self.completed = self._drain.completed or bool(self._drain.error) or len(self._drain) > MAX_DRAIN
            return consumed
        consumed = super().received(data)
        if isinstance(self.error, RequestEntityTooLarge) and not self.expect_continue:
            if self.chunked:
                self.body_rcv.buf.close()
                self.body_rcv.buf = _Nowhere()
                self._drain = self.body_rcv
            elif self.content_length <= MAX_DRAIN:
                self._drain = FixedStreamReceiver(self.content_length, _Nowhere())
            self.completed = self._drain is None
        if self.completed:
            self.expect_continue = False
        return consumed


class _JsonErrorTask(ErrorTask):
    """Answers what never became a request: malformed HTTP, headers or a body too large."""

    def execute(self) -> None:
        error = self.request.error
        text = TOO_LARGE if isinstance(error, RequestEntityTooLarge) else f"{error.reason}: {error.body}"
        request_id = secrets.token_hex(8)
        logging.getLogger("host").info("id=%s status=%d %s", request_id, error.code, text)
        body = ErrorAnswer(message=text).model_dump_json().encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), ("X-Request-Id", request_id)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):
    """Tells the application how many bytes of its answer the client has not taken yet."""

    def get_environment(self) -> dict[str, Any]:
        if self.environ is None:
            super().get_environment()["host.unsent"] = lambda: self.channel.total_outbufs_len
        environ: dict[str, Any] = self.environ
        return environ


class _Channel(HTTPChannel):
    parser_class = _Parser
    task_class = _Task
    error_task_class = _JsonErrorTask


class Server:
    """Serves a WSGI application from a daemon thread until `close()`.

    Args:
        app: the application.
        host, port: where to serve; port 0 takes a free one.
        max_queue: requests that may wait; each holds one thread, and some are left for the quick routes.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """

    def __init__(self, app: Any, host: str, port: int, max_queue: int) -> None:
        self._sockets = _bind(host, port)
        self.host = host
        self.port: int = self._sockets[0].getsockname()[1]
        threads = max_queue + 1 + PARSING + SPARE_THREADS + MAX_WATCHERS
        # A full queue is answered 503; that waitress has tasks waiting for a thread says nothing more.
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
            max_request_body_size=MAX_BODY + 1,
            max_request_header_size=64 << 10,
            connection_limit=threads + 512,
            asyncore_use_poll=True,
            recv_bytes=64 << 10,
            # No answer holds a thread until a slow client has read it; long ones wait in a file.
            outbuf_overflow=16 << 20,
            outbuf_high_watermark=1 << 30,
            log_socket_errors=False,
        )
        self._listeners = [d for d in self._map.values() if isinstance(d, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = _Channel
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
