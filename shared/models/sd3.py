"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.files import FileKind
from shared.models.spec import (
    BATCH_PIXELS,
    CONTROL,
    EMBEDS,
    INPAINT,
    IP,
    LORA,
    NO_COMPEL,
    NO_EMBEDDINGS,
    NO_MOTION,
    PARTIAL,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    Start,
    refusals,
)
from shared.models.tokens import Site, StagePlan, TokenPlan

CONTROL_NET = TokenPlan(
    name="SD3ControlNetModel",
    title="Stable Diffusion 3",
    blocks=("transformer_blocks",),
    attention=("attn", "attn2"),
    # ControlNets of Stable Diffusion 3.5 large get the transformer's tokens, and no text.
    picture=(Site("pos_embed", "output", optional=True), Site("pos_embed_input", "output")),
    text=(Site("context_embedder", "input", of=("text",), optional=True),),
    table="pos_embed_max_size",
    joined=("picture", "text"),
    output=None,
    flow=True,
)

TOKENS = replace(
    CONTROL_NET,
    name="SD3Transformer2DModel",
    picture=(Site("pos_embed", "output"),),
    text=(Site("context_embedder", "input", of=("text",)),),
    output="proj_out",
    adapter="keys",
    left_out=(LeftOut("transformer_blocks", ("encoder_hidden_states", "hidden_states")),),
    stages=StagePlan(
        returns=("text", "picture"),
        kept_text="encoder_hidden_states_cache",
        unshared=MappingProxyType(
            {
                "dual_attention_layers": "xfuser's stages cannot share the dual attention of Stable "
                "Diffusion 3.5 medium"
            }
        ),
    ),
    control_net=CONTROL_NET,
)

FILES = (
    FileKind("Stable Diffusion 3", "sd3", ("joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj.")),
)  # fmt: skip

FAMILY = Family(
    rows=(
        ModelSpec(
            name="sd3",
            step_maps=12.5,
            text_tokens=333,
            sized_tokenizers=("tokenizer_3",),
            most_tokens=512,
            embeds_setting="joint_attention_dim",
            kept=("proj_out", "context_embedder", "norm_out*", "time_*", "pos_embed*"),
            title="Stable Diffusion 3",
            pipeline="StableDiffusion3Pipeline",
            image="start",
            starts=(
                Start("StableDiffusion3Img2ImgPipeline", "image", 0.6),
                Start("StableDiffusion3InpaintPipeline", "inpaint", 0.6),
            ),
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1024,
            height=1024,
            batch_pixels=BATCH_PIXELS,
            control_draws=True,
            steps=28,
            cfg=7.0,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
            encoder_names=("clip_l", "clip_g", "t5xxl"),
            tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
            pooled_embeds=True,
            scheduler_family="flow",
            fields=PROMPTS
            | EMBEDS
            | CONTROL
            | IP
            | SIZE
            | LORA
            | PARTIAL
            | INPAINT
            | {"sigmas", "clip_skip", "latent"},
            control_net_class="SD3ControlNetModel",
            control_net_pipeline="StableDiffusion3ControlNetPipeline",
            control_image_field="control_image",
            ip_adapter_encoder="siglip",
            ip_adapter_takes="one",
            single_file_config="sd3",
            single_file_settings="mmdit_blocks",
            optional_parts=frozenset({"text_encoder_3", "tokenizer_3"}),
            single_file_encoders=MappingProxyType(
                {
                    "text_encoder": "text_encoders.clip_l.transformer.",
                    "text_encoder_2": "text_encoders.clip_g.transformer.",
                    "text_encoder_3": "text_encoders.t5xxl.transformer.",
                }
            ),
            refuses=refusals(NO_MOTION, {"compel": NO_COMPEL, "embeddings_dir": NO_EMBEDDINGS}),
        ),
    ),
    files=FILES,
)
