"""Full-size pipelines with random weights, built from their published configurations on the device itself.

Speed does not depend on the values, so no checkpoint is needed. Text encoders are left out, as prompts are
given as embeddings of the right shape; `text_modules` makes them for whole checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


PIXART_TOKENS = {"pixa": 120, "pixs": 300}
"""What T5 makes of a prompt."""


def on(device: torch.device, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """`make()` with every weight random, the same for the same device kind, in `dtype` on `device`."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    return model.to(device, dtype).eval().requires_grad_(False)


def sdxl_unet(in_channels: int = 4) -> Any:
    return UNet2DConditionModel(
        sample_size=128,
        in_channels=in_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd1_unet() -> Any:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd3_transformer() -> Any:
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )


def flux_transformer() -> Any:
    """FLUX.1-dev: 19 blocks of two streams and 38 of one, 24 heads of 128."""
    return FluxTransformer2DModel(guidance_embeds=True)


def hunyuan_transformer() -> Any:
    """HunyuanDiT 1.2."""
    return HunyuanDiT2DModel(
        num_attention_heads=16,
        attention_head_dim=88,
        in_channels=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        sample_size=128,
        hidden_size=1408,
        num_layers=40,
        mlp_ratio=4.3637,
        learn_sigma=True,
        cross_attention_dim=1024,
        cross_attention_dim_t5=2048,
        pooled_projection_dim=1024,
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=False,
    )


def pixart_transformer(conditions: bool = False) -> Any:
    """PixArt-Sigma XL/2, 1024 pixels; with conditions on size and aspect PixArt-Alpha's."""
    return PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, interpolation_scale=2, use_additional_conditions=conditions
    )


def svd_unet() -> Any:
    return UNetSpatioTemporalConditionModel(
        sample_size=96, num_frames=25, num_attention_heads=(5, 10, 20, 20)
    )


def vae(latents: int = 4, scaling: float = 0.13025) -> Any:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latents,
        sample_size=1024,
        scaling_factor=scaling,
        shift_factor=(0.1159 if scaling < 1 else 0.0609) if latents == 16 else None,
    )


def make_sdxl(device: torch.device, dtype: torch.dtype) -> Any:
    return StableDiffusionXLPipeline(
        vae=on(device, dtype, vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=on(device, dtype, sdxl_unet),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS),
        add_watermarker=False,
    )


