"""Host for AsyncDiff: asynchronous model parallelism. Start it under torchrun, one rank a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.host import serve
from shared.launch.config import HostConfig, asyncdiff_model_n, shares_branch

if TYPE_CHECKING:
    from shared.parallel.method import Together
    from shared.pipeline.engine import PipelineEngine
    from shared.ranks.comm import World


def attach(pipe: Any, config: HostConfig, world: World) -> Together | None:
    """Cut the denoiser and the ControlNets into stages, and put the guidance branches on halves of the ranks.

    One rank alone runs the plain pipeline, on a GPU as CUDA graphs like the others.
    """
    from shared.parallel.asyncdiff import AsyncDiff
    from shared.parallel.cfg_split import CfgSplit, HybridSplit
    from shared.parallel.method import Together
    from shared.ranks.comm import branch_groups, measured_speeds

    graphs = config.captures(world.device.type)
    model_n = asyncdiff_model_n(config, world.size)
    if world.size == 1 and not graphs:
        return None
    group, hybrid = world.compute, shares_branch(config, world.size)
    if config.use_cfg_parallel and not hybrid:
        group, pair, branch = branch_groups(world, config.collective_timeout)
    weights = config.stage_weights if model_n > 1 else None
    if config.auto_balance and model_n > 1:
        # With stride 2 the last rank repeats the last stage: the slower of the two counts.
        speeds = measured_speeds(world, group)
        weights = (*speeds[: model_n - 1], min(speeds[model_n - 1 :]))
    denoiser = getattr(pipe, config.spec.denoiser)
    control = getattr(pipe, "controlnet", None)
    nets = [] if control is None else list(getattr(control, "nets", [control]))
    members: list[Any] = [
        AsyncDiff(
            pipe,
            model_n,
            config.stride,
            max(config.warm_up_steps, 1),
            config.time_shift,
            group=group,
            stage_weights=weights,
            cuda_graph=graphs,
            measure_units=config.auto_balance,
            denoiser=module,
            async_steps=config.async_steps,
        )
        for module in (denoiser, *nets)
    ]
    guided = (lambda: pipe.do_classifier_free_guidance) if nets else None
    if hybrid:
        shared = members[0].asynchronous
        members.append(HybridSplit([denoiser], group, world.rank, shared, local=nets, guided=guided))
    elif config.use_cfg_parallel:
        members.append(CfgSplit([denoiser], pair, branch, local=nets, guided=guided))
    note = {
        "cfg_split": config.use_cfg_parallel,
        "hybrid": hybrid,
        "control_nets": len(nets),
        "stage_weights": weights,
    }
    return Together(members, note)


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and make it parallel."""
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_pipeline

    pipe = load_pipeline(config.spec, config, world.device, quiet=not config.shows_progress(world.rank))
    return PipelineEngine(pipe, config, world, lambda pipe: attach(pipe, config, world))


if __name__ == "__main__":
    serve("asyncdiff", build_engine)
