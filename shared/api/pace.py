"""How long jobs take, from those that were made: estimates of the wait for others. Imports no torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from shared.api.jobs import GenerationJob, Job

REMEMBERED = 16  # jobs; their mean follows a host whose load changes
LEAST_PROGRESS = 5.0  # percent of a running job from which its own pace counts


class Pace:
    """Seconds for a pixel and step, of the last jobs. Any thread may use it."""

    def __init__(self) -> None:
        self._made: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # work and seconds
        self._lock = threading.Lock()

    def add(self, job: GenerationJob) -> None:
        """A job is made; what it took since it left the queue counts."""
        with self._lock:
            self._made.append((job.work(), job.seconds_running()))

    def estimates(self, running: Job | None, waiting: Sequence[Job]) -> dict[str, float]:
        """By id the seconds until each generation is done; those for which nothing is known are left out.

        Args:
            waiting: the jobs in the order in which they come. Operations among them count as nothing.
        """
        with self._lock:
            work, seconds = (
                (sum(column) for column in zip(*self._made, strict=True)) if self._made else (0, 0)
            )
        rate = seconds / work if work else None
        found: dict[str, float] = {}
        ahead = 0.0
        if isinstance(running, GenerationJob):
            done, took = running.progress / 100, running.seconds_running()
            own = took / (done * running.work()) if running.progress >= LEAST_PROGRESS else None
            rate = own if rate is None else rate
            pace = rate if own is None else own  # its own steps tell more of what is left of it
            if rate is None or pace is None:
                return found
            ahead = found[running.id] = (1 - done) * running.work() * pace
        for job in waiting:
            if rate is not None and isinstance(job, GenerationJob) and not job.cancelled:
                ahead = found[job.id] = ahead + job.work() * rate
        return found
