"""Host for AsyncDiff: asynchronous model parallelism. Start it under torchrun, one rank a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.config import HostConfig, asyncdiff_model_n
from shared.host import serve

if TYPE_CHECKING:
    from shared.comm import World
    from shared.generate import PipelineEngine
    from shared.parallel.asyncdiff import AsyncDiff


def attach(pipe: Any, config: HostConfig, world: World) -> AsyncDiff | None:
    """Cut the pipeline's denoiser into stages; None where there is one rank alone."""
    from shared.parallel.asyncdiff import AsyncDiff

    if world.size == 1:
        return None
    return AsyncDiff(
        pipe,
        asyncdiff_model_n(config, world.size),
        config.stride,
        config.warm_up_steps,
        config.time_shift,
        group=world.compute,
        stage_weights=config.stage_weights,
        cuda_graph=not config.no_cuda_graph,
    )


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and make it parallel."""
    from shared.generate import PipelineEngine
    from shared.loading import load_pipeline

    pipe = load_pipeline(config.spec, config, world.device, quiet=world.rank != 0)
    return PipelineEngine(pipe, config, world, lambda pipe: attach(pipe, config, world))


if __name__ == "__main__":
    serve("asyncdiff", build_engine)
