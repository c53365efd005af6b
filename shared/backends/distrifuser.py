"""DistriFusion, displaced patch parallelism: its types, flags and plan, and how it is applied."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shared.backends import presets
from shared.backends.unet_cost import (
    Estimate,
    StepSeconds,
    Work,
    advise_at_start,
    advise_requests,
    told,
)
from shared.launch.backend import Backend, Needs, runs_plain
from shared.launch.errors import UsageError
from shared.launch.flags import HostConfig

if TYPE_CHECKING:
    from shared.parallel.method import Method
    from shared.parallel.pipeline import Pipeline
    from shared.pipeline.engine import PipelineEngine
    from shared.ranks.groups import World
    from shared.ranks.link import Link

log = logging.getLogger("host")


def check(config: HostConfig, world_size: int) -> None:
    """Refuse a plan that does not fit the world size. Raises UsageError."""
    if world_size > 8:
        raise UsageError(f"--parallelism: supports 1 to 8 ranks; the world size is {world_size}")
    if config.split_scheme == "alternate" and config.parallelism == "patch":
        raise UsageError(
            "--split_scheme: must be row or col with --parallelism=patch; got alternate, which only "
            "naive_patch supports"
        )
    patched = config.parallelism == "patch" and config.sync_mode != "full_sync"
    if patched and world_size > 1 and config.warm_up_steps == 0:
        raise UsageError("--warm_up_steps: must be at least 1 (the first step fills the activations); got 0")
    if config.parallelism == "tensor":
        # A LoRA is fused when it is loaded.
        flags = ("quantize_to", "gguf_model", "compile_unet", "shard_weights")
        given = next((f"--{flag}" for flag in flags if getattr(config, flag)), None)
        if given or config.offloads:
            raise UsageError(
                f"--parallelism: tensor divides plain weights in memory; it is not supported with "
                f"{given or 'CPU offload'}; use patch"
            )


def idle(config: HostConfig, world_size: int) -> list[str]:
    """A line for each flag that changes nothing in this launch."""
    changed: list[str] = []
    reason = ""
    if config.parallelism == "tensor":
        changed = config.changed("split_scheme", "sync_mode", "exchange_dtype")
        reason = "--parallelism=tensor has no patches"
    elif config.parallelism == "naive_patch" and config.sync_mode != "full_sync":
        changed = config.changed("sync_mode")
        reason = "naive patches exchange nothing, except with full_sync"
    lines = [f"--{flag} has no effect: {reason}" for flag in changed]
    if config.exchange_dtype and config.parallelism != "tensor" and not _has_patches(config, world_size):
        lines.append("--exchange_dtype has no effect: each rank has whole pictures; see --no_split_batch")
    return lines


def _has_patches(config: HostConfig, world_size: int) -> bool:
    """Whether ranks share a picture, in patches."""
    each = world_size // 2 if world_size % 2 == 0 and not config.no_split_batch else world_size
    return config.parallelism != "tensor" and each > 1


def needs(config: HostConfig, world_size: int) -> Needs:
    """Patches and parts of layers are computed inside the UNet."""
    divides = "--parallelism=tensor" if config.parallelism == "tensor" else None
    return Needs(
        world_size > 1,
        divides_weights=divides,
        shards=config.shards(world_size),
        step_parts=1 if divides else world_size,
        row_parts=1 if divides else world_size,
        decode_parts=1 if config.compile_vae else world_size,
        keeps_patches=config.parallelism == "patch" and _has_patches(config, world_size),
    )


def choose(config: HostConfig, world: World) -> HostConfig:
    """The launch with what the measured link decides: whether patches exchange 8 bits, if that is "auto"."""
    slow = _slow(world)
    if config.exchange_dtype == "auto":
        config = replace(config, exchange_dtype="int8" if slow else None)
    if slow and _has_patches(config, world.size) and world.rank == 0:
        bits = f", in {config.exchange_dtype}" if config.exchange_dtype else ""
        log.info(
            "chosen for this link: patches exchange what keys and values are made of%s: half the bytes", bits
        )
    advise_at_start(partial(advice, config, world.size, world.link), config, world.rank)
    return config


SENT = {None: 1.0, "int8": 0.5, "float8": 0.5, "int4": 0.25}
"""Bytes that patches send for each that 16 bits have."""


def advice(config: HostConfig, world_size: int, link: Link | None, work: Work) -> str | None:
    """That the ranks gain nothing in this work, and why; None where they gain or it is not known."""
    from shared.parallel.chosen_steps import warm_up_of

    cost, chosen = config.spec.step_cost, config.warm_up_steps == "auto"
    if link is None or cost is None or chosen or config.parallelism == "tensor":
        return None
    waits = config.sync_mode == "full_sync"
    warm_up = warm_up_of(work.steps) if config.warm_up_steps is None else int(config.warm_up_steps)
    exact = work.steps if waits else min(warm_up, work.steps)
    branches, ranks = 2 if work.guided else 1, world_size
    split = world_size % 2 == 0 and not config.no_split_batch and work.guided
    own, ranks = (1, ranks // 2) if split else (branches, ranks)
    sent = SENT[config.exchange_dtype] * (0.5 if link.slow else 1.0)
    quiet = config.parallelism == "naive_patch" or config.sync_mode == "no_sync"
    step = StepSeconds(cost, config, link, work)
    together = exact * step.patched(own, ranks, True, sent)
    together += (work.steps - exact) * step.patched(own, ranks, False, 0.0 if quiet else sent)
    estimate = Estimate(together, work.steps * step.alone(branches))
    if estimate.gains:
        return None
    if exact > work.steps / 2:
        reason = f"in {exact} of {work.steps} steps patches wait for each other"
    elif link.slow:
        reason = f"the link between the ranks, {link.bandwidth / 1e9:.2g} GB/s, is slow for the patches"
    else:
        reason = "a patch of a small picture takes nearly as long as the picture"
    return told(reason, estimate)


def _slow(world: World) -> bool:
    return world.link is not None and world.link.slow


def attach(pipe: Pipeline, config: HostConfig, world: World, branches: Any = None) -> Method:
    """Divide the UNet, the ControlNets and the VAE's decoder over the ranks.

    A single rank runs the plain pipeline, on a GPU as CUDA graphs like the others.

    Args:
        branches: shared.ranks.groups.branch_groups where the guidance branches are split, else None.
    """
    from shared.parallel.distrifusion import DistriFusion
    from shared.parallel.method import Plain
    from shared.parallel.rounding import bits_named

    if runs_plain(config, world.size, world.device.type):
        return Plain(pipe)
    return DistriFusion(
        pipe,
        config.parallelism,  # type: ignore[arg-type]
        config.split_scheme,  # type: ignore[arg-type]
        config.sync_mode,  # type: ignore[arg-type]
        config.warm_up_steps if world.size > 1 else config.warm_up_steps or None,
        split_batch=branches is not None,
        group=world.compute,
        branches=branches,
        cuda_graph=config.captures(world.device.type),
        # A compiled decoder cannot be split.
        split_decode=not config.compile_vae,
        keeps_prompts=not config.shard_weights,
        bits=bits_named(config.exchange_dtype),
        projects=_slow(world),
        max_shapes=3 + len(config.sizes or ()),
    )


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and make it parallel."""
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_on_rank
    from shared.pipeline.sharding import shard
    from shared.ranks.groups import branch_groups

    needed = needs(config, world.size)
    pipe = load_on_rank(config, world, needed)
    split = world.size % 2 == 0 and not config.no_split_batch
    branches = branch_groups(world, config.collective_timeout) if split else None
    weights = shard(pipe, config, world, needed)
    return PipelineEngine(
        pipe,
        config,
        world,
        lambda pipe: attach(pipe, config, world, branches),
        weights=weights,
        advise=advise_requests(partial(advice, config, world.size, world.link), config),
    )


BACKEND = Backend(
    name="distrifuser",
    title="DistriFusion: displaced patch parallelism (arXiv 2402.19481)",
    types=("sd1", "sd2", "sdxl"),
    flags=frozenset(
        {"parallelism", "split_scheme", "sync_mode", "no_split_batch", "no_cuda_graph", "exchange_dtype"}
    ),
    check=check,
    idle=idle,
    needs=needs,
    build_engine=build_engine,
    choose=choose,
    presets=presets.distrifuser,
)
