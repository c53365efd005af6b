"""A tiny random LTX-2: its transformer of two streams, Gemma, the VAEs of picture and sound, the vocoder."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tests.tiny import ASCII, seeded

WIDTH = 32  # of Gemma
LAYERS = ["sliding_attention", "full_attention"]  # of Gemma
REGISTERS = 8  # of the connectors; the length of a prompt is a multiple of them


def gemma_tokenizer() -> Any:
    """A token a character."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *ASCII]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.GemmaTokenizer(
        vocab=vocabulary, merges=[], model_max_length=1024, padding_side="left"
    )


def gemma() -> Any:
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 100, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
            "max_position_embeddings": 2048, "sliding_window": 512, "pad_token_id": 0, "eos_token_id": 1,
            "bos_token_id": 2, "layer_types": LAYERS,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, boi_token_index=3, eoi_token_index=4, image_token_index=5,
    )  # fmt: skip
    return seeded(27, lambda: transformers.Gemma3ForConditionalGeneration(config))


def transformer(**changes: Any) -> Any:
    return seeded(52, lambda: diffusers.LTX2VideoTransformer3DModel(**{
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 16,
        "cross_attention_dim": 64, "audio_in_channels": 8, "audio_out_channels": 8,
        "audio_num_attention_heads": 4, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 32,
        "num_layers": 4, "caption_channels": WIDTH, "rope_type": "split", "perturbed_attn": True, **changes,
    }))  # fmt: skip


def make_ltx2() -> Any:
    connectors = seeded(57, lambda: LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=len(LAYERS) + 1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16, video_connector_num_layers=1,
        video_connector_num_learnable_registers=REGISTERS, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=REGISTERS, connector_rope_base_seq_len=64, rope_type="split",
    ))  # fmt: skip
    return diffusers.LTX2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95,
            max_shift=2.05, shift_terminal=0.1,
        ),
        vae=seeded(53, lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 16, 32, 32), decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        )),
        audio_vae=seeded(54, lambda: diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1, 2, 2), num_res_blocks=1, latent_channels=2, resolution=32,
            mel_bins=16,
        )),
        vocoder=seeded(56, lambda: LTX2Vocoder(
            in_channels=32, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]],
        )),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
        connectors=connectors,
        transformer=transformer(),
    )  # fmt: skip
