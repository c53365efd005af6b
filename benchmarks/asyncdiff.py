"""AsyncDiff beside the plain pipeline, full-size random weights, latents out: seconds, error, memory.

torchrun --nproc_per_node=2 benchmarks/asyncdiff.py sdxl:1024:30 sdxl:2048:10 sd1:512:30 sd3:1024:28
    [--compile [--channels-last]] [--systems eager,graph,asyncdiff,balanced,cfg] [--warm-up 3]

Under one rank (plain python) only the plain systems run. Every system's time is the median of `--repeats`
generations after one that warms it up; the error is ||a - b|| / ||b|| of the latents against plain eager.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import MAKERS, call_arguments
from shared.compile import compile_pipeline
from shared.config import HostConfig
from shared.models import MODELS
from shared.parallel.asyncdiff import AsyncDiff

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(run: Any, device: torch.device, repeats: int) -> tuple[float, float, torch.Tensor]:
    """(median seconds, peak GiB, latents) of `run()` after one call."""

    def once() -> tuple[float, torch.Tensor]:
        if dist.is_initialized():
            dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        latents = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, latents

    once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [once() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return statistics.median(seconds for seconds, _ in runs), peak, runs[-1][1]


class Bench:
    """One pipeline measured under several systems, one row each."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rows: list[list[Any]] = []
        self.alone = [dist.new_group([r]) for r in range(self.size)] if self.size > 1 else [None]
        self.reference: torch.Tensor | None = None
        self.base = 0.0

    def work(self, name: str, size: int, steps: int) -> None:
        dtype = DTYPES[self.options.dtype]
        pipe = MAKERS[name](self.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        label = f"{name} {size}, {steps} steps"

        def run() -> torch.Tensor:
            output = pipe(**call_arguments(name, self.device, dtype, size, steps))
            return output.images if hasattr(output, "images") else output.frames

        self.reference, self.base = None, 0.0
        systems = self.options.systems.split(",")
        self._systems(pipe, label, run, steps, systems, "")
        if self.options.compile:
            if self.options.channels_last:
                getattr(pipe, MODELS[name].denoiser).to(memory_format=torch.channels_last)
            compile_denoiser(pipe, name)
            self._systems(pipe, label, run, steps, [s for s in systems if s != "eager"], "compiled ")

    def _systems(self, pipe: Any, label: str, run: Any, steps: int, systems: list[str], prefix: str) -> None:
        for system in systems:
            if self.size == 1 and system in ("asyncdiff", "balanced", "cfg"):
                continue
            began = time.perf_counter()
            held = self._attach(pipe, system)

            def generation(held: list[Any] = held) -> torch.Tensor:
                for one in held:
                    if hasattr(one, "begin"):
                        one.begin(steps)
                return run()

            try:
                seconds, peak, latents = measure(generation, self.device, self.options.repeats)
            finally:
                for one in reversed(held):
                    one.close()
            self._row(label, prefix + system, seconds, peak, latents, time.perf_counter() - began)

    def _attach(self, pipe: Any, system: str) -> list[Any]:
        if system == "eager":
            return []
        if system == "graph":
            return [AsyncDiff(pipe, 1, warm_up_steps=1, group=self.alone[self.rank])]
        if system == "cfg":
            from shared.parallel.cfg_split import CfgSplit

            alone = AsyncDiff(pipe, 1, warm_up_steps=1, group=self.alone[self.rank])
            return [alone, CfgSplit([alone.denoiser], dist.group.WORLD, self.rank)]
        measured = system == "balanced"
        return [AsyncDiff(pipe, self.size, warm_up_steps=self.options.warm_up, measure_units=measured)]

    def _row(self, label: str, system: str, seconds: float, peak: float, latents: torch.Tensor, spent: float):
        if self.reference is None:
            self.reference, self.base = latents.float(), seconds
        error = float((latents.float() - self.reference).norm() / self.reference.norm())
        row = [label, system, f"{seconds:.3f}", f"{self.base / seconds:.2f}", f"{error:.4f}", f"{peak:.1f}"]
        self.rows.append(row)
        if self.rank == 0:
            print("| " + " | ".join(row) + f" |  ({spent:.0f} s)", flush=True)


def compile_denoiser(pipe: Any, name: str) -> None:
    """What --compile_unet does."""
    compile_pipeline(pipe, MODELS[name], HostConfig(backend="asyncdiff", type=name, compile_unet=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="+", help="type:size:steps")
    parser.add_argument("--systems", default="eager,graph,asyncdiff,balanced,cfg")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true", help="of the compiled denoiser")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bench = Bench(options, device)
    if bench.rank == 0:
        gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(
            f"{bench.size} x {gpu}, torch {torch.__version__}, {options.dtype}, warm-up {options.warm_up}\n"
        )
        print("| work | system | seconds | speed-up | error | peak GiB |")
        print("|---|---|---|---|---|---|", flush=True)
    with torch.inference_mode():
        for work in options.work:
            name, size, steps = work.split(":")
            bench.work(name, int(size), int(steps))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if bench.rank == 0 and os.environ.get("OUT"):
        Path(os.environ["OUT"], "asyncdiff.json").write_text(json.dumps(bench.rows))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
