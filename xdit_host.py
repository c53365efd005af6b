"""Host for xDiT: transformers through the package xfuser. Start it under torchrun, one rank a GPU."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from shared.backends.xdit_plan import xdit_degrees
from shared.host import serve
from shared.launch.config import HostConfig, LoadError

if TYPE_CHECKING:
    from shared.parallel.xdit.exact import XDiT
    from shared.parallel.xdit.groups import XfuserGroups
    from shared.parallel.xdit.pipefusion import XDiTPipeFusion
    from shared.pipeline.engine import PipelineEngine
    from shared.ranks.comm import World

log = logging.getLogger("host")


def make_groups(config: HostConfig, world: World) -> XfuserGroups | None:
    """The process groups of the launch's degrees; None for one rank. All ranks must ask at the same time."""
    from shared.parallel.xdit.groups import XfuserGroups

    degrees = xdit_degrees(config, world.size)
    if world.size == 1 and not (config.use_teacache or config.use_fbcache or world.device.type == "cuda"):
        return None
    return XfuserGroups(degrees, world.device, config.collective_timeout)


def attach(pipe: Any, config: HostConfig, world: World, groups: XfuserGroups | None) -> Any:
    """Share the transformer among the ranks; one rank alone runs it plain, on a GPU as CUDA graphs."""
    if groups is None:
        return None
    return _exact(pipe, config, world, groups) if groups.degrees.exact else _pipefusion(pipe, config, groups)


def _exact(pipe: Any, config: HostConfig, world: World, groups: XfuserGroups) -> XDiT:
    from shared.parallel.xdit.exact import XDiT

    return XDiT(
        pipe,
        groups.degrees,
        groups,
        cache="teacache" if config.use_teacache else "fbcache" if config.use_fbcache else None,
        parallel_vae=config.use_parallel_vae,
        cuda_graph=config.captures(world.device.type),
    )


def _pipefusion(pipe: Any, config: HostConfig, groups: XfuserGroups) -> XDiTPipeFusion:
    from shared.parallel.xdit.pipefusion import XDiTPipeFusion

    return XDiTPipeFusion(
        pipe,
        groups.degrees,
        groups,
        warm_up_steps=config.warm_up_steps,
        patches=config.num_pipeline_patch,
        stages=config.attn_layer_num_for_pp,
        parallel_vae=config.use_parallel_vae,
        free_other_stages=not config.offloads,
    )


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and share it among the ranks."""
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_pipeline

    pipe = load_pipeline(config.spec, config, world.device, quiet=not config.shows_progress(world.rank))
    groups = make_groups(config, world)
    # Every rank ends with the picture of its replica; the first of each decodes it.
    picture = groups.picture if groups else 0
    replicas = groups.degrees.data if groups else 1
    if groups and not groups.degrees.exact:
        log.info("the page shows no previews with PipeFusion: no rank has the whole picture during steps")
    holder = picture * (world.size // replicas)
    try:
        return PipelineEngine(
            pipe, config, world, lambda p: attach(p, config, world, groups), holder, picture
        )
    except ValueError as error:
        raise LoadError(str(error)) from error


if __name__ == "__main__":
    serve("xdit", build_engine)
