"""Wan 2.1: text to video."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.files import FileKind
from shared.models.spec import (
    LORA,
    PROMPT_ONLY,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    refusals,
)
from shared.models.tokens import Site, TokenPlan

TOKENS = TokenPlan(
    name="WanTransformer3DModel",
    title="Wan",
    blocks=("blocks",),
    attention=("attn1",),
    picture=(Site("blocks.0", "input"),),
    positions=(Site("rope", "output"),),
    guidance="calls",
    flow=True,
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="wan",
            title="Wan 2.1 text to video",
            pipeline="WanPipeline",
            denoiser="transformer",
            tokens=TOKENS,
            output="video",
            width=832,
            height=480,
            steps=50,
            cfg=5.0,
            size_multiple=16,
            frames=81,
            frames_factor=4,
            fps=16,
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            sized_tokenizers=("tokenizer",),
            embeds_setting="text_dim",
            unpacked_layout="ncfhw",
            vae_kind="video",
            kept=("proj_out", "patch_embedding", "condition_embedder*"),
            scheduler_family="flow_video",
            fields=PROMPTS | SIZE | LORA | {"latent", "frames", "fps"},
            other_settings=MappingProxyType(
                {
                    "transformer_2": "Wan 2.2 A14B, whose second transformer is not supported",
                    "expand_timesteps": "Wan 2.2 TI2V-5B, whose timesteps for each token are not supported",
                }
            ),
            refuses=refusals(PROMPT_ONLY),
        ),
    ),
    files=(FileKind("Wan", "wan", ("blocks.0.self_attn.norm_q.",)),),
    other_pipelines=MappingProxyType({"WanImageToVideoPipeline": "Wan image to video"}),
)
