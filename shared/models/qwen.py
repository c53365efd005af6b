"""Qwen-Image, and Qwen-Image-Edit, which is trained to look at pictures beside the prompt."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shared.models.caches import LeftOut
from shared.models.files import FileKind
from shared.models.spec import (
    IMAGE,
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
    positions=(
        Site("pos_embed", "output", dim=0, of=("picture", "text"), each=True),
        Site("modulate_index", "blocks"),
    ),
    uncapturable=("zero_cond_t",),  # it makes modulate_index on the CPU in each call
    counted=("pos_embed", "max_txt_seq_len"),
    joined=("text", "picture"),
    guidance="calls",
    scale="true_cfg_scale",
    flow=True,
    packed=True,
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
    # Without a negative prompt there would be no guidance; its authors' examples give one space.
    pipeline_defaults=MappingProxyType({"negative_prompt": " "}),
    fields=PROMPTS | SIZE | PARTIAL | LORA | INPAINT | {"sigmas", "latent"},
    refuses=refusals(PROMPT_ONLY),
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
    fields=QWEN.fields - INPAINT | IMAGE,
    refuses=refusals(
        QWEN.refuses,
        {
            "compile_text_encoder": "its text encoder looks at pictures, and reads their sizes from tensors, "
            "which torch.compile cannot trace"
        },
    ),
)

FAMILY = Family(
    rows=(QWEN, EDIT),
    files=(FileKind("Qwen-Image", "qwen", ("transformer_blocks.0.img_mod.1.",)),),
    other_pipelines=MappingProxyType({"QwenImageLayeredPipeline": "Qwen-Image-Layered"}),
)
