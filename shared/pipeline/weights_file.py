"""The header of a model's `.safetensors` file, and its tensors with their scales applied.

Names and shapes come from the file's header, so that another kind of file is refused before weights are read.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.models import FILE_KINDS, INPUTS, MODELS, FileKind, ModelSpec

log = logging.getLogger("host")

DENOISER = "model.diffusion_model."
PREFIXES = (DENOISER, "unet.", "transformer.", "")  # that the denoiser's names have in single files
ZERO_COND_T = "__index_timestep_zero__"  # a tensor that marks Qwen-Image-Edit-2511
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
UNUSED = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # of computing in 8 bits, and marks
FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_rowwise",
    "int8_tensorwise",
)
PACKED = (".weight_scale_2", ".absmax", ".quant_map", ".nested_absmax", ".zero_point", ".weight_zero_point",
          ".qweight", ".qzeros", ".wscales", ".scale_shift_zero")  # fmt: skip
BLOCK = 128  # of block scales whose last block is not full


class SingleFileError(ValueError):
    """A single file that cannot be loaded; the message says why."""


@dataclass(frozen=True)
class Header:
    """Names and shapes of a file's tensors, and its metadata."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def has(self, *prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in self.shapes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the denoiser, with any prefix."""
        return next((self.shapes[p + name] for p in PREFIXES if p + name in self.shapes), None)


def read_header(file: Path, flag: str = "--checkpoint") -> Header:
    """The header of a `.safetensors` file. Raises SingleFileError."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return Header(file, shapes, opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise SingleFileError(f"{flag} {str(file)!r} cannot be read: {error}") from None


def read_weights(file: Path, dtype: torch.dtype, flag: str = "--checkpoint") -> dict[str, torch.Tensor]:
    """All tensors of a file, in its names; those with a scale are multiplied by it and have `dtype`.

    Raises:
        SingleFileError: a broken file, a scale that fits no tensor, weights packed in an unsupported way.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SingleFileError(f"{flag} {str(file)!r} cannot be read: {error}") from None
    try:
        return apply_scales(tensors, dtype)
    except ValueError as error:
        raise SingleFileError(f"{flag} {str(file)!r}: {error}") from None


def scale_names(names: list[str]) -> list[str]:
    """The names that are scales of others, or marks of packed weights."""
    return [name for name in names if name.endswith((*SCALES, *PACKED, *UNUSED)) or ".quant_state." in name]


