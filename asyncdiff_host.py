"""Host for AsyncDiff: asynchronous model parallelism. Start it under torchrun, one rank a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.config import HostConfig, asyncdiff_model_n
from shared.host import serve

if TYPE_CHECKING:
    from shared.comm import World
    from shared.generate import PipelineEngine


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and cut its denoiser into stages."""
    from shared.loading import load_pipeline
    from shared.parallel.asyncdiff import AsyncDiff

    from shared.generate import PipelineEngine

    pipe = load_pipeline(config.spec, config, world.device, quiet=world.rank != 0)
    model_n = asyncdiff_model_n(config, world.size)
    parallel = None
    if world.size > 1:
        parallel = AsyncDiff(
            pipe,
            group=world.compute,
            model_n=model_n,
            stride=config.stride,
            warm_up_steps=config.warm_up_steps,
            time_shift=config.time_shift,
            stage_weights=config.stage_weights,
        )
    return PipelineEngine(pipe, config, world, parallel)


if __name__ == "__main__":
    serve("asyncdiff", build_engine)
