"""HunyuanVideo 1.5: text to video, and picture to video, told apart by model_index.json."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from shared.models.caches import LeftOut
from shared.models.files import FileKind
from shared.models.spec import (
    IMAGE,
    LORA,
    NO_GGUF,
    PROMPT_ONLY,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    refusals,
)
from shared.models.tokens import Padding, Site, TokenPlan

TOKENS = TokenPlan(
    name="HunyuanVideo15Transformer3DModel",
    title="HunyuanVideo 1.5",
    blocks=("transformer_blocks",),
    attention=("attn",),
    picture=(Site("transformer_blocks.0", "input"),),
    text=(Site("transformer_blocks.0", "input", of=("text",), place=1),),
    positions=(Site("rope", "output", dim=0),),
    padding=Padding(text=1, mask=3),
    capturable=False,  # it asks on the CPU which tokens of the prompt are none
    joined=("picture", "text"),
    guidance="calls",
    guider="guider",
    flow=True,
    left_out=(LeftOut("transformer_blocks", ("hidden_states", "encoder_hidden_states")),),
)

_FIELDS = PROMPTS | SIZE | LORA | {"sigmas", "latent", "frames", "fps"}
FROM_PICTURE: MappingProxyType[str, Any] = MappingProxyType(
    {
        "title": "HunyuanVideo 1.5 picture to video",
        "pipeline": "HunyuanVideo15ImageToVideoPipeline",
        "image": "needed",
        "sized_by_picture": True,
        "aspect_multiple": 16,
        "fields": _FIELDS | IMAGE,
    }
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="hv15",
            title="HunyuanVideo 1.5 text to video",
            pipeline="HunyuanVideo15Pipeline",
            denoiser="transformer",
            tokens=TOKENS,
            output="video",
            width=848,
            height=480,
            steps=50,
            cfg=6.0,
            size_multiple=16,
            factor_setting="vae_scale_factor_spatial",
            frames=121,
            frames_factor=4,
            fps=24,
            text_encoders=("text_encoder", "text_encoder_2"),
            tokenizers=("tokenizer", "tokenizer_2"),
            read_tokens=MappingProxyType({"tokenizer": 1000, "tokenizer_2": 256}),
            quoted_tokenizers=("tokenizer_2",),
            embeds_setting="text_embed_dim",
            unpacked_layout="ncfhw",
            vae_kind="video",
            channels_setting="latent_channels",
            scale_setting="spatial_compression_ratio",
            kept=(
                "proj_out",
                "x_embedder*",
                "context_embedder*",
                "image_embedder*",
                "time_embed*",
                "norm_out*",
            ),
            own_names=MappingProxyType(
                {
                    "transformer_blocks.": "double_blocks.",
                    "attn.to_out.0": "img_attn_proj",
                    "attn.to_add_out": "txt_attn_proj",
                    "attn.to_": "img_attn_",
                    "attn.add_q_proj": "txt_attn_q",
                    "attn.add_k_proj": "txt_attn_k",
                    "attn.add_v_proj": "txt_attn_v",
                    "ff.net.0.proj": "img_mlp.fc1",
                    "ff.net.2": "img_mlp.fc2",
                    "ff_context.net.0.proj": "txt_mlp.fc1",
                    "ff_context.net.2": "txt_mlp.fc2",
                }
            ),
            # As ComfyUI has them.
            joined_names=MappingProxyType(
                {
                    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                    "img_attn.proj": ("attn.to_out.0",),
                    "txt_attn.proj": ("attn.to_add_out",),
                    "img_mlp.0": ("ff.net.0.proj",),
                    "img_mlp.2": ("ff.net.2",),
                    "txt_mlp.0": ("ff_context.net.0.proj",),
                    "txt_mlp.2": ("ff_context.net.2",),
                }
            ),
            lora_loader="peft",
            scheduler_family="flow_sigmas",
            fields=_FIELDS,
            variants=MappingProxyType({"HunyuanVideo15ImageToVideoPipeline": FROM_PICTURE}),
            refuses=refusals(PROMPT_ONLY, {"gguf_model": NO_GGUF}),
        ),
    ),
    files=(
        FileKind(
            "HunyuanVideo 1.5",
            marks=("byt5_in.", "vision_in."),
            hint="diffusers converts no single files of it; type hv15 loads it from a diffusers folder",
        ),
    ),
)
