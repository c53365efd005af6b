"""Whose turn it is: clients one after the other, the jobs of one client in order. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from shared.api.jobs import Job


class Turns:
    """Jobs that wait. Iterating gives the order in which `next` would take them. Needs a lock around it.

    A client whose job is taken goes behind the others, and a new one comes last, so that a job waits for at
    most one of each other client before each of its own client's.
    """

    def __init__(self) -> None:
        self._clients: dict[str, deque[Job]] = {}  # whose turn is next comes first; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        for turn in zip_longest(*self._clients.values()):
            yield from (job for job in turn if job is not None)

    def of(self, client: str) -> int:
        """How many jobs of this client wait."""
        return len(self._clients.get(client, ()))

    def add(self, jobs: Iterable[Job]) -> None:
        """Jobs that wait from now on."""
        for job in jobs:
            self._clients.setdefault(job.client, deque()).append(job)

    def next(self) -> Job:
        """Take the job whose turn it is. Raises StopIteration where none waits."""
        client, jobs = next(iter(self._clients.items()))
        del self._clients[client]
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return job

    def remove(self, job: Job) -> bool:
        """Take out a job; whether it waited."""
        jobs = self._clients.get(job.client, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._clients[job.client]
        return True

    def clear(self) -> None:
        """Take out all of them."""
        self._clients.clear()
