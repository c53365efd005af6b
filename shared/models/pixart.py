"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.spec import (
    BATCH_PIXELS,
    EMBEDS,
    LORA,
    NO_GGUF,
    PARTIAL,
    PROMPT_ONLY,
    PROMPTS,
    SCHEDULE,
    SIZE,
    Family,
    ModelSpec,
    refusals,
)
from shared.models.tokens import Site, StagePlan, TokenPlan

TOKENS = TokenPlan(
    name="PixArtTransformer2DModel",
    title="PixArt",
    blocks=("transformer_blocks",),
    attention=("attn1",),
    picture=(Site("pos_embed", "output"),),
    stages=StagePlan(),
    left_out=(LeftOut("transformer_blocks"),),
)

FAMILY = Family(
    rows=(
        *(
            ModelSpec(
                name=name,
                step_maps=12.5,
                title=title,
                pipeline=pipeline,
                denoiser="transformer",
                tokens=TOKENS,
                output="image",
                width=1024,
                height=1024,
                batch_pixels=BATCH_PIXELS,
                steps=20,
                cfg=4.5,
                size_multiple=16,
                text_encoders=("text_encoder",),
                encoder_names=("t5xxl",),
                tokenizers=("tokenizer",),
                sized_tokenizers=("tokenizer",),
                embeds_setting="caption_channels",
                kept=("proj_out", "norm_out*", "pos_embed*", "caption_projection*", "adaln_single*"),
                embeds_mask=True,
                fields=PROMPTS | EMBEDS | SIZE | SCHEDULE | PARTIAL | LORA | {"latent"},
                lora_loader="peft",
                pipeline_defaults=MappingProxyType({"use_resolution_binning": False, "clean_caption": False}),
                refuses=refusals(PROMPT_ONLY, {"gguf_model": NO_GGUF}),
            )
            for name, title, pipeline in (
                ("pixa", "PixArt-alpha", "PixArtAlphaPipeline"),
                ("pixs", "PixArt-Sigma", "PixArtSigmaPipeline"),
            )
        ),
    ),
)
