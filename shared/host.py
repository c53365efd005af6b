"""The life of one rank's process: flags, server, signals, loading, the loop, the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
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
    EXIT_USAGE,
    RANK_0_SECONDS,
    HostConfig,
    LoadError,
    UsageError,
    exit_usage,
    first_line,
    idle_flags,
    parse_or_exit,
    usage_line,
    world_from_environment,
)
from shared.liveness import PATIENCE, STOP_TOGETHER, Family, dead_ranks, died, stop_others
from shared.logs import adopt_libraries, finish, guard_streams, set_up_logging

if TYPE_CHECKING:
    from shared.comm import World
    from shared.generate import PipelineEngine
    from shared.jobs import HostStatus, JobQueue

log = logging.getLogger("host")

EXIT_FAILED = 1
FLUSH_SECONDS = 0.5  # what the HTTP threads get to send their last answers
ANSWER_SECONDS = 3.0  # the same, where a picture was finished after the first signal
WORKERS_GRACE = 5.0  # seconds that other ranks wait for rank 0's word, after --stop_grace
LINGER_SECONDS = (
    0.2  # how long a signalled worker stays, so that its peers hear the signal before its absence
)

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

BuildEngine = Callable[[HostConfig, "World"], "PipelineEngine"]


def serve(backend: str, build_engine: BuildEngine) -> NoReturn:
    """Run one rank of a host until it is stopped; never returns.

    Exit codes: 2 for a usage error, 1 when loading fails or the ranks lose each other, 130 after Ctrl-C,
    0 on every rank after SIGTERM or SIGHUP to any of them: who was told to stop is not restarted.

    Args:
        backend: name in shared.models.BACKENDS.
        build_engine: loads the pipeline and makes it parallel; called on every rank.
    """
    guard_streams()
    config = parse_or_exit(backend)
    rank, world_size = world_from_environment()
    set_up_logging(config, rank)
    from shared.doors import unguarded
    from shared.jobs import HostStatus, JobQueue

    # Workers hear of the end from rank 0, which has until --stop_grace.
    grace = config.stop_grace + (WORKERS_GRACE if rank else 0)
    lifeline = Lifeline("TORCHELASTIC_RUN_ID" in os.environ, config.collective_timeout, rank, grace)
    status = HostStatus(config.backend, config.type, world_size)
    queue = JobQueue(config.max_queue)
    if rank == 0:
        _start_server(config, status, queue, lifeline)
        for line in [*unguarded(config), *idle_flags(config, world_size)]:
            log.warning("%s", line)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        _load_and_loop(config, build_engine, status, queue, lifeline)
    except UsageError as error:
        reason = usage_line(backend, error)
        lifeline.fail(EXIT_USAGE, reason, lambda: print(reason, file=sys.stderr, flush=True))
    except Exception as error:
        told, reason = error, first_line(error)
        if (dead := dead_ranks()) and not isinstance(error, LoadError):
            reason = f"{died(dead)}: {reason}"
            told = BrokenRanksError(reason)
        lifeline.fail(EXIT_FAILED, f"broken: {reason}", lambda: _report_end(told))
    lifeline.end(0, lifeline.stopping or "stopped", failed=False)


def _start_server(config: HostConfig, status: HostStatus, queue: JobQueue, lifeline: Lifeline) -> None:
    from shared.jobs import JobError
    from shared.server import Server, body_bound, create_app

    try:
        app = create_app(config, status, queue)
        server = Server(app, config.host, config.port, config.max_queue, body_bound(app, config))
    except (OSError, UnicodeError) as error:
        exit_usage(config.backend, UsageError(_cannot_serve(config, error)))
    log.info(
        "serving http://%s:%d, loading %s from %s", config.host, config.port, config.type, config.checkpoint
    )

    def stop(reason: str) -> None:
        status.state, status.message = "stopping", reason
        queue.close(JobError(503, f"the host is stopping: {reason}"), running=False)

    def tell_clients(reason: str, failed: bool) -> None:
        status.state, status.message = ("broken" if failed else "stopping"), reason
        queue.close(JobError(500 if failed else 503, f"the host is ending: {reason}"))
        server.close(FLUSH_SECONDS if lifeline.hurried else ANSWER_SECONDS)

    lifeline.before_stop(stop)
    lifeline.before_end(tell_clients)


def _cannot_serve(config: HostConfig, error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return f"--host: must be a name or an address of this machine; got {config.host!r}"
    why = error.strerror or error
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host: must be a name or an address of this machine; got {config.host!r}: {why}"
    return f"--port: cannot serve on {config.host}:{config.port}: {why}"


def _load_and_loop(
    config: HostConfig,
    build_engine: BuildEngine,
    status: HostStatus,
    queue: JobQueue,
    lifeline: Lifeline,
) -> None:
    began = time.monotonic()
    status.at(5, "importing libraries")
    from shared.comm import Channel, init_world, rank_device_info
    from shared.engine import RankLoop
    from shared.memory import freeze_heap
    from shared.requests import RequestError

    status.at(15, "waiting for the other ranks")
    world = init_world(config.device, config.collective_timeout, lifeline.watch, lifeline.when_told)
    limit_threads(world.device.type)
    status.at(20, "loading the model")
    engine = build_engine(config, world)
    adopt_libraries()
    status.at(75, "warming up")
    try:
        engine.warm_up()
    except RequestError as error:
        raise LoadError(f"the launch's own picture is refused: {error}") from error
    on_server = world.rank == 0
    status.at(95, "waiting for the other ranks")
    if on_server:
        engine.preview_to(queue)
    freeze_heap()
    channel = Channel(world)
    status.ranks = channel.introduce(rank_device_info(world))
    lifeline.serving = True
    status.plan = engine.plan
    status.versions = versions()
    status.ready()
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
    handler would wait for the main thread to come back from a collective. The first SIGTERM or SIGHUP of a
    host that serves lets what runs be finished within `grace` seconds; any other signal ends at once. A rank
    that was told alone tells the others, so that all of them end with 0 and the launcher restarts none.

    Args:
        launched: whether a launcher started this process, whose death must be ours.
        patience: seconds in which a stopped rank or launcher must be noticed.
        rank: this process's.
        grace: seconds between the first signal and the end.
    """

    def __init__(self, launched: bool, patience: float, rank: int, grace: float) -> None:
        self.serving = False  # written by the main thread, once all ranks are loaded
        self.stopping = ""  # the reason, between the first signal and the end
        self.hurried = True  # whether the end waits for no answer
        self._rank, self._grace = rank, grace
        self._deadline = math.inf  # time.monotonic()
        self._launched = launched
        self._when_told: list[Callable[[], None]] = [stop_others] if launched else []
        self._told = False  # a signal came to this rank itself
        self._failing = False
        self._signalled = threading.Event()
        self._on_stop: list[Callable[[str], None]] = []
        self._callbacks: list[Callable[[str, bool], None]] = []
        self._lock = threading.Lock()
        self._every = min(0.5, patience / 10)
        self._watched: list[Callable[[], str | None]] = []
        if launched:
            self.watch(Family(patience * PATIENCE, self._every).fault)
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in ENDING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        signal.signal(STOP_TOGETHER, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def watch(self, fault: Callable[[], str | None]) -> None:
        """Ask `fault` now and then; what it says is the reason to end."""
        self._watched.append(fault)

    def when_told(self, tell: Callable[[], None]) -> None:
        """Call `tell` when this rank itself is told to stop, so that other ranks stop as well."""
        self._when_told.append(tell)

    def before_stop(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` at the first signal of a host that serves."""
        self._on_stop.append(callback)

    def before_end(self, callback: Callable[[str, bool], None]) -> None:
        """Call `callback(reason, failed)` before the process ends."""
        self._callbacks.append(callback)

    def end(self, code: int, reason: str, failed: bool = True) -> NoReturn:
        """Run the callbacks, which answer the clients, and end the process at once."""
        with self._lock:
            self.hurried = failed or not self.stopping or time.monotonic() > self._deadline
            for callback in self._callbacks:
                callback(reason, failed)
            log.disabled = True  # what the main thread meets from here on is the end itself
            if not self._callbacks:
                time.sleep(LINGER_SECONDS)
            finish()
            os._exit(code)

    def fail(self, code: int, reason: str, report: Callable[[], None]) -> NoReturn:
        """End as failed. While loading, the lowest rank that failed says why, for most fail alike.

        The launcher ends all ranks of a machine with the first one, so the others let rank 0 go first. One
        that hears the launcher's signal before its turn is silent only where a rank before it has spoken.
        What fails once a stop has begun is the stop.
        """
        time.sleep(LINGER_SECONDS if self._launched else 0.0)  # another rank's word has come before its end
        if self.stopping:
            self.end(0, self.stopping, failed=False)
        if self._rank and not self.serving:
            self._failing = True
            self._signalled.wait(RANK_0_SECONDS + self._rank - 1)
        if self.serving or min(dead_ranks(), default=self._rank) >= self._rank:
            report()
        self.end(code, reason)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], self._every)
            if ready:
                self._signal(os.read(self._read, 1)[0])
            for fault in list(self._watched):
                if reason := fault():
                    log.error("%s, ending", reason)
                    self.end(EXIT_FAILED, f"broken: {reason}")
            if time.monotonic() > self._deadline:
                log.warning("what ran was not done within %g s, ending", self._grace)
                self.end(0, f"{self.stopping} and --stop_grace is over", failed=False)

    def _signal(self, number: int) -> None:
        if number not in (*ENDING_SIGNALS, STOP_TOGETHER):
            return
        if self._failing:
            self._signalled.set()
            return
        own = number != STOP_TOGETHER
        reason = f"{signal.Signals(number).name} was received" if own else "another rank was told to stop"
        # The launcher sends its signal when a rank has died, too: what runs has failed then.
        if own and number != signal.SIGINT and not self.stopping and (dead := dead_ranks()):
            log.log(logging.INFO if self._rank else logging.ERROR, "%s, ending", died(dead))
            self.end(EXIT_FAILED, f"broken: {died(dead)}")
        again, self._told = self._told and own, self._told or own
        if own and number != signal.SIGINT and not again:
            for tell in list(self._when_told):
                tell()
        if number == signal.SIGINT or not self.serving or again:
            log.info("%s, ending", reason)
            self._deadline = 0.0
            self.end(128 + number if number == signal.SIGINT else 0, reason, failed=False)
        if self.stopping:
            return
        self.stopping = reason
        self._deadline = time.monotonic() + self._grace
        log.info(
            "%s: what runs may be finished within %g s; a second signal ends at once", reason, self._grace
        )
        for callback in self._on_stop:
            callback(self.stopping)


class BrokenRanksError(RuntimeError):
    """A rank of this machine died; what was met instead is its trace."""


def _report_end(error: Exception) -> None:
    """Expected endings take one line; a traceback is for what nobody foresaw."""
    from shared.comm import BrokenJobError

    if isinstance(error, LoadError):
        log.error("cannot load: %s", error)
    elif isinstance(error, BrokenJobError | BrokenRanksError | TimeoutError):
        log.error("%s", error)
    else:
        log.error("the host failed: %s", first_line(error), exc_info=error)
