"""Memory: VAE tiling and slicing, CPU offload, xformers, and what each rank reports."""

from __future__ import annotations

import importlib.util
import logging
import resource
from typing import Any

import psutil
import torch

from shared.config import HostConfig
from shared.models import ModelSpec

log = logging.getLogger("host")

OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")


class MemoryFlagError(ValueError):
    """A memory flag that cannot work here; the sentence says why."""


def check_memory_flags(config: HostConfig, device: torch.device) -> None:
    """Refuse, before any weight is read, what this machine cannot do. Raises MemoryFlagError."""
    for flag in OFFLOADS:
        if getattr(config, flag) and device.type == "cpu":
            raise MemoryFlagError(f"--{flag}: offloads from a GPU, and this rank computes on the CPU")
    if config.enable_sequential_cpu_offload and (config.compile_unet or config.compile_text_encoder):
        raise MemoryFlagError(
            "--enable_sequential_cpu_offload: moves every layer as it is called, which torch.compile "
            "cannot trace; use --enable_model_cpu_offload with it"
        )
    if config.xformers_efficient:
        if device.type == "cpu":
            raise MemoryFlagError(
                "--xformers_efficient: xformers computes on GPUs only; CPUs use PyTorch's own attention"
            )
        if importlib.util.find_spec("xformers") is None:
            raise MemoryFlagError(
                "--xformers_efficient: the xformers package is not installed; without the flag PyTorch's own "
                "attention is used, which is as fast"
            )


def apply_vae_flags(pipe: Any, config: HostConfig) -> None:
    """Tiled and sliced decoding. Raises MemoryFlagError where the VAE has no such thing."""
    for flag, method in (("enable_vae_tiling", "enable_tiling"), ("enable_vae_slicing", "enable_slicing")):
        if getattr(config, flag):
            try:
                getattr(pipe.vae, method)()
            except (AttributeError, NotImplementedError):
                raise MemoryFlagError(f"--{flag}: {type(pipe.vae).__name__} has no {method}") from None


def apply_xformers(pipe: Any, config: HostConfig) -> None:
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
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MemoryFlagError(f"--xformers_efficient: {line}") from None
    log.info("xformers attention; PyTorch's own is as fast on GPUs since 2.2")


def place(pipe: Any, spec: ModelSpec, config: HostConfig, device: torch.device, parallel: bool) -> None:
    """Move the pipeline to this rank's device, or put it under the offload that was asked for.

    Args:
        parallel: the denoiser is going to run in parts, so that no call of the whole of it can bring it over:
            model offload then keeps it on the device and offloads the rest.
    """
    if config.enable_model_cpu_offload:
        if parallel:
            pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, spec.denoiser]
            log.info("model offload: %s stays on the device, because it runs in parts", spec.denoiser)
        pipe.enable_model_cpu_offload(gpu_id=device.index or 0, device=device.type)
    elif config.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(gpu_id=device.index or 0, device=device.type)
    elif config.enable_group_offload:
        try:
            pipe.enable_group_offload(
                device, offload_type="leaf_level", use_stream=True, low_cpu_mem_usage=True
            )
        except ValueError as error:
            raise MemoryFlagError(f"--enable_group_offload: {str(error).splitlines()[0]}") from None
    else:
        pipe.to(device)


def memory_report(device: torch.device) -> dict[str, int]:
    """Bytes that this rank uses and has used at most: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    return {"allocated": psutil.Process().memory_info().rss, "peak": peak}
