"""CUDA graphs around a function that is called again and again with the same shapes.

On two fast GPUs a denoising step is bound by Python and by kernel launches; a captured step is one launch.
Without CUDA the function is simply called: one code path for all devices.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shared.parallel.method import Part
from shared.parallel.pipeline import Pipeline, parts_of
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Surgery

log = logging.getLogger("host")


def signature(tree: Any) -> Hashable:
    """What must agree for two calls to be the same computation: structure, shapes, dtypes, other values."""
    leaves, spec = tree_flatten(tree)
    return repr(spec), tuple(_describe(leaf) for leaf in leaves)


def _describe(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf)


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    output: Any


@dataclass
class _Seen:
    """A call that has run; its graph once it has run twice."""

    graph: _Graph | None = None
    too_large: bool = False


SHARE = 0.3
"""Of what a process may use of its device: the most that captured graphs hold."""
SIGNATURES = 512
"""How many calls are remembered, with or without a graph."""


class Pool:
    """The memory of all captured graphs of this process on one device, bounded in bytes.

    What one graph needs only while it runs, the others use too: they never run at the same time. A pool gives
    memory back only as a whole, so all graphs are dropped where there is no room for another one.

    Args:
        limit: bytes.
        in_use: the bytes of the device that are in use.
    """

    def __init__(self, limit: int, in_use: Callable[[], int]) -> None:
        self.limit, self._in_use = limit, in_use
        self.handle: Any = None
        """torch's, while there are graphs."""
        self.nbytes = 0
        """What the graphs hold."""
        self._owners: weakref.WeakSet[Graphs] = weakref.WeakSet()

    def captured(self, owner: Graphs, capture: Callable[[Any], _Graph]) -> _Graph | None:
        """What `capture` makes in a pool of this handle; None where even the only graph is too large."""
        self._owners.add(owner)
        for _ in range(2):
            if self.nbytes > self.limit:
                self.drop()
            if self.handle is None:
                self.handle = torch.cuda.graph_pool_handle()
            before = self._in_use()
            graph = capture(self.handle)
            self.nbytes += max(self._in_use() - before, 0)
            if self.nbytes <= self.limit:
                return graph
            del graph
        self.drop()
        return None

    def drop(self) -> None:
        """Drop every graph; each is captured again when it is next needed."""
        for owner in self._owners:
            owner.forget()
        self.handle, self.nbytes = None, 0

    def left(self, owner: Graphs) -> None:
        """The graphs of one owner are gone; the memory is free once those of all are."""
        self._owners.discard(owner)
        if not self._owners:
            self.handle, self.nbytes = None, 0


_pools: dict[torch.device, Pool] = {}


def pool_of(device: torch.device) -> Pool:
    """The pool of this process on a CUDA device."""
    if device not in _pools:
        share = SHARE * torch.cuda.get_per_process_memory_fraction(device)
        limit = int(share * torch.cuda.get_device_properties(device).total_memory)
        _pools[device] = Pool(limit, lambda: _in_use(device))
    return _pools[device]


def _in_use(device: torch.device) -> int:
    """Bytes of a device in use, by graphs themselves too; what torch keeps unused is given back first."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


_eager = 0


@contextlib.contextmanager
def uncaptured() -> Iterator[None]:
    """Meanwhile every call runs eagerly, in memory that others take after it; what was captured stays."""
    global _eager
    _eager += 1
    try:
        yield
    finally:
        _eager -= 1


class Graphs:
    """Captured calls by kind and signature.

    The first call of a kind and signature runs eagerly (libraries and communicators set themselves up), the
    second is captured, and from then on it is replayed on copies of the inputs. What is captured must be
    capturable: no branch on data, no host synchronisation, no changing Python state. All graphs of a device
    share the memory of one Pool; a call that is too large for it always runs eagerly.

    Args:
        enabled: False calls through always.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._seen: Latest[_Seen] = Latest(SIGNATURES)
        self._pool: Pool | None = None

    def run(self, kind: Hashable, fn: Callable[..., Any], **kwargs: Any) -> Any:
        """``fn(**kwargs)``, replayed where it can be; tensors in the result belong to the caller."""
        leaves, spec = tree_flatten(kwargs)
        device = next((x.device for x in leaves if isinstance(x, torch.Tensor) and x.is_cuda), None)
        if not self.enabled or _eager or device is None:
            return fn(**kwargs)
        key = (kind, signature(kwargs))
        seen = self._seen.get(key)
        if seen is None:
            self._seen.put(key, _Seen())
            return fn(**kwargs)
        if seen.graph is None and not seen.too_large:
            self._pool = pool_of(device)

            def capture(handle: Any) -> _Graph:
                inputs = [self._static(leaf, device) for leaf in leaves]
                return self._capture(handle, fn, inputs, tree_unflatten(inputs, spec))

            seen.graph = self._pool.captured(self, capture)
            if seen.graph is None:
                seen.too_large = True
                log.info("a step is not captured: its graph needs more than %.1f GB", self._pool.limit / 1e9)
        if seen.graph is None:
            return fn(**kwargs)
        graph = seen.graph
        for static, leaf in zip(graph.inputs, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                static.copy_(leaf, non_blocking=True)
        graph.graph.replay()
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, graph.output)

    def around(self, kind: Hashable) -> Callable[[Callable[..., Any], tuple, dict], Any]:
        """What a Surgery puts in place of a module's forward, to run it through here as this kind."""

        def forward(original: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
            return self.run(kind, lambda args, kwargs: original(*args, **kwargs), args=args, kwargs=kwargs)

        return forward

    def forget(self) -> None:
        """Drop all graphs; what has run once is captured at its next call."""
        for seen in self._seen:
            seen.graph = None

    def close(self) -> None:
        """Drop all graphs, and forget what has run."""
        self._seen.clear()
        if self._pool is not None:
            self._pool.left(self)
            self._pool = None

    @staticmethod
    def _static(leaf: Any, device: torch.device) -> Any:
        # Host tensors (a scalar timestep) become device tensors: a captured graph reads no host memory.
        return leaf.detach().to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf

    @staticmethod
    def _capture(handle: Any, fn: Callable[..., Any], inputs: list[Any], kwargs: dict[str, Any]) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog and other host threads may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=handle, capture_error_mode="thread_local"):
            output = fn(**kwargs)
        return _Graph(graph, inputs, output)


class Captured(Part):
    """Models of a pipeline as CUDA graphs, each whole: text encoders are bound by Python and by launches.

    Args:
        pipe: its models' forwards are overridden until ``close``.
        names: the attributes that hold them, some of them maybe None.
        enabled: False leaves them unchanged.
    """

    def __init__(self, pipe: Pipeline, names: Sequence[str], enabled: bool = True) -> None:
        super().__init__()
        self._graphs = Graphs()
        self.held.callback(self._graphs.close)
        surgery = self.held.enter_context(Surgery())
        for name, model in parts_of(pipe, names if enabled else ()).items():
            surgery.override(model, self._graphs.around(name))
        self.captures = len(surgery) > 0
        """Whether there is any model to capture."""

    def reset(self) -> None:
        self._graphs.close()
