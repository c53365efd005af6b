"""A pool of rank processes that stays up for a whole pytest session.

``pool.run(fn, world_size, *args)`` calls one importable function on every rank of a fresh gloo job and gives
back what each rank returned. The processes are forked from a server that has imported tests/preload.py once,
so a call costs milliseconds instead of an import. Each call starts from its rank's own random state.
"""

from __future__ import annotations

import datetime
import faulthandler
import functools
import gc
import itertools
import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

GRACE = 5.0
"""Seconds that the other ranks get to finish once one rank has failed."""
MOST_THREADS = 24
"""Of a rank between two calls. What a test's groups leave wakes up a hundred times a second."""
Made = TypeVar("Made")


def once(make: Callable[[], Made]) -> Made:
    """On each rank of a call: what rank 0 makes. For pictures of one rank, which all would make alike."""
    import torch.distributed as dist

    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    found: Any = made[0]
    return found


def is_last() -> bool:
    """Whether this is the rank of a call that looks whether a pipeline was given back: not that of `once`."""
    import torch.distributed as dist

    return dist.get_rank() == dist.get_world_size() - 1


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time; the message holds each such rank's traceback."""


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _as_strict_as_nccl() -> None:
    """Collectives that refuse what NCCL refuses and gloo does not: tensors that are not contiguous."""
    import torch
    import torch.distributed as dist

    def strict(collective: Any) -> Any:
        @functools.wraps(collective)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                if isinstance(given, torch.Tensor) and not given.is_contiguous():
                    raise ValueError(f"{collective.__name__}: NCCL takes only contiguous tensors")
            return collective(*args, **kwargs)

        return checked

    names = "broadcast all_reduce all_gather_into_tensor all_gather_single all_to_all_single"
    for name in names.split():
        if hasattr(dist, name):
            setattr(dist, name, strict(getattr(dist, name)))


def _serve(rank: int, pipe: Connection, folder: str) -> None:
    """Answer jobs until the pool ends; what this rank leaves among temporary files is in `folder`."""
    os.environ.setdefault("TINY_CACHE", tempfile.gettempdir())  # checkpoints are every process's
    tempfile.tempdir = folder
    _as_strict_as_nccl()
    import torch
    import torch.distributed as dist

    from shared.ranks import groups

    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork is no garbage
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        fn, world_size, store, timeout, args, kwargs = job
        faulthandler.dump_traceback_later(max(timeout - GRACE, 1), exit=False)  # where a silent rank is
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout),
            )
            pipe.send((None, "begun"))
            # The global state differs from rank to rank, as it may in a host: nothing may rest on it.
            torch.manual_seed(1000 + rank)
            answer: tuple[bool, Any] = (True, fn(*args, **kwargs))
        except Exception:
            answer = (False, traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        # A group's threads, which wake a hundred times a second, end with the last object that holds it.
        for made in vars(groups).values():
            if hasattr(made, "cache_clear"):  # groups that are made once in a host
                made.cache_clear()
        gc.collect()
        faulthandler.cancel_dump_traceback_later()
        try:
            pipe.send(answer)
        except Exception:
            pipe.send((False, f"the result cannot be pickled\n{traceback.format_exc()}"))


class RankPool:
    """Rank processes on this machine, started when first needed.

    Args:
        timeout: seconds that one call may take before all ranks are killed.
        method: how they are started, as in `multiprocessing`.
        most_threads: a rank with more of them after a call is replaced; None: it may have any number.
    """

    def __init__(
        self, timeout: float = 120.0, method: str = "forkserver", most_threads: int | None = MOST_THREADS
    ) -> None:
        self.timeout, self.most_threads = timeout, most_threads
        self._context: Any = multiprocessing.get_context(method)
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._stores = tempfile.TemporaryDirectory(prefix="ranks-")
        self._numbers = itertools.count()

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on ranks 0 to world_size - 1 and return their results in rank order.

        ``fn`` must be importable (module level) and finds ``torch.distributed`` initialised with gloo for
        exactly this world size.

        Raises:
            RankError: a rank raised, died, or was not done within the timeout.
        """
        limit = self.timeout if timeout is None else timeout
        for attempt in (1, 2):
            self.start(world_size)
            store = str(Path(self._stores.name) / str(next(self._numbers)))
            workers = self._workers[:world_size]
            for _, pipe in workers:
                pipe.send((fn, world_size, store, limit, args, kwargs))
            results, problems, begun = self._collect(workers, time.monotonic() + limit)
            if len(begun) == world_size or attempt == 2:
                break
            # Not all ranks have found each other, which is gloo's doing and not that of what is tested.
            self._kill()
        silent = [rank for rank in range(world_size) if rank not in results and rank not in problems]
        problems.update({rank: "did not answer in time and was killed" for rank in silent})
        if problems:
            if silent or not all(process.is_alive() for process, _ in workers):
                self._kill()
            text = "\n".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items()))
            raise RankError(f"{len(problems)} of {world_size} ranks failed\n{text}")
        threads = max(len(os.listdir(f"/proc/{process.pid}/task")) for process, _ in workers)
        if self.most_threads is not None and threads > self.most_threads:
            self._kill()
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End all rank processes and remove what the pool left on disk."""
        for _, pipe in self._workers:
            pipe.close()
        for process, _ in self._workers:
            process.join(GRACE)
        self._kill()
        self._stores.cleanup()

    def start(self, world_size: int) -> None:
        """Have so many ranks; those that are missing are importing when this returns."""
        if len(self._workers) >= world_size:
            return
        os.environ["OMP_NUM_THREADS"] = "1"
        if not self._workers and self._context.get_start_method() == "forkserver":
            self._context.set_forkserver_preload(["tests.preload"])
        for rank in range(len(self._workers), world_size):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, there, self._stores.name), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))

    def _collect(
        self, workers: list[tuple[multiprocessing.process.BaseProcess, Connection]], deadline: float
    ) -> tuple[dict[int, Any], dict[int, str], set[int]]:
        results: dict[int, Any] = {}
        problems: dict[int, str] = {}
        begun: set[int] = set()
        pending = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending[pipe]
                try:
                    good, value = pipe.recv()
                except EOFError:
                    good, value = False, "died"
                if good is None:
                    begun.add(rank)
                    continue
                del pending[pipe]
                if good:
                    results[rank] = value
                else:
                    problems[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, problems, begun

    def _kill(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()
