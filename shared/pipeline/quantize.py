"""Quantized weights: 8 bits that compute in 8 bits, 8, 4 and 2 bits that are kept small, and GGUF files

What computes in 8 bits is in shared.pipeline.eight_bits. Why quanto for what is only kept small: of the
libraries tried only it stores int4 and int2 packed on any device, quantizes convolutions by channel (most of
an SD 1.5 UNet is in them), compiles without graph breaks, and keeps layers' classes, so that LoRA, IP-Adapter
and the parallel surgery see what they support. torchao keeps int4 in bytes outside of a few GPUs' kernels and
has no packed int2. The C++ and CUDA extensions that quanto would build at first use are replaced by a few
lines of torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shared.launch.errors import first_line
from shared.launch.file_header import DENOISER
from shared.models import ModelSpec
from shared.parallel.lanes import copy, on_device, side_by_side
from shared.parallel.pipeline import Pipeline, parts_of
from shared.parallel.sharded import plain
from shared.pipeline import eight_bits
from shared.pipeline.single_file_models import as_converted
from shared.pipeline.store import KeptWeights
from shared.pipeline.weights_file import ZERO_COND_T

log = logging.getLogger("host")

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # metadata of tensors that were reshaped to be packed
QTYPES = {"float8_weight": "qfloat8", "int8_weight": "qint8", "int4": "qint4", "int2": "qint2"}
GROUP_SIZES = {"int4": 64, "int2": 32}  # inputs that share a scale


class QuantizeError(ValueError):
    """Weights that cannot be quantized or read; the message says why."""


Packed = dict[str, torch.Tensor]


def quantize_pipeline(
    pipe: Pipeline,
    spec: ModelSpec,
    kind: str,
    device: torch.device,
    kept: KeptWeights | None = None,
    prefix: str = "",
    whole_blocks: bool = True,
    stays: torch.device | None = None,
    in_16_bits: Collection[str] = (),
) -> dict[str, tuple[int, int]]:
    """Quantize the weights of the denoiser and of the text encoders, in place.

    float8 and int8 compute in 8 bits in the denoiser's large layers, where it has any, and leave its others
    as they are; text encoders, which run once a picture, are only kept small. All other kinds quantize
    weights only: activations keep the dtype of the launch. Scales are per output channel for 8 bits
    (symmetric), per group of GROUP_SIZES inputs below.

    Args:
        kind: as --quantize_to, of what the device can compute (eight_bits.for_device).
        device: where layers are quantized, one after the other: a GPU is 20 times as fast as a core.
        kept: where quantized weights are found, or left for the next start.
        prefix: of the components' names there.
        whole_blocks: whether the denoiser's blocks are compiled as a whole, where it is compiled.
        stays: where the models are left; the device by default.
        in_16_bits: layers that stay as they are, by component and name (shared.pipeline.layer_choice).

    Returns:
        bytes before and after per component.

    Raises:
        QuantizeError: a component in which no layer could be quantized.
    """
    sizes = {}
    parts = list(parts_of(pipe, (*spec.denoisers, *spec.text_encoders)).items())
    # What one rank of a machine makes, the others find: each begins with another component.
    first = int(os.environ.get("LOCAL_RANK", "0")) % max(len(parts), 1)
    for name, module in [*parts[first:], *parts[:first]]:
        before, began = tensor_bytes(module), time.monotonic()
        denoises = name in spec.denoisers
        exact = list(spec.kept) if denoises else []
        done, computing = str(eight_bits.weight_only(kind)), dict[str, nn.Linear]()
        if denoises and kind != done:
            computing = eight_bits.computing_layers(module, [*exact, *spec.few_rows], whole_blocks)
            if not computing:
                log.warning("%s: no layer is large enough to gain from computing in %s", name, kind)
        if computing:
            done = kind
            faster = eight_bits.faster(computing, prefix.rstrip(".") or name, in_16_bits)
            count = _compute_in_8_bits(faster, kind, device, kept, prefix + name)
        else:
            count = _keep_small(module, done, exact, device, kept, prefix + name)
            if not count:
                raise QuantizeError(f"--quantize_to={kind}: no layer of {name} could be quantized")
        module.to(stays or device)
        module.requires_grad_(False)
        sizes[name] = (before, tensor_bytes(module))
        log.info(
            "%s: %d layers to %s, %.1f MB before, %.1f MB after, in %.1f s",
            name, count, done, sizes[name][0] / 1e6, sizes[name][1] / 1e6, time.monotonic() - began,
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return sizes


def _compute_in_8_bits(
    layers: dict[str, nn.Linear], kind: str, device: torch.device, kept: KeptWeights | None, name: str
) -> int:
    """Give layers of a module weights that compute in 8 bits; returns how many."""

    def pack(layer: nn.Linear) -> Packed:
        data, scale = eight_bits.quantized(on_device(layer.weight.detach(), device), kind)
        return {"data": data, "scale": scale}

    # Which layers they are depends on what is compiled, and on what is faster.
    which = f"{len(layers)} layers, {zlib.crc32(' '.join(layers).encode()):08x}"
    found = _packed(layers, pack, device, kept, f"{name}, {which}")
    for key, layer in layers.items():
        eight_bits.put(layer, kind, found[f"{key}.weight.data"], found[f"{key}.weight.scale"])
    return len(layers)


def _keep_small(
    module: nn.Module, kind: str, exact: list[str], device: torch.device, kept: KeptWeights | None, name: str
) -> int:
    """Quantize the weights of a module's layers through quanto; returns of how many."""
    import optimum.quanto as quanto

    _without_extensions()
    quanto.quantize(module, weights=getattr(quanto, QTYPES[kind]), exclude=exact)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, quanto.nn.QModuleMixin)}
    packed = {n: m for n, m in layers.items() if m.weight_qtype is not None}
    if not packed:
        return 0
    for layer in packed.values():
        if kind in GROUP_SIZES:
            layer.weight_group_size = _group_size(layer, GROUP_SIZES[kind])

    def pack(layer: Any) -> Packed:
        weight, made = layer.weight, dict[str, torch.Tensor]()
        layer.weight = nn.Parameter(on_device(weight.detach(), device), requires_grad=False)
        layer.qweight.save_to_state_dict(made, "", False)
        layer.weight = weight
        return made

    _put(packed, _packed(packed, pack, device, kept, name))
    return len(layers)


