"""LoRAs as trainers publish them, key by key, and the same LoRAs in diffusers' format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 2.0
JOINED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp")
"""The order of the outputs of layers that a trainer's model joins."""

Names = tuple[tuple[str, str], ...]
"""Patterns of diffusers' layers, and what the trainer's model calls them; equal names are one layer there."""

# BFL's: https://github.com/black-forest-labs/flux, src/flux/modules/layers.py.
BFL: Names = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_[qkv]$", r"double_blocks.\1.img_attn.qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$", r"double_blocks.\1.txt_attn.qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.txt_attn.proj"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear$", r"double_blocks.\1.img_mod.lin"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear$", r"double_blocks.\1.txt_mod.lin"),
    (r"^transformer_blocks\.(\d+)\.ff\.(?:net\.0\.proj|linear_in)$", r"double_blocks.\1.img_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff\.(?:net\.2|linear_out)$", r"double_blocks.\1.img_mlp.2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.(?:net\.0\.proj|linear_in)$", r"double_blocks.\1.txt_mlp.0"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.(?:net\.2|linear_out)$", r"double_blocks.\1.txt_mlp.2"),
    (
        r"^single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp|attn\.to_qkv_mlp_proj)$",
        r"single_blocks.\1.linear1",
    ),
    (r"^single_transformer_blocks\.(\d+)\.(?:proj_out|attn\.to_out)$", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear$", r"single_blocks.\1.modulation.lin"),
)
BFL_BLOCKS = tuple(one for one in BFL if "norm" not in one[0])
CHROMA: Names = (
    *BFL,
    (r"^(distilled_guidance_layer\.(?:in|out)_proj)$", r"\1"),
    (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1$", r"\1.in_layer"),
    (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2$", r"\1.out_layer"),
)
# https://github.com/XLabs-AI/x-flux, src/flux/modules/layers.py.
XLABS: Names = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_[qkv]$", r"double_blocks.\1.processor.qkv_lora1"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$", r"double_blocks.\1.processor.qkv_lora2"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.processor.proj_lora1"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.processor.proj_lora2"),
)
SAME: Names = ((r"^((?:single_)?transformer_blocks\..+)$", r"\1"),)
ZIMAGE: Names = ((r"^(layers\..+)$", r"\1"),)
# https://github.com/Tongyi-MAI/Z-Image and ComfyUI's files.
ZIMAGE_OWN: Names = (
    (r"^((?:layers|noise_refiner|context_refiner)\.\d+\.attention)\.to_[qkv]$", r"\1.qkv"),
    (r"^((?:layers|noise_refiner|context_refiner)\.\d+\.attention)\.to_out\.0$", r"\1.out"),
    (r"^((?:layers|noise_refiner|context_refiner)\.\d+\.(?:feed_forward|adaLN).+)$", r"\1"),
    (r"^all_final_layer\.2-1\.(.+)$", r"final_layer.\1"),
)
# https://github.com/Wan-Video/Wan2.1, wan/modules/model.py.
WAN: Names = (
    (r"^(blocks\.\d+)\.attn1\.to_([qkv])$", r"\1.self_attn.\2"),
    (r"^(blocks\.\d+)\.attn1\.to_out\.0$", r"\1.self_attn.o"),
    (r"^(blocks\.\d+)\.attn2\.to_([qkv])$", r"\1.cross_attn.\2"),
    (r"^(blocks\.\d+)\.attn2\.to_out\.0$", r"\1.cross_attn.o"),
    (r"^(blocks\.\d+)\.attn2\.add_([kv])_proj$", r"\1.cross_attn.\2_img"),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj$", r"\1.ffn.0"),
    (r"^(blocks\.\d+)\.ffn\.net\.2$", r"\1.ffn.2"),
)
WAN_WHOLE: Names = (
    *WAN,
    (r"^condition_embedder\.(time|text)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", r"time_projection.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", r"img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", r"img_emb.proj.3"),
    (r"^proj_out$", r"head.head"),
)
# https://github.com/kohya-ss/musubi-tuner, src/musubi_tuner/hunyuan_video_1_5.
HV15: Names = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_([qkv])$", r"double_blocks.\1.img_attn_\2"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj$", r"double_blocks.\1.txt_attn_\2"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.txt_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"double_blocks.\1.img_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2$", r"double_blocks.\1.img_mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$", r"double_blocks.\1.txt_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$", r"double_blocks.\1.txt_mlp.fc2"),
)
# https://github.com/Lightricks/LTX-2, as ai-toolkit's convert_ltx2_to_diffusers.py writes them.
LTX2: Names = (
    (r"^(transformer_blocks\..+)$", r"\1"),
    (r"^proj_in$", r"patchify_proj"),
    (r"^audio_proj_in$", r"audio_patchify_proj"),
    (r"^time_embed\.(.+)$", r"adaln_single.\1"),
    (r"^audio_time_embed\.(.+)$", r"audio_adaln_single.\1"),
    (r"^av_cross_attn_(video|audio)_scale_shift\.(.+)$", r"av_ca_\1_scale_shift_adaln_single.\2"),
    (r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\.(.+)$", r"av_ca_\1_gate_adaln_single.\2"),
)


@dataclass(frozen=True)
class Trainer:
    """How one trainer's files call what they hold.

    `key`: of one tensor, with {layer} as it is, or {flat}, its dots as underscores.
    """

    key: str
    names: Names
    roles: tuple[str, str] = ("lora_A", "lora_B")
    alpha: bool = False


AI_TOOLKIT = "diffusion_model.{layer}.{role}.weight"
KOHYA = "lora_unet_{flat}.{role}.weight"
DIFFSYNTH = "{layer}.{role}.default.weight"
KOHYA_ROLES = ("lora_down", "lora_up")


def kohya(names: Names, key: str = KOHYA) -> Trainer:
    return Trainer(key, names, KOHYA_ROLES, alpha=True)


FLUX = {
    "ai-toolkit": Trainer("transformer.{layer}.{role}.weight", SAME),
    "kohya": kohya(BFL),
    "onetrainer": kohya(SAME, "lora_transformer_{flat}.{role}.weight"),
    "comfyui": kohya(BFL, AI_TOOLKIT),
    "musubi converted": Trainer(AI_TOOLKIT, BFL),
    "fal": Trainer("base_model.model.{layer}.{role}.weight", BFL),
    "xlabs": Trainer("{layer}.{role}.weight", XLABS, ("down", "up")),
}
TRAINERS: Mapping[str, Mapping[str, Trainer]] = {
    "flux": FLUX,
    "kontext": {name: FLUX[name] for name in ("ai-toolkit", "kohya", "fal")},
    "chroma": {"ai-toolkit": Trainer(AI_TOOLKIT, CHROMA), "kohya": kohya(CHROMA)},
    "flux2": {
        "ai-toolkit": Trainer(AI_TOOLKIT, BFL),
        "kohya": kohya(BFL),
        "peft": Trainer("base_model.model.{layer}.{role}.weight", BFL),
        "diffusers' names": Trainer(AI_TOOLKIT, SAME),
    },
    "qwen": {
        "ai-toolkit": Trainer(AI_TOOLKIT, SAME),
        "kohya": kohya(SAME),
        "lightning": kohya(SAME, "{layer}.{role}.weight"),
        "diffsynth": Trainer(DIFFSYNTH, SAME),
    },
    "zimage": {
        "ai-toolkit": Trainer(AI_TOOLKIT, ZIMAGE),
        "kohya": kohya(ZIMAGE),
        "comfyui": Trainer(AI_TOOLKIT, ZIMAGE_OWN),
        "comfyui with alphas": kohya(ZIMAGE_OWN, AI_TOOLKIT),
        "musubi for comfyui": kohya(ZIMAGE_OWN),
        "diffsynth": Trainer(DIFFSYNTH, ZIMAGE),
    },
    "wani2v": {
        "ai-toolkit": Trainer(AI_TOOLKIT, WAN),
        "kohya": kohya(WAN),
        "lightx2v": Trainer(AI_TOOLKIT, WAN_WHOLE, KOHYA_ROLES),
        "diffsynth": Trainer(DIFFSYNTH, WAN_WHOLE),
    },
    "hv15": {
        "kohya": kohya(HV15),
        "comfyui": Trainer(AI_TOOLKIT, BFL_BLOCKS),
        "musubi for comfyui": kohya(BFL_BLOCKS),
    },
    "ltx2": {
        "ai-toolkit": Trainer(AI_TOOLKIT, LTX2),
        "kohya": kohya(LTX2),
        "comfyui": kohya(LTX2, AI_TOOLKIT),
    },
}


def published(model: nn.Module, trainer: Trainer, seed: int = 0) -> tuple[Tensors, Tensors]:
    """A LoRA on the layers of a diffusers model that a trainer adapts: in its format, and in diffusers'."""
    generator = torch.Generator().manual_seed(seed)
    theirs: Tensors = {}
    ours: Tensors = {}
    for name, layers in _joined(model, trainer.names):
        inputs, outputs = layers[0][1].in_features, [linear.out_features for _, linear in layers]
        down = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        up = torch.randn(sum(outputs), RANK, generator=generator) * 0.3
        for role, tensor in zip(trainer.roles, (down, up), strict=True):
            theirs[trainer.key.format(layer=name, flat=name.replace(".", "_"), role=role)] = tensor
        if trainer.alpha:
            stem = trainer.key.format(layer=name, flat=name.replace(".", "_"), role="")
            theirs[f"{stem.partition('..weight')[0]}.alpha"] = torch.tensor(ALPHA)
        scale = ALPHA / RANK if trainer.alpha else 1.0
        for (layer, _), rows in zip(layers, up.split(outputs), strict=True):
            ours[f"transformer.{layer}.lora_A.weight"] = down.clone()
            ours[f"transformer.{layer}.lora_B.weight"] = rows * scale
    return theirs, ours


def _joined(model: nn.Module, names: Names) -> Iterator[tuple[str, list[tuple[str, nn.Linear]]]]:
    """Each layer of the trainer's model, and diffusers' layers that it is."""
    found: dict[str, list[tuple[str, nn.Linear]]] = {}
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        for pattern, theirs in names:
            if match := re.match(pattern, layer):
                found.setdefault(match.expand(theirs), []).append((layer, module))
                break
    for name, layers in found.items():
        yield name, sorted(layers, key=lambda one: _place(one[0].rpartition(".")[2]))


def _place(leaf: str) -> int:
    return JOINED.index(leaf) if leaf in JOINED else 0
