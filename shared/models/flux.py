"""FLUX.1."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models.caches import LeftOut, Modulated
from shared.models.files import FileKind
from shared.models.spec import (
    CONTROL,
    EMBEDS,
    INPAINT,
    IP,
    LORA,
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
from shared.models.tokens import Beside, Site, StagePlan, TokenPlan

_INPUTS = Site("x_embedder", "input")

CONTROL_NET = TokenPlan(
    name="FluxControlNetModel",
    title="FLUX",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention=("attn",),
    beside=Beside("single_transformer_blocks", "act_mlp", "proj_out"),
    picture=(_INPUTS, Site("controlnet_x_embedder", "input")),
    text=(Site("context_embedder", "input", of=("text",)),),
    positions=(Site("pos_embed", "input", dim=0, of=("text", "picture")),),
    joined=("text", "picture"),
    output=None,
    guidance="embedded",
    flow=True,
    packed=True,
)

# FLUX.1 dev in 28 steps, as in diffusers (FLUX_MAG_RATIOS).
MAG_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047),
    *(1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484),
    *(0.95703, 0.93359, 0.89062),
)

TOKENS = replace(
    CONTROL_NET,
    name="FluxTransformer2DModel",
    picture=(_INPUTS,),
    output="proj_out",
    adapter="call",
    tensor=("ff", "ff_context"),
    left_out=tuple(
        LeftOut(blocks, ("encoder_hidden_states", "hidden_states")) for blocks in CONTROL_NET.blocks
    ),
    # As TeaCache's authors and xfuser have it.
    modulated=Modulated("norm1", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)),
    mag_ratios=MAG_RATIOS,
    stages=StagePlan(
        returns=("text", "picture"),
        one_patch="with one patch, xfuser counts FLUX's text once for every rank that shares the sequence",
        sized_text=True,
    ),
    control_net=CONTROL_NET,
)

FILES = (
    FileKind("FLUX.1", "flux", ("double_blocks.0.img_attn.", "single_transformer_blocks.0.")),
)  # fmt: skip

FAMILY = Family(
    rows=(
        ModelSpec(
            name="flux",
            text_tokens=512,
            title="FLUX.1",
            pipeline="FluxPipeline",
            image="start",
            starts=(
                Start("FluxImg2ImgPipeline", "image", 0.6),
                Start("FluxInpaintPipeline", "inpaint", 0.6),
                Start("FluxFillPipeline", "fill", 1.0, ip_adapter=False),
                Start("FluxControlNetImg2ImgPipeline", "image", 0.6, control=True, ip_adapter=False),
                Start("FluxControlNetInpaintPipeline", "inpaint", 0.6, control=True, ip_adapter=False),
            ),
            denoiser="transformer",
            tokens=TOKENS,
            output="image",
            width=1024,
            height=1024,
            steps=28,
            cfg=3.5,
            size_multiple=16,
            text_encoders=("text_encoder", "text_encoder_2"),
            encoder_names=("clip_l", "t5xxl"),
            tokenizers=("tokenizer", "tokenizer_2"),
            sized_tokenizers=("tokenizer_2",),
            embeds_setting="joint_attention_dim",
            kept=("proj_out", "x_embedder", "context_embedder", "norm_out*", "time_*"),
            pooled_embeds=True,
            scheduler_family="flow_flux",
            compel_class="CompelForFlux",
            fields=PROMPTS
            | EMBEDS
            | CONTROL
            | IP
            | SIZE
            | PARTIAL
            | LORA
            | INPAINT
            | {"sigmas", "latent", "true_cfg_scale"},
            control_net_class="FluxControlNetModel",
            control_net_pipeline="FluxControlNetPipeline",
            control_image_field="control_image",
            ip_adapter_encoder="clip",
            ip_adapter_negative=True,
            single_file_config="flux",
            single_file_settings="guidance_embeds",
            other_inputs=MappingProxyType({(2, 0): "FLUX.1 Canny or Depth"}),
            single_file_encoders=MappingProxyType(
                {
                    "text_encoder": "text_encoders.clip_l.transformer.",
                    "text_encoder_2": "text_encoders.t5xxl.transformer.",
                }
            ),
            refuses=refusals(NO_MOTION, {"embeddings_dir": NO_EMBEDDINGS}),
        ),
    ),
    files=FILES,
    other_pipelines=MappingProxyType({"FluxControlPipeline": "FLUX.1 Canny or Depth"}),
)
