"""Full-size pipelines of 2025 and 2026 with random weights, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image

from benchmarks.models import make_flux, on, vae
from shared.models import MODELS

FRAMES = {"wan": 81, "wan-5b": 121, "hv15": 121, "ltx2": 121}
WIDTHS = {480: 832, 512: 768, 704: 1280, 720: 1280}
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


def make_wan_5b(device: torch.device, dtype: torch.dtype) -> Any:
    """Wan 2.2 TI2V-5B: 30 blocks, 24 heads of 128, and a VAE with 16 x 16 pixels a latent."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return WanPipeline(
        transformer=on(device, dtype, lambda: WanTransformer3DModel(
            in_channels=48, out_channels=48, num_layers=30, num_attention_heads=24, ffn_dim=14336
        )),
        vae=on(device, dtype, lambda: AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        )),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        expand_timesteps=True,
    )  # fmt: skip


def make_flux2(
    device: torch.device,
    dtype: torch.dtype,
    blocks: tuple[int, int] = (5, 20),
    heads: int = 24,
    text: int = 7680,
) -> Any:
    """FLUX.2 klein, distilled: 4B, or 9B with 8 and 24 blocks and 32 heads of 128."""
    return Flux2KleinPipeline(
        transformer=on(device, dtype, lambda: Flux2Transformer2DModel(
            num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=heads,
            joint_attention_dim=text, guidance_embeds=False,
        )),
        vae=on(device, dtype, AutoencoderKLFlux2),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=None,
        tokenizer=None,
        is_distilled=True,
    )  # fmt: skip


def make_ltx2(device: torch.device, dtype: torch.dtype) -> Any:
    """LTX-2: 48 blocks, 32 heads of 128 for the picture and of 64 for the sound."""
    return LTX2Pipeline(
        transformer=on(device, dtype, lambda: LTX2VideoTransformer3DModel(rope_type="split")),
        vae=on(device, dtype, AutoencoderKLLTX2Video),
        audio_vae=on(device, dtype, AutoencoderKLLTX2Audio),
        vocoder=on(device, dtype, LTX2Vocoder),
        connectors=on(device, dtype, lambda: LTX2TextConnectors(rope_type="split")),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        text_encoder=None,
        tokenizer=None,
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
    if name.startswith("flux2"):
        width = 7680 if name == "flux2" else 12288  # of three of the encoder's layers
        return common | _embeds(device, dtype, prompt_embeds=(512, width)) | {"guidance_scale": 1.0}
    if name == "ltx2":  # one call a step, with guidance by the prompt alone
        embeds = _embeds(
            device, dtype, prompt_embeds=(1024, 3840 * 49), negative_prompt_embeds=(1024, 3840 * 49)
        )
        masks = _masks(embeds, "attention_mask")
        return common | embeds | masks | {**MODELS["ltx2"].without_guidance, "guidance_scale": 3.0}
    if name in ("wan", "wan-5b"):
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


def _masks(embeds: dict[str, torch.Tensor], mask: str = "embeds_mask") -> dict[str, torch.Tensor]:
    """Masks that leave no token out, by the pipelines' names: prompt_embeds_mask, prompt_embeds_mask_2."""
    return {
        name.replace("embeds", mask): torch.ones(value.shape[:2], dtype=torch.long, device=value.device)
        for name, value in embeds.items()
    }


MAKERS: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "qwen": make_qwen,
    "zimage": make_zimage,
    "kontext": make_kontext,
    "wan": make_wan,
    "hv15": make_hv15,
    "wan-5b": make_wan_5b,
    "flux2": make_flux2,
    "flux2-9b": partial(make_flux2, blocks=(8, 24), heads=32, text=12288),
    "ltx2": make_ltx2,
}
"""By type, or by type and size."""
