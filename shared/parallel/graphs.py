"""CUDA graphs around a function that is called again and again with the same shapes.

On two fast GPUs a denoising step is bound by Python and by kernel launches; a captured step is one launch.
Without CUDA the function is simply called: one code path for all devices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shared.parallel.method import Part
from shared.parallel.pipeline import Pipeline, parts_of
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Surgery


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


class Graphs:
    """Captured calls by kind and signature, least recently used ones dropped.

    The first call of a kind and signature runs eagerly (libraries and communicators set themselves up), the
    second is captured, and from then on it is replayed on copies of the inputs. What is captured must be
    capturable: no branch on data, no host synchronisation, no changing Python state.

    Args:
        enabled: False calls through always.
        size: how many graphs are kept.
    """

    def __init__(self, enabled: bool = True, size: int = 8) -> None:
        self.enabled = enabled
        self._seen: Latest[_Seen] = Latest(size)
        self._pool: Any = None

    def run(self, kind: Hashable, fn: Callable[..., Any], **kwargs: Any) -> Any:
        """``fn(**kwargs)``, replayed where it can be; tensors in the result belong to the caller."""
        leaves, spec = tree_flatten(kwargs)
        device = next((x.device for x in leaves if isinstance(x, torch.Tensor) and x.is_cuda), None)
        if not self.enabled or device is None:
            return fn(**kwargs)
        key = (kind, signature(kwargs))
        seen = self._seen.get(key)
        if seen is None:
            self._seen.put(key, _Seen())
            return fn(**kwargs)
        if seen.graph is None:
            inputs = [self._static(leaf, device) for leaf in leaves]
            seen.graph = self._capture(fn, inputs, tree_unflatten(inputs, spec))
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

    def close(self) -> None:
        """Drop all graphs and their memory."""
        self._seen.clear()
        self._pool = None

    @staticmethod
    def _static(leaf: Any, device: torch.device) -> Any:
        # Host tensors (a scalar timestep) become device tensors: a captured graph reads no host memory.
        return leaf.detach().to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf

    def _capture(self, fn: Callable[..., Any], inputs: list[Any], kwargs: dict[str, Any]) -> _Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog and other host threads may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
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
