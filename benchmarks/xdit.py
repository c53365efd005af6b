"""xDiT compared with plain diffusers, bare xfuser and diffusers' own Ulysses, full-size random weights.

torchrun --nproc_per_node=2 benchmarks/xdit.py flux:1024:14 flux:2048:6 --compile [--quantize float8,int8]
    --systems eager,graph,ulysses,ulysses-eager,ring,pipefusion,xfuser-ulysses,xfuser-ring,native
torchrun --nproc_per_node=2 benchmarks/xdit.py sd3:1024:20 pixs:1024:20 hy:1024:25 --systems eager,graph,cfg
torchrun --nproc_per_node=2 benchmarks/xdit.py flux:1024:50 --systems ring --repeats 1
    --compile graph,ring,ring+mask,ring+taylorseer:3,ring+fbcache:1e-6

Latents out. Behind "+" is a step cache as --step_cache takes it. Random weights trip no threshold as trained
ones do, so "+mask" computes a fixed share of the steps (20 of 50); a threshold that no step passes shows what
measuring costs. "graph" is one GPU with the transformer captured as a CUDA graph; "-eager" behind one of our
own systems leaves the capture out, "-vae" shares the decoding as well (with --decode), "-overlap" is what is
chosen for slow links ("-all": with all multiprocessors for products), "-int8" what is sent, "-nccl" that NCCL
sends what copy engines could; "-separate", of graph too, is queries, keys and values by three products;
"cfg*ulysses" is a product of degrees. "xfuser-..." is xfuser's own pipeline class, called as its examples do,
and for the types of 2025 and 2026 xfuser's transformer class in diffusers' pipeline, as in its runners;
xfuser-pipefusion fails in xfuser 0.7.0 itself for sd3. The seconds in brackets are from the plain pipeline to
the end of the system: surgery, compilation, all repeats.
--tiny --device cpu --dtype fp32 shows that all of it runs.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import Bench, parser
from shared.launch.values import as_step_cache
from shared.models import CacheSettings
from shared.parallel.graphs import Captured
from shared.parallel.joined import JoinedProjections, of_transformer
from shared.parallel.method import Unwatched
from shared.parallel.rounding import BITS
from shared.parallel.surgery import Closing
from shared.parallel.xdit.degrees import Degrees
from shared.parallel.xdit.exact import XDiT, attention_backend, capturable
from shared.parallel.xdit.groups import RESERVED, XfuserGroups
from shared.parallel.xdit.pipefusion import XDiTPipeFusion
from shared.parallel.xdit.stages import Snapshot

SYSTEMS = ("eager", "graph", "cfg", "ulysses", "ring", "pipefusion", "xfuser-ulysses", "native")


RUNNERS = {
    "qwen": ("transformer_qwen", "xFuserQwenImageTransformerWrapper"),
    "zimage": ("transformer_z_image", "xFuserZImageTransformer2DWrapper"),
    "flux2": ("transformer_flux2", "xFuserFlux2Transformer2DWrapper"),
    "kontext": ("transformer_flux", "xFuserFlux1Transformer2DWrapper"),
    "wan": ("transformer_wan", "xFuserWanTransformer3DWrapper"),
    "hv15": ("transformer_hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper"),
    "ltx2": ("transformer_ltx2", "xFuserLTX2VideoTransformer3DWrapper"),
}
"""The types that xfuser runs by a transformer class of its own, and where that is."""


class Bare(Closing):
    """xfuser's own pipeline class around the pipeline, nothing of ours but the groups and the undoing."""

    def __init__(self, pipe: Any, degrees: Degrees, device: torch.device, warm_up: int) -> None:
        self.pipe, self.plain = pipe, (pipe.scheduler, pipe.transformer)
        self._snapshot = Snapshot(pipe.transformer)
        self.groups = XfuserGroups(degrees, device)
        import xfuser.model_executor.pipelines  # its import registers the pipelines
        from xfuser.model_executor.pipelines.register import xFuserPipelineWrapperRegister

        assert xfuser.model_executor.pipelines
        dtype = pipe.transformer.dtype
        config = self.groups.engine_config(dtype, attention_backend(device, dtype, degrees), warm_up)
        self.groups.start(pipe, config)
        self.wrapped = xFuserPipelineWrapperRegister.get_class(pipe)(pipe, config)

    def run(self, arguments: dict[str, Any], reference: torch.Tensor) -> Any:
        output = self.wrapped(**arguments)
        latents = torch.empty_like(reference) if output is None else output.images.contiguous()
        dist.broadcast(latents, src=dist.get_world_size() - 1)
        return latents

    def close(self) -> None:
        from xfuser.core.cache_manager.cache_manager import get_cache_manager

        self.pipe.scheduler, self.pipe.transformer = self.plain
        self._snapshot.restore()
        get_cache_manager().cache.clear()
        self.groups.close()


