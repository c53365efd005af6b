"""DistriFusion compared with the plain pipeline, full-size random weights: seconds, error, memory.

torchrun --nproc_per_node=2 benchmarks/distrifusion.py sdxl:1024:30 sdxl:2048:10 sdxl:3840:6
    [--compile[=patch] [--channels-last]] [--systems eager,graph,patch,auto,cfg,tensor,full_sync] [--decode]
    [--warm-up 4] [--guidance 1]

Latents out, or whole pictures with --decode, where the VAE decodes in patches on all ranks as well. The rest
is as in benchmarks/asyncdiff.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import Bench, parser
from shared.parallel.asyncdiff import AsyncDiff
from shared.parallel.distrifusion import DistriFusion

SYSTEMS = ("eager", "graph", "patch", "cfg")
SETTINGS: dict[str, dict[str, Any]] = {
    "patch": {"split_batch": False},
    "patch-projects": {"split_batch": False, "projects": True},
    "patch-projects-int8": {"split_batch": False, "projects": True, "bits": "int8"},
    "patch-projects-int4": {"split_batch": False, "projects": True, "bits": "int4"},
    "patch-int8": {"split_batch": False, "bits": "int8"},
    "col": {"split_batch": False, "split_scheme": "col"},
    "patch-no-graph": {"split_batch": False, "cuda_graph": False},
    "stale_gn": {"split_batch": False, "sync_mode": "stale_gn"},
    "full_sync": {"split_batch": False, "sync_mode": "full_sync"},
    "auto": {"split_batch": False, "warm_up_steps": "auto"},
    "no_sync": {"split_batch": False, "sync_mode": "no_sync"},
    "tensor": {"split_batch": False, "parallelism": "tensor"},
    "cfg": {"split_batch": True},
}


class DistriFusionBench(Bench):
    """Plain, captured, in patches, and the guidance branches apart."""

    def attach(self, pipe: Any, system: str) -> list[Any]:
        if system == "eager":
            return []
        if system == "graph":
            return [AsyncDiff(pipe, 1, warm_up_steps=1, group=self.own_group)]
        settings = {"split_decode": self.options.decode} | SETTINGS[system]
        return [DistriFusion(pipe, **({"warm_up_steps": self.options.warm_up} | settings))]


if __name__ == "__main__":
    DistriFusionBench(parser(__doc__, SYSTEMS, warm_up=4).parse_args()).run()
