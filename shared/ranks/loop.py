"""The Engine protocol, and the loop that every rank runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shared.api.faults import RequestError
from shared.api.jobs import GenerationJob, Job, JobError, OperationJob, SecondPass
from shared.api.operations import AddLora, Operation, RemoveLora
from shared.api.queue import JobQueue
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.status import HostStatus
from shared.api.warned import collecting_warnings, merged
from shared.launch.logs import on_terminal
from shared.ranks.channel import Channel
from shared.ranks.device import (
    begin_request,
    give_back_memory,
    out_of_memory,
    rank_device_info,
    request_peak,
)
from shared.ranks.messages import (
    BrokenJobError,
    Call,
    Generate,
    Message,
    OnStep,
    Outcome,
    Ping,
    Stop,
    StoppedError,
    Verdict,
)

log = logging.getLogger("host")

PING_SECONDS = 2.0
LOG_SECONDS = 10.0  # between two log lines of a request that runs


class Engine(Protocol):
    """A loaded pipeline made parallel. All ranks call the same methods with the same arguments."""

    picture: int
    """Which of the pictures that are made at the same time this rank works on, from 0: its replica."""

    @property
    def plan(self) -> dict[str, Any]:
        """How the work is divided, as JSON, for the log and /health."""
        ...

    @property
    def embeddings(self) -> list[dict[str, Any]]:
        """The embeddings of --embeddings_dir, as JSON, for /embeddings."""
        ...

    @property
    def parameters(self) -> dict[str, dict[str, int]]:
        """By model: bytes of parameters that this rank keeps, and of the whole model, for /health."""
        ...

    def generate(self, request: GenerateRequest, on_step: OnStep) -> Reply | None:
        """Make one picture or video; the rank that holds it returns the reply, the others None.

        Raises:
            RequestError: the request is wrong; raised on all ranks.
            StoppedError: passed on from `on_step`.
        """
        ...

    def most_at_once(self, request: GenerateRequest) -> int:
        """How many pictures of a request one replica may be asked for at once; called on rank 0 only."""
        ...

    def generate_all(
        self, request: GenerateRequest, on_step: OnStep, pictures: int, together: bool = True
    ) -> list[Reply]:
        """Pictures with seeds in a row, as `generate` makes them; `on_step` gets the steps of all of them.

        Args:
            together: whether they may be drawn in one call of the pipeline, as far as memory allows.
        """
        ...

    def warm_up(self, size: tuple[int, int] | None = None) -> None:
        """Plan, compile, capture and open connections before the first request, by first steps.

        Args:
            size: width and height in pixels; None: the launch's.

        Raises:
            RequestError: the warm-up request is refused.
        """
        ...

    def preview_to(self, queue: JobQueue | None) -> None:
        """Send previews to the queue's watchers, on the rank that has it; called on all ranks."""
        ...

    def enlarge(self, draft: Reply, second: SecondPass) -> bytes:
        """A first pass' latents or picture as its second pass takes them; called on rank 0 only."""
        ...

    def add_lora(self, path: str, scale: float) -> Sequence[object]:
        """Add a LoRA; those in use afterwards, as JSON. Raises RequestError."""
        ...

    def remove_lora(self, path: str) -> Sequence[object]:
        """Remove a LoRA; those in use afterwards, as JSON. Raises RequestError."""
        ...

    def undo(self, operation: Operation) -> None:
        """Undo an operation that succeeded on this rank and failed on another."""
        ...

    def free_memory(self, request: GenerateRequest | None) -> None:
        """Drop what can be made again: captured steps, buffers, cached embeddings.

        Args:
            request: comes again, and is to need less; None: none does.
        """
        ...

    def close(self) -> None:
        """Restore the pipeline."""
        ...


def no_advice(request: GenerateRequest | None) -> str:
    """Nothing is known of memory."""
    return "a smaller picture needs less"


