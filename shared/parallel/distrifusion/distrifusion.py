"""DistriFusion: each rank denoises a patch of the picture, with stale activations of the others.

Source: Li et al., "DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models", arXiv
2402.19481. Warm-up steps exchange everything synchronously and are exact. In the steady state a layer uses
fresh activations of its own patch and stale ones of the others; the exchange overlaps with the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from shared.parallel.cfg_split import CfgSplit
from shared.parallel.chosen_steps import Pace
from shared.parallel.distrifusion.decoder import PatchDecoder
from shared.parallel.distrifusion.patched import Patched, Schedule, SyncMode
from shared.parallel.exchange import Ranks
from shared.parallel.method import Method, control_nets
from shared.parallel.pipeline import Pipeline, model_of
from shared.parallel.rounding import Bits
from shared.parallel.surgery import Surgery
from shared.parallel.tensor_parallel import TensorParallel

Parallelism = Literal["patch", "tensor", "naive_patch"]
STATE = ("active_adapters", "merged_adapters", "disable_adapters")
"""Attributes of a LoRA layer of PEFT that say what it adds."""
SplitScheme = Literal["row", "col", "alternate"]


class DistriFusion(Method):
    """Makes a diffusers pipeline with a UNet run on all ranks of a process group.

    Every rank holds the whole pipeline and makes the same calls with the same arguments. ``begin`` must be
    called before each generation. Pictures of any size may follow each other.

    Args:
        pipeline: has a ``unet``, and maybe a ``controlnet`` and a ``vae``; loaded with adapters,
            quantized and compiled as wanted.
        parallelism: patch (DistriFusion); tensor (channels and heads are divided, always exact); naive_patch
            (after the warm-up every patch is a picture of its own).
        split_scheme: patches are rows or columns; alternate (naive_patch): rows and columns in turn.
        sync_mode: what patches exchange after the warm-up, see ``SyncMode``.
        warm_up_steps: exact steps at the start of each generation, as in ``Pace``.
        split_batch: CFG split: the two guidance branches on two halves of an even number of ranks.
        group: the ranks that take part; None for all.
        cuda_graph: capture and replay steps on CUDA. Not with offloaded weights, which move.
        split_decode: also decode in patches; every rank must then call the VAE's ``decode``.
        max_shapes: shapes whose buffers and graphs are kept.
        branches: this rank's half of the group, the pair of ranks with its place in both halves (branch 0
            first), and its branch; None makes them where they are needed.
        bundle_bytes: least size of the messages of an asynchronous step.
        bits: patches exchange what is for attention in 8 bits, so that no step is exact; None: as it is.
        projects: patches exchange what keys and values are made of, half the bytes, and each rank makes those
            of all patches: for links that are slower than that arithmetic. Equal either way.
        keeps_prompts: make a prompt's keys and values once a generation; not where weights are sharded, as
            that calls layers outside of their blocks.

    Raises:
        ValueError: impossible values, or a model that cannot be divided.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        parallelism: Parallelism = "patch",
        split_scheme: SplitScheme = "row",
        sync_mode: SyncMode = "corrected_async_gn",
        warm_up_steps: int | str | None = 4,
        *,
        split_batch: bool = True,
        group: dist.ProcessGroup | None = None,
        cuda_graph: bool = True,
        split_decode: bool = True,
        max_shapes: int = 3,
        branches: tuple[dist.ProcessGroup, dist.ProcessGroup, int] | None = None,
        bundle_bytes: int = 4 << 20,
        bits: Bits | None = None,
        projects: bool = False,
        keeps_prompts: bool = True,
    ) -> None:
        for name, value, allowed in (
            ("parallelism", parallelism, get_args(Parallelism)),
            ("split_scheme", split_scheme, get_args(SplitScheme)),
            ("sync_mode", sync_mode, get_args(SyncMode)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if split_scheme == "alternate" and parallelism == "patch":
            raise ValueError(
                "split_scheme 'alternate' needs parallelism 'naive_patch', because other patches keep "
                "their place from step to step; got 'patch'"
            )
        self.unet = model_of(pipeline, "unet")
        super().__init__(pipeline)
        self.parallelism, self.group = parallelism, group
        stale = parallelism != "tensor" and sync_mode != "full_sync"
        if warm_up_steps == "auto" and not stale:
            warm_up_steps = None  # every step is exact
        self.pace = Pace(warm_up_steps, group=group, least=int(stale and parallelism == "patch"))
        self.schedule = Schedule(parallelism == "naive_patch", split_scheme, sync_mode, self.pace)
        self.batches = not self.pace.measures  # which decides for all pictures of a call
        self.cuda_graph, self.max_shapes, self.bundle_bytes = cuda_graph, max_shapes, bundle_bytes
        self.keeps_prompts, self.bits = keeps_prompts, bits if parallelism != "tensor" else None
        self.projects = projects and parallelism != "tensor"
        self.all = Ranks.of(group)
        self.half, self.pair, self.branch = self.all, None, 0
        if split_batch and self.all.size % 2 == 0:
            half, self.pair, self.branch = branches or self._make_branches()
            self.half = Ranks.of(half)
        self.split_decode = split_decode and self.all.size > 1 and pipeline.vae is not None
        self.models: list[Patched] = []
        self._split: CfgSplit | None = None
        self._install()

    def begin(self, steps: int, pictures: int = 1) -> None:
        """A new generation starts: its first steps are exact again.

        Changes of adapters since the last one (loaded, scaled, merged) take effect here.
        """
        super().begin(steps, pictures)
        self.pace.begin(steps)
        if adapters(self.pipeline) != self._adapters:
            self.reset()
        for part in (*self.models, *([self._split] if self._split else [])):
            part.begin(steps, pictures)

    def reset(self) -> None:
        """Override the models again, without old buffers and graphs: after weights or layers changed."""
        self.close()
        self._install()

    def rehearse(self, on: bool) -> None:
        self.pace.rehearsing = on

    @property
    def choice(self) -> str | None:
        return self.pace.told

    @property
    def warm_up_calls(self) -> int:
        return self.pace.rehearsed + 3

    @property
    def plan(self) -> dict[str, Any]:
        """JSON-able: the settings, and what each rank does."""
        branches = 2 if self.pair is not None else 1
        part = "patch" if self.parallelism != "tensor" else "part of the channels"
        return {
            "method": "distrifusion",
            "parallelism": self.parallelism,
            "split_scheme": self.schedule.split_scheme,
            "sync_mode": self.schedule.sync_mode,
            "warm_up_steps": self.pace.warm_up_steps,
            "split_batch": branches == 2,
            "split_decode": self.split_decode,
            "decode_from": self.decoder and self.decoder.least,
            "exchange": self.bits,
            "projects": self.projects,
            "ranks": [
                (f"guidance branch {r // self.half.size}, " if branches == 2 else "")
                + f"{part} {r % self.half.size + 1} of {self.half.size}"
                for r in range(self.all.size)
            ],
            "buffers_bytes": sum(model.held_bytes for model in self.models),
        }

    def _make_branches(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup, int]:
        ranks = [self.all.to_global(r) for r in range(self.all.size)]
        half = len(ranks) // 2
        branch, place = divmod(self.all.rank, half)
        options: dict[str, Any] = {
            "use_local_synchronization": True, "backend": dist.get_backend(self.group),
        }  # fmt: skip
        mine = dist.new_group(ranks[branch * half :][:half], **options)
        return mine, dist.new_group([ranks[place], ranks[half + place]], **options), branch

    def _install(self) -> None:
        self._adapters = adapters(self.pipeline)
        unet, nets = self.unet, control_nets(self.pipeline)
        with contextlib.ExitStack() as held:
            held.callback(self.models.clear)
            if self.parallelism == "tensor" and self.half.size > 1:
                held.enter_context(TensorParallel([unet, *nets], self.half.group))
            surgery = held.enter_context(Surgery())
            for model in (unet, *nets):
                self.models.append(held.enter_context(self._patched(model, surgery)))
            if self.pair is not None:
                self._split = held.enter_context(CfgSplit([unet], self.pair, self.branch, local=nets))
            if self.split_decode:
                self.decoder = held.enter_context(PatchDecoder(self.pipeline.vae, self.group))
            self.held = held.pop_all()

    def _patched(self, model: nn.Module, surgery: Surgery) -> Patched:
        return Patched(
            model,
            self._ranks,
            self.schedule,
            surgery,
            cuda_graph=self.cuda_graph,
            max_shapes=self.max_shapes,
            bundle_bytes=self.bundle_bytes,
            bits=self.bits,
            projects=self.projects,
            keeps_prompts=self.keeps_prompts,
            pixels=self.pipeline.vae_scale_factor,
            is_control=model is not self.unet,
        )

    def _ranks(self) -> Ranks:
        """The ranks that share the picture in the current call."""
        if self.parallelism == "tensor":
            return Ranks(None, 0, 1)
        return self.half if self._split is not None and self._split.active else self.all


def adapters(pipeline: Pipeline) -> Hashable:
    """What a captured step holds of LoRA and IP-Adapter as plain numbers: layers, names, scales."""
    found: list[Hashable] = []
    models: Sequence[nn.Module] = [model_of(pipeline, "unet"), *control_nets(pipeline)]
    for model in models:
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                state = [getattr(module, key, None) for key in ("scaling", *STATE)]
                found.append((name, repr(state)))
            processor = getattr(module, "processor", None)
            if processor is not None and hasattr(processor, "scale"):
                scale = processor.scale
                found.append((name, repr(scale.tolist() if isinstance(scale, torch.Tensor) else scale)))
    return tuple(found)
