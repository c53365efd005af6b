"""Whether PipeFusion's captured stages make the pictures of those that Python calls, on tiny checkpoints.

torchrun --nproc_per_node=2 benchmarks/pipefusion.py [flux sd3 pixs pixa hy] [--device cpu]

Requests with other prompts, sizes and numbers of steps follow each other; printed is the largest difference
of a latent in each, and the seconds that all of them took.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.parallel.method import Unwatched
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.groups import XfuserGroups
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from tests import tiny

CALLS: list[dict[str, Any]] = [
    {"steps": 4},
    {"steps": 4, "prompt": "two large blue dogs on a hill"},
    {"steps": 4, "height": 96, "width": 96, "prompt": "a"},
    {"steps": 5, "prompt": "two large blue dogs on a hill"},
    {"steps": 4, "height": 96, "width": 96},
    {"steps": 4, "height": 96, "width": 96},
    {"steps": 4},
]


def drawn(
    name: str, degrees: Degrees, device: torch.device, calls: list[dict[str, Any]], **options: Any
) -> list[torch.Tensor]:
    """The latents of consecutive requests."""
    pipe, made = tiny.load(name).to(device), []
    groups = XfuserGroups(degrees, device)
    with (
        contextlib.closing(groups),
        XDiTPipeFusion(pipe, degrees, groups, warm_up_steps=2, **options) as parallel,
    ):
        for call in calls:
            changes = dict(call)
            arguments = tiny.call_args(name, changes.pop("steps")) | changes | {"output_type": "latent"}
            if name == "sd3":
                arguments["max_sequence_length"] = None  # 256 is what xfuser takes
            parallel.begin(arguments["num_inference_steps"])
            made.append(parallel.run(arguments, Unwatched()).images.float().cpu())
    return made


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("types", nargs="*", default=["flux", "sd3", "pixs", "pixa", "hy"])
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = made.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    degrees = Degrees(pipefusion=dist.get_world_size())
    for name in options.types:
        runs, seconds = [], []
        for captured in (False, True):
            began = time.perf_counter()
            runs.append(drawn(name, degrees, device, CALLS, cuda_graph=captured))
            seconds.append(time.perf_counter() - began)
        differences = [float((a - b).abs().max()) for a, b in zip(*runs, strict=True)]
        if dist.get_rank() == 0:
            took = f"{seconds[0]:.1f} s, captured {seconds[1]:.1f} s"
            print(f"{name}: {took}, differences {differences}", flush=True)
    dist.destroy_process_group()
