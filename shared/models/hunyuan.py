"""HunyuanDiT."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.spec import (
    BATCH_PIXELS,
    CONTROL,
    LORA,
    NO_COMPEL,
    NO_EMBEDDINGS,
    NO_GGUF,
    NO_IP,
    NO_MOTION,
    PARTIAL,
    PROMPTS,
    RESCALE,
    SIZE,
    Family,
    ModelSpec,
    refusals,
)
from shared.models.tokens import Site, StagePlan, TokenPlan

CONTROL_NET = TokenPlan(
    name="HunyuanDiT2DControlNetModel",
    title="HunyuanDiT",
    blocks=("blocks",),
    attention=("attn1",),
    picture=(Site("pos_embed", "output"),),
    positions=(Site("image_rotary_emb", "argument", dim=0),),
    output=None,
)

TOKENS = replace(
    CONTROL_NET,
    name="HunyuanDiT2DModel",
    output="proj_out",
    stages=StagePlan(equal=True),
    left_out=(LeftOut("blocks"),),
    control_net=CONTROL_NET,
)

FAMILY = Family(
    rows=(
        ModelSpec(
            name="hy",
            title="HunyuanDiT",
            pipeline="HunyuanDiTPipeline",
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1024,
            height=1024,
            batch_pixels=BATCH_PIXELS,
            control_draws=True,
            steps=25,
            cfg=5.0,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2"),
            encoder_names=("hydit_clip", "mt5xl"),
            tokenizers=("tokenizer", "tokenizer_2"),
            sized_tokenizers=("tokenizer", "tokenizer_2"),
            kept=("proj_out", "norm_out*", "time_*", "pos_embed*", "text_embedder*"),
            fields=PROMPTS | CONTROL | SIZE | PARTIAL | LORA | RESCALE | {"latent"},
            control_net_class="HunyuanDiT2DControlNetModel",
            control_net_pipeline="HunyuanDiTControlNetPipeline",
            control_image_field="control_image",
            lora_loader="peft",
            pipeline_defaults=MappingProxyType({"use_resolution_binning": False}),
            refuses=refusals(
                NO_MOTION,
                {
                    "ip_adapter": NO_IP,
                    "gguf_model": NO_GGUF,
                    "compel": NO_COMPEL,
                    "embeddings_dir": NO_EMBEDDINGS,
                    "enable_group_offload": "diffusers has no group offloading for HunyuanDiT2DModel",
                },
            ),
        ),
    ),
)
