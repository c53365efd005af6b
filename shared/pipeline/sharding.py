"""--shard_weights: which models of a pipeline are sharded, and the bytes of each that a rank keeps."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.launch.backend import Needs
from shared.launch.errors import LoadError
from shared.launch.flags import HostConfig
from shared.launch.phases import PHASES
from shared.parallel.asyncdiff.weights import StageWeights
from shared.parallel.distrifusion.decoder import KINDS
from shared.parallel.pipeline import Pipeline
from shared.parallel.sharded import ShardedWeights, plain
from shared.parallel.surgery import Closing, Surgery
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

    Raises:
        LoadError: a VAE that the ranks cannot decode with together.
    """
    models = {
        name: model
        for name, model in models_of(pipe).items()
        if any(name == part or name.startswith(f"{part}_") for part in needs.shards)
    }
    if not models:
        return None
    group: dist.ProcessGroup = weights_group(world, replicas, config.collective_timeout)
    called, vae = dict[str, list[nn.Module]](), models.get("vae")
    in_one_dtype = None
    if vae is not None:
        if not isinstance(vae, KINDS):
            kinds = " or ".join(cls.__name__ for cls in KINDS)
            raise LoadError(f"--shard_weights: needs a VAE of class {kinds}; got {type(vae).__name__}")
        in_one_dtype = InOneDtype(vae)
        called["vae"] = [vae.encoder, vae.decoder]
    steps = (*config.spec.denoisers, "controlnet")
    waiting = [name for name in models if not name.startswith(steps)]
    if not config.enable_model_cpu_offload:
        waiting = []
    PHASES.begin("moving")
    weights = ShardedWeights(models, group, world.device, called, waiting)
    if in_one_dtype is not None:
        weights.held.enter_context(in_one_dtype)
    for name, (kept, whole) in parameter_bytes(pipe, weights).items():
        if name in models:
            log.info("%s: this rank keeps %.1f of %.1f MB", name, kept / 1e6, whole / 1e6)
    PHASES.begin("building")
    how = "copied from the other ranks' memory" if weights.copied else "gathered"
    log.info("blocks are %s into a buffer of %.1f MB", how, weights.buffer_bytes / 1e6)
    return weights


class InOneDtype(Closing):
    """A VAE keeps its dtype, which its pipelines change for a call, and takes tensors of any other.

    One that overflows in half precision has fp32 from the start.
    """

    def __init__(self, vae: Any) -> None:
        self._vae, self._dtype = vae, vae.dtype
        if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):
            vae.to(torch.float32)
        self._surgery = Surgery()
        self._surgery.add(vae, "to", lambda *_, **__: vae)
        for name in ("encode", "decode"):
            self._surgery.add(vae, name, self._cast(getattr(vae, name)))

    def close(self) -> None:
        self._surgery.close()
        self._vae.to(self._dtype)

    def _cast(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def cast(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(self._vae.dtype) if floating else value

        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            return call(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

        return called


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
