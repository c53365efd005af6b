"""DeepCache: in some steps a UNet computes only its outermost layers. An approximation.

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free", arXiv 2312.00858, section 3.3: the
deep features change slowly from step to step, so that what comes out of them is kept from a step that has
computed it, and the outermost skip connection alone carries what is new. Which layers these are follows from
how the UNet is built; what they take from the others is found as for a stage of AsyncDiff.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shared.models import CacheSettings, Rule
from shared.parallel.asyncdiff.partition import partition
from shared.parallel.asyncdiff.stage import Run, Stage, Units
from shared.parallel.asyncdiff.trace import trace
from shared.parallel.graphs import Graphs, signature
from shared.parallel.method import Method
from shared.parallel.pipeline import Pipeline
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Forward, Surgery

INNER, OUTER = 0, 1
BLOCKS = ("down_blocks", "mid_block", "up_blocks")


class DeepCache(Method):
    """Leaves the deep layers of a UNet out in the steps that a rule names, which all ranks know alike.

    Ranks may have a guidance branch each (``CfgSplit``, put on after it); none has only a part of the UNet.

    Args:
        pipeline: has the UNet; loaded with adapters, quantized and compiled as wanted.
        unet: whose layers are left out.
        settings: of the cache, of which no step's change decides.
        cuda_graph: capture and replay both kinds of step on CUDA.
        max_shapes: signatures whose buffers and graphs are kept.

    Raises:
        ValueError: the cache measures a transformer's blocks.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        unet: nn.Module,
        settings: CacheSettings,
        *,
        cuda_graph: bool = True,
        max_shapes: int = 4,
    ) -> None:
        if not settings.for_unets:
            raise ValueError(f"{settings.cache} leaves out blocks of a transformer; UNets have deepcache")
        super().__init__(pipeline)
        self.unet, self.settings = unet, settings
        self.executions: Counter[str] = Counter()
        """How often each unit ran in this generation's steps that leave out, graph replays not counted."""
        self.left_out, self.calls = 0, 0
        self._rule = Rule(settings, 1)
        self._cuda_graph = cuda_graph
        self._stages: Latest[Stage] = Latest(max_shapes, lambda stage: stage.graphs.close())
        self._fresh: set[int] = set()
        """Of the stages, those whose buffers hold something of this generation."""
        self.held.callback(self.reset)
        surgery = self.held.enter_context(Surgery())
        self._units = Units(unet, self._forward, surgery)

    @property
    def warm_up_calls(self) -> int:
        return Rule(self.settings, 28).both_kinds(28)

    @property
    def plan(self) -> dict[str, Any]:
        """JSON-able: the cache, and what is computed in steps that it leaves out once one has been traced."""
        plan: dict[str, Any] = {"method": "deepcache", "cache": self.settings.as_dict()}
        if self._stages.last is not None:
            plan["outer"] = self._stages.last.partition.as_dict()["stages"][OUTER]
        return plan

    @property
    def notes(self) -> list[str]:
        if not self.left_out:
            return []
        return [f"step cache {self.settings.cache}: {self.left_out} of {self.calls} steps were left out"]

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self._begin(steps, 0)

    def begin_late(self, steps: int, first: int) -> None:
        super().begin_late(steps, first)
        self._begin(first + steps, first)

    def _begin(self, steps: int, first: int) -> None:
        self._rule = Rule(self.settings, steps, first)
        self.left_out = self.calls = 0
        self._fresh.clear()
        self.executions.clear()

    def reset(self) -> None:
        """Forget all traces, buffers and graphs: after adapters or weights have changed."""
        self._stages.clear()
        self._fresh.clear()

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.check_begun()
        kwargs, device = self._units.named(args, kwargs)
        stage = self._stage_for(original, kwargs, device)
        step, self.calls = self.calls, self.calls + 1
        computes = self._rule.ahead(step) is not False or id(stage) not in self._fresh
        if computes:
            self._rule.computed()
            self._fresh.add(id(stage))
        self.left_out += not computes
        kind = self._computed if computes else self._outer
        return stage.graphs.run(computes, lambda **k: kind(stage, original, k), **kwargs)

    def _stage_for(self, original: Forward, kwargs: dict[str, Any], device: torch.device) -> Stage:
        key = signature(kwargs)
        if (known := self._stages.get(key)) is not None:
            return known
        traced, _ = trace(self.unet, kwargs, original)
        outer = outermost(self.unet)
        names = [traced.calls[index].name for index in traced.units]
        stages = [OUTER if outer(name) else INNER for name in names]
        plan = partition(traced, 2, assignment=stages)
        self._stages.make_room()
        return self._stages.put(key, Stage(plan, OUTER, device, Graphs(self._cuda_graph), predictions=0))

    def _computed(self, stage: Stage, original: Forward, kwargs: dict[str, Any]) -> Any:
        """The whole UNet, of which what the outermost layers take from the others is kept."""

        def keep(value: int, tensor: torch.Tensor) -> None:
            stage.current[value].copy_(tensor)

        return self._units.under(Run(stage.takes, keep, {}, {}, self.executions), original, kwargs)

    def _outer(self, stage: Stage, original: Forward, kwargs: dict[str, Any]) -> Any:
        run = Run({}, lambda value, tensor: None, stage.answers, stage.units, self.executions)
        return self._units.under(run, original, kwargs)


def outermost(unet: nn.Module) -> Callable[[str], bool]:
    """Says of a unit's name whether it is computed in every step: what is before and behind the blocks, the
    first layer of the first one, and the last layer of the last one."""
    last = len(list(unet.get_submodule("up_blocks").children())) - 1
    layer = len(list(unet.get_submodule(f"up_blocks.{last}.resnets").children())) - 1

    def outer(name: str) -> bool:
        block, *rest = name.split(".")
        if block not in BLOCKS:
            return True
        ends = {("down_blocks", "0"): "0", ("up_blocks", str(last)): str(layer)}
        if len(rest) < 3 or rest[1] in ("downsamplers", "upsamplers"):
            return False
        return ends.get((block, rest[0])) == rest[2]

    return outer