def _packed(
    layers: Mapping[str, Any],
    pack: Callable[[Any], Packed],
    device: torch.device,
    kept: KeptWeights | None,
    name: str,
) -> Packed:
    """The tensors of the layers' quantized weights, in host memory, by the layer's name and theirs in it."""
    alike: dict[Any, Packed] = {}

    def specs_of(layer: Any) -> Packed:
        """Those of one layer tell the shapes of all that are like it."""
        weight = layer.weight
        key = (type(layer), weight.shape, weight.dtype, getattr(layer, "weight_group_size", None))
        if key not in alike:
            alike[key] = {part: tensor.to("meta") for part, tensor in pack(layer).items()}
        return alike[key]

    specs = {
        f"{key}.weight.{part}": spec
        for key, layer in layers.items()
        for part, spec in specs_of(layer).items()
    }

    def fill(places: Packed) -> None:
        def one(item: tuple[str, Any]) -> None:
            for part, tensor in pack(item[1]).items():
                copy(places[f"{item[0]}.weight.{part}"], tensor)

        side_by_side(one, layers.items(), device)

    found = kept.tensors(name, specs, fill) if kept is not None else None
    if found is None:
        found = {key: torch.empty_like(spec, device="cpu") for key, spec in specs.items()}
        fill(found)
    return found


