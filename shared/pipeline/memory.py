"""Memory: VAE tiling and slicing, decoding in bands, CPU offload, xformers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from torch import nn

from shared.launch.backend import Needs
from shared.launch.errors import first_line
from shared.launch.flags import HostConfig
from shared.models import ModelSpec
from shared.parallel.distrifusion.bands import in_bands
from shared.parallel.distrifusion.decoder import KINDS
from shared.parallel.lanes import move
from shared.parallel.pipeline import Model, Pipeline
from shared.parallel.sharded import WHOLE
from shared.parallel.surgery import Surgery

log = logging.getLogger("host")

OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")


class MemoryFlagError(ValueError):
    """A memory flag that cannot work here; the message says why."""


def check_memory_flags(config: HostConfig, device: torch.device) -> None:
    """Refuse, before any weight is read, what this machine cannot do. Raises MemoryFlagError."""
    for flag in OFFLOADS:
        if getattr(config, flag) and device.type == "cpu":
            raise MemoryFlagError(f"--{flag}: needs a GPU; this rank computes on the CPU")
    if config.xformers_efficient:
        if device.type == "cpu":
            raise MemoryFlagError(
                "--xformers_efficient: xformers supports only GPUs; on CPUs PyTorch's own attention is used"
            )
        if importlib.util.find_spec("xformers") is None:
            raise MemoryFlagError(
                "--xformers_efficient: the xformers package is not installed; without the flag PyTorch's own "
                "attention is used, which is as fast"
            )


def apply_vae_flags(pipe: Pipeline, config: HostConfig) -> None:
    """Tiled and sliced decoding. Raises MemoryFlagError where the VAE does not support it."""
    for flag, method in (("enable_vae_tiling", "enable_tiling"), ("enable_vae_slicing", "enable_slicing")):
        if getattr(config, flag):
            try:
                getattr(pipe.vae, method)()
            except (AttributeError, NotImplementedError):
                raise MemoryFlagError(f"--{flag}: {type(pipe.vae).__name__} has no {method}") from None


def decode_in_bands(vae: Any, config: HostConfig) -> Surgery:
    """Large maps of a VAE's decoder in bands, of the kinds that have one; what is returned takes it back.

    Not with --compile_vae: compiled, a decoder keeps fewer maps, and would be other code for each size.
    """
    surgery = Surgery()
    if isinstance(vae, KINDS) and not config.compile_vae:
        in_bands(vae.decoder, surgery)
    return surgery


def apply_xformers(pipe: Pipeline, config: HostConfig) -> None:
    """Attention of the xformers package. Raises MemoryFlagError where it does not load or fit the model."""
    if not config.xformers_efficient:
        return
    try:
        pipe.enable_xformers_memory_efficient_attention()
    except (
        ImportError,
        ModuleNotFoundError,
        ValueError,
        NotImplementedError,
        OSError,
        RuntimeError,
    ) as error:
        raise MemoryFlagError(f"--xformers_efficient: {first_line(error)}") from None
    log.info("xformers attention; PyTorch's own is as fast on GPUs since 2.2")


def place(pipe: Pipeline, spec: ModelSpec, config: HostConfig, device: torch.device, needs: Needs) -> None:
    """Move the pipeline to this rank's device, or put it under the offload that was asked for.

    A denoiser that will run in parts stays on the device under model offload, as no call of the whole module
    could load it. What will be sharded stays in host memory; then nothing is moved in between but its parts.
    """
    if config.enable_model_cpu_offload and not (needs.shards or needs.stages):
        _offload_models(pipe, device, (spec.denoiser, "controlnet") if needs.in_parts else ())
    elif config.enable_sequential_cpu_offload:
        _offload_layers(pipe, device)
    elif config.enable_group_offload:
        try:
            _offload_groups(pipe, spec, device)
        except ValueError as error:
            raise MemoryFlagError(f"--enable_group_offload: {first_line(error)}") from None
    else:
        for name, module in _models(pipe).items():
            if name not in (*needs.shards, *needs.stages):
                move(module, device)


class KeptOffload(CpuOffload):
    """accelerate's hook without the copy back (9 GB for a T5-XXL): weights do not change on the device."""

    _kept: Sequence[tuple[nn.Parameter, torch.Tensor]] = ()
    """Weights that are on the device, with their copies on the CPU."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        for weight, kept in self._kept:
            if weight.dtype == kept.dtype:  # a VAE may come as float32 and go as float16
                weight.data = kept
        self._kept = ()
        return super().init_hook(module)  # moves the rest back: buffers, quantized weights

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if next(module.parameters()).device != self.execution_device:
            self._kept = [
                (weight, weight.data) for weight in module.parameters() if type(weight) is nn.Parameter
            ]
        return super().pre_forward(module, *args, **kwargs)


def _offload_models(pipe: Pipeline, device: torch.device, stay: tuple[str, ...]) -> None:
    """A model is moved over when it is called, and back when the next one is or the pipeline ends."""
    if stay:
        log.info("model offload: %s stays on the device, because it runs in parts", stay[0])
    order = [name for name in pipe.model_cpu_offload_seq.split("->") if name not in stay]
    pipe.model_cpu_offload_seq = "->".join(order)
    pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, *stay]
    pipe.enable_model_cpu_offload(gpu_id=device.index or 0, device=device.type)
    for hook in pipe._all_hooks:
        hook.hook = KeptOffload(hook.hook.execution_device, hook.hook.prev_module_hook)
        add_hook_to_module(hook.model, hook.hook)

    def all_go() -> None:
        for hook in pipe._all_hooks:
            hook.offload()

    # A pipeline's own version ends every call by hooking all models again, which removes the forwards that a
    # parallel method has overridden.
    pipe.maybe_free_model_hooks = all_go


def _offload_layers(pipe: Pipeline, device: torch.device) -> None:
    """Every layer of every model is moved to the device when it is called, and off it afterwards.

    As `pipe.enable_sequential_cpu_offload` does, but for WHOLE.
    """
    import accelerate

    for module in _models(pipe).values():
        buffers = bool(module._parameters)
        accelerate.cpu_offload(module, device, offload_buffers=buffers, preload_module_classes=[*WHOLE])


def _models(pipe: Pipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _offload_groups(pipe: Pipeline, spec: ModelSpec, device: torch.device) -> None:
    """Every layer of every model is moved to the device when it is called."""
    from diffusers.hooks import apply_group_offloading

    for name, module in _models(pipe).items():
        if any(type(part).__name__ in WHOLE for part in module.modules()):
            log.info("group offload: %s stays on the device, because it runs in one piece", name)
            module.to(device)
            continue
        # Fetching ahead on a stream learns the order of layers in the first forward and hooks them again,
        # which would remove what a parallel method has overridden; nor does that keep an order.
        ahead = device.type == "cuda" and name not in (*spec.denoisers, "controlnet")
        how: dict[str, Any] = {
            "onload_device": device, "offload_type": "leaf_level",
            "use_stream": ahead, "low_cpu_mem_usage": ahead,
        }  # fmt: skip
        if isinstance(module, Model):
            module.enable_group_offload(**how)
        else:
            apply_group_offloading(module, **how)
