"""Decoding on one GPU and shared by all: seconds, memory beside what the plan counts, difference.

torchrun --nproc_per_node=2 benchmarks/decoding.py [sdxl svd ad wan hv15 ltx2] [--repeats 2]
    [--tiny --device cpu]    [--side 3840]    of square pictures and frames    [--bands no]    every map whole

VAEs of full size with random weights in bf16 decode random latents of their type's usual size, in fp32 where
the host does. Memory: the most that a rank takes beside weights and latents; on CPUs it is not measured.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import on, vae
from shared.launch.flags import HostConfig
from shared.models import MODELS
from shared.parallel.distrifusion import bands
from shared.parallel.video_decoder import shared_decoder
from shared.pipeline.memory import decode_in_bands
from shared.pipeline.unloaded import Unloaded
from shared.pipeline.work import Work

WIDTHS = (128, 256, 512, 512)
VAES: dict[str, Callable[[], Any]] = {
    "svd": partial(
        AutoencoderKLTemporalDecoder,
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
    ),
    "ad": vae,
    "sdxl": vae,
    "wan": AutoencoderKLWan,
    "hv15": AutoencoderKLHunyuanVideo15,
    "ltx2": AutoencoderKLLTX2Video,
}


def measured(decode: Callable[[], torch.Tensor], repeats: int) -> tuple[torch.Tensor, float, int]:
    """The pixels; the fewest seconds of so many calls after the first; the most bytes that one took."""
    cuda = torch.cuda.is_available()
    best, most = float("inf"), 0
    pixels = decode()
    for _ in range(repeats):
        del pixels
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() if cuda else 0
        dist.barrier()
        began = time.perf_counter()
        pixels = decode()
        if cuda:
            torch.cuda.synchronize()
            most = torch.cuda.max_memory_allocated() - before
        best = min(best, time.perf_counter() - began)
    return pixels, best, most


def row(name: str, options: argparse.Namespace, device: torch.device) -> str:
    """A line of the table."""
    spec, dtype, ranks = MODELS[name], torch.bfloat16, dist.get_world_size()
    if options.tiny:
        from tests import tiny

        model = tiny.load(name).vae.to(device, dtype)
    else:
        model = on(device, dtype, VAES[name])
    side = options.side or (64 if options.tiny else None)
    frames = spec.frames_factor * 2 + 1 if options.tiny and spec.frames else spec.frames
    config = HostConfig(backend="asyncdiff", type=name, checkpoint="", width=side, height=side)
    work = Work(spec, {"vae": Unloaded([copy.deepcopy(model).to("meta")])}, dtype)
    planned = [work.decode(config, frames, count) for count in (1, ranks)]
    torch.manual_seed(0)  # alike on all ranks
    latents, more = work.latents(config, frames, dtype, device)
    decode = partial(model.decode, latents.normal_(), return_dict=False, **more)
    with torch.no_grad(), decode_in_bands(model, config):
        alone, first, most = measured(lambda: decode()[0], options.repeats)
        with shared_decoder(model, None):
            together, second, less = measured(lambda: decode()[0], options.repeats)
    apart = float((alone.float() - together.float()).abs().max())
    sizes = " | ".join(f"{x / 2**30:.2f}" for x in (most, planned[0], less, planned[1]))
    width, height = config.size
    frames = frames or 1
    return (
        f"| {name} | {width}x{height}, {frames} frames | {first:.3f} | {second:.3f} | {first / second:.2f} | "
        f"{sizes} | {apart:.2g} |"
    )


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("types", nargs="*", default=list(VAES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", type=int, help="pixels; default: the type's usual size")
    parser.add_argument("--bands", choices=("yes", "no"), default="yes", help="of rows, of large maps")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="use the tests' small checkpoints")
    options = parser.parse_args()
    if options.bands == "no":
        bands.LARGE = sys.maxsize
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank == 0:
        print(
            "| type | size | s alone | shared | gain | GiB alone | planned | GiB shared | planned | apart |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.types:
        line = row(name, options, device)
        if rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
