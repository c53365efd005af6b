"""The life of one rank's process: flags, server, signals, loading, the loop, the end."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from shared.config import (
    HostConfig,
    LoadError,
    UsageError,
    exit_usage,
    first_line,
    idle_flags,
    parse_or_exit,
    world_from_environment,
)
from shared.liveness import PATIENCE, Family

if TYPE_CHECKING:
    from shared.comm import World
    from shared.generate import PipelineEngine
    from shared.jobs import HostStatus, JobQueue

log = logging.getLogger("host")

EXIT_FAILED = 1
FLUSH_SECONDS = 0.5  # what the HTTP threads get to send their last answers
LINGER_SECONDS = (
    0.2  # how long a signalled worker stays, so that its peers hear the signal before its absence
)

BuildEngine = Callable[[HostConfig, "World"], "PipelineEngine"]


def serve(backend: str, build_engine: BuildEngine) -> NoReturn:
    """Run one rank of a host until it is stopped; never returns.

    Exit codes: 2 for a usage error, 1 when loading fails or the ranks lose each other, 130 after Ctrl-C,
    0 after SIGTERM (torchrun ends in peace when its ranks end with 0).

    Args:
        backend: name in shared.models.BACKENDS.
        build_engine: loads the pipeline and makes it parallel; called on every rank.
    """
    config = parse_or_exit(backend)
    rank, world_size = world_from_environment()
    set_up_logging(config, rank)
    from shared.jobs import HostStatus, JobQueue

    lifeline = Lifeline("TORCHELASTIC_RUN_ID" in os.environ, config.collective_timeout)
    status = HostStatus(config.backend, config.type, world_size)
    queue = JobQueue(config.max_queue)
    if rank == 0:
        _start_server(config, status, queue, lifeline)
        for line in idle_flags(config, world_size):
            log.warning("%s", line)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        _load_and_loop(config, build_engine, status, queue, lifeline)
    except UsageError as error:
        exit_usage(backend, error)
    except Exception as error:
        _report_end(error, rank)
        lifeline.end(EXIT_FAILED, f"broken: {first_line(error)}")
    lifeline.end(0, "stopped", failed=False)


def _start_server(config: HostConfig, status: HostStatus, queue: JobQueue, lifeline: Lifeline) -> None:
    from shared.jobs import JobError
    from shared.server import Server, create_app, refuses_unread

    try:
        app = create_app(config, status, queue)
        Server(app, config.host, config.port, config.max_queue, refuses_unread(config))
    except (OSError, UnicodeError) as error:
        exit_usage(config.backend, UsageError(_cannot_serve(config, error)))
    log.info(
        "serving http://%s:%d, loading %s from %s", config.host, config.port, config.type, config.checkpoint
    )

    def tell_clients(reason: str, failed: bool) -> None:
        status.state, status.message = ("broken" if failed else "stopping"), reason
        queue.close(JobError(500 if failed else 503, f"the host is ending: {reason}"))

    lifeline.before_end(tell_clients)


def _cannot_serve(config: HostConfig, error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return f"--host: must be a name or an address of this machine; got {config.host!r}"
    why = error.strerror or error
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host: must be a name or an address of this machine; got {config.host!r}: {why}"
    return f"--port: cannot serve on {config.host}:{config.port}: {why}"


def _load_and_loop(
    config: HostConfig, build_engine: BuildEngine, status: HostStatus, queue: JobQueue, lifeline: Lifeline
) -> None:
    began = time.monotonic()
    from shared.comm import Channel, init_world, rank_device_info
    from shared.engine import RankLoop
    from shared.memory import freeze_heap
    from shared.requests import RequestError

    world = init_world(config.device, config.collective_timeout, lifeline.watch)
    limit_threads(world.device.type)
    engine = build_engine(config, world)
    try:
        engine.warm_up()
    except RequestError as error:
        raise LoadError(f"the launch's own picture is refused: {error}") from error
    on_server = world.rank == 0
    if on_server:
        engine.preview_to(queue)
    freeze_heap()
    channel = Channel(world)
    status.ranks = channel.introduce(rank_device_info(world))
    status.plan = engine.plan
    status.versions = versions()
    status.state = "ready"
    log.info(
        "ready after %.1f s: %s %s on %d x %s",
        time.monotonic() - began,
        config.backend,
        config.type,
        world.size,
        world.device.type,
    )
    for line in plan_lines(engine.plan):
        log.info("%s", line)
    RankLoop(
        engine,
        channel,
        queue if on_server else None,
        status if on_server else None,
        config.request_timeout,
        config.data_parallel_degree or 1,
    ).run()


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan for people: its settings in one line, then one line a stage."""
    settings = [f"{name} {value}" for name, value in plan.items() if isinstance(value, str | int | float)]
    lines = ["plan: " + ", ".join(settings)]
    for number, stage in enumerate(plan.get("stages", [])):
        runs = ", ".join(first if first == last else f"{first} .. {last}" for first, last in stage["runs"])
        lines.append(
            f"stage {number}: {stage['share']:.1%} of the arithmetic, {stage['units']} units: {runs}"
        )
    return lines


