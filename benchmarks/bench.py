"""What the benchmarks on GPUs share: one pipeline under several systems, timed side by side, one row each."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import kernels, models, models_2026
from shared.launch.backend import Needs
from shared.launch.flags import HostConfig
from shared.models import MODELS, ModelSpec
from shared.parallel.surgery import Surgery
from shared.pipeline import eight_bits, layer_choice
from shared.pipeline.compile import compile_pipeline
from shared.pipeline.hooks import KnownHooks
from shared.pipeline.steps import step_without_sync, without_overrides
from shared.pipeline.unloaded import Unloaded
from shared.pipeline.work import Work
from tests import tiny

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(run: Any, device: torch.device, repeats: int) -> tuple[float, float, torch.Tensor]:
    """(median seconds, most peak GiB of any rank, what it made) of `run()`, after one call that prepares."""

    def once() -> tuple[float, torch.Tensor]:
        if dist.is_initialized():
            dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        made = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, made

    once()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    runs = [once() for _ in range(repeats)]
    most = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0)
    if dist.is_initialized():
        most = most.to(device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    peak = float(most)
    return statistics.median(seconds for seconds, _ in runs), peak, runs[-1][1]


SEARCHING = "-searching"
"""Behind a system: diffusers searches its models for hooks in each generation."""


def as_hosted(pipe: Any, hooks: KnownHooks | None) -> contextlib.ExitStack:
    """What a host changes around a generation until it is closed: the scheduler's steps do not wait for the
    GPU, and models are searched for hooks once."""
    held = contextlib.ExitStack()
    surgery = held.enter_context(Surgery())
    surgery.replace(pipe.scheduler, "step", step_without_sync(pipe.scheduler))
    surgery.add(pipe.scheduler, "__deepcopy__", functools.partial(without_overrides, pipe.scheduler))
    if hooks is not None:
        held.enter_context(hooks.known())
    return held


class Bench(ABC):
    """One pipeline measured under several systems.

    Args:
        options: of `parser`.
    """

    systems: Sequence[str] = ()
    """All of them; the first is what the others are measured against."""
    alone: Sequence[str] = ("eager", "graph")
    """Those that one rank can run."""
    foreign: Sequence[str] = ("eager",)
    """Those whose scheduler stays as it is."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cpu")
        if options.device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        torch.backends.cudnn.benchmark = options.cudnn_measures
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=150))
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        groups = [dist.new_group([r]) for r in range(self.size)] if self.size > 1 else [None]
        self.own_group = groups[self.rank]
        self.rows: list[list[str]] = []
        self._hooks = KnownHooks()
        self._reference: torch.Tensor | None = None
        self._base = 0.0

    @functools.cache  # noqa: B019, there is one bench a process
    def halves(self) -> tuple[Any, Any, int]:
        """The group of this rank's half, that of its place in both halves, and which half it is."""
        half = self.size // 2
        groups = [dist.new_group(list(range(b * half, (b + 1) * half))) for b in (0, 1)]
        pairs = [dist.new_group([place, place + half]) for place in range(half)]
        branch, place = divmod(self.rank, half)
        return groups[branch], pairs[place], branch

    @abstractmethod
    def attach(self, pipe: Any, system: str) -> list[Any]:
        """What makes `pipe` run under `system`: objects with `close()`, and maybe `begin(steps)`."""

    def call(self, pipe: Any, arguments: dict[str, Any]) -> Any:
        """One generation, under what `attach` put on last."""
        return pipe(**arguments)

    def run(self) -> None:
        """Run all the work of the command line, one row after the other."""
        if self.rank == 0:
            gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
            dtype, warm_up = self.options.dtype, self.options.warm_up
            print(f"{self.size} x {gpu}, torch {torch.__version__}, {dtype}, warm-up {warm_up}\n")
            print("| work | system | seconds | speed-up | error | peak GiB |")
            print("|---|---|---|---|---|---|", flush=True)
        with torch.inference_mode():
            for work in self.options.work:
                name, size, steps, *systems = work.split(":", 3)
                self._work(name, int(size), int(steps), *systems)
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if self.rank == 0 and os.environ.get("OUT"):
            Path(os.environ["OUT"], f"{type(self).__name__}.json").write_text(json.dumps(self.rows))
        if dist.is_initialized():
            dist.destroy_process_group()

    def _work(self, name: str, size: int, steps: int, own: str = "") -> None:
        dtype = DTYPES[self.options.dtype]
        source = models_2026 if name in models_2026.MAKERS else models
        kind = name.partition("-")[0]  # what follows is its size
        if self.options.tiny:
            pipe = tiny.load(kind).to(self.device, dtype)
        else:
            pipe = source.MAKERS[name](self.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        what = ", decoded" if self.options.decode else ""
        what += "" if self.options.guidance is None else f", guidance {self.options.guidance:g}"
        label = f"{name} {size}, {steps} steps{what}"

        def generate() -> torch.Tensor:
            if self.options.tiny:
                arguments = tiny.call_args(kind, steps, size=size)
            else:
                arguments = source.call_arguments(name, self.device, dtype, size, steps)
            if self.options.guidance is not None:
                arguments["guidance_scale"] = self.options.guidance
            output = self.call(pipe, arguments | {"output_type": "pt" if self.options.decode else "latent"})
            return output.images if hasattr(output, "images") else output.frames

        self._reference, self._base = None, 0.0
        first = "" if self.options.compile else own
        systems = list(filter(None, (first or self.options.systems).split(",")))
        self._measure(pipe, label, generate, steps, systems, "")
        if self.options.compile:
            if self.options.channels_last:
                getattr(pipe, MODELS[kind].denoiser).to(memory_format=torch.channels_last)
            launch = HostConfig(backend="asyncdiff", type=kind, compile_unet=True)
            compile_pipeline(pipe, MODELS[kind], launch)
            wanted = systems if self.options.compile == "all" else self.options.compile.split(",")
            wanted = own.split(",") if own else wanted
            wanted = [system for system in wanted if system != "eager"]
            if not self.options.only_8_bits:
                self._measure(pipe, label, generate, steps, wanted, "compiled ")
            kinds = list(filter(None, self.options.quantize.split(",")))
            for place, kind in enumerate(kinds):
                with self._in_8_bits(pipe, name, size, *kind.split(":"), last=place == len(kinds) - 1):
                    self._measure(pipe, label, generate, steps, wanted, f"{kind} compiled ")

    @contextlib.contextmanager
    def _in_8_bits(
        self, pipe: Any, name: str, size: int, kind: str, *exact: str, last: bool
    ) -> Iterator[None]:
        """The denoiser's large layers computing in 8 bits, as --quantize_to has them; they are put back.

        Args:
            exact: patterns of more layers that stay as they are; "measured": those that are slower in 8 bits.
        """
        if self.options.tiny:
            eight_bits.LEAST = 1
        spec = MODELS[name]
        named = eight_bits.computing_layers(
            getattr(pipe, spec.denoiser), [*spec.kept, *spec.few_rows, *exact]
        )
        if "measured" in exact:
            stay = self._slower(pipe, spec, kind, size)
            named = eight_bits.faster(named, spec.denoiser, stay)
        layers = named.values()
        weights = [] if last else [layer.weight.cpu() for layer in layers]
        for layer in layers:
            eight_bits.quantize_layer(layer, kind)
        if self.rank == 0:
            print(f"{len(layers)} layers of {name} compute in {kind}", flush=True)
        yield
        for layer, weight in zip(layers, weights, strict=False):
            layer.__class__ = torch.nn.Linear
            layer.weight = torch.nn.Parameter(weight.to(self.device), requires_grad=False)

    def _slower(self, pipe: Any, spec: ModelSpec, kind: str, size: int) -> frozenset[str]:
        """The layers that a host leaves in 16 bits, as rank 0 measures them for whole pictures."""
        dtype = DTYPES[self.options.dtype]
        models = {name: Unloaded([getattr(pipe, name)]) for name in (spec.denoiser, "vae")}
        launch = HostConfig(type=spec.name, width=size, height=size, quantize_to=kind)
        parts = 2 if self.options.guidance == 1 else 1  # without guidance, half of the rows
        found = layer_choice.shapes(launch, Needs(row_parts=parts), Work(spec, models, dtype))
        began, times = time.monotonic(), layer_choice.Times()
        if self.rank == 0:
            times = layer_choice.measured(launch, dtype, self.device, Counter(found.values()))
        given: list[Any] = [times]
        if self.size > 1:
            dist.broadcast_object_list(given, 0)
        chosen = layer_choice.Chosen(found, given[0], dtype, time.monotonic() - began)
        if self.rank == 0:
            print(chosen.line(), chosen.told(), flush=True)
        return chosen.in_16_bits

    def _measure(
        self, pipe: Any, label: str, generate: Any, steps: int, systems: Sequence[str], prefix: str
    ) -> None:
        for system in systems:
            if self.size == 1 and system.removesuffix(SEARCHING) not in self.alone:
                continue
            began = time.perf_counter()
            held: list[Any] = []

            def generation(held: list[Any] = held) -> torch.Tensor:
                for one in held:
                    if hasattr(one, "begin"):
                        one.begin(steps)
                return generate()

            try:
                attached = system.removesuffix(SEARCHING)
                held += self.attach(pipe, attached)
                if attached not in self.foreign:
                    held.append(as_hosted(pipe, self._hooks if attached == system else None))
                seconds, peak, made = measure(generation, self.device, self.options.repeats)
                if self.rank == 0:
                    print(
                        *(f"({system}: {choice})" for one in held if (choice := getattr(one, "choice", None)))
                    )
                self._row(label, prefix + system, seconds, peak, made, time.perf_counter() - began)
                if self.options.profile and (prefix or not self.options.compile):
                    self._profile(generation, f"{label}, {prefix}{system}", seconds, steps)
            except Exception:
                # One system that fails, on all ranks alike, leaves the others to be measured.
                print(f"{label}, {prefix}{system}, rank {self.rank}: {traceback.format_exc()}", flush=True)
            finally:
                for one in reversed(held):
                    one.close()

    def _profile(self, run: Any, label: str, seconds: float, steps: int) -> None:
        """Where one generation's time goes, by class of kernel, as rank 0 sees it."""
        made = kernels.recorded(run, self.device) if self.rank == 0 else run()
        if self.rank == 0:
            table = kernels.table(made, seconds, steps, gaps=self.device.type == "cuda")
            print(f"\n{label}\n\n{table}", flush=True)

    def _row(
        self, label: str, system: str, seconds: float, peak: float, made: torch.Tensor, spent: float
    ) -> None:
        made = made.float().cpu()
        if self._reference is None:
            self._reference, self._base = made, seconds
        error = float((made - self._reference).norm() / self._reference.norm())
        row = [label, system, f"{seconds:.3f}", f"{self._base / seconds:.2f}", f"{error:.4f}", f"{peak:.1f}"]
        self.rows.append(row)
        if self.rank == 0:
            print("| " + " | ".join(row) + f" |  ({spent:.0f} s)", flush=True)


def parser(text: str | None, systems: Sequence[str], warm_up: int | None) -> argparse.ArgumentParser:
    """The flags that all of them take. A `warm_up` of None is a share of the steps."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("work", nargs="+", help="type:size:steps[:systems of its own]")
    made.add_argument(
        "--systems",
        default=",".join(systems),
        help="may be empty with --compile, whose first is then compared; one with '-searching' behind it "
        "searches the models for hooks in each generation, as plain diffusers does",
    )
    made.add_argument(
        "--compile",
        nargs="?",
        const="all",
        help="then these again, compiled: a,b; without a value: all but eager",
    )
    made.add_argument(
        "--quantize",
        default="",
        help="with --compile, then these again with large layers computing in 8 bits, but for those whose "
        "names match a pattern, or that are measured to be slower: float8,int8:*.norm*.linear,int8:measured",
    )
    made.add_argument("--only-8-bits", action="store_true", help="with --quantize: compiled in 8 bits alone")
    made.add_argument("--channels-last", action="store_true", help="of the compiled denoiser")
    made.add_argument("--cudnn-measures", action="store_true", help="cuDNN's convolutions by measurement")
    made.add_argument("--decode", action="store_true", help="whole pictures, not latents")
    made.add_argument("--warm-up", type=int, default=warm_up, help="default: %(default)s")
    made.add_argument("--guidance", type=float, help="scale of guidance; 1 for none, as distilled models")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--dtype", default="bf16", choices=DTYPES)
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument(
        "--profile",
        action="store_true",
        help="where the time of each (with --compile, each compiled one) goes",
    )
    made.add_argument(
        "--tiny", action="store_true", help="use the tests' small checkpoints, to see that it runs"
    )
    return made
