"""Full-size pipelines of 2025 and 2026 with random weights, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image

from benchmarks.models import make_flux, on, vae

FRAMES = {"wan": 81, "hv15": 121}
WIDTHS = {480: 832, 720: 1280}
"""Of a video's height."""


def make_qwen(device: torch.device, dtype: torch.dtype) -> Any:
    """Qwen-Image: 60 blocks, 24 heads of 128."""
    return QwenImagePipeline(
        transformer=on(device, dtype, QwenImageTransformer2DModel),
        vae=on(device, dtype, AutoencoderKLQwenImage),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, max_shift=0.9),
        text_encoder=None,
        tokenizer=None,
    )


def make_zimage(device: torch.device, dtype: torch.dtype) -> Any:
    """Z-Image: 30 blocks, 30 heads of 128."""
    return ZImagePipeline(
        transformer=on(device, dtype, ZImageTransformer2DModel),
        vae=on(device, dtype, lambda: vae(16, 0.3611)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None,
        tokenizer=None,
    )


def make_kontext(device: torch.device, dtype: torch.dtype) -> Any:
    """FLUX.1 Kontext: FLUX.1's models."""
    return FluxKontextPipeline(**make_flux(device, dtype).components)


def make_wan(device: torch.device, dtype: torch.dtype) -> Any:
    """Wan 2.1 14B: 40 blocks, 40 heads of 128."""
    return WanPipeline(
        transformer=on(device, dtype, WanTransformer3DModel),
        vae=on(device, dtype, AutoencoderKLWan),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=None,
        tokenizer=None,
    )


def make_hv15(device: torch.device, dtype: torch.dtype) -> Any:
    """HunyuanVideo 1.5, text to video: 54 blocks, 16 heads of 128."""
    return HunyuanVideo15Pipeline(
        transformer=on(device, dtype, lambda: HunyuanVideo15Transformer3DModel(task_type="t2v")),
        vae=on(device, dtype, AutoencoderKLHunyuanVideo15),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


@cache
def _embeds(device: torch.device, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """As if prompts had been encoded, by name: drawn once, so that no system's time has it in."""
    generator = torch.Generator("cpu").manual_seed(7)
    return {
        name: torch.randn(1, *shape, generator=generator).to(device, dtype) for name, shape in shapes.items()
    }


def call_arguments(
    name: str, device: torch.device, dtype: torch.dtype, size: int, steps: int
) -> dict[str, Any]:
    """Keyword arguments of one generation, latents as output; `size` is the height of a video."""
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    common["generator"] = torch.Generator("cpu").manual_seed(3)
    common |= {"height": size, "width": WIDTHS[size] if name in FRAMES else size}
    if name in FRAMES:
        common["num_frames"] = FRAMES[name]
    if name == "zimage":  # Turbo, without guidance; it takes a list of prompts
        embeds = _embeds(device, dtype, prompt_embeds=(64, 2560))
        return common | {"guidance_scale": 0.0, "prompt_embeds": list(embeds["prompt_embeds"])}
    if name == "kontext":
        embeds = _embeds(device, dtype, prompt_embeds=(512, 4096), pooled_prompt_embeds=(768,))
        picture = {"image": Image.new("RGB", (size, size), (90, 120, 200)), "max_area": size * size}
        return common | embeds | picture | {"guidance_scale": 2.5, "_auto_resize": False}
    if name == "wan":
        embeds = _embeds(device, dtype, prompt_embeds=(512, 4096), negative_prompt_embeds=(512, 4096))
        return common | embeds | {"guidance_scale": 5.0}
    if name == "qwen":
        embeds = _embeds(device, dtype, prompt_embeds=(64, 3584), negative_prompt_embeds=(16, 3584))
        return common | embeds | _masks(embeds) | {"true_cfg_scale": 4.0}
    embeds = _embeds(
        device,
        dtype,
        prompt_embeds=(1000, 3584),
        negative_prompt_embeds=(1000, 3584),
        prompt_embeds_2=(256, 1472),
        negative_prompt_embeds_2=(256, 1472),
    )
    return common | embeds | _masks(embeds)


def _masks(embeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks that leave no token out, by the pipelines' names: prompt_embeds_mask, prompt_embeds_mask_2."""
    return {
        name.replace("embeds", "embeds_mask"): torch.ones(
            value.shape[:2], dtype=torch.long, device=value.device
        )
        for name, value in embeds.items()
    }


MAKERS: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "qwen": make_qwen,
    "zimage": make_zimage,
    "kontext": make_kontext,
    "wan": make_wan,
    "hv15": make_hv15,
}