def apply_scales(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors without scales and marks, what they scale multiplied and in `dtype`.

    Raises:
        ValueError: a scale without its weight, of another shape, or not a number; packed weights.
    """
    packed = next((n for n in tensors if n.endswith(PACKED) or ".quant_state." in n), None)
    if packed:
        raise ValueError(f"its weights are packed in a way that is not supported (key {packed!r})")
    for name, value in tensors.items():
        if name.endswith(".comfy_quant"):
            form = json.loads(bytes(value.view(torch.uint8).tolist()).decode() or "{}").get("format")
            if form not in FORMATS:
                raise ValueError(f"its weights are quantized as {form!r}; supported: {', '.join(FORMATS)}")
    found = dict(tensors)
    count = 0
    for name in tensors:
        suffix = next((s for s in SCALES if name.endswith(s)), None)
        if suffix is None:
            if name.endswith(UNUSED):
                del found[name]
            continue
        target = name.removesuffix(suffix) + ".weight"
        scale = found.pop(name)
        if target not in tensors:
            raise ValueError(f"the scale {name!r} belongs to no weight")
        found[target] = scaled(target, tensors[target], scale).to(dtype)
        count += 1
    for name, value in found.items():
        if value.dtype in (torch.int8, torch.uint8) and value.numel() > 1 and name.endswith(".weight"):
            raise ValueError(f"{name!r} is of {value.dtype} and has no scale")
    if count:
        log.info("%d weights are multiplied by their scales", count)
    return found


def scaled(name: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight x scale in fp32: one number, one for each row, or one for each block.

    Raises:
        ValueError: a scale of another shape, or not a number.
    """
    factor = scale.float()
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(f"the scale of {name!r} is not a number")
    if factor.numel() == 1:
        return weight.float() * factor.reshape(())
    if factor.ndim == 1 and len(factor) == weight.shape[0]:
        factor = factor.reshape(-1, *[1] * (weight.ndim - 1))
    if factor.ndim != weight.ndim:
        raise ValueError(f"{name!r} of shape {list(weight.shape)} has a scale of shape {list(scale.shape)}")
    for axis, (size, blocks) in enumerate(zip(weight.shape, factor.shape, strict=True)):
        width = BLOCK if blocks == math.ceil(size / BLOCK) else size // blocks if size % blocks == 0 else 0
        if not width:
            raise ValueError(
                f"{name!r} of shape {list(weight.shape)} has a scale of shape {list(scale.shape)}"
            )
        if blocks > 1:
            factor = factor.repeat_interleave(width, axis).narrow(axis, 0, size)
    return weight.float() * factor


def family(header: Header) -> FileKind | None:
    """The first of `models.FILE_KINDS` that the file's tensors fit."""
    names = header.shapes
    for kind in FILE_KINDS:
        marks = tuple(prefix + mark for mark in kind.marks for prefix in PREFIXES)
        if (
            (marks and header.has(*marks))
            or any(part in name for part in kind.parts for name in names)
            or (kind.only and names and all(name.startswith(kind.only) for name in names))
        ):
            return kind
    projection = header.shape("input_blocks.1.1.proj_in.weight")
    projection = projection or header.shape("down_blocks.0.attentions.0.proj_in.weight")
    if projection is None:
        return None
    wanted = "sd2" if len(projection) == 2 else "sd1"  # a linear layer there, a convolution here
    return next(kind for kind in FILE_KINDS if kind.name == wanted)


def check_kind(header: Header, spec: ModelSpec) -> None:
    """Refuse a file that is not a checkpoint of this type, and say what it is.

    Raises:
        SingleFileError: the file is something else; the message says what, and which type or flag loads it.
    """
    said = f"--checkpoint {str(header.file)!r}"
    if header.has("model_ema.") and not header.has(DENOISER):
        raise SingleFileError(
            f"{said} holds only averaged weights (EMA, keys model_ema.*), which cannot be loaded"
        )
    kind = family(header)
    if kind is None:
        first = ", ".join(repr(name) for name in sorted(header.shapes)[:3]) or "none"
        raise SingleFileError(f"{said} is not a supported model; its tensors are {first} ...")
    if kind.name == "sdxl" and _is_refiner(header):
        kind = next(k for k in FILE_KINDS if "refiner" in k.title)
    if kind.name != spec.single_file_config:
        types = [s.name for s in MODELS.values() if kind.name and s.single_file_config == kind.name]
        hint = f"--type={' or '.join(types)} loads it" if types else kind.hint
        raise SingleFileError(f"{said} is {kind.title}, not of type {spec.name}: {hint}")


def _is_refiner(header: Header) -> bool:
    """Its time embedding is 384 x 4 wide; the base model's is 320 x 4."""
    time = header.shape("time_embed.0.weight") or header.shape("time_embedding.linear_1.weight")
    return time == (1536, 384)


def input_channels(header: Header, spec: ModelSpec) -> int | None:
    """How many channels the denoiser takes."""
    shapes = (header.shape(name) for name in INPUTS[spec.denoiser])
    inputs = next((shape[1] for shape in shapes if shape is not None and len(shape) > 1), None)
    return None if inputs is None else inputs // spec.single_file_inputs


def other_inputs(spec: ModelSpec, given: int, expected: int) -> str:
    """What a denoiser with another number of input channels is."""
    words = {
        "unet": {2: "InstructPix2Pix"}, "transformer": {2: "FLUX.1 Canny or Depth"},
    }[spec.denoiser]  # fmt: skip
    kinds = {expected * times: word for times, word in words.items()}
    if spec.denoiser == "unet":
        kinds |= {
            expected + 5: "an inpainting model",
            expected + 1: "a depth model",
            expected + 3: "an upscaler",
        }
    what = kinds.get(given, "another model")
    return f"is {what}: its denoiser takes {given} channels, that of type {spec.name} takes {expected}"
