"""Chroma: FLUX's blocks without guidance embedding, with T5 alone and true guidance."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.files import FileKind
from shared.models.spec import (
    EMBEDS,
    IMAGE,
    LORA,
    PARTIAL,
    PROMPT_ONLY,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    Start,
    refusals,
)
from shared.models.tokens import Beside, Site, TokenPlan

TOKENS = TokenPlan(
    name="ChromaTransformer2DModel",
    title="Chroma",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    beside=Beside("single_transformer_blocks", "act_mlp", "proj_out"),
    picture=(Site("x_embedder", "input"),),
    text=(Site("context_embedder", "input", of=("text",)),),
    positions=(Site("pos_embed", "input", dim=0, of=("text", "picture")),),
    joined=("text", "picture"),
    capturable=False,  # diffusers makes an embedding of zero on the CPU in each call
    guidance="calls",
    flow=True,
    packed=True,
    left_out=(
        LeftOut("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        LeftOut("single_transformer_blocks"),
    ),
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="chroma",
            text_tokens=512,
            title="Chroma1",
            pipeline="ChromaPipeline",
            image="start",
            # diffusers 0.42's ChromaInpaintPipeline asks its transformer for a guidance embedding, and fails.
            starts=(Start("ChromaImg2ImgPipeline", "image", 0.9),),
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1024,
            height=1024,
            steps=35,
            cfg=5.0,
            size_multiple=16,
            text_encoders=("text_encoder",),
            encoder_names=("t5xxl",),
            tokenizers=("tokenizer",),
            sized_tokenizers=("tokenizer",),
            most_tokens=512,
            embeds_setting="joint_attention_dim",
            embeds_mask=True,
            kept=("proj_out", "x_embedder", "context_embedder", "norm_out*", "distilled_guidance_layer*"),
            own_names=MappingProxyType({".linear_1": ".in_layer", ".linear_2": ".out_layer"}),
            scheduler_family="flow_sigmas",
            single_file_config="chroma",
            single_file_encoders=MappingProxyType({"text_encoder": "text_encoders.t5xxl.transformer."}),
            fields=PROMPTS | EMBEDS | SIZE | PARTIAL | LORA | IMAGE | {"sigmas", "latent"},
            refuses=refusals(PROMPT_ONLY),
        ),
    ),
    files=(FileKind("Chroma", "chroma", ("distilled_guidance_layer.",)),),
)
