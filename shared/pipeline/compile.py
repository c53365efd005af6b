"""torch.compile by regions: the forward of each repeated block, so that one graph serves many blocks.

A compiled region is the `forward` of a module instance, inside which no parallel method may work: whole
blocks where the method runs blocks (AsyncDiff, one rank), smaller layers where it works inside them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shared.launch.flags import HostConfig
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, part_of, parts_of
from shared.pipeline.layouts import in_its_layout, keep_layouts

log = logging.getLogger("host")

LIMIT = 8192  # graphs of one function: shapes x kinds of block; the default of 8 falls back silently
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes without inductor's own CUDA graphs. With a denoiser in many regions those would be captured again
with the step, and a later region would overwrite what an earlier one has left for a skip connection."""


def compile_pipeline(
    pipe: Pipeline, spec: ModelSpec, config: HostConfig, whole_blocks: bool = True
) -> dict[str, int]:
    """Compile what --compile_unet, --compile_vae and --compile_text_encoder ask for.

    Nothing is traced yet: that happens at the first call of each region and shape.

    Args:
        whole_blocks: compile the denoiser's blocks; else only the feed-forward layers inside them.

    Returns:
        number of compiled regions per component.
    """
    counts: dict[str, int] = {}
    if config.compile_unet:
        given = denoiser_settings(config)
        if config.compile_mode in WITHOUT_GRAPHS:
            log.info("%s: compile mode %s, as the host captures whole steps", spec.denoiser, given["mode"])
        for name, denoiser in parts_of(pipe, spec.denoisers).items():
            keep_layouts(denoiser)
            counts[name] = _compile(regions(denoiser) if whole_blocks else feed_forwards(denoiser), given)
        if (net := part_of(pipe, "controlnet")) is not None:
            done = set(denoiser.modules())  # of which some nets run layers too
            keep_layouts(net)
            counts["controlnet"] = _compile([one for one in regions(net) if one not in done], given)
    if config.compile_vae:
        # The pipeline calls vae.decode and vae.encode, which call these two: the VAE's own forward is unused.
        counts["vae"] = _compile(
            [m for m in (pipe.vae.decoder, pipe.vae.encoder) if m is not None], settings(config)
        )
    if config.compile_text_encoder:
        for name, encoder in parts_of(pipe, spec.text_encoders).items():
            _prime(encoder)
            counts[name] = _compile([encoder], settings(config))
    for name, count in counts.items():
        if not count:
            raise ValueError(f"{name} has no block to compile")
        log.info("compiling %d regions of %s at their first use", count, name)
    if counts:
        _raise_limits()
        _overlap_collectives()
        _pass_over_graphs()
    return counts


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost composite modules of the lists of blocks: resnets, transformer blocks, resamplers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and _composite(child):
            for block in child:
                if any(isinstance(m, nn.ModuleList) and _composite(m) for m in block.children()):
                    yield from blocks(block)
                else:
                    yield block
        elif not isinstance(child, nn.ModuleList):
            yield from blocks(child)


def regions(module: nn.Module) -> list[nn.Module]:
    """What is compiled of a denoiser whose blocks run whole: the blocks, and the group norms between them.

    torch's own kernel for group norms copies what is channels last, and its result is copied back.
    """
    found = list(blocks(module))
    inside = {part for block in found for part in block.modules()}
    norms = (part for part in module.modules() if isinstance(part, nn.GroupNorm))
    return found + [norm for norm in norms if norm not in inside]


def feed_forwards(module: nn.Module) -> Iterator[nn.Module]:
    """The feed-forward layers of transformer blocks: they work on each token separately."""
    from diffusers.models.attention import FeedForward

    return (m for m in module.modules() if isinstance(m, FeedForward))


def graph_count() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _composite(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(any(m.children()) for m in modules)


def settings(config: HostConfig) -> dict[str, Any]:
    """torch.compile's arguments by the flags."""
    # Shapes are fixed: blocks of all levels and batches share code, and one graph for all is slower.
    arguments: dict[str, Any] = {"fullgraph": not config.compile_fullgraph_off, "dynamic": False}
    if config.compile_backend:
        arguments["backend"] = config.compile_backend
    if config.compile_mode:
        arguments["mode"] = config.compile_mode
    if config.compile_options:
        arguments["options"] = config.compile_options
    return arguments


def denoiser_settings(config: HostConfig) -> dict[str, Any]:
    """The same for a denoiser, whose steps are captured as a whole."""
    mode = WITHOUT_GRAPHS.get(config.compile_mode or "", config.compile_mode)
    return settings(replace(config, compile_mode=mode))


def _compile(modules: Any, arguments: dict[str, Any]) -> int:
    count = 0
    for module in modules:
        forward = module.forward
        if isinstance(module, nn.GroupNorm):
            forward = in_its_layout(forward)
        module.forward = torch.compile(forward, **arguments)
        count += 1
    return count


def _prime(encoder: nn.Module) -> None:
    """One call on one token: transformers then hooks its layers, under a lock, which no trace passes.

    Encoders are compiled whole, because those hooks reach hidden states only in a trace from the top.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=next(encoder.parameters()).device)
    with torch.no_grad():
        encoder(token, output_hidden_states=True)


def _raise_limits() -> None:
    torch._dynamo.config.recompile_limit = LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 8 * LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def _overlap_collectives() -> None:
    """Where a region sends to other ranks, compute what does not wait for them first (Ulysses in xDiT)."""
    import torch._inductor.config as inductor

    inductor.reorder_for_compute_comm_overlap = True
    inductor.reorder_for_compute_comm_overlap_passes = ["sink_waits", "raise_comms"]


def _pass_over_graphs() -> None:
    import torch._inductor.config as inductor

    from shared.pipeline.graph_pass import GraphPass

    inductor.joint_custom_post_pass = GraphPass()
