"""Logging: log lines that no client can forge, and standard streams that never block.

A slow reader, a pipe without a reader or a full disk must not delay a picture or the end of the process. So
standard output and error become pipes to a small process, the scribe, which writes to the real streams. It
outlives a crash, so that the last messages of a C++ library are written too. Imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import io
import json
import logging
import os
import re
import select
import signal
import stat
import struct
import sys
import termios
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.launch.flags import HostConfig

PIPE_BYTES = 1 << 20  # between the rank and its scribe
KEPT_BYTES = 1 << 20  # that wait for a blocked stream; further bytes are dropped
FINISH_SECONDS = 1.0  # that the scribe may still write for, after the rank's end
CHUNK = 4096

_finish: tuple[int, int] | None = None  # the scribe's process id, and the pipe that signals the end to it
_terminal: bool | None = None


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun sets them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def on_terminal() -> bool:
    """Whether standard error is a terminal, as it was when the process began."""
    return sys.stderr.isatty() if _terminal is None else _terminal


def shows_progress(config: HostConfig, rank: int) -> bool:
    """Whether this rank shows progress bars: only rank 0 on a terminal, and no bars between JSON lines."""
    return rank == 0 and on_terminal() and not config.log_json and config.log_level in ("info", "debug")


def guard_streams() -> None:
    """Let a scribe write what this process writes to standard output and error. Call it before threads."""
    global _finish, _terminal
    if _finish is not None:
        return
    _terminal = sys.stderr.isatty()
    if _terminal:  # for progress bars
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(2)
            os.environ.setdefault("COLUMNS", str(size.columns))
            os.environ.setdefault("LINES", str(size.lines))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    ends = {number: os.pipe() for number in (1, 2)}
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for _, write in ends.values():
                os.close(write)
            os.close(tell)
            _scribe({number: read for number, (read, _) in ends.items()}, told)
        finally:
            os._exit(0)
    os.close(told)
    for number, (read, write) in ends.items():
        os.close(read)
        with contextlib.suppress(OSError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(write, False)
        os.dup2(write, number)
        os.close(write)
    sys.stdout = _stream(1)
    sys.stderr = _stream(2)
    _finish = pid, tell
    atexit.register(finish)


def finish() -> None:
    """Flush what was written to the real streams, in FINISH_SECONDS at most."""
    global _finish
    if _finish is None:
        return
    (pid, tell), _finish = _finish, None
    with contextlib.suppress(OSError):
        os.write(tell, b".")
    deadline = time.monotonic() + FINISH_SECONDS + 0.5
    with contextlib.suppress(OSError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.005)


class _Raw(io.FileIO):
    """Drops what the pipe does not accept, instead of raising an error where it is written."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        with contextlib.suppress(OSError):
            while done < len(view):
                written = super().write(view[done:])
                if not written:
                    break
                done += written
        return len(view)


def _stream(number: int) -> io.TextIOWrapper:
    raw: Any = _Raw(number, "w", closefd=False)
    return io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", newline="\n", write_through=True)


def _scribe(sources: dict[int, int], told: int) -> None:
    """Copy the pipes to the streams until the rank's end; then for FINISH_SECONDS at most."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    outlets = {source: _Outlet(number) for number, source in sources.items()}
    for source in outlets:
        os.set_blocking(source, False)
    over = False
    while outlets and not over:
        ready, _, _ = select.select([told, *outlets], [], [])
        over = told in ready
        for source in list(outlets) if over else [s for s in ready if s != told]:
            while True:
                try:
                    data = os.read(source, 1 << 16)
                except BlockingIOError:
                    break
                if not data:
                    break
                outlets[source].put(data)
                if not over:
                    break
    deadline = time.monotonic() + FINISH_SECONDS
    for outlet in outlets.values():
        outlet.drained(deadline)


class _Outlet:
    """A real stream, and its buffer. A thread of its own writes, because a write may block forever."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._waiting: deque[bytes] = deque()
        self._bytes = self._dropped = 0
        self._writing = False
        self._changed = threading.Condition()
        threading.Thread(target=self._write_all, daemon=True).start()

    def put(self, data: bytes) -> None:
        with self._changed:
            if self._bytes + len(data) > KEPT_BYTES:
                self._dropped += len(data)
                return
            self._waiting.append(data)
            self._bytes += len(data)
            self._changed.notify_all()

    def drained(self, deadline: float) -> None:
        """Wait until all is written, at most until `deadline`."""
        with self._changed:
            while (self._waiting or self._writing) and time.monotonic() < deadline:
                self._changed.wait(max(0.0, deadline - time.monotonic()))

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                while not self._waiting:
                    self._changed.wait()
                data = self._waiting.popleft()
                self._bytes -= len(data)
                self._writing = True
                dropped, self._dropped = self._dropped, 0
            lost = self._write(data)
            if dropped and not lost:
                note = f"{dropped} bytes of the log were dropped: they could not be written\n"
                lost = self._write(note.encode()) and dropped
                dropped = 0
            with self._changed:
                self._dropped += dropped + lost

    def _write(self, data: bytes) -> int:
        """Write to the real stream; how many bytes it did not take."""
        done = 0
        try:
            while done < len(data):
                _wait_for_room(self._number)
                done += os.write(self._number, data[done : done + CHUNK])
        except OSError:
            return len(data) - done
        return 0


def _wait_for_room(number: int) -> None:
    """Fill a pipe only to a quarter: the launcher writes to it too, before it sends its signals."""
    if not stat.S_ISFIFO(os.fstat(number).st_mode):
        return
    room = fcntl.fcntl(number, fcntl.F_GETPIPE_SZ) // 4
    while struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, b"\0" * 4))[0] > room:
        # A pipe whose reader is gone stays full; poll reports it.
        poll = select.poll()
        poll.register(number, 0)
        if poll.poll(0):
            raise BrokenPipeError
        time.sleep(0.01)


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """The text with its line ends and control characters escaped, so that clients cannot forge log lines."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _indented(text: str) -> str:
    """The text with each line indented, so that none looks like a log line."""
    return "\n".join(f"    {one_line(line)}" for line in text.split("\n"))


class TextFormatter(logging.Formatter):
    """Log lines for people."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _indented(stack_info)


class JsonFormatter(logging.Formatter):
    """Log lines as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "rank": world_from_environment()[0],
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


QUIET = ("torchao", "torch.utils._pytree")
"""Loggers that warn, when torchao is imported, of its own kernels, which are not used here."""


def set_up_logging(config: HostConfig, rank: int) -> None:
    """Rank 0 logs at --log_level; the others only warnings and errors, unless the level is debug.

    The warnings of other loggers and of Python, and failures of threads, have the same format.
    """
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(
        JsonFormatter()
        if config.log_json
        else TextFormatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S")
    )
    level = config.log_level.upper()
    logging.captureWarnings(True)
    threading.excepthook = _thread_failed
    for name in ("", "py.warnings", "waitress", "host"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    for name in QUIET:
        logging.getLogger(name).setLevel("ERROR")
    logging.getLogger("host").setLevel(level if rank == 0 or level == "DEBUG" else "WARNING")


def adopt_libraries() -> None:
    """Give the log handlers of imported libraries our format."""
    ours = logging.getLogger("host").handlers[0].formatter
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setFormatter(ours)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else "?"
    if failure.exc_value is not None:
        logging.getLogger("host").error("thread %s failed", name, exc_info=failure.exc_value)
