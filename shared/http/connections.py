"""One connection of the HTTP server: HTTP's own errors as JSON; slow, idle and refused clients bounded."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections import Counter
from typing import Any

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error

from shared.api.replies import ErrorAnswer

MAX_BODY = 64 << 20  # bytes, of routes that take pictures
SMALL_BODY = 64 << 10  # bytes, of all others
MAX_DRAIN = 1 << 30  # bytes of a refused body that are discarded, so that its client reads the answer
CHUNK_LINES = 4 << 10  # bytes that the lines of a chunked body may have beside as much as its content
NO_ROOM = "the host has no room for this body: its temporary folder is full"
HEADER_SECONDS = 20.0  # from the first byte of a request to the end of its headers
BODY_SECONDS = 60.0  # for a body or an answer, and what it takes at SLOWEST besides
SLOWEST = 16 << 10  # bytes a second
LINGER_SECONDS = 10.0  # for a refused body after its answer, and what it takes at SLOWEST besides
PER_ADDRESS = 192  # connections


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

    def __init__(self, adj: Any, channel: Channel) -> None:
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
        elif self.chunked and "CONTENT_LENGTH" in self.headers and in_headers:
            # Whoever stands between could take one of them for where the next request begins (RFC 9112, 6.3).
            self.refuse(400, "give Content-Length or Transfer-Encoding, not both")
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


class Channel(HTTPChannel):
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
