"""A UNet or ControlNet of which each rank computes a patch: the cut, the kinds of step, the shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from shared.parallel.chosen_steps import Pace
from shared.parallel.distrifusion.layers import PatchLayers, PatchRun
from shared.parallel.distrifusion.patch_exchange import Kind, PatchExchange
from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.graphs import Graphs
from shared.parallel.method import Part
from shared.parallel.rounding import DIFFERENCES, Bits
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Forward, Surgery

SyncMode = Literal["corrected_async_gn", "stale_gn", "sync_gn", "separate_gn", "full_sync", "no_sync"]
"""The moments that group norms use in the steady state: the others' stale ones with the forecast of
``moments.StaleMoments``; the others' stale ones; everyone's fresh ones, waiting for them; only this patch's.
Convolutions and attention use the others' stale boundary rows, keys and values. full_sync: every step is a
warm-up step. no_sync: nothing is sent any more; what arrived in the last warm-up step stays, and group norms
use only this patch's moments."""

LOCAL_NORMS = ("separate_gn", "no_sync")
CUT = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_cond",
)
"""Arguments besides the sample that are pictures."""


@dataclass(frozen=True)
class Schedule:
    """When and what patches exchange."""

    naive: bool
    split_scheme: str
    sync_mode: SyncMode
    pace: Pace

    def dim(self, step: int) -> int:
        """The dimension of [batch, channels, height, width] that this step cuts."""
        if self.split_scheme == "alternate":
            return 2 + step % 2
        return 3 if self.split_scheme == "col" else 2

    def joined(self, step: int) -> bool:
        """Whether the step is exact."""
        return self.sync_mode == "full_sync" or not self.pace.asynchronous(step)

    @property
    def deferred(self) -> tuple[Kind, ...]:
        """What is read stale after the warm-up."""
        if self.naive or self.sync_mode == "full_sync":
            return ()
        if self.sync_mode in ("corrected_async_gn", "stale_gn"):
            return ("rows", "tokens", "moments")
        return ("rows", "tokens")


