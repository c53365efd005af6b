"""Tiny FLUX.2, Wan and LTX-2 as single files in their authors' layout, and headers of the published sizes.

name, folder = KINDS["a14b"]                    # the type, and a function that gives the diffusers folder
file = single("a14b", tmp_path)                 # the denoiser's file, and beside it what it lacks
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from shared.launch.file_header import CONFIGS, DENOISER
from tests import tiny, tiny_flux2, tiny_wan
from tests.tiny_original import Tensors, flux2, prefixed, wan, wan_vae

KINDS: dict[str, tuple[str, Callable[[], Path]]] = {
    "klein": ("flux2", lambda: tiny.checkpoint("flux2")),
    "distilled": ("flux2", lambda: tiny.cached(
        "flux2-distilled", lambda path: tiny_flux2.make_flux2(distilled=True).save_pretrained(path)
    )),
    "dev": ("flux2", lambda: tiny.cached(
        "flux2-dev", lambda path: tiny_flux2.make_dev().save_pretrained(path)
    )),
    "wan": ("wan", lambda: tiny.checkpoint("wan")),
    "wani2v": ("wani2v", lambda: tiny.checkpoint("wani2v")),
    "a14b": ("wan", lambda: tiny_wan.wan22("a14b")),
    "a14b_i2v": ("wani2v", lambda: tiny_wan.wan22("a14b_i2v")),
    "ti2v": ("wan", lambda: tiny_wan.wan22("ti2v")),
    "ti2v_i2v": ("wani2v", lambda: tiny_wan.wan22("ti2v")),
    "ltx2": ("ltx2", lambda: tiny.checkpoint("ltx2")),
}  # fmt: skip
"""The type, and the diffusers folder."""

LTX2 = {
    "audio_proj_in": "audio_patchify_proj", "audio_time_embed.": "audio_adaln_single.",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "proj_in": "patchify_proj", "time_embed.": "adaln_single.", "norm_q": "q_norm", "norm_k": "k_norm",
}  # fmt: skip
STATISTICS = {"latents_mean": "per_channel_statistics.mean-of-means",
              "latents_std": "per_channel_statistics.std-of-means"}  # fmt: skip
VOCODER = {
    "conv_in.": "conv_pre.",
    "upsamplers.": "ups.",
    "resnets.": "resblocks.",
    "conv_out.": "conv_post.",
}
CONNECTORS = {
    "text_proj_in.": "text_embedding_projection.aggregate_embed.", "norm_q": "q_norm", "norm_k": "k_norm",
    "transformer_blocks.": "transformer_1d_blocks.",
    "video_connector.": DENOISER + "video_embeddings_connector.",
    "audio_connector.": DENOISER + "audio_embeddings_connector.",
}  # fmt: skip


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    found = {}
    for key, value in tensors.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        found[key] = value
    return found


def ltx2(model: Any) -> Tensors:
    return renamed(model.state_dict(), LTX2)


def ltx2_vae(model: Any) -> Tensors:
    """Blocks and what changes the size after them (before them, in the decoder) are one list."""
    names = {f"down_blocks.{i}.downsamplers.0.": f"down_blocks.{2 * i + 1}:" for i in range(4)}
    names |= {f"down_blocks.{i}.": f"down_blocks.{2 * i}." for i in range(3, 0, -1)}
    names |= {"encoder.mid_block.": "encoder.down_blocks.8.", "decoder.mid_block.": "decoder.up_blocks.0:"}
    names |= {f"up_blocks.{i}.upsamplers.0.": f"up_blocks.{2 * i + 1}:" for i in range(3)}
    names |= {f"up_blocks.{i}.": f"up_blocks.{2 * i + 2}:" for i in range(2, -1, -1)}
    found = renamed(model.state_dict(), names | {":": ".", "resnets": "res_blocks"} | STATISTICS)
    return found | {"per_channel_statistics.mean-of-stds": torch.zeros(1)}


ORIGINAL: dict[str, Callable[[Any], Tensors]] = {"flux2": flux2, "wan": wan, "wani2v": wan, "ltx2": ltx2}


def whole(name: str, pipe: Any) -> Tensors:
    """A checkpoint of type wan or ltx2 with its other models: all that diffusers or this project converts."""
    found = prefixed(DENOISER, ORIGINAL[name](pipe.transformer))
    if name == "wan":
        encoder = pipe.text_encoder.state_dict()
        del encoder["encoder.embed_tokens.weight"]  # the same as shared.weight
        found |= prefixed("text_encoders.umt5xxl.transformer.", encoder)
        return found | prefixed("first_stage_model.", wan_vae(pipe.vae))
    found |= prefixed("vae.", ltx2_vae(pipe.vae))
    found |= prefixed("audio_vae.", renamed(pipe.audio_vae.state_dict(), STATISTICS))
    found |= prefixed("vocoder.", renamed(pipe.vocoder.state_dict(), VOCODER))
    return found | renamed(pipe.connectors.state_dict(), CONNECTORS)


def plain(kind: str) -> Any:
    """diffusers' own pipeline of this kind."""
    name, folder = KINDS[kind]
    cls = diffusers.WanImageToVideoPipeline if name == "wani2v" else diffusers.DiffusionPipeline
    # dev's tokenizer is one in place of the processor around it.
    parts = {} if kind != "dev" else {"tokenizer": tiny_flux2.make_dev().tokenizer}
    pipe = cls.from_pretrained(folder(), local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(tensors: Tensors, file: Path) -> Path:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)
    return file


def single(kind: str, path: Path, prefix: str = "", stem: str = "a", two: bool = False) -> Path:
    """The denoiser of a kind in `<stem>.safetensors`, and all else of its diffusers folder beside it.

    Args:
        two: the second denoiser in a file too, whose name has `low` for `high`; else in the folder.
    """
    name, folder = KINDS[kind]
    pipe = plain(kind)
    gone = ["transformer", "transformer_2"] if two else ["transformer"]
    beside = path / stem
    shutil.copytree(folder(), beside)
    for part in gone:
        for file in (beside / part).glob("*.safetensors"):
            file.unlink()
        other = stem if part == "transformer" else stem.replace("high", "low")
        tensors = ORIGINAL[name](getattr(pipe, part))
        save(prefixed(prefix, tensors), path / f"{other}.safetensors")
    return path / f"{stem}.safetensors"


def published(name: str, config: str, file: Path) -> Path:
    """A file with the header of a published denoiser, in its authors' layout and bf16, that takes no room."""
    settings = json.loads((CONFIGS / config / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = getattr(diffusers, settings["_class_name"]).from_config(settings)
    place, entries = 0, {}
    for key, tensor in ORIGINAL[name](model).items():
        size = 2 * tensor.numel()
        entries[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + place)
    return file
