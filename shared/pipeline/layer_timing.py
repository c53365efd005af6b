"""How long single layers take on a device: a linear layer in 16 bits and in 8, as compiled blocks have it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shared.pipeline.eight_bits import quantize_layer

Call = Callable[[], torch.Tensor]

LAYERS = 4
"""Layers of one shape that take turns, so that no weight stays in a cache as it would not in a model."""
LARGE = 256 << 20
"""Bytes of the weights of one shape that suffice for that."""
RUNS, ROUNDS = 10, 5
"""Times that are measured, and calls of each layer in one of them."""
DEFAULT: Mapping[str, Any] = {"fullgraph": True, "dynamic": False}
"""torch.compile's arguments, with inductor's own products."""


@dataclass(frozen=True)
class Shape:
    """A product: rows of the inputs, and the numbers of the layer's inputs and outputs."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs}x{self.outputs}"


def microseconds(calls: Sequence[Call]) -> float:
    """Of one call: the median over runs of all of them, on a GPU replayed as a CUDA graph."""
    if not torch.cuda.is_available():
        return statistics.median(_on_the_clock(calls) for _ in range(RUNS)) / len(calls)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in (*calls, *calls):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
        for call in [*calls] * ROUNDS:
            call()
    times = []
    for _ in range(RUNS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / ROUNDS)
    return statistics.median(times) / len(calls)


def _on_the_clock(calls: Sequence[Call]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) * 1e6


def between(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer as a block has it: what is in front of it and behind it can be joined with its own rounding."""
    return F.silu(layer(F.silu(x)))


def layers_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[nn.Linear]:
    """Layers that take turns."""
    size = shape.inputs * shape.outputs * dtype.itemsize
    count = max(min(LAYERS, LARGE // size), 1)
    return [nn.Linear(shape.inputs, shape.outputs, device=device, dtype=dtype) for _ in range(count)]


def calls_of(layers: Sequence[nn.Module], x: torch.Tensor, compiled: Mapping[str, Any] | None) -> list[Call]:
    """A call of each layer.

    Args:
        compiled: torch.compile's arguments; None: as Python calls it.
    """
    if compiled is None:
        return [partial(between, layer, x) for layer in layers]
    # Code of its own: compiled for each shape anew, it counts for no limit, and what else is compiled stays.
    own = FunctionType(between.__code__.replace(), between.__globals__)
    made: Any = torch.compile(own, **compiled)
    return [partial(made, layer, x) for layer in layers]


def both(
    shape: Shape, kind: str, dtype: torch.dtype, device: torch.device, compiled: Mapping[str, Any] = DEFAULT
) -> tuple[float, float]:
    """Microseconds of one product in 16 bits and in 8.

    Args:
        kind: float8 or int8.
        compiled: torch.compile's arguments.

    Raises:
        RuntimeError: it cannot be measured, as where memory is short.
    """
    # Compiled by inductor as it is, a product of 16 bits is the same library's as Python's.
    plain = None if dict(compiled) == dict(DEFAULT) else compiled
    with torch.inference_mode():
        x = torch.randn(shape.rows, shape.inputs, device=device, dtype=dtype)
        layers = layers_of(shape, dtype, device)
        sixteen = microseconds(calls_of(layers, x, plain))
        for layer in layers:
            quantize_layer(layer, kind)
        return sixteen, microseconds(calls_of(layers, x, compiled))
