"""The process of one rank: flags, server, signals, loading, the loop, the end."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from shared.backends import BACKENDS
from shared.launch.backend import Backend
from shared.launch.checks import idle_flags, preset_line
from shared.launch.errors import LoadError, UsageError, first_line
from shared.launch.flags import HostConfig
from shared.launch.logs import adopt_libraries, guard_streams, set_up_logging, world_from_environment
from shared.launch.parser import EXIT_USAGE, exit_usage, parse_or_exit, usage_line
from shared.launch.phases import PHASES
from shared.pipeline.kept import keep_bytecode, keep_compiled
from shared.ranks.lifeline import EXIT_FAILED, Lifeline
from shared.ranks.liveness import dead_ranks, died

if TYPE_CHECKING:
    from shared.api.queue import JobQueue
    from shared.api.status import HostStatus
    from shared.ranks.groups import World
    from shared.ranks.loop import Engine

log = logging.getLogger("host")

FLUSH_SECONDS = 0.5  # for the HTTP threads to send their last answers
ANSWER_SECONDS = 3.0  # the same, where a picture was finished after the first signal
WORKERS_GRACE = 5.0  # seconds that other ranks wait for rank 0's message, after --stop_grace


def serve(backend: Backend[World, Engine]) -> NoReturn:
    """Run one rank of a host until it is stopped; never returns.

    Exit codes: 2 for a usage error, 1 when loading fails or the ranks lose each other, 130 after Ctrl-C,
    0 on every rank after SIGTERM or SIGHUP to any of them, so that torchrun does not restart them.
    """
    guard_streams()
    config = parse_or_exit(backend, BACKENDS)
    rank, world_size = world_from_environment()
    set_up_logging(config, rank)
    keep_bytecode(config)
    from shared.api.queue import JobQueue
    from shared.api.status import HostStatus

    # Workers are stopped by rank 0, which has until --stop_grace.
    grace = config.stop_grace + (WORKERS_GRACE if rank else 0)
    lifeline = Lifeline("TORCHELASTIC_RUN_ID" in os.environ, config.collective_timeout, rank, grace)
    status = HostStatus(config.backend, config.type, world_size)
    queue = JobQueue(config.max_queue, config.max_queue_per_client)
    if rank == 0:
        from shared.http.access import exposure_warnings

        _start_server(config, backend, status, queue, lifeline)
        for line in [*exposure_warnings(config), *idle_flags(config, backend, world_size)]:
            log.warning("%s", line)
        if (preset := preset_line(config, backend, world_size)) is not None:
            log.info("%s", preset)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    keep_compiled(config, trims=os.environ.get("LOCAL_RANK", "0") == "0")
    try:
        _load_and_loop(config, backend, status, queue, lifeline)
    except UsageError as error:
        reason = usage_line(backend, error)
        lifeline.fail(EXIT_USAGE, reason, lambda: print(reason, file=sys.stderr, flush=True))
    except Exception as error:
        from shared.ranks.messages import BrokenJobError

        cause, reason = error, first_line(error)
        if (dead := dead_ranks()) and not isinstance(error, LoadError):
            reason = f"{died(dead)}: {reason}"
            cause = BrokenJobError(reason)
        lifeline.fail(EXIT_FAILED, f"broken: {reason}", lambda: _report_end(cause))
    lifeline.end(0, lifeline.stopping or "stopped", failed=False)


def _start_server(
    config: HostConfig, backend: Backend, status: HostStatus, queue: JobQueue, lifeline: Lifeline
) -> None:
    from shared.api.folder import FolderError
    from shared.api.jobs import JobError
    from shared.api.store import open_store
    from shared.http.server import Server, body_bound, create_app

    try:
        store = open_store(config)
    except FolderError as error:
        exit_usage(backend, UsageError(f"--state_dir: {config.state_dir!r} {error}"))
    try:
        app = create_app(config, status, queue, store)
        server = Server(app, config.host, config.port, config.max_queue, body_bound(app, config))
    except (OSError, UnicodeError) as error:
        exit_usage(backend, UsageError(_cannot_serve(config, error)))
    log.info(
        "serving http://%s:%d, loading %s from %s", config.host, config.port, config.type, config.checkpoint
    )

    def stop(reason: str) -> None:
        status.state, status.message = "stopping", reason
        queue.close(JobError(503, f"the host is stopping: {reason}"), running=False)

    def answer_clients(reason: str, failed: bool) -> None:
        status.state, status.message = ("broken" if failed else "stopping"), reason
        queue.close(JobError(500 if failed else 503, f"the host is ending: {reason}"))
        seconds = FLUSH_SECONDS if lifeline.immediate else ANSWER_SECONDS
        store.settle(seconds)
        server.close(seconds)

    lifeline.before_stop(stop)
    lifeline.before_end(answer_clients)


def _cannot_serve(config: HostConfig, error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return f"--host: must be a name or an address of this machine; got {config.host!r}"
    why = error.strerror or error
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"--host: must be a name or an address of this machine; got {config.host!r}: {why}"
    return f"--port: cannot serve on {config.host}:{config.port}: {why}"


def _load_and_loop(
    config: HostConfig,
    backend: Backend[World, Engine],
    status: HostStatus,
    queue: JobQueue,
    lifeline: Lifeline,
) -> None:
    began = time.monotonic()
    status.at(5, "importing libraries")
    PHASES.begin("imports")
    gc.disable()  # a sixth of their time: all of it stays
    from shared.ranks.channel import Channel
    from shared.ranks.device import freeze_heap, put_off_full_collections, rank_device_info
    from shared.ranks.groups import init_world
    from shared.ranks.link import measured_link, told
    from shared.ranks.loop import RankLoop, no_advice

    with meanwhile(bring_up_gpu, config.device != "cpu"):
        if backend.plans_memory:
            from shared.pipeline.unused import import_libraries

            import_libraries(config)
            import shared.pipeline.memory_plan as memory_plan
    put_off_full_collections()
    gc.enable()
    with meanwhile(import_compilers, config.compiles):  # while ranks, disks and GPUs are waited for
        PHASES.begin("ranks")
        status.at(15, "waiting for the other ranks")
        world = init_world(config.device, config.collective_timeout, lifeline.watch, lifeline.when_stopped)
        limit_threads(world.device.type)
        PHASES.begin("link")
        status.at(18, "measuring the link between the ranks")
        world = replace(world, link=measured_link(world.device, world.compute, world.voting))
        if world.link is not None and world.rank == 0:
            log.info("link between the ranks: %s", world.link)
        config = backend.choose(config, world)
        status.at(20, "loading the model")
        channel, memory = Channel(world), None
        if backend.plans_memory:
            PHASES.begin("memory plan")
            config, memory = memory_plan.planned(config, backend, channel)
        PHASES.begin("building")
        engine = backend.build_engine(config, world)
        adopt_libraries()
    PHASES.begin("warm-up")
    warm_up(engine, config, status)
    on_server = world.rank == 0
    status.at(95, "waiting for the other ranks")
    engine.preview_to(queue if on_server else None)
    freeze_heap()
    status.ranks = channel.gather_infos(rank_device_info(world) | {"parameters": engine.parameters})
    lifeline.serving = True
    status.plan, status.embeddings = engine.plan | told(world.link), engine.embeddings
    if memory is not None:
        status.plan = status.plan | {"memory": memory.told()}
        if memory.bits is not None:
            status.plan = status.plan | {"eight_bits": memory.bits.told()}
    status.plan = status.plan | {"start": PHASES.told()}
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
    for line in [PHASES.line(), *plan_lines(engine.plan)]:
        log.info("%s", line)
    RankLoop(
        engine,
        channel,
        queue if on_server else None,
        status if on_server else None,
        config.request_timeout,
        backend.pictures_at_once(config),
        memory.advice_for if memory is not None else no_advice,
    ).run()


@contextlib.contextmanager
def meanwhile(work: Callable[[], None], needed: bool) -> Iterator[None]:
    """Do some work in a thread, if it is needed, while what is inside of the block runs."""
    thread = threading.Thread(target=work, name=work.__name__, daemon=True)
    if needed:
        thread.start()
    yield
    if needed:
        thread.join()


def bring_up_gpu() -> None:
    """Bring this rank's GPU up, if every rank of this machine has one."""
    import torch

    local, ranks = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    with contextlib.suppress(RuntimeError):  # joining the other ranks says it
        if torch.cuda.device_count() >= max(ranks, 1):
            torch.zeros(1, device=f"cuda:{local}")


