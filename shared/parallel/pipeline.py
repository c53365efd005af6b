"""What is used of a diffusers pipeline and of its models, as types: mypy does not look into diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from shared.models import ModelSpec

if TYPE_CHECKING:

    class Model(nn.Module):
        """A diffusers model: a denoiser, a ControlNet, a VAE."""

        attn_processors: dict[str, Any]
        config: Any
        device: torch.device
        dtype: torch.dtype

        def enable_group_offload(self, **how: Any) -> None: ...
else:
    from diffusers import ModelMixin as Model


class Pipeline(Protocol):
    """A diffusers pipeline. Models, tokenizers and processors come by `model_of` and `part_of`."""

    scheduler: Any
    vae: Any
    vae_scale_factor: int
    model_cpu_offload_seq: str
    maybe_free_model_hooks: Callable[[], None]
    _exclude_from_cpu_offload: list[str]
    _all_hooks: list[Any]  # after enable_model_cpu_offload

    @property
    def config(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def components(self) -> dict[str, Any]: ...

    @property
    def _execution_device(self) -> torch.device: ...

    def __call__(self, **arguments: Any) -> Any: ...

    def to(self, device: torch.device) -> Any: ...

    def register_modules(self, **parts: Any) -> None: ...

    def set_progress_bar_config(self, **settings: Any) -> None: ...

    def enable_model_cpu_offload(self, gpu_id: int, device: str) -> None: ...

    def enable_xformers_memory_efficient_attention(self) -> None: ...

    # Of some pipelines only; the type says which.

    lora_set: Any  # no part of diffusers: whoever loads LoRAs keeps them there
    refiner: Any  # neither: the pipeline of --refiner
    embeddings: Any  # neither, and those of --embeddings_dir
    text_encoder: Any
    encode_prompt: Callable[..., Any]
    get_timesteps: Callable[..., Any]  # of those that start from a picture
    image_processor: Any
    watermark: Any
    prepare_latents: Callable[..., Any]
    lora_state_dict: Callable[..., Any]
    _pack_latents: Callable[..., torch.Tensor]
    _unpack_latents: Callable[..., torch.Tensor]
    _unpatchify_latents: Callable[..., torch.Tensor]

    @property
    def do_classifier_free_guidance(self) -> bool: ...

    def load_ip_adapter(self, parts: Any, subfolder: str, weight_name: str) -> None: ...

    def set_ip_adapter_scale(self, scale: float | list[float]) -> None: ...

    def maybe_convert_prompt(self, prompt: str, tokenizer: Any) -> str: ...


def model_of(pipeline: Pipeline, name: str) -> Model:
    """The model of a pipeline that it must have: `unet` or `transformer`.

    Raises:
        ValueError: it has none.
    """
    found = part_of(pipeline, name)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(pipeline).__name__} has no {name}")
    return cast(Model, found)


def pixels_of(pipeline: Pipeline, spec: ModelSpec) -> int:
    """Pixels a side of one latent."""
    return int(getattr(pipeline, spec.factor_setting))


def statistics_of_squares(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [4 x channels] of what squares of 2 x 2 latents have as channels, of such a VAE."""
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return vae.bn.running_mean, deviation


def parts_of(pipeline: Pipeline, names: Iterable[str]) -> dict[str, Any]:
    """The text encoders or tokenizers of these names; without those that the checkpoint leaves out."""
    found = {name: getattr(pipeline, name) for name in names}
    return {name: part for name, part in found.items() if part is not None}


def part_of(pipeline: Pipeline, name: str) -> Any:
    """A model, tokenizer or processor that only some pipelines have; None where it has none."""
    return getattr(pipeline, name, None)