def limit_threads(device_type: str) -> None:
    """On CPUs the ranks of a machine share its cores evenly."""
    import torch

    if device_type == "cpu":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))


def versions() -> dict[str, str]:
    """Versions of what the answers depend on, for /health."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "xfuser"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Lifeline:
    """Ends the process when a signal comes, or the launcher or another rank is gone or stopped.

    It does so whatever the main thread is stuck in, and as long as that takes: loading may take its time.

    Signals are only noted by their C handler (`signal.set_wakeup_fd`); a thread reads them, because a Python
    handler would wait for the main thread to come back from a collective.

    Args:
        launched: whether a launcher started this process, whose death must be ours.
        patience: seconds in which a stopped rank or launcher must be noticed.
    """

    def __init__(self, launched: bool, patience: float) -> None:
        self._callbacks: list[Callable[[str, bool], None]] = []
        self._lock = threading.Lock()
        self._every = min(0.5, patience / 10)
        self._watched: list[Callable[[], str | None]] = []
        if launched:
            self.watch(Family(patience * PATIENCE, self._every).fault)
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def watch(self, fault: Callable[[], str | None]) -> None:
        """Ask `fault` now and then; what it says is the reason to end."""
        self._watched.append(fault)

    def before_end(self, callback: Callable[[str, bool], None]) -> None:
        """Call `callback(reason, failed)` before the process ends."""
        self._callbacks.append(callback)

    def end(self, code: int, reason: str, failed: bool = True) -> NoReturn:
        """Run the callbacks, give the HTTP threads a moment, end the process at once."""
        with self._lock:
            for callback in self._callbacks:
                callback(reason, failed)
            log.disabled = True  # what the main thread meets from here on is the end itself
            time.sleep(FLUSH_SECONDS if self._callbacks else LINGER_SECONDS)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], self._every)
            if ready:
                number = os.read(self._read, 1)[0]
                if number in (signal.SIGINT, signal.SIGTERM):
                    log.info("%s, ending", signal.Signals(number).name)
                    # The launcher sends SIGTERM when a rank has died, too: a running request has failed then.
                    code = 0 if number == signal.SIGTERM else 128 + number
                    self.end(code, f"{signal.Signals(number).name} was received", number == signal.SIGTERM)
            for fault in list(self._watched):
                if reason := fault():
                    log.error("%s, ending", reason)
                    self.end(EXIT_FAILED, f"broken: {reason}")


def _report_end(error: Exception, rank: int) -> None:
    """Expected endings take one line; a traceback is for what nobody foresaw."""
    from shared.comm import BrokenJobError

    if isinstance(error, LoadError):
        if rank == 0:
            log.error("cannot load: %s", error)
    elif isinstance(error, BrokenJobError | TimeoutError):
        log.error("%s", error)
    else:
        log.exception("the host failed")


class _JsonFormatter(logging.Formatter):
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


def set_up_logging(config: HostConfig, rank: int) -> None:
    """Rank 0 logs at --log_level; the others only what is wrong, unless the level is debug."""
    handler = logging.StreamHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(
        _JsonFormatter()
        if config.log_json
        else logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S")
    )
    level = config.log_level.upper()
    if config.log_json:  # whatever else writes to the log must be JSON, too
        logging.captureWarnings(True)
        for name in ("py.warnings", "waitress"):
            logging.getLogger(name).handlers = [handler]
            logging.getLogger(name).propagate = False
    logger = logging.getLogger("host")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level if rank == 0 or level == "DEBUG" else "WARNING")
