"""FLUX.2: klein, its distilled form, and dev, told apart by model_index.json."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from shared.models.caches import LeftOut
from shared.models.files import FileForm, FileKind
from shared.models.spec import (
    INPAINT,
    LORA,
    PARTIAL,
    PROMPT_ONLY,
    PROMPTS,
    SIZE,
    Chat,
    Family,
    ModelSpec,
    Start,
    refusals,
)
from shared.models.tokens import Beside, Site, StagePlan, TokenPlan

TOKENS = TokenPlan(
    name="Flux2Transformer2DModel",
    title="FLUX.2",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    fused=("single_transformer_blocks",),
    beside=Beside("single_transformer_blocks", "attn.mlp_act_fn", "attn.to_out"),
    # It counts the text's tokens where it gets them, so they are cut there.
    picture=(Site("hidden_states", "argument"),),
    text=(Site("encoder_hidden_states", "argument", of=("text",)),),
    positions=(Site("img_ids", "argument"), Site("txt_ids", "argument", of=("text",))),
    joined=("text", "picture"),
    guidance="calls",
    one_branch=("is_distilled", "guidance_embeds"),
    flow=True,
    packed=True,
    squares=True,
    left_out=(
        LeftOut("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        LeftOut("single_transformer_blocks"),
    ),
    stages=StagePlan(
        returns=("text", "picture"),
        one_patch="with one patch, xfuser counts FLUX.2's text once for every rank that shares the sequence",
        unpacked=frozenset({"Flux2KleinPipeline"}),
        inputs=True,
    ),
)
_ONE_BRANCH = replace(TOKENS, guidance="embedded")

_MOST_PICTURES = 10  # as its authors say
_FIELDS = PROMPTS | SIZE | LORA | INPAINT | PARTIAL | {"sigmas", "latent"}

DISTILLED: MappingProxyType[str, Any] = MappingProxyType(
    {
        "title": "FLUX.2 klein, distilled",
        "tokens": _ONE_BRANCH,
        "steps": 4,
        "cfg": 1.0,
        "unguided": True,
        "fields": _FIELDS - {"negative"},
    }
)
DEV: MappingProxyType[str, Any] = MappingProxyType(
    {
        "title": "FLUX.2 dev",
        "pipeline": "Flux2Pipeline",
        "tokens": _ONE_BRANCH,
        "starts": (Start("Flux2Pipeline", "image", None, most=_MOST_PICTURES),),
        "text_only": ("tokenizer",),
        "chat": Chat(MappingProxyType({"add_generation_prompt": False}), "system_message"),
        "single_file_tokenizer": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "fields": _FIELDS - {"negative", "mask"},
    }
)


def _klein(size: str, inputs: tuple[int, ...], config: str) -> tuple[FileForm, FileForm]:
    """Klein and what it was distilled from, which have the same tensors."""
    base = MappingProxyType({"is_distilled": False})
    return (
        FileForm(f"FLUX.2 klein base {size}", inputs, config, ("flux2",), words=("base",), index=base),
        FileForm(f"FLUX.2 klein {size}", inputs, config, ("flux2",)),
    )


FAMILY = Family(
    rows=(
        ModelSpec(
            name="flux2",
            text_tokens=512,
            title="FLUX.2",
            pipeline="Flux2KleinPipeline",
            other_classes=frozenset({"Flux2Pipeline"}),
            image="start",
            starts=(
                Start("Flux2KleinPipeline", "image", None, most=_MOST_PICTURES),
                Start("Flux2KleinInpaintPipeline", "inpaint", 0.8, most_pixels=1024 * 1024),
            ),
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1024,
            height=1024,
            steps=50,
            cfg=4.0,
            size_multiple=16,
            edit_pixels=1024 * 1024,
            text_encoders=("text_encoder",),
            tokenizers=("tokenizer",),
            sized_tokenizers=("tokenizer",),
            chat=Chat(MappingProxyType({"add_generation_prompt": True, "enable_thinking": False})),
            embeds_setting="joint_attention_dim",
            kept=(
                "proj_out",
                "x_embedder",
                "context_embedder",
                "norm_out*",
                "time_guidance_embed*",
                "*_stream_modulation*",
            ),
            scheduler_family="flow_sigmas",
            single_file_config="flux2",
            single_file_vae="beside",
            single_file_tokenizer="Qwen/Qwen3-4B",
            negative_embeds_only=True,
            fields=_FIELDS,
            variants=MappingProxyType({"is_distilled": DISTILLED, "Flux2Pipeline": DEV}),
            refuses=refusals(PROMPT_ONLY),
        ),
    ),
    files=(
        FileKind(
            "FLUX.2",
            "flux2",
            ("double_stream_modulation_img.", "single_stream_modulation."),
            forms=(
                FileForm("FLUX.2 dev", (6144, 128), "flux2/dev", ("flux2",)),
                *_klein("4B", (3072, 128), "flux2/klein_4b"),
                *_klein("9B", (4096, 128), "flux2/klein_9b"),
            ),
        ),
    ),
)
