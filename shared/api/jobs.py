"""Requests on their way: the bounded queue between the HTTP threads and rank 0's loop, and the host's state.

Imports no torch: the server answers from the first second, before torch is loaded.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.api.operations import Operation
from shared.api.requests import FieldProblem, GenerateRequest, Reply
from shared.api.warned import merged

State = Literal["loading", "ready", "busy", "broken", "stopping"]
PREVIEW_SECONDS = 0.25  # between two previews of a picture that forms


class JobError(RuntimeError):
    """Why a job has no reply: the HTTP `status` it is answered with, and `problems`, the faults by field."""

    def __init__(self, status: int, message: str, problems: Sequence[FieldProblem] = ()) -> None:
        self.status = status
        self.problems = list(problems)
        super().__init__(message)


class QueueFullError(RuntimeError):
    """The queue holds as many requests as may wait."""


@dataclass(frozen=True)
class Preview:
    """What a picture looks like after `step`: RGB bytes, `height` rows of `width` pixels."""

    step: int
    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True)
class SecondPass:
    """What a job makes of its first pass' latents, enlarged (A1111's hires fix)."""

    request: GenerateRequest  # another latent stands in its place until the first pass is over
    upscaler: str  # as A1111 calls it
    mode: str  # of torch.nn.functional.interpolate
    antialias: bool
    layout: str  # ModelSpec.latent_layout
    covers: tuple[int, int]  # width and height in pixels of the enlarged latents, before they are cut

    def work(self) -> float:
        """Pixels times steps."""
        return _work(self.request) * (self.request.strength or 1.0)


def _work(request: GenerateRequest) -> float:
    return (request.width or 1) * (request.height or 1) * (request.steps or 1)


@dataclass(frozen=True)
class Order:
    """What a client asks for: pictures of `request`; where they take two passes, `second` says the other."""

    request: GenerateRequest
    second: SecondPass | None = None


@dataclass(eq=False, kw_only=True)
class _Job:
    """What every job has. Written by rank 0's loop, read by HTTP threads."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    started: float | None = None  # time.monotonic()
    error: JobError | None = None  # why it failed; None where it did not, or is not done
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _done: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """Ask for the job to end at the next step boundary; harmless when it is done."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def start(self) -> None:
        """The job has left the queue."""
        self.started = time.monotonic()

    def seconds_running(self) -> float:
        """Seconds since the job left the queue."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    def step_age(self) -> float:
        """Seconds since the last step, or since the job left the queue where it has none."""
        return self.seconds_running()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job is done, at most `timeout` seconds; whether it is done."""
        return self._done.wait(timeout)

    def finish(self, error: JobError | None = None) -> None:
        """End the job, with an error unless it succeeded; the first end counts."""
        with self._ending:
            if not self._done.is_set():
                self.error = error
                self._done.set()


@dataclass(eq=False)
class OperationJob(_Job):
    """An operation on the pipeline between two generations. Once it runs it cannot be cancelled."""

    operation: Operation
    result: Sequence[object] = ()  # what the engine returned

    def succeed(self, result: Sequence[object]) -> None:
        """The operation is done on all ranks."""
        self.result = result
        self.finish()


@dataclass(eq=False)
class GenerationJob(_Job):
    """Pictures of one request, in one pass or two. It can be cancelled at each step."""

    request: GenerateRequest
    second: SecondPass | None = None  # each picture takes two passes: `request` makes latents for this one
    step: int = 0
    steps: int = 0
    stepped: float | None = None  # time.monotonic() of the last step
    preview: Preview | None = None  # the newest, while somebody watches
    made: list[Reply] = field(default_factory=list)  # the pictures so far, their seeds in a row
    drawing: int = 1  # pictures that are made now, at the same time
    drafts: list[Reply] = field(default_factory=list)  # first passes whose second is next, or runs
    starts: tuple[bytes, ...] = ()  # their latents, enlarged
    _progress: float = field(default=0.0, init=False)

    @property
    def progress(self) -> float:
        """0 to 100, never falling."""
        return 100.0 if self.done and self.error is None else self._progress

    @property
    def pictures(self) -> int:
        """How many are asked for."""
        return self.request.pictures or 1

    def step_age(self) -> float:
        return super().step_age() if self.stepped is None else time.monotonic() - self.stepped

    def at_step(self, step: int, steps: int) -> None:
        """Denoising step `step` of `steps` is done."""
        self.step, self.steps, self.stepped = step, steps, time.monotonic()
        pictures = len(self.made) + self.drawing * self._share(min(step / max(steps, 1), 1.0))
        self._progress = max(self._progress, 99.0 * min(pictures / self.pictures, 1.0))

    def _share(self, done: float) -> float:
        """The part of a picture that is made when this part of a pass is."""
        if self.second is None:
            return done
        first, second = _work(self.request), self.second.work()
        return (first + second * done if self.drafts else first * done) / (first + second)

    def draw(self, at_once: int) -> tuple[GenerateRequest, int]:
        """The request for the pictures that come next, and how many are made at the same time.

        Where there are drafts it is their second pass, and each picture starts from its own draft.
        """
        request = self.request
        if self.second is not None and self.drafts:
            request = self.second.request
        else:
            self.drawing = min(at_once, self.pictures - len(self.made))
        return request.numbered(len(self.made)), self.drawing

    def add(self, replies: Sequence[Reply]) -> None:
        """Pictures are made, or the first passes of them; with the last one the job is done."""
        if len(replies) != self.drawing:
            self.finish(
                JobError(500, f"the ranks returned {len(replies)} pictures instead of {self.drawing}")
            )
            return
        if self.second is not None and not self.drafts:
            self.drafts = list(replies)
            return
        for reply, draft in zip(replies, self.drafts, strict=False):
            reply.warnings = merged(draft.warnings, reply.warnings)
            for name, seconds in draft.seconds.items():
                reply.seconds[name] = round(reply.seconds.get(name, 0.0) + seconds, 4)
        self.drafts, self.starts = [], ()
        self.made += replies
        if len(self.made) == self.pictures:
            self.finish()


Job = GenerationJob | OperationJob


class JobQueue:
    """First in, first out, one running at a time; `limit` jobs may wait behind the running one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: Job | None = None
        self.last: GenerationJob | None = None  # the newest that left the queue
        self.watchers = 0  # who would see a preview; written by the HTTP threads
        self._previewed = 0.0  # time.monotonic()
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed: JobError | None = None

    def __len__(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    @property
    def generation(self) -> GenerationJob | None:
        """The running job where it is a generation."""
        return self.running if isinstance(self.running, GenerationJob) else None

    def waiting(self) -> list[Job]:
        """The jobs that wait, the next one first."""
        with self._changed:
            return list(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether the queue was closed: nothing is taken from it any more."""
        return self._closed is not None

    def submit(self, job: Job) -> None:
        """Add a job.

        Raises:
            QueueFullError: when `limit` jobs wait and one runs.
            JobError: 503, when the queue was closed.
        """
        with self._changed:
            if self._closed is not None:
                raise JobError(self._closed.status, str(self._closed))
            ahead = len(self._waiting) + (self.running is not None)
            if ahead > self.limit:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting; at most {self.limit} may wait"
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def take(self, timeout: float) -> Job | None:
        """The next job, which is then the running one; None after `timeout` seconds without any.

        Jobs cancelled while they waited are ended here and passed over.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                while self._waiting:
                    job = self._waiting.popleft()
                    if job.cancelled:
                        job.finish(JobError(499, "cancelled"))
                        continue
                    job.start()
                    self.running = job
                    self.last = self.generation or self.last
                    return job
                left = 0.0 if self._closed else deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return None

    def release(self) -> None:
        """The running job is over."""
        with self._changed:
            self.running = None
            self._changed.notify_all()

    def drop(self, job: Job) -> None:
        """Cancel a job; one that still waits is ended at once."""
        job.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.finish(JobError(499, "cancelled"))

    def cancel_running(self) -> bool:
        """Cancel the running job, or the next one where rank 0 is between two; whether there was one."""
        with self._changed:
            job = self.running or next(iter(self._waiting), None)
        if job is None or not self._cancellable(job):
            return False
        self.drop(job)
        return True

    def cancel(self, id: str) -> bool:
        """Cancel the job of this id, where it is running or waiting; whether there was one."""
        with self._changed:
            jobs = [*([self.running] if self.running else []), *self._waiting]
        found = [job for job in jobs if job.id == id and self._cancellable(job)]
        for job in found:
            self.drop(job)
        return bool(found)

    def _cancellable(self, job: Job) -> bool:
        """Not when it is done; and an operation that runs has no steps between which it could end."""
        return not job.done and (job is not self.running or isinstance(job, GenerationJob))

    def wants_preview(self) -> bool:
        """Whether somebody watches and the last preview is old enough."""
        return self.watchers > 0 and time.monotonic() - self._previewed >= PREVIEW_SECONDS

    def show_preview(self, step: int, width: int, height: int, rgb: bytes) -> None:
        """What the running job's picture looks like after `step`."""
        self._previewed = time.monotonic()
        if (job := self.generation) is not None:
            job.preview = Preview(step, width, height, rgb)

    def progress(self) -> float:
        """0 to 100, of the running generation, else of the last one; 0 before there was any."""
        job = self.generation or self.last
        return 0.0 if job is None else job.progress

    def step_age(self) -> float | None:
        """Seconds since the running job's last step, or since its start; None where none runs."""
        job = self.running
        return None if job is None else job.step_age()

    def close(self, error: JobError, running: bool = True) -> None:
        """End those that wait and new ones with 503, and with `error` the running job unless it may go on."""
        with self._changed:
            closed = self._closed = self._closed or JobError(503, str(error))
            ending, waiting = self.running if running else None, list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        if ending is not None:
            ending.finish(error)
        for job in waiting:
            job.finish(closed)


@dataclass
class HostStatus:
    """What /health and /initialize tell. Written by rank 0's main thread, read by HTTP threads."""

    backend: str
    type: str
    world_size: int
    state: State = "loading"
    message: str = ""  # why the host is broken, or what it is at while it loads
    loaded: int = 0  # percent of the way to ready, by the stages of loading
    plan: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)  # device and memory of each rank
    versions: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def at(self, loaded: int, message: str) -> None:
        """The host has come so far in loading, percent, and is at `message`; nothing once it is broken."""
        if self.state == "loading":
            self.loaded, self.message = loaded, message

    def ready(self) -> None:
        """The host is loaded and takes requests."""
        self.at(100, "")
        self.state = "ready"

    def health(self, queue: JobQueue) -> dict[str, Any]:
        """The JSON of GET /health."""
        return {
            "state": self.state,
            "message": self.message,
            "loaded": self.loaded,
            "backend": self.backend,
            "type": self.type,
            "plan": self.plan,
            "world_size": self.world_size,
            "queue_length": len(queue),
            "ranks": self.ranks,
            "versions": self.versions,
            "uptime_seconds": round(time.time() - self.started, 1),
        }