class Theirs(Closing):
    """xfuser's transformer class in diffusers' own pipeline, as its runners of these types have it."""

    def __init__(self, pipe: Any, name: str, degrees: Degrees, device: torch.device) -> None:
        self.transformer, self._plain = pipe.transformer, type(pipe.transformer)
        self._snapshot = Snapshot(pipe.transformer)
        self.groups = XfuserGroups(degrees, device)
        dtype = pipe.transformer.dtype
        config = self.groups.engine_config(dtype, attention_backend(device, dtype, degrees))
        self.groups.start(pipe, config)
        module, title = RUNNERS[name]
        models = importlib.import_module(f"xfuser.model_executor.models.transformers.{module}")
        kind: Any = getattr(models, title)
        with torch.device("meta"):
            theirs = kind.from_config(pipe.transformer.config)
        # The same weights: only the class, and what it puts beside diffusers' own, are taken from theirs.
        for path, part in theirs.named_modules():
            mine = pipe.transformer.get_submodule(path)
            for key, value in vars(part).items():
                if key not in vars(mine) or key == "processor":
                    setattr(mine, key, value)
            if type(mine) is not type(part):
                mine.__class__ = type(part)

    def close(self) -> None:
        self.transformer.__class__ = self._plain
        self._snapshot.restore()
        self.groups.close()


class Native(Closing):
    """diffusers' own context parallelism."""

    def __init__(self, pipe: Any, ranks: int) -> None:
        from diffusers import ContextParallelConfig

        self.transformer = pipe.transformer
        # It divides by the number of accelerators, which is 0 on a CPU.
        count = max(1, torch.accelerator.device_count())
        with mock.patch.object(torch.accelerator, "device_count", lambda: count):
            self.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))

    def close(self) -> None:
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(self.transformer, self.transformer._cp_plan)
        self.transformer._parallel_config = None
        for module in self.transformer.modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = None


class XDiTBench(Bench):
    """Plain, captured, our degrees one by one, xfuser by itself, and diffusers' own."""

    foreign = (
        "eager",
        "native",
        "pipefusion",
        "pipefusion-eager",
        "xfuser-ulysses",
        "xfuser-ring",
        "xfuser-cfg",
        "xfuser-pipefusion",
    )
    alone = ("eager", "graph", "graph-separate")
    held: Any = None
    latents: torch.Tensor
    steps, type = 0, ""

    def _work(self, name: str, size: int, steps: int, own: str = "") -> None:
        self.steps, self.type = steps, name.partition("-")[0]
        super()._work(name, size, steps, own)
        self.held = None  # or it would keep this transformer in memory during the next work

    def attach(self, pipe: Any, system: str) -> list[Any]:
        held = self._attach(pipe, system)
        self.held = held[-1] if held else None
        return held

    def _attach(self, pipe: Any, system: str) -> list[Any]:
        if system == "eager":
            return []
        if system in ("graph", "graph-separate"):
            captured = Captured(pipe, ["transformer"], enabled=capturable(pipe.transformer))
            joins = [] if system != "graph" else [JoinedProjections(of_transformer(pipe.transformer))]
            return [captured, *joins]
        if system == "native":
            return [Native(pipe, self.size)]
        if system.startswith("xfuser-"):
            degrees = self._degrees(system.removeprefix("xfuser-"))
            if self.type in RUNNERS:
                return [Theirs(pipe, self.type, degrees, self.device)]
            return [Bare(pipe, degrees, self.device, self.options.warm_up)]
        system, _, cache = system.partition("+")
        method, *how = system.split("-")
        graph, degrees = "eager" not in how, self._degrees(method)
        # Made here, so that the device is this rank's whatever the pipeline says.
        reserved = RESERVED if "overlap" in how and "all" not in how else None
        groups = XfuserGroups(degrees, self.device, reserved=reserved)
        if degrees.pipefusion > 1:
            settings: Any = {"warm_up_steps": self.options.warm_up, "cuda_graph": graph}
            fused = XDiTPipeFusion(pipe, degrees, groups, **settings)
            return [groups, fused]
        options: Any = {"overlap": "overlap" in how, "bits": next((b for b in BITS if b in how), None)}
        options["parallel_vae"] = "vae" in how
        options["join"] = "separate" not in how
        options["copies"] = "nccl" not in how
        if cache:
            options["cache"] = fixed(self.steps) if cache == "mask" else as_step_cache(cache)
        capture = graph and self.device.type == "cuda"
        return [groups, XDiT(pipe, degrees, groups, cuda_graph=capture, **options)]

    def _degrees(self, name: str) -> Degrees:
        """ "ulysses": all ranks; "cfg*ulysses*ring": two for each but the last, and the last has the rest."""
        *outer, last = name.split("*")
        rest = self.size // 2 ** len(outer)
        return Degrees(**dict.fromkeys(outer, 2), **{last: 2 if name == "cfg" else rest})

    def call(self, pipe: Any, arguments: dict[str, Any]) -> Any:
        if self.options.tiny:
            arguments = {k: v for k, v in arguments.items() if k != "max_sequence_length"}
        if isinstance(self.held, Bare):
            return _Output(self.held.run(arguments, self.latents))
        if isinstance(self.held, XDiTPipeFusion):
            return self.held.run(arguments)
        if isinstance(self.held, XDiT):  # which tells the branches' split whether there are two
            output = self.held.run(arguments, Unwatched())
        else:
            output = super().call(pipe, arguments)
        self.latents = output.images if hasattr(output, "images") else output.frames
        return output


def fixed(steps: int) -> CacheSettings:
    """A mask: the first tenth of the steps, at least two, then one of three."""
    first = max(steps // 10, 2)
    mask = "".join("1" if step < first or (step - first) % 3 == 2 else "0" for step in range(steps))
    return CacheSettings("mask", mask=mask)


class _Output:
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images


if __name__ == "__main__":
    XDiTBench(parser(__doc__, SYSTEMS, warm_up=1).parse_args()).run()
