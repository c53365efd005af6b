"""Qwen-Image, and Qwen-Image-Edit, which is trained to look at pictures beside the prompt."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.files import FileKind
from shared.models.spec import (
    CONTROL,
    IMAGE,
    INPAINT,
    LORA,
    NO_COMPEL,
    NO_CONTROL,
    NO_EMBEDDINGS,
    NO_IP,
    NO_MOTION,
    PARTIAL,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    Start,
    refusals,
)
from shared.models.tokens import Site, TokenPlan

_INPUTS, _POSITIONS = Site("img_in", "input"), Site("pos_embed", "output", 0, ("picture", "text"), each=True)

CONTROL_NET = TokenPlan(
    name="QwenImageControlNetModel",
    title="Qwen-Image",
    blocks=("transformer_blocks",),
    attention=("attn",),
    picture=(_INPUTS, Site("controlnet_x_embedder", "input")),
    text=(Site("txt_in", "input", of=("text",)),),
    positions=(_POSITIONS,),
    joined=("text", "picture"),
    output=None,
    guidance="calls",
    scale="true_cfg_scale",
    flow=True,
    packed=True,
)

TOKENS = replace(
    CONTROL_NET,
    name="QwenImageTransformer2DModel",
    picture=(_INPUTS,),
    positions=(_POSITIONS, Site("modulate_index", "blocks")),
    uncapturable=("zero_cond_t",),  # it makes modulate_index on the CPU in each call
    counted=("pos_embed", "max_txt_seq_len"),
    output="proj_out",
    control_net=CONTROL_NET,
    left_out=(LeftOut("transformer_blocks", ("encoder_hidden_states", "hidden_states")),),
)

QWEN = ModelSpec(
    name="qwen",
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    image="start",
    starts=(
        Start("QwenImageImg2ImgPipeline", "image", 0.6),
        Start("QwenImageInpaintPipeline", "inpaint", 0.6),
        Start(
            "QwenImageControlNetInpaintPipeline",
            "inpaint",
            None,
            control=True,
            image="control_image",
            mask="control_mask",
            control_image=None,
            control_extra="extra_condition_channels",
        ),
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
    encoder_names=("qwen25_7b",),
    single_file_config="qwen",
    single_file_tokenizer="Qwen/Qwen2.5-VL-7B-Instruct",
    single_file_encoders=MappingProxyType({"text_encoder": "text_encoders.qwen25_7b.transformer."}),
    single_file_settings="zero_cond_t",
    single_file_vae="wan",
    control_net_class="QwenImageControlNetModel",
    control_net_pipeline="QwenImageControlNetPipeline",
    control_image_field="control_image",
    one_control_net=True,
    control_draws=True,
    # Without a negative prompt there would be no guidance; its authors' examples give one space.
    pipeline_defaults=MappingProxyType({"negative_prompt": " "}),
    fields=PROMPTS | CONTROL | SIZE | PARTIAL | LORA | INPAINT | {"sigmas", "latent"},
    refuses=refusals(NO_MOTION, {"ip_adapter": NO_IP, "compel": NO_COMPEL, "embeddings_dir": NO_EMBEDDINGS}),
)

EDIT = replace(
    QWEN,
    name="qwenedit",
    title="Qwen-Image-Edit",
    pipeline="QwenImageEditPlusPipeline",  # of -2509 and -2511
    other_classes=frozenset({"QwenImageEditPipeline"}),
    variants=MappingProxyType(
        {
            "QwenImageEditPipeline": {
                "pipeline": "QwenImageEditPipeline",
                "starts": (Start("QwenImageEditPipeline", "image", None),),
                "steps": 50,
            }
        }
    ),
    image="needed",
    # Nothing bounds their number; each is 4096 tokens more.
    starts=(Start("QwenImageEditPlusPipeline", "image", None, most=8),),
    tokens=replace(TOKENS, control_net=None),
    control_net_class=None,
    control_net_pipeline=None,
    one_control_net=False,
    width=1024,
    height=1024,
    aspect_multiple=32,
    steps=40,
    picture_processor="processor",
    encoders_capturable=False,  # it reads the sizes of pictures from tensors
    sized_tokenizers=(),
    # Its transformer has positions for 4096 tokens, of which pictures take some too.
    whole_prompts=True,
    most_tokens=2048,
    # Its inpainting pipeline makes pictures of 1024 x 1024 pixels, whatever size is asked for.
    fields=QWEN.fields - INPAINT - CONTROL | IMAGE,
    refuses=refusals(
        QWEN.refuses,
        {
            "control_net": NO_CONTROL,
            "compile_text_encoder": "its text encoder looks at pictures, and reads their sizes from tensors, "
            "which torch.compile cannot trace",
        },
    ),
)

FAMILY = Family(
    rows=(QWEN, EDIT),
    files=(FileKind("Qwen-Image", "qwen", ("transformer_blocks.0.img_mod.1.",)),),
    other_pipelines=MappingProxyType({"QwenImageLayeredPipeline": "Qwen-Image-Layered"}),
)
