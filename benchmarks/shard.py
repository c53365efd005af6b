"""Sharded weights compared with whole ones: seconds and peak memory a rank, full-size random weights.

torchrun --nproc_per_node=2 benchmarks/shard.py flux:1024:14 sdxl:1024:30
torchrun --nproc_per_node=2 benchmarks/shard.py flux:1024:14 --compile ring,ring+shard
    --systems eager,ring,ring+shard,ring+shard-eager,ulysses,ulysses+shard  (transformers)
    --systems eager,patch,patch+shard,asyncdiff,asyncdiff+shard             (UNets)

Systems that do not fit the type are left out. Latents out, without text encoders; the peak is that of a
generation: denoiser, buffers, activations, VAE. "-eager" leaves the capture out, "-nccl" has collectives
where a host would copy from the other ranks' memory. One rank has no other to share with. --tiny --device cpu
--dtype fp32 shows that all of it runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import Bench, parser
from shared.models import MODELS
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.asyncdiff.weights import StageWeights
from shared.parallel.distrifusion import DistriFusion
from shared.parallel.method import Method
from shared.parallel.sharded import ShardedWeights
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT
from shared.parallel.xdit.groups import XfuserGroups

SYSTEMS = (
    *("eager", "ring", "ring+shard", "ring+shard-eager", "ulysses", "ulysses+shard"),
    *("patch", "patch+shard", "asyncdiff", "asyncdiff+shard"),
)
TRANSFORMERS = ("ring", "ulysses")


class ShardBench(Bench):
    """Each method with whole weights and with sharded ones."""

    def _work(self, name: str, size: int, steps: int, own: str = "") -> None:
        self.denoiser = MODELS[name].denoiser
        given = self.options.systems
        fits = [
            s
            for s in given.split(",")
            if s == "eager" or (s.partition("+")[0] in TRANSFORMERS) == (self.denoiser == "transformer")
        ]
        self.options.systems = ",".join(fits)
        super()._work(name, size, steps)
        self.options.systems = given

    def attach(self, pipe: Any, system: str) -> list[Any]:
        if system == "eager":
            return []
        method, _, how = system.partition("+")
        graph, sharded = self.device.type == "cuda" and not how.endswith("eager"), how.startswith("shard")
        model, group = getattr(pipe, self.denoiser), dist.new_group()
        if method == "asyncdiff":
            kept = StageWeights(model, group, self.device) if sharded else None
            made: Method = AsyncDiff(
                pipe, self.size, 1, self.options.warm_up, group=group, cuda_graph=graph, weights=kept
            )
            return [kept, made] if kept else [made]
        held: list[Any] = []
        if sharded:
            with mock.patch.dict(os.environ, {"NCCL_P2P_DISABLE": "1"} if "nccl" in how else {}):
                held.append(ShardedWeights({"denoiser": model}, group, self.device))
            if self.rank == 0:
                print(f"({system}: {'copied' if held[0].copied else 'gathered'})", flush=True)
        if method == "patch":
            return [
                *held,
                DistriFusion(
                    pipe, warm_up_steps=self.options.warm_up, cuda_graph=graph, keeps_prompts=not sharded
                ),
            ]
        degrees = Degrees(**{method: self.size})
        groups = XfuserGroups(degrees, self.device)
        return [*held, groups, XDiT(pipe, degrees, groups, cuda_graph=graph)]


if __name__ == "__main__":
    ShardBench(parser(__doc__, SYSTEMS, warm_up=3).parse_args()).run()
