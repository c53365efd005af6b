"""A tiny random Wan 2.1: its transformer, VAE of videos and UMT5."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests.tiny import seeded, t5_tokenizer


def umt5(width: int = 32) -> Any:
    config = transformers.UMT5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return seeded(24, lambda: transformers.UMT5EncoderModel(config))


def vae() -> Any:
    channels = 4
    return seeded(33, lambda: diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=channels, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.1 * (i - 1) for i in range(channels)],
        latents_std=[1.5 + 0.25 * i for i in range(channels)],
    ))  # fmt: skip


def make_wan() -> Any:
    denoiser = seeded(49, lambda: diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=4, rope_max_seq_len=64,
    ))  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=vae(), scheduler=scheduler, transformer=denoiser
    )
