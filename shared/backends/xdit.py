"""xDiT: transformers through the package xfuser. Its types and flags, and how it is applied."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from shared.backends import presets
from shared.backends.xdit_cost import GAINS, Choice
from shared.backends.xdit_plan import FLAGS, REFUSES, TYPES, check, link_choice, tokens_of, xdit_degrees
from shared.launch.backend import Backend, Needs
from shared.launch.flags import HostConfig
from shared.models import ModelSpec

if TYPE_CHECKING:
    from shared.parallel.method import Method
    from shared.parallel.pipeline import Pipeline
    from shared.parallel.xdit.exact import XDiT
    from shared.parallel.xdit.groups import XfuserGroups
    from shared.parallel.xdit.pipefusion import XDiTPipeFusion
    from shared.pipeline.engine import PipelineEngine
    from shared.ranks.groups import World

log = logging.getLogger("host")


def needs(config: HostConfig, world_size: int) -> Needs:
    """PipeFusion calls the blocks of a stage; every other method runs the whole transformer."""
    pipefused = world_size > 1 and (config.pipefusion_parallel_degree or 1) > 1
    flags = ("pipefusion_parallel_degree", "tensor_parallel_degree")
    divides = next((f"--{flag}" for flag in flags if (getattr(config, flag) or 1) > 1), None)
    # PipeFusion's stages keep their own blocks already.
    own = (*config.spec.denoisers, "controlnet") if pipefused else ()
    shards = tuple(name for name in config.shards(world_size) if name not in own)
    degrees = xdit_degrees(config, world_size)
    branches = degrees.cfg if tokens_of(config).guidance == "batch" else 1
    patches = (config.num_pipeline_patch or degrees.pipefusion) if pipefused else 1
    return Needs(
        pipefused,
        inside_blocks=pipefused and degrees.sequence > 1,  # xfuser's exchange is not traced
        divides_weights=divides,
        shards=shards,
        step_parts=degrees.sequence * (degrees.cfg if config.spec.guidance_branches > 1 else 1),
        row_parts=degrees.sequence * branches * patches,
        decode_parts=config.decode_parts(degrees.world // degrees.data),
        copies=degrees.ring > 1 and degrees.ulysses == 1 and not pipefused,
    )


def idle(config: HostConfig, world_size: int) -> list[str]:
    """A line for each flag that changes nothing in this launch."""
    if config.shard_weights and needs(config, world_size).in_parts:
        reason = "PipeFusion's stages keep only their own blocks anyway; it shards the other models"
        return [f"--shard_weights has no effect on the transformer: {reason}"]
    if config.exchange_dtype and xdit_degrees(config, world_size).sequence == 1:
        return ["--exchange_dtype has no effect: no ranks share a picture's tokens"]
    return []


def choose(config: HostConfig, world: World) -> HostConfig:
    """The launch with what suits the measured link: the degrees, and the 8-bit exchange if it is "auto"."""
    found = _choice(config, world)
    if config.exchange_dtype == "auto":
        config = replace(config, exchange_dtype="int8" if found is not None and found.slow else None)
        found = _choice(config, world)
    if found is None:
        return config
    degrees = found.degrees
    if world.rank == 0:
        for level, line in link_lines(config, found):
            log.log(level, "%s", line)
    return replace(
        config,
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        use_cfg_parallel=config.use_cfg_parallel or degrees.cfg == 2,
    )


def link_lines(config: HostConfig, found: Choice) -> list[tuple[int, str]]:
    """What is chosen for the measured link and why, as (level, line) for the log."""
    how = f"{found.degrees}{', overlapped' * found.overlap}"
    if config.exchange_dtype:
        how += f", exchange in {config.exchange_dtype}"
    took, alone = found.seconds * 1000, found.alone * 1000
    lines = [
        (logging.INFO, f"chosen for this link: {how}; about {took:.3g} ms a step, {alone:.3g} ms on one rank")
    ]
    if found.seconds > GAINS * found.alone:
        advice = "" if config.exchange_dtype else "; --exchange_dtype=int8 sends half as much"
        lines.append(
            (
                logging.WARNING,
                f"this plan is hardly faster than one rank, or slower ({took:.3g} against {alone:.3g} ms a "
                f"step), as the link is slow for this size{advice}; --data_parallel_degree gives each rank "
                "pictures of its own",
            )
        )
    return lines


def make_groups(config: HostConfig, world: World) -> XfuserGroups | None:
    """The process groups of the launch's degrees; None for one rank. All ranks must call it."""
    from shared.parallel.xdit.groups import RESERVED, XfuserGroups

    degrees = xdit_degrees(config, world.size)
    if world.size == 1 and not (config.cache or world.device.type == "cuda"):
        return None
    found = _choice(config, world)
    reserved = RESERVED if found is not None and found.overlap else None
    return XfuserGroups(degrees, world.device, config.collective_timeout, reserved)


