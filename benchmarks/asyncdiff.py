"""AsyncDiff compared with the plain pipeline, full-size random weights, latents out: seconds, error, memory.

torchrun --nproc_per_node=2 benchmarks/asyncdiff.py sdxl:1024:30 sdxl:2048:10 sd1:512:30 sd3:1024:28
    [--compile [--channels-last]] [--systems eager,graph,asyncdiff,balanced,auto,cfg,hybrid-12-8]
    [--warm-up 3] [--guidance 1]
torchrun --nproc_per_node=2 benchmarks/asyncdiff.py sdxl:1024:30 --systems graph+deepcache:3,cfg+deepcache:3

"auto" chooses its asynchronous steps by itself. "hybrid-12-8" divides the guidance branches, and after 12
steps shares one of them for 8 (two ranks); "hybrid-auto" chooses those steps by itself, and "hybrid-demo"
takes those that it chooses for 30 steps of the demo checkpoint, as random weights choose others.
Behind "+" of graph and cfg is a step cache, and behind all of that "-remade": the prompt's keys and
values in each step, and self-attention's projections one by one.
"pairs-12-8" puts them on halves of four or more ranks, asynchronous in 8 steps; "pairs": after --warm-up.
Under one rank (plain python) only the plain systems run. Every system's time is the median of `--repeats`
generations after one that warms it up; the error is ||a - b|| / ||b|| against plain eager.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import Bench, parser
from shared.launch.values import as_step_cache
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.asyncdiff.deep_cache import DeepCache
from shared.parallel.cfg_split import CfgSplit, HybridSplit
from shared.parallel.chosen_steps import Pace
from shared.parallel.joined import JoinedProjections, of_unet
from shared.parallel.kept_prompt import KeptPrompt
from shared.parallel.pipeline import model_of, part_of

SYSTEMS = ("eager", "graph", "asyncdiff", "balanced", "cfg")


DEMO = "......S.S.SS.SSS.SSSSS.SSSS.S."
"""The steps that ``--use_cfg_parallel --async_steps=auto`` shares (S) on the demo checkpoint."""


class Demo(Pace):
    """Measures as any other, and decides as on the demo checkpoint."""

    def _is_slow(self, step: int) -> bool:
        super()._is_slow(step)
        return DEMO[step % len(DEMO)] == "S"


class AsyncDiffBench(Bench):
    """Plain, captured, in stages by FLOPs or by measured time, and the guidance branches apart."""

    def attach(self, pipe: Any, system: str) -> list[Any]:
        if system == "eager":
            return []
        system, remade, _ = system.partition("-remade")
        system, _, cache = system.partition("+")
        unet = part_of(pipe, "unet")
        denoiser = model_of(pipe, "transformer" if unet is None else "unet")

        def prompt() -> list[Any]:
            if remade:
                return []
            kept = [] if unet is None else [KeptPrompt(unet)]
            return [*kept, JoinedProjections(of_unet(denoiser))]

        if system in ("graph", "cfg"):
            if cache:
                alone: Any = DeepCache(pipe, denoiser, as_step_cache(cache))
            else:
                alone = AsyncDiff(pipe, 1, warm_up_steps=1, group=self.own_group)
            if system == "graph":
                return [alone, *prompt()]
            return [alone, *prompt(), CfgSplit([denoiser], dist.group.WORLD, self.rank)]
        if system.startswith("hybrid-"):
            if system == "hybrid-demo":
                pace: Pace = Demo(None, "auto")
            elif system == "hybrid-auto":
                pace = Pace(None, "auto")
            else:
                exact, late = map(int, system.split("-")[1:])
                pace = Pace(exact, late)
            stages = AsyncDiff(pipe, 2, pace=pace, notes=False, leader=1)
            shared = stages.asynchronous
            return [
                stages,
                *prompt(),
                HybridSplit([stages.denoiser], dist.group.WORLD, self.rank, shared, pace=pace),
            ]
        if system.startswith("pairs"):
            exact, steps = (*map(int, system.split("-")[1:]), self.options.warm_up, None)[:2]
            half, pair, branch = self.halves()
            stages = AsyncDiff(pipe, self.size // 2, warm_up_steps=exact, async_steps=steps, group=half)
            return [stages, *prompt(), CfgSplit([stages.denoiser], pair, branch)]
        warm_up = "auto" if system == "auto" else self.options.warm_up
        stages = AsyncDiff(pipe, self.size, warm_up_steps=warm_up, measure_units=system == "balanced")
        return [stages, *prompt()]


if __name__ == "__main__":
    AsyncDiffBench(parser(__doc__, SYSTEMS, warm_up=None).parse_args()).run()
