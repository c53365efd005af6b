"""The models of a launch without memory for their weights: from configurations and headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.launch import file_header
from shared.launch.file_header import Header, config_folder, read_header, read_index
from shared.launch.flags import HostConfig
from shared.parallel.sharded import blocks_of
from shared.pipeline.eight_bits import computing_layers, faster, weight_only
from shared.pipeline.quantize import GROUP_SIZES
from shared.pipeline.single_file import listed_parts, missing_parts, overrides
from shared.pipeline.single_file_models import class_of


@dataclass(frozen=True)
class Stored:
    """How a model's parameters are stored: in this dtype, layers but those `kept` quantized to `kind`."""

    dtype: torch.dtype
    kind: str | None = None
    kept: tuple[str, ...] = ()
    whole_blocks: bool = True
    """Whether blocks are compiled as a whole, where they are compiled."""
    few_rows: tuple[str, ...] = ()
    """More layers that stay as they are where the kind computes in 8 bits."""
    compiled: bool = False
    component: str = ""
    in_16_bits: frozenset[str] = frozenset()
    """Layers that stay as they are too, by component and name."""


@dataclass
class Unloaded:
    """A model of a pipeline: its modules on meta, and the bytes of tensors of which only a size is known."""

    modules: list[nn.Module] = field(default_factory=list)
    more: int = 0
    packed: int | None = None
    """Bytes of a GGUF file's tensors, in place of all parameters."""
    _found: dict[Stored, tuple[list[int], list[int]]] = field(default_factory=dict, init=False, repr=False)

    def nbytes(self, how: Stored) -> int:
        """Of all parameters."""
        if self.packed is not None:
            return self.packed
        return self.more + sum(self._sizes(how)[0])

    def share(self, ranks: int, how: Stored) -> float:
        """The part of the bytes that a rank keeps, where blocks are divided over so many ranks."""
        wholes, blocks = self._sizes(how)
        return 1 - sum(blocks) * (1 - 1 / ranks) / (1 + sum(wholes))

    def largest_block(self, how: Stored) -> int:
        """Bytes of the largest part that is gathered, or moved, as one."""
        return max(self._sizes(how)[1], default=0)

    def _sizes(self, how: Stored) -> tuple[list[int], list[int]]:
        """Bytes of each module, and of each block; found once, as a plan asks for many launches."""
        if how not in self._found:
            wholes, blocks = list[int](), list[int]()
            for module in self.modules:
                sizes = stored(module, how)
                wholes.append(sum(sizes.values()))
                blocks += _block_sizes(module, how, sizes)
            self._found[how] = wholes, blocks
        return self._found[how]


def _block_sizes(module: nn.Module, how: Stored, sizes: dict[int, int]) -> list[int]:
    """By block, of any number of ranks: that changes only where a block's parts end."""
    splits = not (how.compiled and how.whole_blocks)
    blocks = blocks_of(module, 2, lambda parameter: sizes[id(parameter)], splits)
    return [sum(sizes[id(piece.tensor)] for piece in block.pieces) for block in blocks]


def stored(module: nn.Module, how: Stored) -> dict[int, int]:
    """Bytes of each parameter as it is loaded, by its id."""
    exact = _full_precision(module, how.dtype)
    sizes = {}
    for name, parameter in module.named_parameters():
        size = 4 if any(part in exact for part in name.split(".")) else how.dtype.itemsize
        sizes[id(parameter)] = parameter.numel() * size
    kind = weight_only(how.kind)
    stay = (*how.kept, *how.few_rows)
    if kind != how.kind and (computing := computing_layers(module, stay, how.whole_blocks)):
        for layer in faster(computing, how.component, how.in_16_bits).values():
            sizes[id(layer.weight)] = layer.weight.numel() + 4 * layer.out_features
        return sizes
    for name, layer in module.named_modules() if kind else ():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not any(fnmatch(name, one) for one in how.kept):
            each = sizes[id(layer.weight)] // layer.weight.numel()
            sizes[id(layer.weight)] = _quantized(layer.weight, str(kind), each)
    return sizes


def _quantized(weight: torch.Tensor, kind: str, size: int) -> int:
    outputs, inputs = weight.shape[0], weight[0].numel()
    if kind not in GROUP_SIZES:
        return weight.numel() + outputs * size
    group = GROUP_SIZES[kind]
    groups = weight.numel() // group if inputs > group and inputs % group == 0 else outputs
    return weight.numel() * (4 if kind == "int4" else 2) // 8 + 2 * groups * size


