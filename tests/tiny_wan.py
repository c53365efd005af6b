"""Tiny random Wans: their transformer, VAE of videos and UMT5, and CLIP where they see a picture."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.tiny import image_processor, seeded, t5_text, t5_tokenizer, video_vae

CLIP_WIDTH = 32


def transformer(seed: int, channels: int = 4, **changes: Any) -> Any:
    return seeded(seed, lambda: diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=channels,
        out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=4, rope_max_seq_len=64, **changes,
    ))  # fmt: skip


def parts() -> dict[str, Any]:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_text(kind="UMT5", seed=24),
        "vae": video_vae("AutoencoderKLWan", 33),
        "scheduler": scheduler,
    }


def make_wan() -> Any:
    return diffusers.WanPipeline(**parts(), transformer=transformer(49))


def make_wani2v() -> Any:
    # It sees noise, a mask of the frames that are given (4 to a latent), and their latents.
    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        **parts(),
        transformer=transformer(50, 12, image_dim=CLIP_WIDTH, added_kv_proj_dim=64),
        image_encoder=seeded(51, lambda: transformers.CLIPVisionModel(config)),
        image_processor=image_processor(),
    )