def _put(layers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Give layers their packed weights, without a copy.

    As quanto's layers load them, but for `optimize`, which unpacks and packs anew.
    """
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor

    for name, layer in layers.items():
        here = f"{name}.weight."
        parts = ("_data", "_scale") if layer.weight_qtype.bits == 8 else ("_data._data", "_scale", "_shift")
        own = {here + part: tensors[here + part] for part in parts}
        shape = {"size": layer.weight.size(), "stride": layer.weight.stride()}
        how = {"qtype": layer.weight_qtype, "axis": 0, "missing_keys": []}
        if layer.weight_qtype.bits == 8:
            weight = WeightQBytesTensor.load_from_state_dict(own, here, activation_qtype=None, **how, **shape)
        else:
            group = layer.weight_group_size
            weight = WeightQBitsTensor.load_from_state_dict(own, here, group_size=group, **how, **shape)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, packed tensors counted as they are stored."""
    tensors = {id(t): t for whole in (*module.parameters(), *module.buffers()) for t in plain(whole)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def load_gguf(path: str, spec: ModelSpec, cls: Any, config: Path, dtype: torch.dtype) -> Any:
    """The denoiser from a GGUF file; its linear layers stay quantized and are unpacked when they are used.

    Names may have the prefix `model.diffusion_model.` or not. What no linear layer can hold packed is
    unpacked here: convolutions, norms, and rows that begin amid a block.

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
    tensors = _read_gguf(path, dtype)
    marks = [name for name in tensors if name.removeprefix(DENOISER).startswith("__")]  # are no weights
    for name in marks:
        del tensors[name]
    further = {"zero_cond_t": True} if any(name.endswith(ZERO_COND_T) for name in marks) else {}
    try:
        model = cls.from_single_file(
            as_converted(tensors, spec),
            config=str(config),
            subfolder=spec.denoiser,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            local_files_only=True,
            **further,
        )
    except (OSError, KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise QuantizeError(
            f"--gguf_model: {path!r} does not fit type {spec.name}: {first_line(error)}"
        ) from None
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise QuantizeError(f"--gguf_model: {path!r} lacks {len(missing)} tensors, such as {missing[0]!r}")
    _unpack_the_rest(model, dtype)
    if wrong := _misfit(model, cls, config, spec):
        raise QuantizeError(f"--gguf_model: {path!r} does not fit type {spec.name}: {wrong}")
    log.info("GGUF %s: %.1f MB", path, tensor_bytes(model) / 1e6)
    return model.eval()


def _read_gguf(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in the shapes that they had before they were packed. Raises QuantizeError."""
    import gguf
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    try:
        fields = gguf.GGUFReader(path).fields
        shapes = {
            name.removeprefix(ORIGINAL_SHAPE): [int(field.parts[i][0]) for i in field.data]
            for name, field in fields.items()
            if name.startswith(ORIGINAL_SHAPE)
        }
        tensors = load_gguf_checkpoint(path)
    except ValueError as error:
        if "quantization type" not in str(error):
            raise QuantizeError(f"--gguf_model: {path!r} cannot be read: it is truncated or broken") from None
        raise QuantizeError(f"--gguf_model: {path!r}: {first_line(error)}") from None
    except (OSError, IndexError, KeyError, OverflowError, UnicodeError):
        raise QuantizeError(f"--gguf_model: {path!r} cannot be read: it is truncated or broken") from None
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if isinstance(tensor, GGUFParameter):
            block, size = gguf.GGML_QUANT_SIZES[tensor.quant_type]
            if len(shape) == 2 and shape[1] % block == 0:
                packed = tensor.as_tensor().reshape(shape[0], shape[1] // block * size)
                tensors[name] = GGUFParameter(packed, quant_type=tensor.quant_type)
                continue
            tensor = dequantize_gguf_tensor(tensor).to(dtype)
        tensors[name] = tensor.reshape(shape)
    return tensors


def _unpack_the_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Packed tensors outside of linear layers' weights would be taken for numbers."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, GGUFParameter) and not (
                isinstance(module, GGUFLinear) and name == "weight"
            ):
                plain = dequantize_gguf_tensor(parameter).to(dtype)
                module.register_parameter(name, nn.Parameter(plain, requires_grad=False))
            elif parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def _misfit(model: nn.Module, cls: Any, config: Path, spec: ModelSpec) -> str | None:
    """The first tensor that the model's first call would fail on."""
    from accelerate import init_empty_weights
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    with init_empty_weights():
        whole = cls.from_config(cls.load_config(config, subfolder=spec.denoiser, local_files_only=True))
    tried = set()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        shape = list(getattr(parameter, "quant_shape", parameter.shape))
        if isinstance(parameter, GGUFParameter) and parameter.quant_type not in tried:
            tried.add(parameter.quant_type)
            shape = list(dequantize_gguf_tensor(parameter).shape)
        if name in expected and shape != list(expected[name].shape):
            return f"{name} has the shape {shape}, it must be {list(expected[name].shape)}"
    return None


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
    # torch 2.13's own product of bf16 and packed int8 crashes on CPUs.
    products: Any = importlib.import_module("optimum.quanto.library.qbytes_mm")
    products.qbytes_int8pack_mm = products.qbytes_mm
