"""Tiny random Wans, 2.1 and 2.2: transformers, VAEs of videos, UMT5, and CLIP where they see a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.tiny import cached, image_processor, seeded, t5_text, t5_tokenizer, video_vae

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


def wan22(kind: str) -> Path:
    """A checkpoint of Wan 2.2: a14b, a14b_i2v (a picture's latents are inputs, CLIP is none) or ti2v."""

    def make(path: Path) -> None:
        if kind == "ti2v":
            # Of each 2 x 2 pixels its VAE makes one, so latents are a sixteenth of the picture.
            vae = seeded(34, lambda: diffusers.AutoencoderKLWan(
                base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
                temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
                patch_size=2, scale_factor_spatial=16, latents_mean=[0.1, 0.0, -0.1, 0.2],
                latents_std=[1.5, 1.25, 1.0, 0.75],
            ))  # fmt: skip
            pipe = diffusers.WanPipeline(
                **parts() | {"vae": vae}, transformer=transformer(52), expand_timesteps=True
            )
        else:
            cls = diffusers.WanPipeline if kind == "a14b" else diffusers.WanImageToVideoPipeline
            channels = 4 if kind == "a14b" else 12
            # Tiny schedules have few steps: half of them are the second transformer's.
            pipe = cls(
                **parts(),
                transformer=transformer(53, channels),
                transformer_2=transformer(54, channels),
                boundary_ratio=0.8,
            )
        pipe.save_pretrained(path)

    return cached(f"wan22-{kind}", make)


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
