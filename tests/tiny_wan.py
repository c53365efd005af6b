"""A tiny random Wan 2.1: its transformer, VAE of videos and UMT5."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.tiny import seeded, t5_text, t5_tokenizer, video_vae


def make_wan() -> Any:
    denoiser = seeded(49, lambda: diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=4, rope_max_seq_len=64,
    ))  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(kind="UMT5", seed=24),
        vae=video_vae("AutoencoderKLWan", 33),
        scheduler=scheduler,
        transformer=denoiser,
    )
