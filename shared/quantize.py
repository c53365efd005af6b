"""Quantized weights: float8, int8, int4 and int2 through optimum-quanto, and GGUF files.

Why quanto: of the libraries tried it alone stores int4 and int2 packed on any device, quantizes convolutions
(most of an SD 1.5 UNet is in them), compiles without graph breaks, and keeps the layers' classes
(`nn.Linear`, `nn.Conv2d`), so that LoRA, IP-Adapter and the parallel surgery see what they know. torchao
keeps int4 in bytes outside of a few GPUs' kernels, has no packed int2 and leaves convolutions alone. The C++
and CUDA extensions that quanto would build at first use are replaced by a few lines of torch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shared.config import first_line
from shared.models import ModelSpec

log = logging.getLogger("host")

QTYPES = {"float8": "qfloat8", "int8": "qint8", "int4": "qint4", "int2": "qint2"}
GROUP_SIZES = {"int4": 64, "int2": 32}  # inputs that share a scale
# A few percent of the weights, at the ends of the model, where rounding shows most.
KEPT = ("conv_in", "conv_out", "proj_out", "proj_out.*", "x_embedder", "context_embedder", "norm_out*",
        "time_*", "add_embedding*", "class_embedding*", "pos_embed*", "caption_projection*", "adaln_single*",
        "text_embedder*")  # fmt: skip


class QuantizeError(ValueError):
    """Weights that cannot be quantized or read; the sentence says why."""


def quantize_pipeline(
    pipe: Any, spec: ModelSpec, kind: str, device: torch.device
) -> dict[str, tuple[int, int]]:
    """Quantize the weights of the denoiser and of the text encoders, in place.

    Weights only: activations keep the dtype of the launch. Scales are per output channel for 8 bits
    (symmetric), per group of GROUP_SIZES inputs below.

    Args:
        kind: float8 (e4m3), int8, int4 or int2.
        device: where each component is quantized, and left.

    Returns:
        bytes before and after per component.

    Raises:
        QuantizeError: a component in which no layer could be quantized.
    """
    import optimum.quanto as quanto

    _without_extensions()
    sizes = {}
    for name in (spec.denoiser, *spec.text_encoders):
        module = getattr(pipe, name, None)
        if module is None:
            continue
        module.to(device)
        before = tensor_bytes(module)
        quanto.quantize(module, weights=getattr(quanto, QTYPES[kind]), exclude=list(KEPT))
        layers = [m for m in module.modules() if isinstance(m, quanto.nn.QModuleMixin)]
        for layer in layers:
            if kind in GROUP_SIZES:
                layer.weight_group_size = _group_size(layer, GROUP_SIZES[kind])
        quanto.freeze(module)
        if not any(layer.frozen for layer in layers):
            raise QuantizeError(f"--quantize_to={kind}: no layer of {name} could be quantized")
        module.requires_grad_(False)
        sizes[name] = (before, tensor_bytes(module))
        log.info(
            "%s: %d layers to %s, %.1f MB before, %.1f MB after",
            name, len(layers), kind, sizes[name][0] / 1e6, sizes[name][1] / 1e6,
        )  # fmt: skip
    return sizes


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, packed tensors counted as they are stored."""
    seen: set[int] = set()
    total = 0
    stack: list[Any] = [*module.parameters(), *module.buffers()]
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not nn.Parameter:
            stack += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def load_gguf(path: str, spec: ModelSpec, cls: Any, config: Path, dtype: torch.dtype) -> Any:
    """The denoiser from a GGUF file; its linear layers stay quantized and are unpacked as they are used.

    Args:
        cls: the denoiser's class.
        config: a diffusers folder with the denoiser's configuration in a folder of its name.

    Raises:
        QuantizeError: a broken file, or one for another model.
    """
    from diffusers import GGUFQuantizationConfig

    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise QuantizeError(f"--gguf_model: {path!r} cannot be read: {error.strerror or error}") from None
    if magic != b"GGUF":
        raise QuantizeError(f"--gguf_model: {path!r} is not a GGUF file")
    try:
        model = cls.from_single_file(
            str(path),
            config=str(config),
            subfolder=spec.denoiser,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            local_files_only=True,
        )
    except OSError:  # all that diffusers says of a reader that failed
        raise QuantizeError(f"--gguf_model: {path!r} cannot be read: it is cut off or broken") from None
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
        raise QuantizeError(
            f"--gguf_model: {path!r} does not fit type {spec.name}: {first_line(error)}"
        ) from None
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise QuantizeError(f"--gguf_model: {path!r} lacks {len(missing)} tensors, such as {missing[0]!r}")
    log.info("GGUF %s: %.1f MB", path, tensor_bytes(model) / 1e6)
    return model.eval()


def _group_size(layer: Any, wanted: int) -> int | None:
    inputs = layer.weight.numel() // layer.weight.shape[0]
    return wanted if inputs > wanted and inputs % wanted == 0 else None


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, ...] of 8 // bits values each -> uint8 [n * 8 // bits, ...], lowest bits first."""
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)])


def _without_extensions() -> None:
    """Put `_unpack` in the place of quanto's extensions, and hide its CUDA kernels: both need a build."""
    from optimum.quanto.library.extensions import extension

    for name in ("quanto_cpp", "quanto_cuda", "quanto_hip"):
        if extension.is_extension_available(name):
            extension.get_extension(name)._lib = SimpleNamespace(unpack=_unpack)
    for name in ("quanto_cuda", "quanto_hip"):
        extension._extensions.pop(name, None)
