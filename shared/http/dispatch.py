"""From an HTTP request to the ranks and back: what every way in to the host shares.

A way in (the own API, OpenAI's, A1111's) turns its request into an `Order`, gives it to `Dispatcher.run`, and
words the replies or the `ApiError` in its own form. Nothing here uses Flask.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shared.api.faults import MAX_FAULTS, FieldProblem, RequestError
from shared.api.hashes import FileHashes, cache_folder
from shared.api.jobs import GenerationJob, Job, JobError, OperationJob, Order
from shared.api.media import side_by_side
from shared.api.metadata import infotext, made_by
from shared.api.operations import Operation
from shared.api.queue import JobQueue, QueueFullError
from shared.api.replies import Reply
from shared.api.status import HostStatus
from shared.api.warned import collecting_warnings, merged
from shared.http.metrics import Metrics
from shared.http.wsgi import PARSING
from shared.launch.flags import HostConfig
from shared.launch.wording import MAX_TEXT, cut

DISCONNECT_POLL = 0.1  # seconds between two checks of whether the client is still connected
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
        self.message = cut(message, MAX_FAULTS * MAX_TEXT)
        self.problems = faults[:MAX_FAULTS]
        self.more = len(faults) - len(self.problems)  # faults that are not listed
        self.headers = headers or {}
        super().__init__(message)

    @classmethod
    def from_request(cls, error: RequestError) -> ApiError:
        return cls(error.status, str(error), error.problems)

    @classmethod
    def unavailable(cls, why: str, message: str) -> ApiError:
        """503; `why` is a key of RETRY_AFTER."""
        return cls(503, message, headers={"Retry-After": str(RETRY_AFTER[why])})


@dataclass
class Caller:
    """Who sent a request, and what is noted while it is answered."""

    id: str  # X-Request-Id
    gone: Callable[[], bool] = lambda: False  # whether the client has closed its connection
    job: Job | None = None  # what it waits for
    warnings: list[str] = field(default_factory=list)  # of all of its pictures
    error: str = ""  # the message that it is answered with, if that is an error


Asked = TypeVar("Asked", bound=Order)
Parsed = TypeVar("Parsed")


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
        self.hashes = FileHashes(cache_folder(config))
        status.when_ready.append(lambda: self.hashes.begin(config))  # not before: it would delay the loading
        # Fewer than the server's threads, so that some are always left for the quick routes.
        self._slots = threading.BoundedSemaphore(queue.limit + 1 + PARSING)
        self._parsing = threading.BoundedSemaphore(PARSED_AT_ONCE)

    def check_ready(self) -> None:
        """Raise ApiError 503 where the host cannot take a request now."""
        state, message = self.status.state, self.status.message
        if state in ("loading", "broken", "stopping"):
            raise ApiError.unavailable(state, f"the host is {state}" + (f": {message}" if message else ""))

    def run(self, caller: Caller, parse: Callable[[], Asked]) -> tuple[Asked, list[Reply]]:
        """Parse a request, wait for its turn and for all of its pictures. A client that leaves cancels it.

        Args:
            caller: who sent it; gets the warnings.
            parse: reads and checks the body.

        Returns:
            What `parse` gave, and the pictures.

        Raises:
            ApiError: with the status of PROTOCOL's error table.
        """
        self.check_ready()
        with self._slot():
            with collecting_warnings() as warnings:
                asked = self._parsed(parse)
            began = time.monotonic()
            job = GenerationJob(asked.request, asked.second, id=caller.id)
            self._await(job, caller, meanwhile=lambda: self._encode(job, asked))
            for reply in job.made:
                self.metrics.made(reply, time.monotonic() - began)
                reply.warnings = merged(warnings, reply.warnings)
            caller.warnings = merged(*(reply.warnings for reply in job.made))
            return asked, job.made

    def operate(self, caller: Caller, operation: Operation) -> Sequence[object]:
        """Have an operation done on all ranks, between two generations; what it returned.

        Raises:
            ApiError: with the status of PROTOCOL's error table.
        """
        self.check_ready()
        with self._slot():
            job = OperationJob(operation, id=caller.id)
            self._await(job, caller)
            return job.result

    def read(self, parse: Callable[[], Parsed]) -> Parsed:
        """Parse a body that may hold pictures and asks nothing of the ranks; what `parse` gives.

        Raises:
            ApiError: 503 where too many are parsed already, else the fault that `parse` finds.
        """
        with self._slot():
            return self._parsed(parse)

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the requests that are at work. Raises ApiError 503 where there are too many."""
        if not self._slots.acquire(blocking=False):
            raise ApiError.unavailable("full", "too many requests at once")
        try:
            yield
        finally:
            self._slots.release()

    def _parsed(self, parse: Callable[[], Parsed]) -> Parsed:
        try:
            with self._parsing:
                return parse()
        except RequestError as error:
            raise ApiError.from_request(error) from None

    def _await(self, job: Job, caller: Caller, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Queue a job and wait until it is done; `meanwhile` is called now and then, and at the end."""
        caller.job = job
        try:
            self.queue.submit(job)
        except QueueFullError as error:
            raise ApiError.unavailable("full", f"the queue is full: {error}") from None
        except JobError as error:
            raise ApiError.unavailable("stopping", str(error)) from None
        while not job.wait(DISCONNECT_POLL):
            if not job.cancelled and caller.gone():
                self.queue.drop(job)
            meanwhile()
        if job.error is not None:
            raise _api_error(job.error)
        meanwhile()

    def _encode(self, job: GenerationJob, asked: Order) -> None:
        """Encode the pictures that are made so far; the ranks make the next ones at the same time."""

        def encode(reply: Reply) -> None:
            reply.infotext = infotext(asked, reply, self.config, self.hashes)
            if asked.retouched is not None and asked.retouched.paste is not None:
                reply.paste(asked.retouched.paste)
            reply.encode(made_by(asked, reply, self.config))

        side_by_side(encode, [reply for reply in job.made if not reply.infotext])


def _api_error(error: JobError) -> ApiError:
    message = str(error)
    if error.status == 500:
        # A failure of torch may bring its own stack trace; the log has all of it.
        message = message.strip().split("\n", 1)[0][:1000]
    if error.status == 503:
        return ApiError.unavailable("stopping", message)
    return ApiError(error.status, message, error.problems)
