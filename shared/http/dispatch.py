"""From an HTTP request to the ranks and back: what every way in to the host shares.

A way in (the own API, OpenAI's, A1111's) turns its request into an `Order`, gives it to `Dispatcher.run`, and
words the replies or the `ApiError` in its own form. Nothing here uses Flask.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from shared.api.faults import MAX_FAULTS, FieldProblem, RequestError
from shared.api.hashes import FileHashes, cache_folder
from shared.api.jobs import GenerationJob, HostEndedError, Job, JobError, OperationJob, Order
from shared.api.operations import Operation
from shared.api.queue import ClientFullError, JobQueue, QueueFullError
from shared.api.replies import Reply
from shared.api.revival import launch_of, revived
from shared.api.status import HostStatus
from shared.api.store import PROMPT_SHOWN, JobRecord, JobStore
from shared.api.stored import StoredError
from shared.api.warned import collecting_warnings, merged, warn
from shared.http.finish import Finisher
from shared.http.metrics import Metrics
from shared.http.wsgi import PARSING
from shared.launch.flags import HostConfig
from shared.launch.wording import MAX_TEXT, cut, shown

DISCONNECT_POLL = 0.1  # seconds between two checks of whether the client is still connected
PARSED_AT_ONCE = 2  # a body, its text and its pictures may take some hundred MB while they are checked
KEPT = "the job is kept and goes on after a restart: ask again with this X-Request-Id"
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
    named: bool = False  # whether the client itself gave it, so that it may ask for the job again
    route: str = ""  # such as "POST /generate"
    client: str = ""  # who takes turns with others (shared.http.proxies)
    digest: Callable[[], str] = lambda: ""  # of the method, the path and the body
    gone: Callable[[], bool] = lambda: False  # whether the client has closed its connection
    job: Job | None = None  # what it waits for
    warnings: list[str] = field(default_factory=list)  # of all of its pictures
    error: str = ""  # the message that it is answered with, if that is an error
    strange: str = ""  # what the client gave that cannot be an id
    leaves: bool = False  # whether its job is not over with the answer: it is counted when it is


Asked = TypeVar("Asked", bound=Order)
Parsed = TypeVar("Parsed")


class Dispatcher:
    """Checks, queues and awaits requests, from the threads of the HTTP server.

    Args:
        config: the launch.
        status: what the host says of itself.
        queue: the way to rank 0's loop.
        store: the accepted jobs; None: a new one, in memory.
    """

    def __init__(
        self, config: HostConfig, status: HostStatus, queue: JobQueue, store: JobStore | None = None
    ) -> None:
        self.config = config
        self.status = status
        self.queue = queue
        self.store = JobStore() if store is None else store
        self.metrics = Metrics(status, queue)
        self.hashes = FileHashes(cache_folder(config))
        status.when_ready.append(lambda: self.hashes.begin(config))  # not before: it would delay the loading
        self.finisher = Finisher(config, self.hashes, self.store, self.metrics)
        queue.taken = self._taken
        queue.restore(revived(self.store, config, self.finisher.attend))
        # Fewer than the server's threads, so that some are always left for the quick routes.
        self._slots = threading.BoundedSemaphore(queue.limit + 1 + PARSING)
        self._parsing = threading.BoundedSemaphore(PARSED_AT_ONCE)

    def check_ready(self) -> None:
        """Raise ApiError 503 where the host cannot take a request now."""
        state, message = self.status.state, self.status.message
        if state in ("loading", "broken", "stopping"):
            raise ApiError.unavailable(state, f"the host is {state}" + (f": {message}" if message else ""))

    def run(self, caller: Caller, parse: Callable[[], Asked]) -> tuple[Asked, list[Reply]]:
        """`accept` and `wait`: parse a request, wait for its turn and for all of its pictures.

        Args:
            caller: who sent it; gets the warnings.
            parse: reads and checks the body.

        Returns:
            What `parse` gave, and the pictures.

        Raises:
            ApiError: with the status of PROTOCOL's error table.
        """
        with self._slot():
            asked, record = self._accept(caller, parse, awaited=True)
            return asked, self.wait(caller, record)

    def accept(self, caller: Caller, parse: Callable[[], Asked]) -> tuple[Asked, JobRecord]:
        """Parse a request, store its job and queue it; it goes on when the client is gone.

        A request that has the id of a job and asks for the same gets that job, whatever its state; what it
        asks for is then what was stored, with the seed that was drawn.

        Raises:
            ApiError: 409 where the id belongs to another request, else as `run`.
        """
        with self._slot():
            asked, record = self._accept(caller, parse, awaited=False)
            record.kept = caller.leaves = True
            return asked, record

    def _accept(self, caller: Caller, parse: Callable[[], Asked], awaited: bool) -> tuple[Asked, JobRecord]:
        known = self.store.get(caller.id)
        if known is None:
            self.check_ready()

        def read() -> tuple[str, Asked]:
            digest = caller.digest()
            if known is not None:
                _check_same(known, digest)
            return digest, parse()

        with collecting_warnings() as warnings:
            if caller.strange:
                warn(
                    f"X-Request-Id: must be 8 to 64 letters, digits, _ and -, got {shown(caller.strange)}; "
                    f"asked again with it, this is another request; its own is {caller.id}"
                )
            digest, asked = self._parsed(read)
        if known is None:
            request, config = asked.request, self.config
            record = JobRecord(
                id=caller.id,
                route=caller.route,
                digest=digest,
                client=caller.client,
                order=Order(request, asked.second, asked.retouched),
                prompt=cut(request.positive or "", PROMPT_SHOWN),
                seed=request.seed,
                pictures=request.pictures or 1,
                launch=launch_of(config),
                scheduler=config.scheduler,
                warnings=warnings,
                kept=caller.named,
                awaited=awaited,
            )
            if (known := self._begin(record, asked)) is None:
                return asked, record
            _check_same(known, digest)
        known.kept = True
        return self._as_stored(asked, known), known

    def _begin(self, record: JobRecord, order: Order) -> JobRecord | None:
        """Store a new job and queue it; the one that has its id already is returned instead."""
        job = self.finisher.attend(record, order)
        record.pending = True
        try:
            if known := self.store.add(record):
                return known
            try:
                self._submit(job)
            except ApiError:
                self.store.forget(record)
                raise
            record.pending = False
        except Exception as error:
            job.error = JobError(503, str(error))  # for who asks for the same meanwhile
            job.settled.set()
            raise
        return None

    def _as_stored(self, asked: Asked, record: JobRecord) -> Asked:
        """A request that is asked again, with what was drawn and filled in when it was asked first."""
        try:
            order = self.store.order(record)
        except (KeyError, StoredError):
            return asked  # `wait` says why there is no answer
        made, wanted = order.request.output_format, asked.request.output_format
        if made != wanted:
            raise ApiError(409, f"this job's answer is in the format {made}, and Accept asks for {wanted}")
        return replace(asked, request=order.request, second=order.second)

    def wait(self, caller: Caller, record: JobRecord) -> list[Reply]:
        """Wait until a job is done; its pictures. A client that leaves cancels it, unless the job is kept.

        Args:
            caller: who waits; gets the warnings.

        Raises:
            ApiError: why there is no picture.
        """
        job = record.job
        if job is not None:
            caller.job, record.awaited = job, True
            while not job.settled.wait(DISCONNECT_POLL):
                if caller.gone() and record.kept:
                    record.awaited, caller.leaves = False, True
                    raise ApiError(499, "the client is gone; its job goes on")
                if caller.gone() and not job.cancelled:
                    self.queue.drop(job)
        error, made = (record.error, None) if job is None else (job.error, job.made)
        if error is not None:
            raise self._error_of(error)
        if made is None:
            made = self.replies(record)
        caller.warnings = merged(*(reply.warnings for reply in made))
        return made

    def replies(self, record: JobRecord) -> list[Reply]:
        """What was made of a job that is done.

        Raises:
            ApiError: 503 where it is not done as the host ends, 404 where it was forgotten meanwhile, 500.
        """
        if record.finished is None:
            raise ApiError.unavailable("stopping", f"the host is stopping; {KEPT}")
        try:
            return self.store.replies(record)
        except KeyError:
            raise ApiError(404, f"the job {record.id} is forgotten") from None
        except StoredError as error:
            raise ApiError(500, str(error)) from None

    def discard(self, record: JobRecord) -> None:
        """Cancel a job that waits or runs, at the next step boundary; forget one that is over."""
        if record.job is not None:
            self.queue.drop(record.job)
        else:
            self.store.forget(record)

    def _taken(self, job: Job) -> None:
        """A job is about to go to the ranks."""
        if isinstance(job, GenerationJob) and (record := self.store.get(job.id)) is not None:
            self.store.begin(record)

    def operate(self, caller: Caller, operation: Operation) -> Sequence[object]:
        """Have an operation done on all ranks, between two generations; what it returned.

        Raises:
            ApiError: with the status of PROTOCOL's error table.
        """
        self.check_ready()
        with self._slot():
            job = caller.job = OperationJob(operation, id=caller.id, client=caller.client)
            self._submit(job)
            while not job.wait(DISCONNECT_POLL):
                if not job.cancelled and caller.gone():
                    self.queue.drop(job)
            if job.error is not None:
                raise self._error_of(job.error)
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

    def _submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError 503, and 429 where its client has too many there."""
        try:
            self.queue.submit(job)
        except ClientFullError as error:
            raise ApiError(429, str(error), headers={"Retry-After": str(RETRY_AFTER["full"])}) from None
        except QueueFullError as error:
            raise ApiError.unavailable("full", f"the queue is full: {error}") from None
        except JobError as error:
            raise ApiError.unavailable("stopping", str(error)) from None

    def _error_of(self, error: JobError) -> ApiError:
        if isinstance(error, HostEndedError) and self.store.folder is not None:
            return ApiError.unavailable("stopping", f"{error}; {KEPT}")
        message = error.reason if error.status == 500 else str(error)
        if error.status == 503:
            return ApiError.unavailable("stopping", message)
        return ApiError(error.status, message, error.problems)


def _check_same(record: JobRecord, digest: str) -> None:
    """Raise ApiError 409 where a job was asked for by another request."""
    if record.digest != digest:
        raise ApiError(
            409,
            f"the X-Request-Id {record.id} belongs to another request: send that one's body to "
            f"{record.route or 'its route'}, or another id",
        )
