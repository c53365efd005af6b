"""Wan 2.1 and 2.2: text and picture to video."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from shared.models.caches import LeftOut
from shared.models.files import FileForm, FileKind
from shared.models.spec import (
    IMAGE,
    LORA,
    PROMPT_ONLY,
    PROMPTS,
    SIZE,
    Family,
    ModelSpec,
    refusals,
)
from shared.models.tokens import Site, TokenPlan

TOKENS = TokenPlan(
    name="WanTransformer3DModel",
    title="Wan",
    blocks=("blocks",),
    attention=("attn1",),
    picture=(Site("blocks.0", "input"),),
    # TI2V-5B has a timestep for each token.
    positions=(Site("rope", "output"), Site("timestep", "argument", optional=True)),
    further=("transformer_2",),
    guidance="calls",
    flow=True,
    left_out=(LeftOut("blocks"),),
)

OWN_NAMES = MappingProxyType(
    {
        "attn1.to_out.0": "self_attn.o",
        "attn2.to_out.0": "cross_attn.o",
        "attn1.to_": "self_attn.",
        "attn2.to_": "cross_attn.",
        "attn2.add_k_proj": "cross_attn.k_img",
        "attn2.add_v_proj": "cross_attn.v_img",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "proj_out": "head.head",
    }
)

_FIELDS = PROMPTS | SIZE | LORA | {"latent", "frames", "fps"}

# Wan 2.2 A14B: one transformer for the noisier steps, one for the others.
A14B: MappingProxyType[str, Any] = MappingProxyType(
    {
        "steps": 40,
        "cfg": 4.0,
        "fields": _FIELDS | {"guidance_scale_2"},
        "refuses": refusals(
            PROMPT_ONLY, {"gguf_model": "this checkpoint has two transformers, and the flag names one file"}
        ),
    }
)
TI2V: MappingProxyType[str, Any] = MappingProxyType(
    {
        "width": 1280,
        "height": 704,
        "size_multiple": 32,
        "frames": 121,
        "fps": 24,
        # Its timestep for each token makes six further maps in fp32, and what is made of them.
        "wide_maps": ("ffn_dim", 23.5),
    }
)

WAN = ModelSpec(
    name="wan",
    step_maps=11.5,
    wide_maps=("ffn_dim", 4.5),
    title="Wan 2.1 and 2.2 text to video",
    pipeline="WanPipeline",
    denoiser="transformer",
    tokens=TOKENS,
    output="video",
    width=832,
    height=480,
    steps=50,
    cfg=5.0,
    size_multiple=16,
    factor_setting="vae_scale_factor_spatial",
    frames=81,
    frames_factor=4,
    fps=16,
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    sized_tokenizers=("tokenizer",),
    embeds_setting="text_dim",
    unpacked_layout="ncfhw",
    scale_setting="scale_factor_spatial",
    vae_kind="video",
    own_names=OWN_NAMES,
    kept=("proj_out", "patch_embedding", "condition_embedder*"),
    scheduler_family="flow_video",
    fields=_FIELDS,
    single_file_config="wan",
    single_file_vae="wan",
    single_file_tokenizer="google/umt5-xxl",
    single_file_encoders=MappingProxyType({"text_encoder": "text_encoders.umt5xxl.transformer."}),
    lora_parts=MappingProxyType({"high": "transformer", "low": "transformer_2"}),
    variants=MappingProxyType({"transformer_2": A14B, "expand_timesteps": TI2V}),
    refuses=refusals(PROMPT_ONLY),
)

_PAIR = ("high", "low")  # noise, in the names of A14B's two files
_SEES = ("img_emb.", "condition_embedder.image_embedder.")  # CLIP's picture
_LAST = ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")
_T2V, _I2V = ("wan",), ("wani2v",)
_14B, _14B_PICTURE, _5B = (5120, 16, 1, 2, 2), (5120, 36, 1, 2, 2), (3072, 48, 1, 2, 2)

FORMS = (
    FileForm("Wan 2.1 T2V 1.3B", (1536, 16, 1, 2, 2), "wan/t2v_1_3b", _T2V),
    FileForm("Wan 2.2 T2V A14B", _14B, "wan/t2v_a14b", _T2V, words=_PAIR, second="transformer_2", pair=_PAIR),
    FileForm("Wan 2.1 T2V 14B", _14B, "wan/t2v_14b", _T2V),
    FileForm("Wan 2.1 FLF2V 14B", _14B_PICTURE, has=_LAST, hint="no type takes its last frame"),
    FileForm("Wan 2.1 I2V 14B", _14B_PICTURE, "wan/i2v_14b", _I2V, has=_SEES),
    FileForm("Wan 2.2 I2V A14B", _14B_PICTURE, "wan/i2v_a14b", _I2V, second="transformer_2", pair=_PAIR),
    FileForm("Wan 2.2 TI2V 5B", _5B, "wan/ti2v_5b", _T2V + _I2V),
)

FAMILY = Family(
    rows=(
        WAN,
        replace(
            WAN,
            name="wani2v",
            title="Wan 2.1 and 2.2 picture to video",
            pipeline="WanImageToVideoPipeline",
            image="needed",
            aspect_multiple=16,
            # Its transformer takes the last 512 tokens for the prompt's and those before for the picture's,
            # so prompts of its default length, 512, are the only right ones.
            fields=WAN.fields | IMAGE,
            packages=("ftfy",),
            variants=MappingProxyType(
                {
                    "transformer_2": A14B | {"cfg": 3.5, "fields": A14B["fields"] | IMAGE},
                    # Its checkpoint is the one that type wan loads.
                    "expand_timesteps": TI2V
                    | {
                        "other_classes": frozenset({"WanPipeline"}),
                        "puts_frames_back": True,
                        "aspect_multiple": 32,
                    },
                }
            ),
        ),
    ),
    files=(
        FileKind(
            "a Wan with inputs of its own (VACE, Animate, S2V, Fun)",
            marks=(
                *("vace_blocks.", "vace_patch_embedding.", "face_adapter.", "motion_encoder.", "ref_conv."),
                *("casual_audio_encoder.", "control_adapter.", "fps_embedding."),
            ),
            hint="no type loads it",
        ),
        FileKind("Wan", "wan", ("blocks.0.self_attn.norm_q.", "blocks.0.attn1.norm_q."), forms=FORMS),
    ),
)