def cuts(length: int, unit: int, ranks: int, pixels: int = 1) -> list[int]:
    """Where the patches of ``ranks`` ranks begin and end: ranks + 1 numbers, all but the last in whole units.

    Raises:
        ValueError: fewer units than ranks; ``pixels`` per element say which sizes fit.
    """
    units = -(-length // unit)
    if units < ranks:
        least = (ranks - 1) * unit + 1
        raise ValueError(
            f"{length * pixels} pixels make only {units} patches of {unit * pixels} for {ranks} ranks; the "
            f"smallest size that fits is {least * pixels} pixels ({ranks * unit * pixels} for equal patches)"
        )
    return [i * units // ranks * unit for i in range(ranks)] + [length]


class _Layout:
    """One shape of a model's arguments on given ranks: the cut, its buffers and graphs."""

    def __init__(self, ranks: Ranks, dim: int, length: int, unit: int, pixels: int, graphs: Graphs) -> None:
        self.ranks, self.dim, self.length, self.graphs = ranks, dim, length, graphs
        self.cuts = cuts(length, unit, ranks.size, pixels)
        self.start, self.stop = self.cuts[ranks.rank], self.cuts[ranks.rank + 1]
        self.levels = unit.bit_length()
        self.exchange: PatchExchange | None = None
        self.run = PatchRun(None, dim, start=self.start)
        """Only what compiled code must distinguish changes in it from one kind of step to another."""
        self.recorded = False
        """Whether it has run at all."""
        self.fresh = False
        """Whether its buffers hold something of this generation."""
        self.prompted = False
        """Whether its keys of the prompt are this generation's."""

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of a picture that is larger or smaller than the sample by a power of two, or x
        itself where it is such a part."""
        size = x.shape[self.dim]
        if size > self.length and size % self.length == 0:
            ratio = size // self.length
            return x.narrow(self.dim, self.start * ratio, (self.stop - self.start) * ratio)
        for level in range(self.levels):
            start, stop, whole = (-(-at // 2**level) for at in (self.start, self.stop, self.length))
            if size == whole:
                return x.narrow(self.dim, start, stop - start)
            if size == stop - start:
                return x
        raise ValueError(
            f"a residual of {size} rows fits neither the sample of {self.length} nor the patch of "
            f"{self.stop - self.start}; a ControlNet in guess mode needs split_batch off"
        )


class Patched(Part):
    """Runs a model on this rank's patch; a UNet's answer is gathered, a ControlNet's stays a patch.

    Args:
        model: UNet2DConditionModel or ControlNetModel.
        ranks: who shares the picture, asked at each call.
        schedule: what is exchanged when.
        surgery: takes the overrides.
        cuda_graph, max_shapes, bundle_bytes, bits: as in ``DistriFusion``.
        pixels: of the picture, per element of the sample; for messages.
        keeps_prompts, projects: as in ``DistriFusion``.
        is_control: whether the model is a ControlNet.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Callable[[], Ranks],
        schedule: Schedule,
        surgery: Surgery,
        *,
        cuda_graph: bool = True,
        max_shapes: int = 3,
        bundle_bytes: int = 4 << 20,
        bits: Bits | None = None,
        pixels: int = 8,
        keeps_prompts: bool = True,
        projects: bool = False,
        is_control: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.ranks, self.schedule = model, ranks, schedule
        self.cuda_graph, self.bundle_bytes, self.bits, self.pixels = cuda_graph, bundle_bytes, bits, pixels
        kept = max_shapes * (2 if schedule.split_scheme == "alternate" else 1)
        self.layouts: Latest[_Layout] = Latest(kept, lambda layout: layout.graphs.close())
        self.held.callback(self.layouts.clear)
        self.is_control = is_control
        self.calls = 0
        blocks = model.get_submodule("down_blocks").children()
        self.unit = 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in blocks)
        self._names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self.layers = PatchLayers(model, surgery, keeps_prompts, projects)
        surgery.override(model, self._forward)

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self.calls = 0
        for layout in self.layouts:
            layout.fresh = layout.prompted = False
            if layout.exchange is not None:
                layout.exchange.reset()

    def reset(self) -> None:
        self.layouts.clear()

    @property
    def held_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(x.exchange.held_bytes for x in self.layouts if x.exchange is not None)

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self.check_begun()
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        return_dict = kwargs.pop("return_dict", True)
        sample, t = kwargs["sample"], kwargs["timestep"]
        if not isinstance(t, torch.Tensor):
            kwargs["timestep"] = torch.tensor(
                t, dtype=torch.float64 if isinstance(t, float) else torch.int64, device=sample.device
            )
        step, self.calls = self.calls, self.calls + 1
        layout = self._layout(kwargs, self.schedule.dim(step))
        several, naive = layout.ranks.size > 1, self.schedule.naive
        joined = several and (self.schedule.joined(step) or not (layout.fresh or naive))
        stale = several and not joined and not naive
        run, exchanging = layout.run, joined or stale
        if not layout.recorded or (exchanging and layout.exchange is None):
            self._record(layout, original, kwargs, exchanging)
        run.exchange = layout.exchange if exchanging else None
        run.local_norms = stale and self.schedule.sync_mode in LOCAL_NORMS
        if not layout.prompted and self.layers.keeps_prompts:
            self._take_prompt(layout, kwargs)
        first = self.bits == DIFFERENCES and not layout.fresh
        layout.prompted, layout.fresh = True, True

        def compute(**arguments: Any) -> Any:
            return self._on_patch(layout, original, arguments, joined, first)

        output = layout.graphs.run((joined, stale, first), compute, **kwargs)
        if self.schedule.pace.measures and not self.is_control:
            self.schedule.pace.note(step, output[0])
        if not return_dict:
            return output
        return ControlNetOutput(*output) if self.is_control else UNet2DConditionOutput(*output)

    def _layout(self, kwargs: dict[str, Any], dim: int) -> _Layout:
        ranks = self.ranks()
        shapes = [(x.shape, x.dtype, x.device) for x in tree_leaves(kwargs) if isinstance(x, torch.Tensor)]
        key = (ranks.size, dim, tuple(shapes))
        if (known := self.layouts.get(key)) is not None:
            return known
        length = kwargs["sample"].shape[dim]
        return self.layouts.put(
            key, _Layout(ranks, dim, length, self.unit, self.pixels, Graphs(self.cuda_graph))
        )

    def _record(self, layout: _Layout, original: Forward, kwargs: dict[str, Any], exchanging: bool) -> None:
        """One forward whose answer is dropped: it shows what there will be to exchange, and makes room for
        the prompt's keys. Not compiled, as no other forward is like it."""
        if exchanging:
            layout.exchange = PatchExchange(
                layout.ranks.group,
                kwargs["sample"].device,
                self.schedule.deferred,
                posting=self.schedule.sync_mode != "no_sync",
                forecast=self.schedule.sync_mode == "corrected_async_gn",
                bundle_bytes=self.bundle_bytes,
                bits=self.bits,
            )
        layout.run.exchange, layout.run.local_norms = layout.exchange, False
        layout.run.recording = True
        with torch.compiler.set_stance("force_eager"):
            self._on_patch(layout, original, kwargs)
        layout.run.recording, layout.recorded, layout.prompted = False, True, True
        if layout.exchange is not None:
            layout.exchange.build()
            layout.run.totals = layout.exchange.totals()

    def _take_prompt(self, layout: _Layout, kwargs: dict[str, Any]) -> None:
        prepare = getattr(self.model, "process_encoder_hidden_states", None)

        def take(text: torch.Tensor, added: Any) -> None:
            # What the model makes of the prompt before its blocks get it; beside an IP-Adapter's tokens.
            text = text if prepare is None else prepare(text, added)
            self.layers.take_prompt(layout.run, text[0] if isinstance(text, tuple) else text)

        text, added = kwargs["encoder_hidden_states"], kwargs.get("added_cond_kwargs")
        layout.graphs.run("prompt", take, text=text, added=added)

    def _on_patch(
        self,
        layout: _Layout,
        original: Forward,
        kwargs: dict[str, Any],
        synchronous: bool = True,
        first: bool = False,
    ) -> Any:
        run, dim, kwargs = layout.run, layout.dim, dict(kwargs)
        if layout.ranks.size > 1:
            run.whole = kwargs["sample"]
            run.patch = kwargs["sample"] = run.whole.narrow(dim, layout.start, layout.stop - layout.start)
            for name in CUT:
                if kwargs.get(name) is not None:
                    kwargs[name] = tree_map(layout.cut, kwargs[name])
        if run.exchange is not None:
            run.exchange.start(synchronous, first)
        with self.layers.running(run):
            output = original(**kwargs, return_dict=False)
        run.whole = run.patch = None
        if run.exchange is not None and run.exchange.recording:
            return output
        if layout.ranks.size > 1 and not self.is_control:
            sizes = [stop - start for start, stop in pairwise(layout.cuts)]
            output = (gather(output[0], dim, sizes, layout.ranks.group),)
        if run.exchange is not None:
            run.exchange.finish()
        return output


def gather(own: torch.Tensor, dim: int, sizes: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """The patches of all ranks joined along ``dim``; ``sizes`` are their lengths there, in rank order."""
    most = max(sizes)
    padded = own.transpose(0, dim)
    if len(padded) < most:
        padded = torch.cat([padded, padded.new_zeros(most - len(padded), *padded.shape[1:])])
    every = all_gather(padded, group)
    if any(size != most for size in sizes):
        every = torch.cat([part[:size] for part, size in zip(every.split(most), sizes, strict=True)])
    return every.transpose(0, dim).contiguous()