def import_compilers() -> None:
    """Import what the first compiled region needs, and hash torch's files as its cache does."""
    import torch._inductor.compile_fx
    import torch._inductor.runtime.triton_heuristics  # noqa: F401
    from torch._inductor.codecache import torch_key

    torch_key()


def warm_up(engine: Engine, config: HostConfig, status: HostStatus) -> None:
    """Warm the launch's size, then each of --sizes. Raises LoadError where one of them fails."""
    from shared.api.faults import RequestError

    sizes = [config.size, *(size for size in config.sizes or () if size != config.size)]
    for number, (width, height) in enumerate(sizes):
        name = f"{width}x{height}" + (f", size {number + 1} of {len(sizes)}" if len(sizes) > 1 else "")
        status.at(75 + 20 * number // len(sizes), f"warming up at {name}")
        began = time.monotonic()
        try:
            engine.warm_up((width, height) if number else None)
        except RequestError as error:
            raise LoadError(f"the warm-up request at {width}x{height} is refused: {error}") from error
        except Exception as error:
            if not number or dead_ranks():
                raise
            raise LoadError(f"--sizes: {width}x{height} fails: {first_line(error)}") from error
        log.info("warmed up at %s in %.1f s", name, time.monotonic() - began)


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan as log lines: its settings in one line, then one line a stage."""
    settings = [f"{name} {value}" for name, value in plan.items() if isinstance(value, str | int | float)]
    lines = ["plan: " + ", ".join(settings)]
    for number, stage in enumerate(plan.get("stages", [])):
        runs = ", ".join(first if first == last else f"{first} .. {last}" for first, last in stage["runs"])
        lines.append(
            f"stage {number}: {stage['share']:.1%} of the arithmetic, {stage['units']} units: {runs}"
        )
    return lines


def limit_threads(device_type: str) -> None:
    """Divide the cores of a machine evenly among its ranks on CPUs."""
    import torch

    if device_type == "cpu":
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))


def versions() -> dict[str, str]:
    """Versions of the packages that pictures depend on, for /health."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "xfuser"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _report_end(error: Exception) -> None:
    """Log the error: expected ones in one line, others with a traceback."""
    from shared.ranks.messages import BrokenJobError

    if isinstance(error, LoadError):
        log.error("cannot load: %s", error)
    elif isinstance(error, BrokenJobError | TimeoutError):
        log.error("%s", error)
    else:
        log.error("the host failed: %s", first_line(error), exc_info=error)
