"""AsyncDiff, asynchronous model parallelism: its types, flags and plan, and how it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
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
from shared.backends.xdit_cost import Speeds
from shared.launch.backend import Backend, Needs, runs_plain
from shared.launch.errors import UsageError
from shared.launch.flags import HostConfig

if TYPE_CHECKING:
    from shared.parallel.asyncdiff.weights import StageWeights
    from shared.parallel.method import Method, Part
    from shared.parallel.pipeline import Pipeline
    from shared.pipeline.engine import PipelineEngine
    from shared.ranks.groups import World


def shares_branch(config: HostConfig, world_size: int) -> bool:
    """Whether two ranks divide the guidance branches in some steps and stages of one of them in others."""
    return config.use_cfg_parallel and config.async_steps is not None and world_size == 2


def stages(config: HostConfig, world_size: int) -> int:
    """Number of stages, model_n: world size = (model_n + stride - 1) x (2 with use_cfg_parallel).

    Raises:
        UsageError: where the world size and the flags do not fit each other.
    """
    branches = 2 if config.use_cfg_parallel and not shares_branch(config, world_size) else 1
    if world_size == 1:
        if config.model_n not in (None, 1) or config.stride != 1 or config.use_cfg_parallel:
            raise UsageError(
                f"--model_n={config.model_n or 2} --stride={config.stride} needs "
                f"{branches * ((config.model_n or 2) + config.stride - 1)} ranks; the world size is 1 "
                "(start it under torchrun --nproc_per_node=N)"
            )
        return 1
    least, most = (1 if branches == 2 else 2), 4
    model_n = config.model_n
    if model_n is None:
        model_n = world_size // branches - config.stride + 1
    needed = branches * (model_n + config.stride - 1)
    allowed = sorted({branches * (n + config.stride - 1) for n in range(least, most + 1)})
    if needed != world_size or not least <= model_n <= most:
        formula = "model_n + stride - 1" if branches == 1 else "2 x (model_n + stride - 1)"
        raise UsageError(
            f"--model_n: the world size must be {formula} with model_n {least} to {most}; got world size "
            f"{world_size}, stride {config.stride}"
            + (f", model_n {config.model_n}" if config.model_n else "")
            + f" (world sizes that fit this stride: {', '.join(map(str, allowed))}"
            + ("; with --use_cfg_parallel twice as many)" if world_size in map((2).__mul__, allowed) else ")")
        )
    if model_n == 1 and config.stride == 2:
        raise UsageError("--stride: 2 needs model_n of 2 or more; got model_n 1")
    if config.stage_weights and len(config.stage_weights) != model_n:
        raise UsageError(
            f"--stage_weights: must be one number for each of the {model_n} stages; "
            f"got {len(config.stage_weights)}"
        )
    return model_n


def check(config: HostConfig, world_size: int) -> None:
    """Refuse a plan that does not fit the world size. Raises UsageError."""
    stages(config, world_size)
    if config.shard_weights and world_size > 1:
        both = "use_cfg_parallel with --async_steps on two ranks"
        given = "auto_balance" if config.auto_balance else both
        if config.auto_balance or shares_branch(config, world_size):
            raise UsageError(
                f"--shard_weights: not supported with --{given}: each rank computes the whole model there"
            )
    if world_size > 1 and config.warm_up_steps == 0:
        raise UsageError("--warm_up_steps: must be at least 1 (the first step fills the activations); got 0")
    if config.cache is not None:
        if not config.cache.for_unets:
            raise UsageError(
                f"--step_cache: {config.cache.cache} leaves out blocks of a transformer; UNets have "
                "deepcache, such as deepcache:3, and mask"
            )
        if stages(config, world_size) > 1:
            raise UsageError(
                "--step_cache: not supported with stages, which take from each other what the step before "
                "made; on two ranks use it with --use_cfg_parallel, on one by itself"
            )
    if config.auto_balance and config.stage_weights:
        raise UsageError("--auto_balance: measures what --stage_weights sets; give only one of them")


def idle(config: HostConfig, world_size: int) -> list[str]:
    """A line for each flag that changes nothing in this launch."""
    if stages(config, world_size) > 1:
        return []
    changed = config.changed("time_shift", "stage_weights", "auto_balance", "async_steps")
    return [f"--{flag} has no effect: there is one stage" for flag in changed]


def needs(config: HostConfig, world_size: int) -> Needs:
    """Stages call parts of the denoiser."""
    shards, staged = config.shards(world_size), tuple[str, ...]()
    if stages(config, world_size) > 1:
        whole = (*config.spec.denoisers, "controlnet")
        staged = tuple(name for name in shards if name in whole)
        shards = tuple(name for name in shards if name not in whole)
    halves = config.use_cfg_parallel and not shares_branch(config, world_size)
    return Needs(
        in_parts=world_size > 1,
        shards=shards,
        stages=staged,
        stage_count=stages(config, world_size),
        step_parts=2 if halves else 1,
        row_parts=2 if halves else 1,
        decode_parts=config.decode_parts(world_size),
    )


def advice(config: HostConfig, world_size: int, link: Speeds | None, work: Work) -> str | None:
    """That the ranks gain nothing in this work, and why; None where they gain or it is not known."""
    from shared.parallel.chosen_steps import warm_up_of

    if world_size == 1 or "auto" in (config.warm_up_steps, config.async_steps):
        return None  # a method that chooses by itself tells itself
    count, hybrid = stages(config, world_size), shares_branch(config, world_size)
    warm_up = warm_up_of(work.steps) if config.warm_up_steps is None else int(config.warm_up_steps)
    most = work.steps if config.async_steps is None else int(config.async_steps)
    late = min(max(work.steps - warm_up, 0), most) if count > 1 else 0
    exact, branches = work.steps - late, 2 if work.guided else 1
    split = config.use_cfg_parallel and work.guided
    if count > 1:
        reason = f"{exact} of {work.steps} steps are exact, which stages do not share"
    else:
        reason = "without guidance (cfg of 1 or less) there are no two branches to share"
    if not late and not split:
        return told(reason)
    if link is None or config.spec.step_cost is None:
        return None
    step, own = StepSeconds(config.spec.step_cost, config, link, work), 1 if split else branches
    together = exact * step.alone(own) + late * step.staged(1 if hybrid else own, count) / config.stride
    estimate = Estimate(together, work.steps * step.alone(branches))
    if estimate.gains:
        return None
    if step.staged(own, count) > step.alone(own):
        reason = f"the link between the ranks, {link.bandwidth / 1e9:.2g} GB/s, is slow for the stages"
    return told(reason, estimate)


def choose(config: HostConfig, world: World) -> HostConfig:
    """The launch as it is; says where its ranks gain nothing."""
    advise_at_start(partial(advice, config, world.size, world.link), config, world.rank)
    return config


def attach(
    pipe: Pipeline, config: HostConfig, world: World, stage_weights: Sequence[StageWeights] = ()
) -> Method:
    """Cut the denoiser and the ControlNets into stages, and put the guidance branches on halves of the ranks.

    A single rank runs the plain pipeline, on a GPU as CUDA graphs like the others.

    Args:
        stage_weights: of these models, where a rank keeps only its stage's.
    """
    from shared.parallel.asyncdiff import AsyncDiff
    from shared.parallel.asyncdiff.deep_cache import DeepCache
    from shared.parallel.cfg_split import CfgSplit, HybridSplit
    from shared.parallel.chosen_steps import DRIFT, FLOW_DRIFT, Pace
    from shared.parallel.distrifusion.decoder import KINDS, PatchDecoder
    from shared.parallel.joined import JoinedProjections, of_unet
    from shared.parallel.kept_prompt import KeptPrompt
    from shared.parallel.method import CombinedMethod, Plain, control_nets
    from shared.parallel.pipeline import model_of
    from shared.ranks.device import measured_speeds
    from shared.ranks.groups import branch_groups

    if runs_plain(config, world.size, world.device.type) and config.cache is None:
        return Plain(pipe)
    model_n = stages(config, world.size)
    group, hybrid = world.compute, shares_branch(config, world.size)
    # One for all models and ranks, also those of other branches.
    drift = FLOW_DRIFT if config.spec.predicts_flow else DRIFT
    pace = Pace(config.warm_up_steps or None, config.async_steps, group, drift=drift)
    if config.use_cfg_parallel and not hybrid:
        group, pair, branch = branch_groups(world, config.collective_timeout)
    weights = config.stage_weights if model_n > 1 else None
    if config.auto_balance and model_n > 1:
        # With stride 2 the last rank repeats the last stage: the slower of the two counts.
        speeds = measured_speeds(world, group)
        weights = (*speeds[: model_n - 1], min(speeds[model_n - 1 :]))
    denoiser = model_of(pipe, config.spec.denoiser)
    nets = control_nets(pipe)
    captures, max_shapes = config.captures(world.device.type), 4 + len(config.sizes or ())

    def divided(module: Any, kept: StageWeights | None) -> AsyncDiff:
        return AsyncDiff(
            pipe,
            model_n,
            config.stride,
            time_shift=config.time_shift,
            group=group,
            stage_weights=weights,
            cuda_graph=captures,
            measure_units=config.auto_balance,
            denoiser=module,
            weights=kept,
            leader=1 if hybrid else None,
            pace=pace,
            notes=module is denoiser and not hybrid,
            max_shapes=max_shapes,
        )

    kept_of = dict(zip_longest(range(1 + len(nets)), stage_weights))
    method: AsyncDiff | DeepCache
    if config.cache is None:
        method = divided(denoiser, kept_of[0])
    else:
        method = DeepCache(pipe, denoiser, config.cache, cuda_graph=captures, max_shapes=max_shapes)
    parts: list[Part] = [divided(net, kept_of[place]) for place, net in enumerate(nets, 1)]
    attending = config.spec.attends_to_prompt and config.keeps_weights(world.size)
    prompts = [KeptPrompt(module) for module in (denoiser, *nets)] if attending else []
    parts += prompts
    joins = config.joins(world.device.type, world.size)
    joined = [JoinedProjections(of_unet(module)) for module in (denoiser, *nets)] if joins else []
    parts += joined
    guided = (lambda: method.running.do_classifier_free_guidance) if nets else None
    if hybrid and isinstance(method, AsyncDiff):
        shared = method.asynchronous
        parts.append(HybridSplit([denoiser], group, world.rank, shared, local=nets, guided=guided, pace=pace))
    elif config.use_cfg_parallel:
        parts.append(CfgSplit([denoiser], pair, branch, local=nets, guided=guided))
    least, decoder = config.decode_from, None
    if least is not None and world.size > 1 and isinstance(pipe.vae, KINDS):
        decoder = PatchDecoder(pipe.vae, world.compute, least)
        parts.append(decoder)
    note = {
        "decode_from": decoder and decoder.least,
        "cfg_split": config.use_cfg_parallel,
        "hybrid": hybrid,
        "control_nets": len(nets),
        "stage_weights": weights,
        "kept_prompt": sum(part.layers for part in prompts),
        "joined": sum(part.layers for part in joined),
    }
    combined = CombinedMethod(method, parts, note)
    combined.decoder = decoder
    return combined


def build_engine(config: HostConfig, world: World) -> PipelineEngine:
    """Load the pipeline on this rank's device and make it parallel."""
    from shared.parallel.asyncdiff.weights import StageWeights
    from shared.parallel.method import control_nets
    from shared.parallel.pipeline import model_of
    from shared.pipeline.engine import PipelineEngine
    from shared.pipeline.loading import load_on_rank
    from shared.pipeline.sharding import shard
    from shared.ranks.groups import branch_groups

    needed = needs(config, world.size)
    pipe = load_on_rank(config, world, needed)
    weights = shard(pipe, config, world, needed)
    kept: list[StageWeights] = []
    if needed.stages:
        split = config.use_cfg_parallel
        group = branch_groups(world, config.collective_timeout)[0] if split else world.compute
        models = (model_of(pipe, config.spec.denoiser), *control_nets(pipe))
        kept = [StageWeights(model, group, world.device) for model in models]
    return PipelineEngine(
        pipe,
        config,
        world,
        lambda pipe: attach(pipe, config, world, kept),
        weights=weights,
        stage_weights=kept,
        advise=advise_requests(partial(advice, config, world.size, world.link), config),
    )


BACKEND = Backend(
    name="asyncdiff",
    title="AsyncDiff: asynchronous model parallelism (arXiv 2406.06911)",
    types=("ad", "sd1", "sd2", "sd3", "sdup", "sdxl", "svd"),
    flags=frozenset(
        {
            "model_n",
            "stride",
            "async_steps",
            "time_shift",
            "stage_weights",
            "auto_balance",
            "use_cfg_parallel",
            "step_cache",
            "no_cuda_graph",
        }
    ),
    refuses={"sd3": {"step_cache": "its transformer has step caches on xdit_host.py"}},
    check=check,
    idle=idle,
    needs=needs,
    build_engine=build_engine,
    choose=choose,
    presets=presets.asyncdiff,
)
