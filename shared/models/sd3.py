"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from types import MappingProxyType

from shared.models.files import FileKind
from shared.models.spec import (
    CONTROL,
    EMBEDS,
    IP,
    LORA,
    NO_COMPEL,
    NO_MOTION,
    PARTIAL,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    refusals,
)

FILES = (
    FileKind("Stable Diffusion 3", "sd3", ("joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj.")),
)  # fmt: skip

FAMILY = Family(
    rows=(
        ModelSpec(
            name="sd3",
            most_tokens=512,
            title="Stable Diffusion 3",
            pipeline="StableDiffusion3Pipeline",
            image_pipeline="StableDiffusion3Img2ImgPipeline",
            denoiser="transformer",
            output="image",
            width=1024,
            height=1024,
            steps=28,
            cfg=7.0,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
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
            | {"sigmas", "clip_skip", "latent"},
            control_net_class="SD3ControlNetModel",
            control_net_pipeline="StableDiffusion3ControlNetPipeline",
            control_image_field="control_image",
            ip_adapter_encoder="siglip",
            single_file_config="sd3",
            single_file_encoders=MappingProxyType(
                {
                    "text_encoder": "text_encoders.clip_l.transformer.",
                    "text_encoder_2": "text_encoders.clip_g.transformer.",
                    "text_encoder_3": "text_encoders.t5xxl.transformer.",
                }
            ),
            refuses=refusals(NO_MOTION, {"compel": NO_COMPEL}),
        ),
    ),
    files=FILES,
)