def attach(pipe: Pipeline, config: HostConfig, world: World, groups: XfuserGroups | None) -> Method:
    """Share the transformer among the ranks; a single rank runs it plain, on a GPU as CUDA graphs."""
    from shared.parallel.method import Plain

    if groups is None:
        return Plain(pipe)
    return _exact(pipe, config, world, groups) if groups.degrees.exact else _pipefusion(pipe, config, groups)


def _exact(pipe: Pipeline, config: HostConfig, world: World, groups: XfuserGroups) -> XDiT:
    from shared.parallel.rounding import bits_named
    from shared.parallel.video_decoder import can_share
    from shared.parallel.xdit.exact import XDiT

    found = _choice(config, world)
    return XDiT(
        pipe,
        groups.degrees,
        groups,
        cache=config.cache,
        parallel_vae=config.use_parallel_vae or (config.decode_from is not None and can_share(pipe.vae)),
        decode_from=config.decode_from or 0,
        cuda_graph=config.captures(world.device.type),
        overlap=found is not None and found.overlap,
        bits=bits_named(config.exchange_dtype),
        join=config.joins(world.device.type, world.size),
    )


def _choice(config: HostConfig, world: World) -> Choice | None:
    if world.link is None:
        return None
    return link_choice(config, world.size, world.link, world.device.type)


def _pipefusion(pipe: Pipeline, config: HostConfig, groups: XfuserGroups) -> XDiTPipeFusion:
    from shared.parallel.distrifusion.decoder import KINDS
    from shared.parallel.xdit.pipefusion import XDiTPipeFusion

    return XDiTPipeFusion(
        pipe,
        groups.degrees,
        groups,
        warm_up_steps=None if config.warm_up_steps is None else int(config.warm_up_steps),
        patches=config.num_pipeline_patch,
        stages=config.attn_layer_num_for_pp,
        parallel_vae=config.use_parallel_vae
        or (config.decode_from is not None and isinstance(pipe.vae, KINDS)),
        decode_from=config.decode_from or 0,
        free_other_stages=not config.offloads,
        cuda_graph=config.captures(groups.device.type),
    )


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and share it among the ranks."""
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_on_rank
    from shared.pipeline.sharding import shard

    needed = needs(config, world.size)
    pipe = load_on_rank(config, world, needed)
    groups = make_groups(config, world)
    # Every rank ends with the picture of its replica; the first of each decodes it.
    picture = groups.picture if groups else 0
    replicas = groups.degrees.data if groups else 1
    if groups and not groups.degrees.exact:
        log.info(
            "the web page shows no previews with PipeFusion: no rank has the whole picture during a step"
        )
    holder = picture * (world.size // replicas)
    weights = shard(pipe, config, world, needed, replicas)
    return PipelineEngine(
        pipe,
        config,
        world,
        lambda p: attach(p, config, world, groups),
        holder,
        picture,
        weights=weights,
        replicas=replicas,
    )


def found_presets(spec: ModelSpec, ranks: int, given: Collection[str]) -> presets.Presets:
    """What --preset means for a type."""
    return presets.xdit(spec, ranks, given, BACKEND.refusal(spec, "use_fbcache") is None)


BACKEND = Backend(
    name="xdit",
    title="xDiT: sequence, pipeline and guidance parallelism through xfuser (arXiv 2411.01738)",
    types=TYPES,
    flags=FLAGS,
    refuses=REFUSES,
    check=check,
    idle=idle,
    needs=needs,
    build_engine=build_engine,
    pictures_at_once=lambda config: config.data_parallel_degree or 1,
    choose=choose,
    presets=found_presets,
)
