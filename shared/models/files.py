"""Single files of weights, recognised by the names of their tensors."""

from __future__ import annotations

from dataclasses import dataclass


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
    "transformer": ("img_in.weight", "x_embedder.weight", "x_embedder.proj.weight", "pos_embed.proj.weight"),
}
"""The denoiser's first weights, in its authors' and in diffusers' naming: [.., input channels, ..]."""

VAE_PREFIXES = ("first_stage_model.", "vae.")
