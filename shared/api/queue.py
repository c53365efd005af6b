"""The bounded queue between the HTTP threads and rank 0's loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from shared.api.fair import Turns
from shared.api.jobs import GenerationJob, HostEndedError, Job, JobError, Preview

PREVIEW_SECONDS = 0.25  # between two previews of a picture
GLANCE_SECONDS = 10.0  # that previews go on being made for a client that asks now and then


class QueueFullError(RuntimeError):
    """The queue holds as many requests as may wait."""


class ClientFullError(RuntimeError):
    """One client has as many requests in the queue as it may have."""


class JobQueue:
    """One job runs at a time; the clients take turns, and the jobs of one client are run in order.

    Args:
        limit: jobs that may wait behind the running one.
        per_client: the same, of one client; None: no limit of its own.
    """

    def __init__(self, limit: int, per_client: int | None = None) -> None:
        self.limit = limit
        self.per_client = per_client
        self.running: Job | None = None
        self.last: GenerationJob | None = None  # the newest that left the queue
        self.taken: Callable[[Job], None] = lambda job: None  # called before a job goes to the ranks
        self.watchers = 0  # clients that would see a preview; written by the HTTP threads
        self._previewed = 0.0  # time.monotonic()
        self._glanced = float("-inf")  # the same
        self._waiting = Turns()
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
            ClientFullError: when `per_client` jobs of the job's client wait and one runs, of whoever it is.
            JobError: 503, when the queue was closed.
        """
        with self._changed:
            if self._closed is not None:
                raise JobError(self._closed.status, str(self._closed))
            runs = self.running is not None
            own = self._waiting.of(job.client)
            if self.per_client is not None and own + runs > self.per_client:
                raise ClientFullError(
                    f"{own} of your requests are waiting; at most {self.per_client} of one client may wait "
                    "(--max_queue_per_client)"
                )
            ahead = len(self._waiting) + runs
            if ahead > self.limit:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting; at most {self.limit} may wait"
                )
            self._waiting.add([job])
            self._changed.notify_all()

    def restore(self, jobs: Sequence[Job]) -> None:
        """Add jobs that were accepted before the host was started again, whatever `limit` is now."""
        with self._changed:
            self._waiting.add(jobs)
            self._changed.notify_all()

    def take(self, timeout: float) -> Job | None:
        """The next job, which is then the running one; None after `timeout` seconds without any."""
        job = self._take(timeout)
        if job is not None:
            self.taken(job)
        return job

    def _take(self, timeout: float) -> Job | None:
        """`take`; jobs cancelled while they waited are ended here and passed over."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                while self._waiting:
                    job = self._waiting.next()
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
            if self._waiting.remove(job):
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
        now = time.monotonic()
        is_watched = self.watchers > 0 or now - self._glanced < GLANCE_SECONDS
        return is_watched and now - self._previewed >= PREVIEW_SECONDS

    def glance(self) -> Preview | None:
        """The newest preview of what runs, for a client that does not stay; for a time more are made."""
        self._glanced = time.monotonic()
        job = self.generation
        return None if job is None else job.preview

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
        """End those that wait and new ones with 503, and with `error` the running job unless it may go on.

        Theirs are HostEndedErrors.
        """
        with self._changed:
            closed = self._closed = self._closed or HostEndedError(503, str(error))
            ending, waiting = self.running if running else None, list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        if ending is not None:
            ending.finish(HostEndedError(error.status, str(error)))
        for job in waiting:
            job.finish(closed)