class RankLoop:
    """Receives messages and executes them, the same on every rank, until Stop.

    Args:
        engine: what executes them.
        channel: the control messages.
        queue, status: rank 0's side of the HTTP server; None on the other ranks.
        request_timeout: seconds that one request may run, with all of its pictures.
        at_once: pictures of one request that the ranks make at the same time.
        advice: what would need less memory than this request has needed, in words.
    """

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        queue: JobQueue | None = None,
        status: HostStatus | None = None,
        request_timeout: float = 1800.0,
        at_once: int = 1,
        advice: Callable[[GenerateRequest | None], str] = no_advice,
    ) -> None:
        self.engine = engine
        self.channel = channel
        self.queue = queue
        self.status = status
        self.request_timeout = request_timeout
        self.at_once, self.advice = at_once, advice
        self._freed_for = ""
        """The latest job that ran out of memory, and was tried once more."""

    def run(self) -> None:
        """Serve until Stop arrives.

        Raises:
            BrokenJobError: the ranks cannot go on together; the process must end.
        """
        while True:
            job = self._next_job()
            message = self.channel.publish(self._message(job))
            if isinstance(message, Stop):
                return
            if isinstance(message, Ping):
                continue
            self._set_state("busy")
            # If the ranks fail, the job stays the running one: what ends the host answers it.
            self._finish(job, message, self._carry_out(message))
            if job is None or not job.done:
                continue  # with the next of the job's pictures, or the second pass of this one
            if self.queue is not None:
                self.queue.release()
            self._set_state("ready")

    def _next_job(self) -> Job | None:
        """The running job while it has pictures left, else the next one."""
        return None if self.queue is None else self.queue.running or self.queue.take(PING_SECONDS)

    def _message(self, job: Job | None) -> Message | None:
        if self.queue is None:
            return None
        match job:
            case None:
                return Stop() if self.queue.closed else Ping()
            case OperationJob():
                return Call(job.id, job.operation)
            case GenerationJob():
                each = job.each(self.at_once, self.engine.most_at_once(job.request))
                request, pictures = job.draw(self.at_once * each)
                return Generate(job.id, request, pictures, each, job.together, job.starts)

    def _carry_out(self, message: Generate | Call) -> list[Outcome]:
        rank = self.channel.world.rank
        outcome = Outcome(rank, Verdict.FINISHED)
        begin_request(self.channel.world.device)
        try:
            if isinstance(message, Generate):
                with collecting_warnings() as outcome.warnings:
                    outcome.result = self._generate(message)
            else:
                outcome.result = self._operate(message.operation)
            self._agree(Verdict.FINISHED)
        except StoppedError as stopped:
            outcome.verdict = stopped.verdict
            if isinstance(message, Call):
                self.engine.undo(message.operation)
        except BrokenJobError:
            raise
        except Exception as error:
            outcome.error = str(error) or type(error).__name__
            outcome.out_of_memory = out_of_memory(error)
            if isinstance(error, RequestError):
                outcome.status, outcome.problems = error.status, error.problems
            else:
                log.exception("request %s failed on rank %d", message.job_id, rank)
            outcome.verdict = self.channel.vote(Verdict.FAILED)
        if outcome.verdict is Verdict.FAILED:
            outcome.result = None
            # All ranks try the compute group or none does: one that refuses a request has not broken it.
            hosts_fault = bool(outcome.error) and outcome.status == 500
            doubt = self.channel.vote(Verdict.FAILED if hosts_fault else Verdict.GO_ON)
            if outcome.out_of_memory:
                give_back_memory()  # the next collective needs some
            outcome.in_sync = doubt is Verdict.GO_ON or self.channel.compute_works()
        outcome.device = rank_device_info(self.channel.world) | {
            "memory_request_peak_mib": request_peak(self.channel.world.device) >> 20,
            "parameters": self.engine.parameters,
        }
        return self.channel.gather_outcomes(outcome)

    def _generate(self, message: Generate) -> list[Reply]:
        """The pictures that this rank holds. A replica without any runs along for the collectives."""
        first = self.engine.picture * message.each
        request = message.request.numbered(first)
        if message.starts:
            start = message.starts[min(first, len(message.starts) - 1)]
            name = "image" if request.latent is None else "latent"
            request = request.model_copy(update={name: start})
        job = None if self.queue is None else self.queue.generation
        on_step = self._step_boundary(job)
        replies = self.engine.generate_all(request, on_step, message.each, message.together)
        return [reply for reply in replies if _number(reply, message) < message.pictures]

    def _operate(self, operation: Operation) -> Sequence[object]:
        match operation:
            case AddLora():
                return self.engine.add_lora(operation.path, operation.scale)
            case RemoveLora():
                return self.engine.remove_lora(operation.path)

    def _agree(self, verdict: Verdict) -> None:
        agreed = self.channel.vote(verdict)
        if agreed is not verdict:
            raise StoppedError(agreed)

    def _step_boundary(self, job: GenerationJob | None) -> OnStep:
        logged = time.monotonic()

        def on_step(step: int, steps: int) -> None:
            nonlocal logged
            self._agree_to_go_on(job)
            if job is None:
                return
            job.at_step(step, steps)
            # A terminal has a progress bar.
            if time.monotonic() - logged >= LOG_SECONDS and not on_terminal():
                logged = time.monotonic()
                log.info("id=%s step %d/%d", job.id, step, steps)

        return on_step

    def _agree_to_go_on(self, job: GenerationJob | None) -> None:
        mine = Verdict.GO_ON
        if job is not None and job.cancelled:
            mine = Verdict.CANCELLED
        elif job is not None and job.seconds_running() > self.request_timeout:
            mine = Verdict.TIMED_OUT
        agreed = self.channel.vote(mine)
        if agreed is not Verdict.GO_ON:
            raise StoppedError(agreed)

    def _finish(self, job: Job | None, message: Generate | Call, outcomes: list[Outcome]) -> None:
        """Answer the job from the outcomes of all ranks; every rank sees a broken compute group."""
        if self.status is not None:
            self.status.ranks = [o.device for o in outcomes if o.device is not None]
        broken = [o for o in outcomes if not o.in_sync]
        verdict = max(o.verdict for o in outcomes)
        again = not broken and _had_no_room(outcomes) and self._again(job, message)
        if verdict is Verdict.FINISHED:
            self._freed_for = ""
        if job is not None and not again:
            if verdict is Verdict.FINISHED:
                self._deliver(job, message, outcomes)
            elif not broken or _had_no_room(outcomes):
                job.finish(self._job_error(verdict, outcomes, message))
        if broken:
            reasons = "; ".join(f"rank {o.rank}: {o.error}" for o in outcomes if o.error)
            raise BrokenJobError(f"the ranks are out of sync ({reasons or 'a collective failed'})")

    def _again(self, job: Job | None, message: Generate | Call) -> bool:
        """After an out-of-memory: whether the message comes again, all ranks alike."""
        if isinstance(message, Generate) and message.each > 1 and message.together:
            log.warning("request %s: out of memory for several pictures at once; one by one", message.job_id)
            give_back_memory()
            if isinstance(job, GenerationJob):
                job.together = False
            return True
        again = message.job_id != self._freed_for
        self.engine.free_memory(message.request if again and isinstance(message, Generate) else None)
        give_back_memory()
        if not again:
            return False
        log.warning(
            "request %s: out of memory; captured steps and caches are dropped, and no steps of this size are "
            "captured any more",
            message.job_id,
        )
        self._freed_for = message.job_id
        return True

    def _deliver(self, job: Job, message: Generate | Call, outcomes: list[Outcome]) -> None:
        """Give the job the results of the ranks."""
        match job:
            case OperationJob():
                job.succeed(outcomes[0].result)
            case GenerationJob():
                assert isinstance(message, Generate)
                replies = [reply for outcome in outcomes for reply in outcome.result]
                replies.sort(key=lambda reply: _number(reply, message))
                for reply in replies:
                    reply.warnings = merged(reply.warnings, *(o.warnings for o in outcomes))
                job.add(replies)
                self._enlarge(job)

    def _enlarge(self, job: GenerationJob) -> None:
        """Make what the second passes start from."""
        if job.second is None or not job.drafts or job.done:
            return
        try:
            job.starts = tuple(self.engine.enlarge(draft, job.second) for draft in job.drafts)
        except Exception as error:
            log.exception("request %s failed between its passes", job.id)
            job.finish(JobError(500, str(error) or type(error).__name__))

    def _job_error(self, verdict: Verdict, outcomes: list[Outcome], message: Generate | Call) -> JobError:
        if verdict is Verdict.CANCELLED:
            return JobError(499, "cancelled")
        if verdict is Verdict.TIMED_OUT:
            return JobError(504, f"timed out after {self.request_timeout:g} s")
        failed = [o for o in outcomes if o.error]
        hosts_fault = [o for o in failed if o.status == 500]
        if not hosts_fault:
            return JobError(failed[0].status, failed[0].error, failed[0].problems)
        if _had_no_room(outcomes):
            # torch's second sentence says how much was asked for, the others what is where.
            said = [f"rank {o.rank}: {'. '.join(o.error.split('. ')[:2])}" for o in failed if o.out_of_memory]
            return JobError(507, f"out of memory ({'; '.join(said)}): {self._advice(message)}")
        return JobError(500, "; ".join(f"rank {o.rank}: {o.error}" for o in hosts_fault))

    def _advice(self, message: Generate | Call) -> str:
        request = message.request if isinstance(message, Generate) else None
        try:
            return self.advice(request)
        except Exception:  # the answer matters more, and other ranks wait
            log.exception("what would need less memory cannot be told")
            return no_advice(request)

    def _set_state(self, state: Any) -> None:
        if self.status is not None and self.status.state not in ("stopping", "broken"):
            self.status.state = state


def _number(reply: Reply, message: Generate) -> int:
    """Which of the message's pictures it is: their seeds are in a row, after the largest comes 0."""
    return (reply.seed - (message.request.seed or 0)) % 2**64


def _had_no_room(outcomes: list[Outcome]) -> bool:
    """Whether memory was full on some ranks, and nothing else went wrong but what broke by that."""
    failed = [outcome for outcome in outcomes if outcome.error]
    full = [outcome for outcome in failed if outcome.out_of_memory]
    # A rank that runs out of memory within a step leaves the others alone in a collective, which then fails.
    return bool(full) and (full == failed or not all(outcome.in_sync for outcome in outcomes))