def _full_precision(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """The names that libraries leave in fp32 when they load to another dtype."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return set(getattr(module, "_keep_in_fp32_modules", None) or ())
    usual = module._keep_in_fp32_modules if dtype == torch.float16 else ()
    return {*(usual or ()), *(module._keep_in_fp32_modules_strict or ())}


def unloaded_models(
    config: HostConfig, dtype: torch.dtype, divided: str | None = None
) -> dict[str, Unloaded]:
    """By component, as shared.pipeline.sharding.models_of names them.

    Args:
        divided: the flag that divides weights, where one does (shared.launch.backend.Needs.divides_weights).

    Raises:
        OSError, ValueError, KeyError, AttributeError: a configuration that cannot be read; loading says it.
    """
    spec, checkpoint = config.spec, Path(config.checkpoint)
    header = read_header(checkpoint) if checkpoint.is_file() else None
    listed = listed_parts(read_index(config.checkpoint) or {})
    absent: dict[str, Any] = {}
    if header is not None:
        missing_parts(spec, header, listed, absent)
    found: dict[str, Unloaded] = {}
    for name, (library, class_name) in listed.items():
        if name in absent:
            continue
        place = config_folder(spec, checkpoint, name) if header is not None else checkpoint
        own = overrides(spec, header) if header is not None and name in spec.denoisers else {}
        place /= name
        if name == "vae" and config.vae and Path(config.vae).is_dir():
            inside = Path(config.vae) / "vae"
            place = inside if (inside / "config.json").is_file() else Path(config.vae)
        model = _on_meta(library, class_name, place, own)
        if model is not None:
            found[name] = Unloaded([model])
        if model is not None and header is not None and class_name.startswith("T5"):
            # Loaded from tensors, T5 holds its embedding twice.
            each = [p.numel() for _, p in model.named_parameters(remove_duplicate=False)]
            twice = sum(each) - sum(p.numel() for p in model.parameters())
            found[name].more = twice * dtype.itemsize
    if config.gguf_model:
        found[spec.denoiser].packed = _gguf_bytes(config.gguf_model, found[spec.denoiser].modules[0], dtype)
    if config.refiner:
        place = Path(config.refiner)
        configured = place.with_suffix("") if place.is_file() else place
        if not (configured / "model_index.json").is_file():
            configured = file_header.CONFIGS / (spec.refiner_config or "")
        class_name = _read(configured / "model_index.json")[spec.denoiser][1]
        model = _on_meta("diffusers", class_name, configured / spec.denoiser, {})
        found["refiner"] = Unloaded([model] if model is not None else [])
    _adapters(config, found, dtype, divided)
    return found


def _adapters(
    config: HostConfig, found: dict[str, Unloaded], dtype: torch.dtype, divided: str | None
) -> None:
    spec = config.spec
    denoiser = found[spec.denoiser]
    motion = config.motion_adapter or config.motion_module
    if motion and Path(motion).is_dir():
        model = _on_meta("diffusers", "MotionAdapter", Path(motion), {})
        assert model is not None
        found["motion_adapter"] = Unloaded([model])
        if type(denoiser.modules[0]).__name__ == "UNet2DConditionModel":
            denoiser.modules.append(model)
    elif motion and motion.endswith(".safetensors"):
        flag = "motion_adapter" if config.motion_adapter else "motion_module"
        found["motion_adapter"] = Unloaded(more=_numbers(motion, flag) * dtype.itemsize)
        denoiser.more += _numbers(motion, flag) * dtype.itemsize
    for number, path in enumerate(config.control_net or ()):
        settings = Path(path) / "config.json"
        if settings.is_file():
            model = _on_meta("diffusers", _read(settings)["_class_name"], Path(path), {})
            net = Unloaded([model] if model is not None else [])
        else:
            net = Unloaded(more=_numbers(path, "control_net") * dtype.itemsize)
        found[f"controlnet_{number}" if number else "controlnet"] = net
    fused = bool(config.quantize_to or config.compile_unet or config.compile_text_encoder or divided)
    fused = fused and not config.gguf_model
    flags = ("ip_adapter",) if fused else ("lora", "motion_adapter_lora", "ip_adapter")
    for flag in flags:
        for path in getattr(config, flag) or ():
            if Path(path).is_file() and path.endswith(".safetensors"):
                denoiser.more += _numbers(path, flag) * dtype.itemsize
    for path in config.ip_adapter or ():
        encoder = Path(path).parent / "image_encoder"
        kind = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
        if "image_encoder" not in found and (encoder / "config.json").is_file():
            model = _on_meta("transformers", kind[spec.ip_adapter_encoder or "clip"], encoder, {})
            found["image_encoder"] = Unloaded([model] if model is not None else [])


def _on_meta(library: str, class_name: str, folder: Path, own: dict[str, Any]) -> nn.Module | None:
    """A model of this configuration; None where the class is no model.

    Args:
        library: diffusers, transformers, or the folder of diffusers' pipelines that has the class.
    """
    cls = class_of(library, class_name)
    if nn.Module not in getattr(cls, "__mro__", ()):
        return None
    model: nn.Module
    with torch.device("meta"):
        if library != "transformers":
            model = cls.from_config({**_read(folder / "config.json"), **own})
        else:
            encoder = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
            encoder.tie_weights()
            model = encoder
    return model.to("meta").eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text())
    return settings


def _numbers(path: str, flag: str) -> int:
    """How many numbers the `.safetensors` file of a flag holds."""
    header: Header = read_header(Path(path), f"--{flag}")
    return sum(prod(shape) for name, shape in header.shapes.items() if not name.endswith("pos_encoder.pe"))


def _gguf_bytes(path: str, model: nn.Module, dtype: torch.dtype) -> int:
    """Of a GGUF file's tensors: packed in linear layers, else in `dtype`. Reads the header alone."""
    import gguf

    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    others = sum(p.numel() for p in model.parameters() if id(p) not in linear)
    total, packed = 0, 0
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2 and tensor.tensor_type.name not in ("F32", "F16"):
            packed += int(tensor.n_bytes)
            total += int(tensor.n_elements)
    plain = sum(p.numel() for p in model.parameters()) - others - total
    return packed + (others + max(plain, 0)) * dtype.itemsize
