"""How long each unit of a denoiser takes on this device: the costs to divide by where FLOPs say too little.

Norms, temporal attention and samplers are bound by memory and not by arithmetic: stages of equal FLOPs then
do not take equal time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from shared.parallel.asyncdiff.trace import Trace
from shared.parallel.surgery import Forward

ROUNDS = 3
AHEAD_CYCLES = 200_000_000  # about 0.1 s of a GPU's clock, in which the CPU launches the whole forward


class UnitTimer:
    """Answers the calls of a denoiser's modules by running them, and times those that are units.

    Args:
        traced: the units' names and order.
        device: CUDA events on a GPU, the wall clock on a CPU.
    """

    def __init__(self, traced: Trace, device: torch.device) -> None:
        self._units = {traced.calls[index].name for index in traced.units}
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def call(self, name: str, original: Forward, args: tuple, kwargs: dict) -> Any:
        """Run a module; in order of execution, each unit's begin and end are noted."""
        if name not in self._units:
            return original(*args, **kwargs)
        begin = self._mark()
        result = original(*args, **kwargs)
        self._marks.append((begin, self._mark()))
        return result

    def seconds(self, forward: Callable[[], Any]) -> list[float]:
        """The least time of each unit over some rounds of `forward`, which must come to `call`."""
        rounds = [self._round(forward) for _ in range(ROUNDS + 1)][1:]
        return [min(times) for times in zip(*rounds, strict=True)]

    def _round(self, forward: Callable[[], Any]) -> list[float]:
        self._marks = []
        if self._cuda:
            # A GPU that is kept busy meanwhile runs the kernels one after the other, without launch gaps.
            torch.cuda._sleep(AHEAD_CYCLES)
        forward()
        if not self._cuda:
            return [end - begin for begin, end in self._marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._marks]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
