"""--state_dir: accepted jobs in an SQLite database, and large files beside it.

Each write waits for the disk once where it can: a job is accepted by one commit and done by one commit, and
files that are not in the database are on the disk before the row that needs them. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("host")

VERSION = 2  # of the tables; 1 had no column `files`
LOCK_SECONDS = 5.0  # that a host waits for the one before it to be gone
SMALL = 64 << 10  # bytes of an order or an answer; larger ones lie in a file
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    place INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, head BLOB NOT NULL, job_order BLOB,
    attempts INTEGER NOT NULL, ended BLOB, made BLOB, size INTEGER NOT NULL, files BLOB
)"""


class FolderError(RuntimeError):
    """The folder cannot be used: why, in words."""


class Row(NamedTuple):
    """One job as it is stored: `head` and `ended` are JSON."""

    id: str
    head: bytes
    attempts: int
    ended: bytes | None  # None: it waits or runs
    size: int


class StateFolder:
    """The jobs of one host. One process at a time has it.

    Every method that writes returns when the disk has it, but for `attempt`. They raise OSError (ENOSPC where
    there is no room) and sqlite3.Error.

    Raises:
        FolderError: another host has the folder, or it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._files = path / "files"
        self._lock = threading.Lock()
        self._later = ThreadPoolExecutor(1, "state_dir")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.mkdir(mode=0o700, exist_ok=True)
            self._held = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise FolderError(f"cannot be written: {error.strerror}: {error.filename}") from None
        self._take_lock()
        try:
            self._open(path / "jobs.sqlite")
        except sqlite3.Error as error:
            self.close()
            raise FolderError(f"jobs.sqlite cannot be read: {error}; move it away to start anew") from None
        except FolderError:
            self.close()
            raise

    def _take_lock(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(self._held)
                    raise FolderError(f"cannot be locked: {error.strerror}") from None
            if time.monotonic() > deadline:
                os.close(self._held)
                raise FolderError("is used by another host")
            time.sleep(0.1)

    def _open(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's other files get its mode
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        if self._db.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
            raise FolderError("must be on a local disk: SQLite cannot share memory for its log there")
        self._db.execute("PRAGMA synchronous=FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in range(VERSION + 1):
            raise FolderError(f"is of another version: {version}, not {VERSION}; give another folder")
        if version == 1:
            self._db.execute("ALTER TABLE jobs ADD COLUMN files BLOB")
        self._db.execute(_TABLE)
        self._db.execute(f"PRAGMA user_version={VERSION}")
        self._log = os.open(f"{path}-wal", os.O_RDONLY)
        _sync(path.parent)
        known = {name for (id,) in self._db.execute("SELECT id FROM jobs") for name in self._names(id)}
        for file in self._files.iterdir():  # of a host that ended between two writes
            if file.name not in known:
                file.unlink()

    @staticmethod
    def _names(id: str) -> tuple[str, str]:
        return f"{id}.order", f"{id}.made"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise

    def rows(self) -> list[Row]:
        """All jobs, the first accepted first."""
        with self._lock:
            columns = "id, head, attempts, ended, size"
            return [Row(*row) for row in self._db.execute(f"SELECT {columns} FROM jobs ORDER BY place")]

    def order(self, id: str) -> bytes:
        """What was given as a job's order. Raises KeyError, and OSError where its file is gone."""
        return self._column(id, "job_order") or (self._files / f"{id}.order").read_bytes()

    def made(self, id: str) -> bytes:
        """What was given as a job's replies. Raises KeyError."""
        return self._column(id, "made") or b"[]"

    def _column(self, id: str, name: str) -> bytes | None:
        with self._lock:
            row = self._db.execute(f"SELECT {name} FROM jobs WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise KeyError(id)
        found: bytes | None = row[0]
        return found

    def read(self, id: str, offset: int, length: int) -> bytes:
        """A part of a job's files, in bytes. Raises KeyError, OSError."""
        small = self._column(id, f"substr(files, {offset + 1}, {length})")
        if small is not None:
            return small
        with (self._files / f"{id}.made").open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def add(self, id: str, head: bytes, order: bytes) -> None:
        """A new job; `head` is what is known of it beside its order."""
        large = len(order) > SMALL
        if large:
            self._write(f"{id}.order", [order])
        with self._writing() as db:
            db.execute(
                "INSERT INTO jobs (id, head, job_order, attempts, size) VALUES (?, ?, ?, 0, 0)",
                (id, head, None if large else order),
            )

    def attempt(self, id: str, attempts: int) -> None:
        """So often was the job given to the ranks.

        It outlives this process at once, and a power cut once the disk has it, for which nobody waits.
        """
        with self._writing() as db:
            db.execute("PRAGMA synchronous=NORMAL")
            try:
                db.execute("UPDATE jobs SET attempts = ? WHERE id = ?", (attempts, id))
            finally:
                db.execute("PRAGMA synchronous=FULL")
        self._later.submit(self._sync_log)

    def _sync_log(self) -> None:
        try:
            os.fdatasync(self._log)
        except OSError as error:
            log.error("--state_dir could not be written through: %s", error)

    def finish(self, id: str, ended: bytes, order: bytes, made: bytes, files: list[bytes], size: int) -> None:
        """A job is over; `made` are its replies, whose bytes are `files`; `order` is kept of what it was."""
        large = sum(map(len, files)) > SMALL
        if large:
            self._write(f"{id}.made", files)
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET ended = ?, job_order = ?, made = ?, size = ?, files = ? WHERE id = ?",
                (ended, order, made, size, None if large else b"".join(files), id),
            )
        (self._files / f"{id}.order").unlink(missing_ok=True)

    def forget(self, id: str) -> None:
        """Remove a job and its files."""
        with self._writing() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (id,))
        for name in self._names(id):
            (self._files / name).unlink(missing_ok=True)

    def _write(self, name: str, parts: list[bytes]) -> None:
        """A file of a job whose row does not say yet that it is there."""
        path = self._files / name
        try:
            with open(path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            _sync(self._files)
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Leave the folder to another host; whatever is called from now on raises sqlite3.Error."""
        with self._lock:
            if self._held < 0:
                return
            with contextlib.suppress(AttributeError):  # it may never have been opened
                self._db.close()
                self._later.shutdown()
                os.close(self._log)
            os.close(self._held)
            self._held = -1


def _sync(folder: Path) -> None:
    held = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
