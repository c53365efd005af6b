"""From an HTTP request to the ranks and back: what every way in to the host shares.

A way in (the own API, OpenAI's, A1111's) turns its request into a `GenerateRequest`, gives it to
`Dispatcher.run`, and words the reply or the `ApiError` in its own form.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from flask import g
from flask import request as http

from shared.api.jobs import HostStatus, Job, JobError, JobQueue, QueueFullError, SecondPass
from shared.api.media import side_by_side
from shared.api.metadata import made_by
from shared.api.operations import Operation
from shared.api.requests import MAX_TOLD, FieldProblem, GenerateRequest, Reply, RequestError
from shared.api.warned import together, warnings_told
from shared.http.metrics import Metrics
from shared.http.wsgi import PARSING
from shared.launch.flags import HostConfig
from shared.launch.wording import MAX_TEXT, cut, shown

log = logging.getLogger("host")

DISCONNECT_POLL = 0.1  # seconds between two looks whether the client is still there
PARSED_AT_ONCE = 2  # a body, its text and its pictures may take some hundred MB while they are checked
RETRY_AFTER = {"loading": 5, "full": 2, "broken": 30, "stopping": 30}  # seconds


class ApiError(Exception):
    """An answer other than success. `status` is the HTTP status; `problems` names each fault."""

    def __init__(
        self,
        status: int,
        message: str,
        problems: Iterable[FieldProblem] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        faults = list(problems)
        self.status = status
        self.message = cut(message, MAX_TOLD * MAX_TEXT)
        self.problems = faults[:MAX_TOLD]
        self.more = len(faults) - len(self.problems)  # faults that are not told
        self.headers = headers or {}
        super().__init__(message)

    @classmethod
    def from_request(cls, error: RequestError) -> ApiError:
        return cls(error.status, str(error), error.problems)

    @classmethod
    def unavailable(cls, why: str, message: str) -> ApiError:
        """503; `why` is a key of RETRY_AFTER."""
        return cls(503, message, headers={"Retry-After": str(RETRY_AFTER[why])})


class Dispatcher:
    """Checks, queues and awaits requests, from the threads of the HTTP server.

    Args:
        config: the launch.
        status: what the host says of itself.
        queue: the way to rank 0's loop.
    """

    def __init__(self, config: HostConfig, status: HostStatus, queue: JobQueue) -> None:
        self.config = config
        self.status = status
        self.queue = queue
        self.metrics = Metrics(status, queue)
        # Fewer than the server's threads, so that some are always left for the quick routes.
        self._slots = threading.BoundedSemaphore(queue.limit + 1 + PARSING)
        self._parsing = threading.BoundedSemaphore(PARSED_AT_ONCE)

    def check_ready(self) -> None:
        """Raise ApiError 503 where the host cannot take a request now."""
        state, message = self.status.state, self.status.message
        if state in ("loading", "broken", "stopping"):
            raise ApiError.unavailable(state, f"the host is {state}" + (f": {message}" if message else ""))

    def run(
        self, parse: Callable[[], GenerateRequest | tuple[GenerateRequest, SecondPass | None]]
    ) -> list[Reply]:
        """Parse a request, wait for its turn and for all of its pictures. A client that leaves cancels it.

        Args:
            parse: gives the request, and what is made of its latents where its pictures take two passes.

        Raises:
            ApiError: with the status of PROTOCOL's error table.
        """
        self.check_ready()
        if not self._slots.acquire(blocking=False):
            raise ApiError.unavailable("full", "too many requests at once")
        try:
            try:
                with self._parsing, warnings_told() as told:
                    parsed = parse()
            except RequestError as error:
                raise ApiError.from_request(error) from None
            began = time.monotonic()
            request, second = parsed if isinstance(parsed, tuple) else (parsed, None)
            job = Job(request, id=g.request_id, second=second)
            self._submit(job)
            self._encode(job)
            for reply in job.made:
                self.metrics.made(reply, time.monotonic() - began)
                reply.warnings = together(told, reply.warnings)
            g.warnings = together(*(reply.warnings for reply in job.made))
            return job.made
        finally:
            self._slots.release()

    def call(self, operation: Operation) -> Any:
        """Have an operation done on all ranks, between two generations; what it returned.

        Raises:
            ApiError: with the status of PROTOCOL's error table.
        """
        self.check_ready()
        if not self._slots.acquire(blocking=False):
            raise ApiError.unavailable("full", "too many requests at once")
        try:
            return self._submit(Job(None, operation, id=g.request_id))
        finally:
            self._slots.release()

    def read(self, parse: Callable[[], Any]) -> Any:
        """Parse a body that may hold pictures and asks nothing of the ranks; what `parse` gives.

        Raises:
            ApiError: 503 where too many are parsed already, else the fault that `parse` finds.
        """
        if not self._slots.acquire(blocking=False):
            raise ApiError.unavailable("full", "too many requests at once")
        try:
            with self._parsing:
                return parse()
        except RequestError as error:
            raise ApiError.from_request(error) from None
        finally:
            self._slots.release()

    def _submit(self, job: Job) -> Any:
        g.job = job
        try:
            self.queue.submit(job)
        except QueueFullError as error:
            raise ApiError.unavailable("full", f"the queue is full: {error}") from None
        except JobError as error:
            raise ApiError.unavailable("stopping", str(error)) from None
        gone = http.environ.get("waitress.client_disconnected", lambda: False)
        while not job.wait(DISCONNECT_POLL):
            if not job.cancelled and gone():
                self.queue.drop(job)
            self._encode(job)  # here, so that the ranks draw the next picture meanwhile
        if job.error is not None:
            raise _api_error(job.error)
        return job.reply

    def _encode(self, job: Job) -> None:
        """Encode the pictures of those replies that still have them."""

        def encode(reply: Reply) -> None:
            reply.encode(
                None if job.request is None else made_by(job.request, reply, self.config, job.second)
            )

        side_by_side(encode, [reply for reply in job.made if reply.pictures])


def _api_error(error: JobError) -> ApiError:
    message = str(error)
    if error.status == 500:
        # A failure of torch may bring its own stack trace; the log has all of it.
        message = message.strip().split("\n", 1)[0][:1000]
    if error.status == 503:
        return ApiError.unavailable("stopping", message)
    return ApiError(error.status, message, error.problems)


def check_json_type() -> None:
    """Raise ApiError 415 unless the body says that it is JSON in UTF-8, uncompressed."""
    charset = http.mimetype_params.get("charset", "utf-8").lower()
    coding = http.headers.get("Content-Encoding", "identity").lower()
    if http.mimetype != "application/json" or charset not in ("utf-8", "utf8", "us-ascii"):
        given = http.headers.get("Content-Type") or "none"
        raise ApiError(415, f"Content-Type must be application/json (UTF-8); got {shown(given)}")
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding must be absent; got {shown(coding)}")
