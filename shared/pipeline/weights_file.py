"""The tensors of a single `.safetensors` file, with their scales applied."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.launch.file_header import SingleFileError

log = logging.getLogger("host")

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
