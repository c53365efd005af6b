"""From the pictures that the ranks made to the answer that is kept, in threads of its own.

The client that asked may be gone by then, and rank 0's loop makes the next pictures meanwhile.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shared.api.hashes import FileHashes
from shared.api.jobs import GenerationJob, HostEndedError, Job, JobError, Order
from shared.api.media import side_by_side
from shared.api.metadata import infotext, made_by
from shared.api.pace import Pace
from shared.api.replies import Reply
from shared.api.requests import GenerateRequest
from shared.api.store import JobRecord, JobStore
from shared.api.warned import merged
from shared.http.connections import NO_ROOM
from shared.http.metrics import Metrics
from shared.launch.flags import HostConfig
from shared.launch.wording import cut

log = logging.getLogger("host")

WORKERS = 2  # jobs whose pictures are encoded at the same time


class Finisher:
    """Encodes what jobs make and puts it into the store."""

    def __init__(self, config: HostConfig, hashes: FileHashes, store: JobStore, metrics: Metrics) -> None:
        self.config = config
        self.hashes = hashes
        self.store = store
        self.metrics = metrics
        self.pace = Pace()
        self._workers = ThreadPoolExecutor(WORKERS, "finish")

    def attend(self, record: JobRecord, order: Order) -> GenerationJob:
        """The job of a record. What it makes is encoded, and stored when it is done; then it is settled."""
        job = GenerationJob(order.request, order.second, id=record.id, client=record.client)
        began = time.monotonic()

        def watch() -> None:
            self._workers.submit(self._attended, record, job, order, began)

        job.watch, record.job = watch, job
        return job

    def _attended(self, record: JobRecord, job: GenerationJob, order: Order, began: float) -> None:
        with record.finishing:
            done = job.done  # before the pictures are looked at, for the last one comes before the end
            try:
                self._encode(job, order)
            except Exception as error:
                job.cancel()
                job.finish(unforeseen := failure(error, record.id))
                job.error, done = unforeseen, True
            if done and not job.settled.is_set():
                try:
                    self._settle(record, job, began)
                finally:
                    job.settled.set()

    def _encode(self, job: GenerationJob, order: Order) -> None:
        """Encode the pictures that are made so far."""

        def encode(reply: Reply) -> None:
            reply.infotext = infotext(order, reply, self.config, self.hashes)
            if order.retouched is not None and order.retouched.paste is not None:
                reply.paste(order.retouched.paste)
            reply.encode(made_by(order, reply, self.config))

        if job.error is None:
            side_by_side(encode, [reply for reply in job.made if not reply.infotext])

    def _settle(self, record: JobRecord, job: GenerationJob, began: float) -> None:
        self._store(record, job, began)
        if not record.awaited and record.finished is not None:
            status = 200 if job.error is None else job.error.status
            error = "" if job.error is None else job.error.reason
            warnings = merged(*(reply.warnings for reply in job.made))
            self.metrics.answered(status)
            level = logging.WARNING if status >= 500 else logging.INFO
            log_outcome(
                level, record.id, status, time.time() - record.accepted, record.route, job, warnings, error
            )

    def _store(self, record: JobRecord, job: GenerationJob, began: float) -> None:
        if isinstance(job.error, HostEndedError):
            self.store.interrupt(record, job.error)
            return
        if job.error is None:
            self.pace.add(job)
            for reply in job.made:
                self.metrics.made(reply, time.monotonic() - began)
                reply.warnings = merged(record.warnings, reply.warnings)
        self.store.finish(record, job.error, job.made)


def log_outcome(
    level: int,
    id: str,
    status: int,
    seconds: float,
    route: str,
    job: Job | None,
    warnings: Sequence[str],
    error: str,
) -> None:
    """One line of what came of a request, with the size, steps and seed of pictures that were asked for.

    Args:
        status: of HTTP.
        seconds: since it came.
        route: its method and path.
        error: the reason, empty where it succeeded.
    """
    fields: dict[str, Any] = {"id": id, "status": status, "seconds": round(seconds, 3), "route": route}
    if isinstance(job, GenerationJob):
        made: Reply | GenerateRequest = job.made[0] if job.done and job.error is None else job.request
        fields |= {"size": f"{made.width}x{made.height}", "steps": made.steps, "seed": made.seed}
    text = " ".join(f"{k}={v}" for k, v in fields.items())
    if warnings:
        fields["warnings"] = list(warnings)
        text += f" warnings={'; '.join(warnings)!r}"
    if error:
        message = fields["error"] = cut(error)
        text += f" error={message!r}"
    log.log(level, "%s", text, extra={"fields": fields})


def failure(error: Exception, id: str) -> JobError:
    """What nobody foresaw in the server, as a request is answered for it; the log has it under the id."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("id=%s %s", id, error)
        return JobError(507, NO_ROOM)
    log.error("id=%s failed in the server", id, exc_info=error)
    return JobError(500, "the server failed; its log has the reason under this X-Request-Id")
