"""Tiny checkpoints as one `.safetensors` in the layout of the models' authors, and as GGUF.

The key names are the inverse of what `diffusers.loaders.single_file_utils` reads.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.models import MODELS
from tests import tiny

Tensors = dict[str, torch.Tensor]
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET_TOP = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "conv_norm_out": "out.0",
    "time_embedding.linear_2": "time_embed.2", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
SD3_TOP = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
             "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip


def unet(model: Any) -> Tensors:
    """A UNet of two levels of two layers in the layout of latent-diffusion."""
    per_level, levels = model.config.layers_per_block, len(model.config.block_out_channels)
    found: Tensors = {}
    for key, value in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        parts = name.split(".")
        if name in UNET_TOP:
            found[f"{UNET_TOP[name]}.{kind}"] = value
            continue
        if parts[0] == "mid_block":
            place = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}"
            inner = parts[3:]
        else:
            down, level = parts[0] == "down_blocks", int(parts[1])
            step = per_level + 1
            if parts[2] in ("downsamplers", "upsamplers"):
                number = step * level + (step if down else per_level)
                has_attention = any(k.startswith(f"up_blocks.{level}.attentions") for k in model.state_dict())
                inner = ["op"] if down else ["conv"]
                place = f"input_blocks.{number}.0" if down else f"output_blocks.{number}.{1 + has_attention}"
            else:
                number = step * level + int(parts[3]) + down
                place = f"{'input' if down else 'output'}_blocks.{number}.{int(parts[2] == 'attentions')}"
                inner = parts[4:]
        found[".".join([place, RESNET.get(inner[0], inner[0]), *inner[1:], kind])] = value
    assert levels == 2 and len(found) == len(model.state_dict())
    return found


def vae(model: Any) -> Tensors:
    found: Tensors = {}
    last = len(model.config.block_out_channels) - 1
    for key, value in model.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            down, level = parts[1] == "down_blocks", int(parts[2])
            place = [parts[0], "down" if down else "up", str(level if down else last - level)]
            resampler = ["downsample" if down else "upsample", *parts[5:]]
            parts = place + (["block", *parts[4:]] if parts[3] == "resnets" else resampler)
        elif parts[1] == "mid_block":
            inner = ".".join(parts[4:-1])
            if parts[2] == "resnets":
                parts = [parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]]
            else:
                parts = [parts[0], "mid", "attn_1", VAE_ATTENTION[inner], parts[-1]]
                value = value[..., None, None] if inner != "group_norm" and value.ndim == 2 else value
        found[".".join(parts)] = value
    return found


def clip(model: Any, prefix: str) -> Tensors:
    return {
        prefix + (key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}"): value
        for key, value in model.state_dict().items()
    }


def open_clip(model: Any, prefix: str) -> Tensors:
    """A CLIP text encoder in the layout of OpenCLIP, with query, key and value in one tensor."""
    own = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    found = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
    }
    if "text_projection.weight" in own:
        found["text_projection"] = own["text_projection.weight"].T
    for layer in range(model.config.num_hidden_layers):
        block = f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [own[f"encoder.layers.{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, theirs in OPEN_CLIP.items():
                found[f"{block}.{theirs}.{kind}"] = own[f"encoder.layers.{layer}.{ours}.{kind}"]
    return {prefix + key: value for key, value in found.items()}


def sd3(model: Any) -> Tensors:
    own = model.state_dict()
    last = model.config.num_layers - 1
    found = {"pos_embed": own["pos_embed.pos_embed"]}

    def swapped(value: torch.Tensor) -> torch.Tensor:
        return torch.cat(value.chunk(2)[::-1])

    for kind in ("weight", "bias"):
        for ours, theirs in SD3_TOP.items():
            value = own[f"{ours}.{kind}"]
            found[f"{theirs}.{kind}"] = swapped(value) if ours == "norm_out.linear" else value
        for i in range(last + 1):
            block, names = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for side, qkv in (("x_block", "to_{}"), ("context_block", "add_{}_proj")):
                parts = [own[f"{block}.attn.{qkv.format(p)}.{kind}"] for p in "qkv"]
                found[f"{names}.{side}.attn.qkv.{kind}"] = torch.cat(parts)
            pairs = {"attn.to_out.0": "x_block.attn.proj", "norm1.linear": "x_block.adaLN_modulation.1",
                     "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
                     "norm1_context.linear": "context_block.adaLN_modulation.1"}  # fmt: skip
            if i < last:
                pairs |= {"attn.to_add_out": "context_block.attn.proj",
                          "ff_context.net.2": "context_block.mlp.fc2",
                          "ff_context.net.0.proj": "context_block.mlp.fc1"}  # fmt: skip
            for ours, theirs in pairs.items():
                value = own[f"{block}.{ours}.{kind}"]
                swap = i == last and ours == "norm1_context.linear"
                found[f"{names}.{theirs}.{kind}"] = swapped(value) if swap else value
    return found


WAN = {
    **MODELS["wan"].own_names,
    "norm_added_k": "norm_k_img", "norm2": "norm3", "image_embedder.norm1": "img_emb.proj.0",
    "image_embedder.norm3": "img_emb.proj.4", "condition_embedder.": "",
}  # fmt: skip


def wan(model: Any) -> Tensors:
    found: Tensors = {}
    for key, value in model.state_dict().items():
        name = key.replace(
            "scale_shift_table", "modulation" if key.startswith("blocks") else "head.modulation"
        )
        for ours, theirs in WAN.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def zimage(model: Any) -> Tensors:
    names = {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder",
             ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm.", ".to_out.0.": ".out."}  # fmt: skip
    found, own = {}, model.state_dict()
    for key, value in own.items():
        if ".to_q." in key:
            parts = [own[key.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            found[key.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".to_k." not in key and ".to_v." not in key:
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            found[key] = value
    return found


FLUX2 = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "attn.to_qkv_mlp_proj": "linear1", "proj_out": "final_layer.linear",
    "x_embedder": "img_in", "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin", "stream_modulation.linear": "stream_modulation.lin",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale", "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2", "attn.to_out.0": "img_attn.proj", "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2", "attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv",
    "attn.to_out": "linear2",
}  # fmt: skip


def flux2(model: Any) -> Tensors:
    found, own = {}, model.state_dict()
    for key, value in own.items():
        single, name = key.startswith("single_transformer_blocks."), key
        if any(part in key for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            continue
        if ".to_q." in key or ".add_q_proj." in key:
            head, part = ("to_", "{}") if ".to_q." in key else ("add_", "{}_proj")
            parts = [key.replace(head + part.format("q"), head + part.format(one)) for one in "qkv"]
            value = torch.cat([own[part] for part in parts])
        if key.startswith("norm_out.linear"):
            value = torch.cat(value.chunk(2)[::-1])  # scale and shift
        stream = "norm" if single else "img_attn.norm"
        for letter, word in (("q", "query"), ("k", "key")):
            name = name.replace(f"attn.norm_{letter}.weight", f"{stream}.{word}_norm.scale")
        for ours, theirs in FLUX2.items():
            name = name.replace(ours, theirs)
        name = name.replace("single_transformer_blocks.", "single_blocks.")
        found[name.replace("transformer_blocks.", "double_blocks.")] = value
    return found


WAN_RESNET = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
              "conv_shortcut": "shortcut"}  # fmt: skip
WAN_VAE = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2", "mid_block.resnets.0": "middle.0",
           "mid_block.attentions.0": "middle.1", "mid_block.resnets.1": "middle.2"}  # fmt: skip


def wan_vae(model: Any) -> Tensors:
    """The VAE of Qwen-Image in Wan's layout, in which the decoder's blocks and upsamplers are one list."""
    found: Tensors = {}
    for key, value in model.state_dict().items():
        side, _, name = key.partition(".")
        if side in ("quant_conv", "post_quant_conv"):
            found[f"{'conv1' if side == 'quant_conv' else 'conv2'}.{name}"] = value
            continue
        for ours, theirs in WAN_VAE.items():
            name = name.replace(ours, theirs)
        for ours, theirs in WAN_RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("down_blocks.", "downsamples.")
        if up := re.match(r"up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.", name):
            place = 4 * int(up[1]) + (3 if up[2] == "upsamplers" else int(up[3]))
            name = f"upsamples.{place}.{name[up.end() :]}"
        found[f"{side}.{name}"] = value
    return found


def qwen25_vl(model: Any) -> Tensors:
    """As its authors name it."""
    return {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in model.state_dict().items()
    }


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: value for key, value in tensors.items()}


def tensors(name: str, pipe: Any) -> Tensors:
    """The whole pipeline of type `name` in its authors' layout.

    Flux's transformer keeps diffusers' own, because diffusers reads the authors' at full width only.
    """
    if name in ("qwen", "qwenedit"):
        found = prefixed("vae.", wan_vae(pipe.vae))
        found |= prefixed("text_encoders.qwen25_7b.transformer.", qwen25_vl(pipe.text_encoder))
        return found | prefixed("model.diffusion_model.", pipe.transformer.state_dict())
    autoencoder = vae(pipe.vae)
    if name in ("sd1", "sd2", "sdxl"):
        found = prefixed("model.diffusion_model.", unet(pipe.unet)) | prefixed(
            "first_stage_model.", autoencoder
        )
        if name == "sd1":
            return found | clip(pipe.text_encoder, "cond_stage_model.transformer.")
        if name == "sd2":
            return found | open_clip(pipe.text_encoder, "cond_stage_model.model.")
        found |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        return found | open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    found = prefixed("first_stage_model." if name == "sd3" else "vae.", autoencoder)
    if name == "zimage":
        found |= prefixed("text_encoders.qwen3_4b.transformer.model.", pipe.text_encoder.state_dict())
        return found | prefixed("model.diffusion_model.", zimage(pipe.transformer))
    found |= clip(pipe.text_encoder, "text_encoders.clip_l.transformer.")
    if name == "sd3":
        found |= clip(pipe.text_encoder_2, "text_encoders.clip_g.transformer.")
        found |= prefixed("text_encoders.t5xxl.transformer.", pipe.text_encoder_3.state_dict())
        return found | prefixed("model.diffusion_model.", sd3(pipe.transformer))
    found |= prefixed("text_encoders.t5xxl.transformer.", pipe.text_encoder_2.state_dict())
    return found | prefixed("model.diffusion_model.", pipe.transformer.state_dict())


def single_file(name: str) -> Path:
    """`model.safetensors` with, beside it, the folder `model` that holds its configuration and no weights."""

    def make(folder: Path) -> None:
        folder.mkdir()
        found = tensors(name, tiny.load(name))
        save_file({k: v.contiguous().clone() for k, v in found.items()}, folder / "model.safetensors")
        shutil.copytree(
            tiny.checkpoint(name), folder / "model", ignore=shutil.ignore_patterns("*.safetensors")
        )

    return tiny.cached(f"single-{name}", make) / "model.safetensors"


ORIGINAL = {"flux2": flux2, "sd3": sd3, "wan": wan, "wani2v": wan, "zimage": zimage}
OWN_NAMES = ("chroma", "flux", "kontext", "qwen", "qwenedit")  # in diffusers' naming in every form


def gguf(name: str, form: str = "original") -> Path:
    """The denoiser as GGUF: matrices of suitable width in Q8_0, the rest in F32.

    `form`: original or diffusers, the naming of the keys; prefixed is original with the prefix of ComfyUI's
    checkpoints; published is original without a prefix, with
    what has no rows of 256 reshaped to such, and vectors in BF16.
    """
    import gguf as gguf_format

    def make(path: Path) -> None:
        pipe = tiny.load(name)
        model = getattr(pipe, "unet", None) or pipe.transformer
        original = ORIGINAL.get(name, unet)
        found = model.state_dict() if form == "diffusers" or name in OWN_NAMES else original(model)
        if form == "prefixed" or (form == "original" and name not in (*ORIGINAL, *OWN_NAMES)):
            found = prefixed("model.diffusion_model.", found)
        writer = gguf_format.GGUFWriter(path, "test")
        for key, value in found.items():
            array = value.contiguous().float().numpy()
            if form == "published" and array.ndim == 1:
                kind = gguf_format.GGMLQuantizationType.BF16
                writer.add_tensor(key, gguf_format.quants.quantize(array, kind), raw_dtype=kind)
                continue
            if form == "published" and array.size % 256 == 0 and array.shape[-1] % 256:
                writer.add_array(f"comfy.gguf.orig_shape.{key}", [int(size) for size in array.shape])
                array = array.reshape(-1, 256)
            if array.ndim == 2 and array.shape[-1] % 32 == 0:
                kind = gguf_format.GGMLQuantizationType.Q8_0
                writer.add_tensor(key, gguf_format.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(key, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return tiny.cached(f"gguf-{name}-{form}", make, ".gguf")
