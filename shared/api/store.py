"""The accepted jobs of a host, from their acceptance to the time when their answers are forgotten.

Without a folder all of it is in memory. With one (--state_dir) a job is on the disk before it is queued and
its answer before it is done, so that both outlive the host. Imports no torch.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json, to_json

from shared.api.folder import Row, StateFolder
from shared.api.jobs import GenerationJob, HostEndedError, JobError, Order
from shared.api.replies import Reply
from shared.api.stored import (
    dump_error,
    dump_order,
    dump_replies,
    load_error,
    load_order,
    load_replies,
    slim,
)
from shared.launch.flags import HostConfig

log = logging.getLogger("host")

State = Literal["queued", "running", "done", "failed", "cancelled"]
PROMPT_SHOWN = 200  # characters
LEAST_BYTES = 16 << 10  # that a finished job counts as, beside its files
MOST_ATTEMPTS = 2  # at a job that ends the host
MEMORY_AGE, FOLDER_AGE = 3600.0, 24 * 3600.0  # seconds: the defaults of --keep_jobs
MEMORY_BYTES, FOLDER_BYTES = 256 << 20, 4 << 30  # the defaults of --keep_bytes
_STORING_FAILS = (OSError, sqlite3.Error)


def state_of(error: JobError | None) -> State:
    """The state of a job that is over."""
    if error is None:
        return "done"
    return "cancelled" if error.status == 499 else "failed"


@dataclass(eq=False, kw_only=True)
class JobRecord:
    """One accepted job. Times are seconds since the epoch."""

    id: str
    route: str  # such as "POST /generate"
    digest: str  # of the request as it came, to know it again
    order: Order | None = None  # until it is over; JobStore.order gives it later too
    prompt: str = ""  # its beginning
    seed: int | None = None
    pictures: int = 1
    client: str = ""
    launch: str = ""  # type and checkpoint that it was accepted for
    scheduler: str | dict[str, Any] | None = None  # --scheduler then
    warnings: list[str] = field(default_factory=list)  # of its parsing
    accepted: float = field(default_factory=time.time)
    pending: bool = False  # stored, but the queue may still refuse it
    kept: bool = False  # whether it goes on without a client that waits for it
    awaited: bool = False  # whether a client waits for it now, whose request is logged and counted
    job: GenerationJob | None = None  # until it is over
    attempts: int = 0
    began: float | None = None  # when it last went to the ranks
    finished: float | None = None
    error: JobError | None = None
    size: int = 0  # bytes that its answer takes
    made: list[Reply] | None = None  # None where the folder has them
    finishing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def state(self) -> State:
        if self.finished is None:
            return "queued" if self.job is None or self.job.started is None else "running"
        return state_of(self.error)

    @property
    def progress(self) -> float:
        """0 to 100; 100 only where the answer is there."""
        job = self.job
        if self.finished is not None or job is None:
            return 100.0 if self.state == "done" else 0.0
        return min(job.progress, 99.0)

    def seconds_waited(self) -> float:
        """Seconds from the acceptance to the ranks, or until now."""
        until = self.began if self.began is not None else self.finished
        return max(0.0, (time.time() if until is None else until) - self.accepted)

    def head(self) -> bytes:
        """What is known from the beginning, as JSON."""
        return to_json({name: getattr(self, name) for name in _HEAD})


_HEAD = (
    "route",
    "digest",
    "client",
    "launch",
    "scheduler",
    "warnings",
    "accepted",
    "prompt",
    "seed",
    "pictures",
)


def open_store(config: HostConfig) -> JobStore:
    """The store of a launch. Raises FolderError."""
    folder = None if config.state_dir is None else StateFolder(Path(config.state_dir))
    return JobStore(folder, config.keep_jobs, config.keep_bytes)


class JobStore:
    """All jobs by id, the first accepted first. Any thread may use it.

    Args:
        folder: where they outlive the host.
        max_age: seconds that finished jobs are kept.
        max_bytes: that the answers of finished jobs may take; the one that finished last is always kept.
    """

    def __init__(
        self, folder: StateFolder | None = None, max_age: float | None = None, max_bytes: int | None = None
    ) -> None:
        self.folder = folder
        self.max_age = max_age or (MEMORY_AGE if folder is None else FOLDER_AGE)
        self.max_bytes = max_bytes or (MEMORY_BYTES if folder is None else FOLDER_BYTES)
        self._records: dict[str, JobRecord] = {}
        self._finished: dict[str, JobRecord] = {}  # the one that finished first comes first
        self._bytes = 0  # of the finished ones
        self._lock = threading.Lock()
        records = [self._read(row) for row in folder.rows()] if folder is not None else []
        self._records |= {record.id: record for record in records}
        over = [record for record in records if record.finished is not None]
        for record in sorted(over, key=lambda record: record.finished or 0.0):
            self._finished[record.id] = record
            self._bytes += record.size + LEAST_BYTES
        self._prune()

    def get(self, id: str) -> JobRecord | None:
        """The job of this id, if it is known."""
        self._prune()
        with self._lock:
            return self._records.get(id)

    def accepted(self, id: str) -> JobRecord | None:
        """The same, of those that the queue has taken."""
        record = self.get(id)
        return None if record is None or record.pending else record

    def all(self) -> list[JobRecord]:
        """Every accepted job, the newest first."""
        self._prune()
        with self._lock:
            return [record for record in reversed(self._records.values()) if not record.pending]

    def unfinished(self) -> list[JobRecord]:
        """The jobs that wait or run, the first accepted first."""
        with self._lock:
            return [record for record in self._records.values() if record.finished is None]

    def add(self, record: JobRecord) -> JobRecord | None:
        """Keep a new job; one that has its id already is returned instead. Raises OSError, sqlite3.Error."""
        with self._lock:
            if known := self._records.get(record.id):
                return known
            self._records[record.id] = record
        try:
            if self.folder is not None:
                assert record.order is not None
                self.folder.add(record.id, record.head(), dump_order(record.order))
        except BaseException:
            with self._lock:
                del self._records[record.id]
            raise
        return None

    def begin(self, record: JobRecord) -> None:
        """A job goes to the ranks; if the host dies from here on, that was one of its attempts."""
        record.began = time.time()
        self._set_attempts(record, record.attempts + 1)

    def interrupt(self, record: JobRecord, error: HostEndedError) -> None:
        """The host ends before a job; one that outlives it is as it was, and an orderly end is no attempt."""
        if self.folder is None:
            self.finish(record, error, [])
            return
        started = record.job is not None and record.job.started is not None
        record.job = None
        if started and error.status == 503:
            self._set_attempts(record, record.attempts - 1)

    def _set_attempts(self, record: JobRecord, attempts: int) -> None:
        record.attempts = attempts
        if self.folder is None:
            return
        try:
            self.folder.attempt(record.id, attempts)
        except _STORING_FAILS as error:  # it is made all the same
            log.error("id=%s could not be noted as attempted: %s", record.id, error)

    def finish(self, record: JobRecord, error: JobError | None, made: list[Reply]) -> None:
        """A job is over; where its answer cannot be written, it is kept in memory."""
        made = made if error is None else []
        kept: list[Reply] | None = made
        order = record.order and slim(record.order)
        meta, files = dump_replies(made)
        record.size = sum(map(len, files))
        record.error, now = error, time.time()
        if self.folder is not None:
            try:
                ended = to_json(
                    {"began": record.began, "finished": now, "error": error and dump_error(error).decode()}
                )
                dumped = b"" if order is None else dump_order(order)
                self.folder.finish(record.id, ended, dumped, meta, files, record.size)
                kept, order = None, None
            except _STORING_FAILS as fault:
                log.error("id=%s could not be stored and is in memory only: %s", record.id, fault)
        record.made, record.order, record.finished = kept, order, now
        record.job = None
        with self._lock:
            if record.id in self._records:
                self._finished[record.id] = record
                self._bytes += record.size + LEAST_BYTES
        self._prune()

    def settle(self, timeout: float) -> None:
        """Wait until the answer of every job that is done is stored, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for record in self.unfinished():
            if (job := record.job) is not None and job.done:
                job.settled.wait(max(0.0, deadline - time.monotonic()))

    def order(self, record: JobRecord) -> Order:
        """What was asked for, without pictures and tensors once it is over. Raises KeyError, StoredError."""
        if record.order is not None:
            return record.order
        if self.folder is None:
            raise KeyError(record.id)
        try:
            return load_order(self.folder.order(record.id))
        except FileNotFoundError:
            raise KeyError(record.id) from None

    def replies(self, record: JobRecord) -> list[Reply]:
        """What was made of a job that is done. Raises KeyError where it was forgotten, StoredError."""
        if record.made is not None:
            return record.made
        if self.folder is None:
            raise KeyError(record.id)
        folder, id = self.folder, record.id
        try:
            return load_replies(folder.made(id), lambda offset, length: folder.read(id, offset, length))
        except FileNotFoundError:
            raise KeyError(id) from None

    def forget(self, record: JobRecord) -> None:
        """Remove a job and its files. Raises OSError, sqlite3.Error."""
        with self._lock:
            self._records.pop(record.id, None)
            if self._finished.pop(record.id, None) is not None:
                self._bytes -= record.size + LEAST_BYTES
        if self.folder is not None:
            self.folder.forget(record.id)

    def _prune(self) -> None:
        """Forget the jobs that finished first, as far as age and bytes ask for it."""
        while (record := self._outdated()) is not None:
            try:
                self.forget(record)
            except _STORING_FAILS as error:
                log.error("id=%s could not be removed: %s", record.id, error)

    def _outdated(self) -> JobRecord | None:
        with self._lock:
            first = next(iter(self._finished.values()), None)
            if first is None or first.finished is None:
                return None
            old = time.time() - first.finished > self.max_age
            return first if old or (self._bytes > self.max_bytes and len(self._finished) > 1) else None

    def _read(self, row: Row) -> JobRecord:
        """A job of the host before this one; one that cannot be read is failed."""
        record = JobRecord(id=row.id, route="", digest="", attempts=row.attempts, size=row.size)
        try:
            for name, value in from_json(row.head).items():
                if name in _HEAD:
                    setattr(record, name, value)
            if row.ended is not None:
                ended = from_json(row.ended)
                record.began, record.finished = ended["began"], ended["finished"]
                record.error = ended["error"] and load_error(ended["error"].encode())
        except (ValueError, TypeError, KeyError) as error:
            record.finished = record.accepted
            record.error = JobError(500, f"this version cannot read what is stored of the job: {error}")
        return record
