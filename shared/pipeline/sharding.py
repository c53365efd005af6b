"""--shard_weights: which models of a pipeline are sharded, and the bytes of each that a rank keeps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from shared.launch.backend import Needs
from shared.launch.flags import HostConfig
from shared.parallel.asyncdiff.weights import StageWeights
from shared.parallel.pipeline import Pipeline
from shared.parallel.sharded import ShardedWeights, plain
from shared.ranks.groups import World, weights_group

log = logging.getLogger("host")


def models_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """Every model of a pipeline by its component's name; further ControlNets as controlnet_1, …"""
    found: dict[str, nn.Module] = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            for number, net in enumerate(getattr(part, "nets", [part])):
                found[f"{name}_{number}" if number else name] = net
    return found


def shard(
    pipe: Pipeline, config: HostConfig, world: World, needs: Needs, replicas: int = 1
) -> ShardedWeights | None:
    """Leave on each rank its part of the models that `needs.shards` names; None where it names none.

    Args:
        pipe: with these models in host memory, and all others on this rank's device.
        replicas: groups of ranks with a picture, and so with whole weights, of their own.
    """
    models = {
        name: model
        for name, model in models_of(pipe).items()
        if any(name == part or name.startswith(f"{part}_") for part in needs.shards)
    }
    if not models:
        return None
    group: dist.ProcessGroup = weights_group(world, replicas, config.collective_timeout)
    weights = ShardedWeights(models, group, world.device)
    for name, (kept, whole) in parameter_bytes(pipe, weights).items():
        if name in models:
            log.info("%s: this rank keeps %.1f of %.1f MB", name, kept / 1e6, whole / 1e6)
    log.info("blocks are gathered in two buffers of %.1f MB in all", weights.buffer_bytes / 1e6)
    return weights


def parameter_bytes(
    pipe: Pipeline, weights: ShardedWeights | None = None, stages: Sequence[StageWeights] = ()
) -> dict[str, tuple[int, int]]:
    """By model: the bytes of parameters that this rank keeps, and those of the whole model."""
    found = {}
    common = {id(stage.model): stage.saved_bytes() for stage in stages}
    for name, model in models_of(pipe).items():
        tensors = {id(t): t for parameter in model.parameters() for t in plain(parameter)}.values()
        sizes = [(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors]
        # Of a tensor that lies elsewhere there is one row of memory.
        kept = sum(min(size) for size in sizes) - (weights.saved_bytes(name) if weights else 0)
        kept -= common.get(id(model), 0)
        found[name] = kept, sum(whole for whole, _ in sizes)
    return found
