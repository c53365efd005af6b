"""What a launch of xdit_host.py asks for: its degrees, and flags that do not go together. Without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.flags import HostConfig
from shared.models import BACKENDS
from shared.parallel.xdit_degrees import FLAGS, Degrees, choose_degrees, fitting_sizes

SINGLE_FILE_CONFIGS = Path(__file__).parent / "configs"


def xdit_degrees(config: HostConfig, world_size: int) -> Degrees:
    """How xDiT divides the ranks. Raises ValueError where the flags and the world size do not fit."""
    given = {name: getattr(config, flag) for name, flag in FLAGS.items() if getattr(config, flag)}
    if "cfg" in given:
        given["cfg"] = 2
    return choose_degrees(world_size, given, config.spec.guidance_branches, _attention_heads(config))


def _attention_heads(config: HostConfig) -> int | None:
    """Attention heads of the denoiser, from the checkpoint's configuration; None where it cannot be read."""
    folder = Path(config.checkpoint)
    if folder.is_file():
        folder = SINGLE_FILE_CONFIGS / (config.spec.single_file_config or "")
    try:
        heads = json.loads((folder / config.spec.denoiser / "config.json").read_text())["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return heads if isinstance(heads, int) else None


def check_xdit(config: HostConfig, world_size: int) -> None:
    """Refuse what xDiT cannot do with these flags. Raises ValueError, with the flag and what is allowed."""
    for flag, reason in BACKENDS["xdit"].refuses.get(config.type, {}).items():
        value = getattr(config, flag)
        if value and (value is True or value != 1):  # a degree of 1 divides nothing
            raise ValueError(f"--{flag}: not for type {config.type} on xdit_host.py: {reason}")
    degrees = xdit_degrees(config, world_size)
    for flag, value, wrong in _xdit_conflicts(config, degrees):
        if value:
            raise ValueError(f"--{flag}: {wrong}")
    unit = config.spec.size_multiple * degrees.sequence
    if degrees.pipefusion > 1 and config.size[1] % unit:
        raise ValueError(
            f"--height: must be a multiple of {unit} with {degrees}; got {config.size[1]} "
            f"(nearest: {fitting_sizes(config.size[1], unit)})"
        )


def _xdit_conflicts(config: HostConfig, degrees: Degrees) -> Iterator[tuple[str, Any, str]]:
    """(flag, whether it is in the way, why) for the flags that do not go with these degrees."""
    pipefusion, tensor = degrees.pipefusion > 1, degrees.tensor > 1
    cached = config.use_teacache or config.use_fbcache
    no_pipefusion = "is for PipeFusion; give --pipefusion_parallel_degree of 2 or more with it"
    yield "num_pipeline_patch", config.num_pipeline_patch and not pipefusion, no_pipefusion
    stages = config.attn_layer_num_for_pp
    yield "attn_layer_num_for_pp", stages and not pipefusion, no_pipefusion
    yield (
        "attn_layer_num_for_pp",
        stages and len(stages) != degrees.pipefusion,
        f"one number for each of the {degrees.pipefusion} stages; got {len(stages or ())}",
    )
    yield (
        "warm_up_steps",
        pipefusion and config.warm_up_steps < 1,
        "must be at least 1 with PipeFusion (the first step fills the buffers); got 0",
    )
    for flag in ("control_net", "ip_adapter"):
        yield (
            flag,
            pipefusion and getattr(config, flag),
            f"not with PipeFusion ({degrees}), the others have it",
        )
    for flag in ("enable_sequential_cpu_offload", "enable_group_offload"):
        why = "PipeFusion's layers read weights themselves; --enable_model_cpu_offload goes with it"
        yield flag, pipefusion and getattr(config, flag), why
    yield "pipefusion_parallel_degree", pipefusion and tensor, "not with --tensor_parallel_degree"
    for flag in ("quantize_to", "gguf_model", "compile_unet"):
        why = "--tensor_parallel_degree divides plain weights in memory, so not with it"
        yield flag, tensor and getattr(config, flag), why
    yield (
        "tensor_parallel_degree",
        tensor and config.offloads,
        "divides weights in memory, so not with offload",
    )
    yield "use_fbcache", config.use_fbcache and config.use_teacache, "--use_teacache is given too; one cache"
    cache = "use_teacache" if config.use_teacache else "use_fbcache"
    yield (
        cache,
        cached and (config.control_net or pipefusion or tensor),
        f"for Ulysses, ring and data parallelism without --control_net; got {degrees}"
        + (" with --control_net" if config.control_net else ""),
    )
    yield (
        "use_parallel_vae",
        config.use_parallel_vae and degrees.world == degrees.data,
        (f"needs ranks that share a picture; got {degrees}"),
    )
    yield (
        "compile_vae",
        config.compile_vae and config.use_parallel_vae,
        ("a compiled decoder is one piece, so not with --use_parallel_vae"),
    )
    yield (
        "xformers_efficient",
        config.xformers_efficient and degrees.world > 1,
        ("xDiT brings the attention of its own that all ranks share"),
    )
