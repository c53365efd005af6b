"""Single files of weights, recognised by the names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class FileForm:
    """A form of a kind of single file, recognised by shapes, names, and words of the file's own name.

    The first form of a kind that a file fits counts. `types` load it, or none, and `hint` says why.
    """

    title: str
    inputs: tuple[int, ...]  # the shape of the denoiser's first weight, of INPUTS
    config: str = ""  # folder under configs/ with what is not as in that of the kind
    types: tuple[str, ...] = ()
    has: tuple[str, ...] = ()  # one of the denoiser's names begins with one of them
    words: tuple[str, ...] = ()  # one of them is in the file's name, where other forms have the same tensors
    second: str = ""  # the component of a second denoiser, which has a file of its own
    pair: tuple[str, ...] = ()  # the word in the name of the first one's file, and that of the second's
    index: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Entries of model_index.json that differ from those in `config`."""
    hint: str = ""


@dataclass(frozen=True)
class FilePart:
    """A component, beside the denoiser, encoders and VAE, that single files of a type may hold."""

    prefixes: tuple[str, ...]  # of its tensors' names; it is there if names begin with the first one
    names: Mapping[str, str]  # parts of the names in the file -> in diffusers, replaced in this order


@dataclass(frozen=True)
class FileKind:
    """A kind of single file, recognised by its tensors' names; the first match in FILE_KINDS counts.

    `name` is the `single_file_config` of the types that load it, or "" where none does.
    """

    title: str
    name: str = ""
    marks: tuple[str, ...] = ()  # names begin with it, after the denoiser's usual prefix or without
    parts: tuple[str, ...] = ()  # are in a name
    only: tuple[str, ...] = ()  # all names begin with one of them
    forms: tuple[FileForm, ...] = ()  # where its files differ in more than overrides can say
    hint: str = ""


PARTS = (
    FileKind("a LoRA", parts=(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w1"),
             hint="--lora takes it"),
    FileKind("a ControlNet", marks=("control_model.", "controlnet_cond_embedding.", "controlnet_x_embedder.",
             "controlnet_blocks.", "controlnet_down_blocks.", "control_all_x_embedder."),
             hint="--control_net takes it"),
    FileKind("an IP-Adapter", marks=("image_proj.", "ip_adapter."), hint="--ip_adapter takes it"),
    FileKind("a motion module", parts=("motion_modules.",), hint="--motion_module takes it, with --type=ad"),
    FileKind("a VAE", only=("encoder.conv", "encoder.down", "encoder.mid", "encoder.norm", "decoder.",
             "quant_conv.", "post_quant_conv.", "first_stage_model.", "vae."), hint="--vae takes it"),
    FileKind("a text encoder", only=("text_model.", "text_projection", "logit_scale", "shared.", "encoder.",
             "embeddings.", "final_layer_norm.", "scaled_fp8", "spiece_model", "text_encoders.",
             "cond_stage_model.", "conditioner."), hint="it is a part of a checkpoint"),
)  # fmt: skip
"""Files that are no checkpoint of any type; they are tried before the checkpoints."""

INPUTS: dict[str, tuple[str, ...]] = {
    "unet": ("input_blocks.0.0.weight", "conv_in.weight"),
    "transformer": (
        "img_in.weight",
        "x_embedder.weight",
        "x_embedder.proj.weight",
        "pos_embed.proj.weight",
        "patch_embedding.weight",
        "patchify_proj.weight",
        "proj_in.weight",
    ),
}
"""The denoiser's first weights, in its authors' and in diffusers' naming: [.., input channels, ..]."""

VAE_PREFIXES = ("first_stage_model.", "vae.")
