"""LTX-2: text, or a picture to begin with, to video with sound."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.files import FileForm, FileKind, FilePart
from shared.models.spec import (
    IMAGE,
    LORA,
    PROMPT_ONLY,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    Start,
    refusals,
)
from shared.models.tokens import Site, TokenPlan

# The sound's tokens, a few per cent of the picture's, are whole on every rank: shared, they would cost three
# exchanges a block and save nothing, as the time of so few goes into reading the weights.
TOKENS = TokenPlan(
    name="LTX2VideoTransformer3DModel",
    title="LTX-2",
    blocks=("transformer_blocks",),
    attention=("attn1",),
    everywhere=("video_to_audio_attn",),
    skipped="all_perturbed",
    picture=(Site("proj_in", "input"),),
    # Cosines and sines are [batch, heads, tokens, channels] or [batch, tokens, channels], by checkpoint.
    # A video that begins with a picture has a timestep for each token.
    positions=(
        Site("rope", "output", dim=-2),
        Site("cross_attn_rope", "output", dim=-2),
        Site("timestep", "argument", optional=True),
    ),
    flow=True,
    left_out=(LeftOut("transformer_blocks", ("hidden_states", "audio_hidden_states")),),
)

# The connectors' names begin as the denoiser's do, in files with its prefix and without.
PARTS = MappingProxyType(
    {
        "audio_vae": FilePart(
            ("audio_vae.",),
            MappingProxyType(
                {
                    "audio_vae.": "",
                    "per_channel_statistics.mean-of-means": "latents_mean",
                    "per_channel_statistics.std-of-means": "latents_std",
                }
            ),
        ),
        "vocoder": FilePart(
            ("vocoder.",),
            MappingProxyType(
                {
                    "vocoder.": "",
                    "ups.": "upsamplers.",
                    "resblocks.": "resnets.",
                    "conv_pre.": "conv_in.",
                    "conv_post.": "conv_out.",
                }
            ),
        ),
        "connectors": FilePart(
            (
                "text_embedding_projection.",
                *(
                    f"{prefix}{kind}_embeddings_connector."
                    for prefix in ("model.diffusion_model.", "")
                    for kind in ("video", "audio")
                ),
            ),
            MappingProxyType(
                {
                    "model.diffusion_model.": "",
                    "embeddings_connector.": "connector.",
                    "transformer_1d_blocks.": "transformer_blocks.",
                    "text_embedding_projection.aggregate_embed.": "text_proj_in.",
                    "q_norm.": "norm_q.",
                    "k_norm.": "norm_k.",
                }
            ),
        ),
    }
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="ltx2",
            # The sound's tokens are as few as the prompt's.
            prompt_rows=(
                *("*.attn2.to_[kv]", "*.audio_attn*", "*.audio_ff.*", "*.audio_to_video_attn.to_[kv]"),
                *("*.video_to_audio_attn.to_q", "*.video_to_audio_attn.to_out.*"),
            ),
            title="LTX-2 text to video with sound",
            pipeline="LTX2Pipeline",
            denoiser="transformer",
            tokens=TOKENS,
            output="video",
            width=768,
            height=512,
            steps=30,
            least_steps=2,
            cfg=3.0,
            without_guidance=MappingProxyType(
                {
                    "audio_guidance_scale": 1.0,
                    "stg_scale": 0.0,
                    "audio_stg_scale": 0.0,
                    "modality_scale": 1.0,
                    "audio_modality_scale": 1.0,
                }
            ),
            size_multiple=32,
            aspect_multiple=32,
            factor_setting="vae_spatial_compression_ratio",
            frames=121,
            frames_factor=8,
            fps=24,
            fps_field="frame_rate",
            sound=("vocoder", "output_sampling_rate"),
            text_encoders=("text_encoder",),
            encoders_capturable=False,  # Gemma 3 copies from host memory
            tokenizers=("tokenizer",),
            sized_tokenizers=("tokenizer",),
            unpacked_layout="tokens",
            vae_kind="video",
            statistics="buffers",
            channels_setting="latent_channels",
            scale_setting="spatial_compression_ratio",
            video_scale=32,
            kept=(
                "proj_in",
                "proj_out",
                "audio_proj_in",
                "audio_proj_out",
                "caption_projection*",
                "audio_caption_projection*",
                "time_embed*",
                "audio_time_embed*",
                "av_cross_attn_*",
                "prompt_adaln*",
                "audio_prompt_adaln*",
            ),
            own_names=MappingProxyType(
                {
                    "audio_proj_in": "audio_patchify_proj",
                    "audio_time_embed.": "audio_adaln_single.",
                    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
                    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
                    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
                    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
                    "proj_in": "patchify_proj",
                    "time_embed.": "adaln_single.",
                }
            ),
            scheduler_family="flow_sigmas",
            single_file_config="ltx2",
            single_file_tokenizer="google/gemma-3-12b-it",
            single_file_parts=PARTS,
            fields=PROMPTS | SIZE | LORA | IMAGE | {"sigmas", "latent", "frames", "fps"},
            image="begins",
            starts=(Start("LTX2ImageToVideoPipeline", "image", None, begins=True),),
            other_classes=frozenset({"LTX2ImageToVideoPipeline"}),
            refuses=refusals(
                PROMPT_ONLY, {"gguf_model": "its GGUF files are not supported here; types with it: {types}"}
            ),
        ),
    ),
    files=(
        FileKind(
            "LTX-2.3 or newer",
            parts=(".attn1.to_gate_logits.",),
            hint="diffusers converts no single files of it; type ltx2 loads it from a diffusers folder",
        ),
        FileKind(
            "LTX-2",
            "ltx2",
            ("audio_patchify_proj.", "audio_adaln_single.", "audio_proj_in.", "audio_time_embed."),
            forms=(
                # It takes the steps as they are given.
                FileForm("LTX-2 distilled", (4096, 128), "ltx2/distilled", ("ltx2",), words=("distilled",)),
                FileForm("LTX-2", (4096, 128), "ltx2", ("ltx2",)),
            ),
        ),
    ),
    other_pipelines=MappingProxyType({"LTXPipeline": "LTX-Video, which has no sound"}),
)
