"""Jobs: a generation or an operation, from its acceptance to its answer.

Imports no torch: the server answers from the first second, before torch is loaded.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.api.faults import FieldProblem
from shared.api.operations import Operation
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.retouch import Retouched
from shared.api.warned import merged


class JobError(RuntimeError):
    """Why a job has no reply: the HTTP `status` it is answered with, and `problems`, the faults by field."""

    def __init__(self, status: int, message: str, problems: Sequence[FieldProblem] = ()) -> None:
        self.status = status
        self.problems = list(problems)
        super().__init__(message)

    @property
    def reason(self) -> str:
        """The first line of the message: a failure of torch may bring its own stack trace."""
        return str(self).strip().split("\n", 1)[0][:1000]


class HostEndedError(JobError):
    """The host ends before the job is done: 503 where it was told to stop, else 500."""


def _nothing() -> None:
    """Nobody watches the job."""


@dataclass(frozen=True)
class Preview:
    """What a picture looks like after `step`: RGB bytes, `height` rows of `width` pixels."""

    step: int
    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True)
class SecondPass:
    """What a job makes of its first pass' latents or pixels, enlarged (A1111's hires fix)."""

    request: GenerateRequest  # with a placeholder for its latent or image until the first pass is over
    upscaler: str  # A1111's name
    mode: str  # of torch.nn.functional.interpolate; of pixels, of Image.Resampling
    antialias: bool
    layout: str  # ModelSpec.latent_layout, or "pixels"
    covers: tuple[int, int]  # width and height in pixels of what is enlarged, before it is cut

    def work(self) -> float:
        """Pixels times steps."""
        return _work(self.request) * (self.request.strength or 1.0)


def _work(request: GenerateRequest) -> float:
    return (request.width or 1) * (request.height or 1) * (request.frames or 1) * (request.steps or 1)


@dataclass(frozen=True)
class Order:
    """What a client asks for: pictures of `request`; where they take two passes, `second` says the other.

    Attributes:
        retouched: where the request's picture is not the client's own.
    """

    request: GenerateRequest
    second: SecondPass | None = None
    retouched: Retouched | None = None

    @property
    def last(self) -> GenerateRequest:
        """The request of the pass that makes the picture."""
        return self.request if self.second is None else self.second.request


@dataclass(eq=False, kw_only=True)
class _Job:
    """What every job has. Written by rank 0's loop, read by HTTP threads."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    client: str = ""  # who asked: clients take turns
    started: float | None = None  # time.monotonic()
    error: JobError | None = None  # why it failed; None where it did not, or is not done
    watch: Callable[[], None] = _nothing  # called when pictures are made, and at the end; must not wait
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
            if self._done.is_set():
                return
            self.error = error
            self._done.set()
        self.watch()


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
    preview: Preview | None = None  # the newest, while clients watch
    made: list[Reply] = field(default_factory=list)  # the pictures so far, with consecutive seeds
    drawing: int = 1  # pictures that are being made at the same time
    together: bool = True  # whether one call of the pipeline may draw several
    drafts: list[Reply] = field(default_factory=list)  # first passes whose second is next or running
    starts: tuple[bytes, ...] = ()  # their latents or pictures, enlarged
    settled: threading.Event = field(default_factory=threading.Event)  # done, encoded and stored
    _progress: float = field(default=0.0, init=False)

    @property
    def progress(self) -> float:
        """0 to 100, never falling."""
        return 100.0 if self.done and self.error is None else self._progress

    @property
    def pictures(self) -> int:
        """How many are asked for."""
        return self.request.pictures or 1

    def work(self) -> float:
        """Pixels of all frames times steps, of all pictures; with two passes, of both."""
        first = _work(self.request) * (self.request.strength or 1.0)
        each = first if self.second is None else first + self.second.work()
        return each * self.pictures

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

    def each(self, replicas: int, most: int) -> int:
        """How many pictures each replica makes next, where it may make `most`; with two passes it is one."""
        if self.second is not None or not self.together:
            return 1
        return min(most, -(-(self.pictures - len(self.made)) // replicas))

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
        else:
            self.watch()


Job = GenerationJob | OperationJob
