"""Qwen-Image."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.files import FileKind
from shared.models.spec import (
    INPAINT,
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
from shared.models.tokens import Site, TokenPlan

TOKENS = TokenPlan(
    name="QwenImageTransformer2DModel",
    title="Qwen-Image",
    blocks=("transformer_blocks",),
    attention=("attn",),
    picture=(Site("img_in", "input"),),
    text=(Site("txt_in", "input", of=("text",)),),
    positions=(Site("pos_embed", "output", dim=0, of=("picture", "text"), each=True),),
    counted=("pos_embed", "max_txt_seq_len"),
    joined=("text", "picture"),
    guidance="calls",
    scale="true_cfg_scale",
    flow=True,
    packed=True,
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="qwen",
            title="Qwen-Image",
            pipeline="QwenImagePipeline",
            image="start",
            starts=(
                Start("QwenImageImg2ImgPipeline", "image", 0.6),
                Start("QwenImageInpaintPipeline", "inpaint", 0.6),
            ),
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1328,
            height=1328,
            steps=50,
            least_steps=2,
            cfg=4.0,
            cfg_field="true_cfg_scale",
            size_multiple=16,
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            sized_tokenizers=("tokenizer",),
            most_tokens=1024,
            embeds_setting="joint_attention_dim",
            vae_kind="video",
            kept=("proj_out", "img_in", "txt_in", "norm_out*", "time_text_embed*"),
            scheduler_family="flow_sigmas",
            # Without a negative prompt there would be no guidance; its authors' examples give one space.
            pipeline_defaults=MappingProxyType({"negative_prompt": " "}),
            fields=PROMPTS | SIZE | PARTIAL | LORA | INPAINT | {"sigmas", "latent"},
            refuses=refusals(PROMPT_ONLY),
        ),
    ),
    files=(FileKind("Qwen-Image", "qwen", ("transformer_blocks.0.img_mod.1.",)),),
)
