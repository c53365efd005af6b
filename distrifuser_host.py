"""Host for DistriFusion: displaced patch parallelism. Start it under torchrun, one rank a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.host import serve
from shared.launch.config import HostConfig

if TYPE_CHECKING:
    from shared.parallel.distrifusion import DistriFusion
    from shared.pipeline.engine import PipelineEngine
    from shared.ranks.comm import World


def attach(pipe: Any, config: HostConfig, world: World, branches: Any = None) -> DistriFusion | None:
    """Divide the UNet, the ControlNets and the VAE's decoder over the ranks.

    One rank alone runs the plain pipeline, on a GPU as CUDA graphs like the others.

    Args:
        branches: shared.ranks.comm.branch_groups where the guidance branches are split, else None.
    """
    from shared.parallel.distrifusion import DistriFusion

    graphs = config.captures(world.device.type)
    if world.size == 1 and not graphs:
        return None
    return DistriFusion(
        pipe,
        config.parallelism,  # type: ignore[arg-type]
        config.split_scheme,  # type: ignore[arg-type]
        config.sync_mode,  # type: ignore[arg-type]
        config.warm_up_steps if world.size > 1 else max(config.warm_up_steps, 1),
        split_batch=branches is not None,
        group=world.compute,
        branches=branches,
        cuda_graph=graphs,
        # A compiled decoder is one piece.
        split_decode=not config.compile_vae,
    )


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and make it parallel."""
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_pipeline
    from shared.ranks.comm import branch_groups

    pipe = load_pipeline(config.spec, config, world.device, quiet=not config.shows_progress(world.rank))
    split = world.size % 2 == 0 and not config.no_split_batch
    branches = branch_groups(world, config.collective_timeout) if split else None
    return PipelineEngine(pipe, config, world, lambda pipe: attach(pipe, config, world, branches))


if __name__ == "__main__":
    serve("distrifuser", build_engine)
