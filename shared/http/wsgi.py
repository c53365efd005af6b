"""The HTTP server of a process: waitress with this API's connections, its threads, ports and bounds."""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from waitress import wasyncore
from waitress.server import BaseWSGIServer, create_server

from shared.http.connections import MAX_BODY, Channel

PARSING = 4  # requests that may be read and checked beside those that wait or run
SPARE_THREADS = 4  # for /health, /progress and /cancel, whatever /generate does
MAX_POLLS = 16  # requests that wait for the end of a job by GET /jobs/{id}; each holds a thread
MAX_WATCHERS = 16  # open streams of GET /events; each holds a thread
IDLE_CONNECTIONS = 256  # beside those whose requests wait or run; then the longest idle ones are closed
OTHER_FILES = 64  # open ones of a process that are not connections

Bound = Callable[[str, str, dict[str, str]], int]
"""How many bytes of body a request of this method, path and headers (WSGI's names without HTTP_) may have."""

# `localhost` often names an IPv6 address that a container does not have.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


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
        threads = max_queue + 1 + PARSING + SPARE_THREADS + MAX_WATCHERS + MAX_POLLS
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
            # shared.http.proxies decides whom X-Forwarded-For is believed from.
            clear_untrusted_proxy_headers=False,
        )
        self._listeners = [d for d in self._map.values() if isinstance(d, BaseWSGIServer)]
        for listener in self._listeners:
            listener.channel_class = Channel
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