def make_sd1(device: torch.device, dtype: torch.dtype) -> Any:
    return StableDiffusionPipeline(
        vae=on(device, dtype, vae),
        text_encoder=None,
        tokenizer=None,
        unet=on(device, dtype, sd1_unet),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sd3(device: torch.device, dtype: torch.dtype) -> Any:
    return StableDiffusion3Pipeline(
        transformer=on(device, dtype, sd3_transformer),
        vae=on(device, dtype, lambda: vae(16, 1.5305)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def make_flux(device: torch.device, dtype: torch.dtype) -> Any:
    return FluxPipeline(
        transformer=on(device, dtype, flux_transformer),
        vae=on(device, dtype, lambda: vae(16, 0.3611)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def chroma_transformer() -> Any:
    return ChromaTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
    )


def make_chroma(device: torch.device, dtype: torch.dtype) -> Any:
    return ChromaPipeline(
        transformer=on(device, dtype, chroma_transformer),
        vae=on(device, dtype, lambda: vae(16, 0.3611)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True),
        text_encoder=None,
        tokenizer=None,
    )


def make_hy(device: torch.device, dtype: torch.dtype) -> Any:
    return HunyuanDiTPipeline(
        transformer=on(device, dtype, hunyuan_transformer),
        vae=on(device, dtype, vae),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
        ),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_pixart(
    device: torch.device,
    dtype: torch.dtype,
    cls: Any = PixArtSigmaPipeline,
    conditions: bool = False,
    scaling: float = 0.13025,
) -> Any:
    """PixArt-Sigma, or by another class, with conditions on size and aspect, PixArt-Alpha."""
    return cls(
        transformer=on(device, dtype, partial(pixart_transformer, conditions)),
        vae=on(device, dtype, partial(vae, scaling=scaling)),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )


def make_svd(device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1024,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    return StableVideoDiffusionPipeline(
        vae=on(device, dtype, svd_vae),
        image_encoder=on(device, dtype, lambda: CLIPVisionModelWithProjection(encoder)),
        unet=on(device, dtype, svd_unet),
        scheduler=EulerDiscreteScheduler(
            interpolation_type="linear",
            prediction_type="v_prediction",
            timestep_spacing="leading",
            steps_offset=1,
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            **BETAS,
        ),
        feature_extractor=CLIPImageProcessor(),
    )


def svd_vae() -> Any:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        layers_per_block=2,
        sample_size=768,
    )


def make_ad(device: torch.device, dtype: torch.dtype) -> Any:
    return AnimateDiffPipeline(
        vae=on(device, dtype, vae),
        text_encoder=None,
        tokenizer=None,
        unet=on(device, dtype, sd1_unet),
        motion_adapter=on(device, dtype, MotionAdapter),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
        ),
    ).to(device, dtype)


def text_modules(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Text encoders of the published sizes and small tokenizers, as components of the pipeline."""
    import transformers as hf

    from tests.tiny import bert_tokenizer, clip_tokenizer, t5_tokenizer

    def clip(width: int, layers: int, projection: bool = False) -> Any:
        config = hf.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_act="quick_gelu" if width == 768 else "gelu",
            projection_dim=width,
            eos_token_id=513,  # the tokenizer's: the pooled output is read there
        )
        cls = hf.CLIPTextModelWithProjection if projection else hf.CLIPTextModel
        return on(device, dtype, lambda: cls(config))

    def t5(width: int, inner: int, heads: int, words: int = 32128) -> Any:
        config = hf.T5Config(
            vocab_size=words,
            d_model=width,
            d_ff=inner,
            num_heads=heads,
            num_layers=24,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
        return on(device, dtype, lambda: hf.T5EncoderModel(config))

    def bert() -> Any:
        config = hf.BertConfig(
            vocab_size=47020,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        )
        return on(device, dtype, lambda: hf.BertModel(config))

    clip_l, clip_g = partial(clip, 768, 12), partial(clip, 1280, 32, projection=True)
    t5_xxl, mt5_xl = partial(t5, 4096, 10240, 64), partial(t5, 2048, 5120, 32, 250112)
    makers: dict[str, list[tuple[Callable[..., Any], Callable[[], Any]]]] = {
        "sd1": [(clip_l, clip_tokenizer)],
        "sdxl": [(clip_l, clip_tokenizer), (clip_g, clip_tokenizer)],
        "sd3": [
            (partial(clip_l, projection=True), clip_tokenizer),
            (clip_g, clip_tokenizer),
            (t5_xxl, t5_tokenizer),
        ],
        "flux": [(clip_l, clip_tokenizer), (t5_xxl, t5_tokenizer)],
        **{kind: [(t5_xxl, partial(t5_tokenizer, tokens))] for kind, tokens in PIXART_TOKENS.items()},
        "hy": [(bert, bert_tokenizer), (mt5_xl, partial(t5_tokenizer, 256))],
    }
    found: dict[str, Any] = {}
    for number, (encoder, tokenizer) in enumerate(makers[name], 1):
        suffix = f"_{number}" if number > 1 else ""
        found |= {f"text_encoder{suffix}": encoder(), f"tokenizer{suffix}": tokenizer()}
    return found


@cache
def _embeds(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, pooled: int = 0
) -> dict[str, Any]:
    """As if prompts had been encoded: drawn once, so that no system's time has it in."""
    generator = torch.Generator("cpu").manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    found: dict[str, Any] = {
        "prompt_embeds": draw(1, tokens, width),
        "negative_prompt_embeds": draw(1, tokens, width),
    }
    if pooled:
        found |= {
            "pooled_prompt_embeds": draw(1, pooled),
            "negative_pooled_prompt_embeds": draw(1, pooled),
        }
    return found


def call_arguments(
    name: str, device: torch.device, dtype: torch.dtype, size: int, steps: int
) -> dict[str, Any]:
    """Keyword arguments of one generation, latents as output, guidance on."""
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    common["generator"] = torch.Generator("cpu").manual_seed(3)
    if name == "svd":
        return common | {
            "image": Image.new("RGB", (1024, 576), (90, 120, 200)),
            "width": 1024,
            "height": 576,
            "num_frames": 25,
        }
    common |= {"width": size, "height": size, "guidance_scale": 5.0}
    if name in ("hy", *PIXART_TOKENS):
        common["use_resolution_binning"] = False
    if name == "flux":
        embeds = _embeds(device, dtype, 512, 4096, 768)
        given = {key: value for key, value in embeds.items() if not key.startswith("negative")}
        return common | given | {"guidance_scale": 3.5}
    if name == "chroma":
        return common | _masked(_embeds(device, dtype, 512, 4096), device)
    if name in PIXART_TOKENS:
        return (
            common
            | _masked(_embeds(device, dtype, PIXART_TOKENS[name], 4096), device)
            | {
                "clean_caption": False,
                "negative_prompt": None,
            }
        )
    if name == "hy":
        second = _masked(_embeds(device, dtype, 256, 2048), device)
        first = _masked(_embeds(device, dtype, 77, 1024), device)
        return common | first | {f"{key}_2": value for key, value in second.items()}
    shapes = {"sdxl": (77, 2048, 1280), "sd3": (333, 4096, 2048), "sd1": (77, 768), "ad": (77, 768)}
    if name == "ad":
        common["num_frames"] = 16
    return common | _embeds(device, dtype, *shapes[name])


def _masked(embeds: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Embeddings with masks that leave no token out."""
    masks = {}
    for key, value in embeds.items():
        mask = torch.ones(value.shape[:2], dtype=torch.long, device=device)
        masks[key.replace("prompt_embeds", "prompt_attention_mask")] = mask
    return embeds | masks


MAKERS: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "sdxl": make_sdxl,
    "sd1": make_sd1,
    "sd3": make_sd3,
    "flux": make_flux,
    "chroma": make_chroma,
    "hy": make_hy,
    "pixa": partial(make_pixart, cls=PixArtAlphaPipeline, conditions=True, scaling=0.18215),
    "pixs": make_pixart,
    "svd": make_svd,
    "ad": make_ad,
}
