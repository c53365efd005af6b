"""LoRA on every model type: read, matched by name, injected through PEFT, scaled, fused, removed.

One path for all types, because half of the pipelines have no loader of their own and the others load what
fits and silently ignore the rest. Key formats: diffusers, PEFT, kohya (flattened module names), and what
`pipeline.lora_state_dict` converts (the original SD/SDXL block names, BFL's flux names).
Source of the method: Hu et al., "LoRA", arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shared.api.lora_dir import is_named
from shared.models import ModelSpec
from shared.parallel.pipeline import Pipeline, model_of, part_of, parts_of
from shared.pipeline.weights_file import scaled

log = logging.getLogger("host")

ROLES = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up",
    "_lora.down": "down", "_lora.up": "up", "lora_linear_layer.down": "down", "lora_linear_layer.up": "up",
}  # fmt: skip
KEY = re.compile(
    r"(?P<layer>.+?)(?P<sep>\.?)(?P<role>lora_linear_layer\.(?:down|up)|_lora\.(?:down|up)|lora\.(?:down|up)"
    r"|lora_(?:A|B|down|up))(?:\.[^.]+)?\.weight$"
)
ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.alpha$")
SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale|weight\.scale)$")
FOREIGN = re.compile(r"\.(?:hada_w|lokr_w|dora_scale|lora_magnitude|oft_|diff$|lora_mid)")
OTHER_NAMES = {
    "self_attn.to_q": "self_attn.q_proj", "self_attn.to_k": "self_attn.k_proj",
    "self_attn.to_v": "self_attn.v_proj", "self_attn.to_out": "self_attn.out_proj",
    ".temporal_transformer.": ".", "attention_blocks.0": "attn1", "attention_blocks.1": "attn2",
}  # fmt: skip
WRAPPERS = ("base_model.model.", "diffusion_model.", "model.diffusion_model.")
KOHYA = re.compile(r"lora_(?P<part>unet|transformer|te\d?|text_encoder(?:_\d)?)_(?P<rest>.+)$")
FALLBACK_ERRORS = (ValueError, KeyError, IndexError, AttributeError, RuntimeError, TypeError)


class LoraError(ValueError):
    """A LoRA that cannot be used; the message says why."""


@dataclass
class Pair:
    """The two matrices of one adapted layer: weight += up @ down * alpha / rank."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None

    @property
    def rank(self) -> int:
        assert self.down is not None
        return self.down.shape[0]


@dataclass(frozen=True)
class Loaded:
    """One LoRA on a pipeline. `matched` and `unmatched` count layers of the file."""

    path: str
    adapter: str
    scale: float
    matched: int
    unmatched: int


@dataclass
class LoraSet:
    """The LoRAs of one pipeline, in the order in which they were added."""

    pipe: Pipeline
    spec: ModelSpec
    frozen: str | None = None  # why none can be added, removed or scaled
    fixed: str | None = None  # why none can be added or removed; scales still work
    loaded: dict[str, Loaded] = field(default_factory=dict)
    _count: int = 0

    def add(self, path: str, scale: float = 1.0) -> Loaded:
        """Load a LoRA and make it active with the others.

        Raises:
            LoraError: fused, compiled or offloaded weights, an unreadable file, or a LoRA that fits nowhere.
        """
        self._check_open(self.fixed)
        if path in self.loaded:
            raise LoraError(f"LoRA {path!r} is loaded already")
        tensors = read_lora(path)
        try:
            parts, unmatched = match_layers(self.pipe, self.spec, tensors)
        except LoraError as error:
            raise LoraError(f"LoRA {path!r}: {error}") from None
        matched = sum(len(pairs) for pairs in parts.values())
        if not matched:
            raise LoraError(f"LoRA {path!r} fits no layer of type {self.spec.name}: {_sample(unmatched)}")
        adapter = f"lora{self._count}"
        self._count += 1
        try:
            for part, pairs in parts.items():
                _inject(getattr(self.pipe, part), pairs, adapter)
        except Exception:
            self._take_off(adapter)
            raise
        entry = Loaded(path, adapter, scale, matched, len(unmatched))
        self.loaded[path] = entry
        self.set_scales({})
        if unmatched:
            log.warning(
                "LoRA %s: %d of %d layers fit; the others are ignored (%s)",
                path, matched, matched + len(unmatched), _sample(unmatched),
            )  # fmt: skip
        else:
            log.info("LoRA %s: %d layers, scale %g", path, matched, scale)
        return entry

    def remove(self, path: str) -> None:
        """Remove a LoRA; after the last one the layers are the original objects. Raises LoraError."""
        self._check_open(self.fixed)
        self._take_off(self.loaded.pop(self.name_of(path)).adapter)
        self.set_scales({})

    def rescale(self, path: str, scale: float) -> Loaded:
        """Give a loaded LoRA another scale of its own, the one without `set_scales`. Raises LoraError."""
        self._check_open()
        self.loaded[path] = replace(self.loaded[path], scale=scale)
        return self.loaded[path]

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give LoRAs other scales, keyed by path, file name or file name without suffix; {} is the launch's.

        Raises:
            LoraError: a name that is not loaded, or weights that were fused.
        """
        if scales:
            self._check_open()
        wanted = {entry.path: entry.scale for entry in self.loaded.values()}
        wanted |= {self.name_of(name): scale for name, scale in scales.items()}
        by_adapter = {self.loaded[path].adapter: scale for path, scale in wanted.items()}
        for module in _parts(self.pipe, self.spec).values():
            for _, layer in _lora_layers(module):
                names = [name for name in by_adapter if name in layer.lora_A]
                layer.set_adapter(names)
                for name in names:
                    layer.set_scale(name, by_adapter[name])
                layer.requires_grad_(False)

    def name_of(self, name: str) -> str:
        """The path of the loaded LoRA that `name` means. Raises LoraError."""
        found = [name] if name in self.loaded else [path for path in self.loaded if is_named(path, name)]
        if len(found) != 1:
            known = ", ".join(self.loaded) or "none"
            problem = "means several LoRAs" if found else "is not loaded"
            raise LoraError(f"LoRA {name!r} {problem}; loaded: {known}")
        return found[0]

    def fuse(self, why: str) -> None:
        """Add the LoRAs at their scales to the weights and remove the adapter layers."""
        for module in _parts(self.pipe, self.spec).values():
            for _, layer in _lora_layers(module):
                layer.merge()
            _unwrap(module)
        if self.loaded:
            self.frozen = f"LoRAs are fused into the weights because of {why}"

    def freeze(self, why: str) -> None:
        """From now on none can be added, removed or scaled, for this reason."""
        self.frozen = why

    def _take_off(self, adapter: str) -> None:
        for module in _parts(self.pipe, self.spec).values():
            for _, layer in _lora_layers(module):
                if adapter in layer.lora_A:
                    layer.delete_adapter(adapter)
            getattr(module, "peft_config", {}).pop(adapter, None)
            if not self.loaded:
                _unwrap(module)

    def _check_open(self, fixed: str | None = None) -> None:
        if reason := self.frozen or fixed:
            raise LoraError(reason)


def loras_of(pipe: Pipeline, spec: ModelSpec) -> LoraSet:
    """The pipeline's LoraSet; an empty one at first."""
    if not isinstance(part_of(pipe, "lora_set"), LoraSet):
        pipe.lora_set = LoraSet(pipe, spec)
    return pipe.lora_set


def read_lora(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file, or of the one in a folder. Raises LoraError."""
    file = Path(path)
    try:
        if file.is_dir():
            inside = sorted(file.glob("*.safetensors"))
            if len(inside) != 1:
                raise LoraError(f"LoRA folder {path!r} must hold one .safetensors file, got {len(inside)}")
            file = inside[0]
        if file.suffix != ".safetensors":
            raise LoraError(f"LoRA {path!r} must be a .safetensors file (no pickles)")
        return load_file(file)
    except (OSError, SafetensorError, KeyError, AttributeError) as error:
        raise LoraError(f"LoRA {path!r} cannot be read: {error}") from None


def check_lora(path: str) -> None:
    """Check what can be checked of a LoRA without the model. Raises LoraError."""
    tensors = read_lora(path)
    try:
        _numbers(tensors)
    except LoraError as error:
        raise LoraError(f"LoRA {path!r}: {error}") from None


def _numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as numbers to compute with: 8-bit ones in fp32, times their scales.

    Raises:
        LoraError: weights that are integers, or a NaN or Inf.
    """
    scales: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        floats = value.is_floating_point()
        try:
            wide = value.float() if floats and value.element_size() == 1 else value
        except RuntimeError:
            raise LoraError(f"{key!r} is {value.dtype}, which is not supported") from None
        if floats and not torch.isfinite(wide).all():
            raise LoraError(f"{key!r} holds NaN or Inf")
        if of := SCALE.match(key):
            scales[f"{of['layer']}.weight"] = wide.float()
        elif key != "scaled_fp8":
            found[key] = wide
    for key, value in found.items():
        if KEY.match(key) and not value.is_floating_point():
            raise LoraError(f"{key!r} must hold floats, got {str(value.dtype).removeprefix('torch.')}")
    for key, scale in scales.items():
        if key not in found:
            raise LoraError(f"the scale of {key!r} has no weight to scale")
        try:
            found[key] = scaled(key, found[key], scale)
        except ValueError as error:
            raise LoraError(str(error)) from None
    return found


def match_layers(
    pipe: Pipeline, spec: ModelSpec, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, dict[str, Pair]], list[str]]:
    """Which layers of the pipeline a LoRA's tensors belong to.

    Returns:
        pairs per component attribute and module name, and the names in the file that fit no layer.
    """
    tensors = _numbers(tensors)
    foreign = [key for key in tensors if FOREIGN.search(key)]
    if foreign:
        raise LoraError(f"DoRA, LoHa, LoKr and similar formats are not supported (key {foreign[0]!r})")
    parts = _parts(pipe, spec)
    matched, unmatched = _resolve(parts, spec, _pairs(tensors))
    if unmatched and hasattr(pipe, "lora_state_dict"):
        converted = _converted(pipe, spec, tensors)
        if converted is not None:
            again, left = _resolve(parts, spec, converted)
            if sum(map(len, again.values())) > sum(map(len, matched.values())):
                matched, unmatched = again, left
    return matched, unmatched


def _parts(pipe: Pipeline, spec: ModelSpec) -> dict[str, nn.Module]:
    names = (spec.denoiser, *spec.text_encoders)
    return parts_of(pipe, names)


def _pairs(tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, float] | None = None) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    for key, value in tensors.items():
        if found := KEY.match(key):
            layer = found["layer"].removesuffix(".processor") if found["sep"] else found["layer"]
            pair = pairs.setdefault(layer, Pair())
            setattr(pair, ROLES[found["role"]], value)
        elif found := ALPHA.match(key):
            if value.numel() != 1:
                raise LoraError(f"{key!r} must be one number, got shape {list(value.shape)}")
            pairs.setdefault(found["layer"], Pair()).alpha = float(value)
        else:
            pairs.setdefault(key, Pair())
    for key, alpha in (alphas or {}).items():
        layer = key.removesuffix(".alpha").removesuffix(".lora")
        layer = KEY.sub(r"\g<layer>", f"{layer}.weight")
        if layer in pairs:
            pairs[layer].alpha = float(alpha)
    return pairs


def _converted(pipe: Pipeline, spec: ModelSpec, tensors: dict[str, torch.Tensor]) -> dict[str, Pair] | None:
    """The pairs after diffusers' own conversion of other formats, or None where it cannot convert it."""
    config = model_of(pipe, spec.denoiser).config
    try:
        result = type(pipe).lora_state_dict(dict(tensors), unet_config=config)
    except FALLBACK_ERRORS as error:
        log.debug("diffusers cannot convert this LoRA either: %s", error)
        return None
    state, alphas = result if isinstance(result, tuple) else (result, None)
    return _pairs(state, alphas)


def _resolve(
    parts: dict[str, nn.Module], spec: ModelSpec, pairs: dict[str, Pair]
) -> tuple[dict[str, dict[str, Pair]], list[str]]:
    layers = {part: _adaptable(module) for part, module in parts.items()}
    flat = {part: {name.replace(".", "_"): name for name in known} for part, known in layers.items()}
    matched: dict[str, dict[str, Pair]] = {}
    unmatched = []
    for name, pair in pairs.items():
        place = _place(name, spec, layers, flat)
        if (
            place
            and pair.down is not None
            and pair.up is not None
            and _fits(layers[place[0]][place[1]], pair)
        ):
            matched.setdefault(place[0], {})[place[1]] = pair
        else:
            unmatched.append(name)
    return matched, unmatched


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can wrap: not those whose parent reads their weights past their forward."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        direct = isinstance(parent, nn.MultiheadAttention) or type(parent).__name__.endswith("AttentionPool")
        if isinstance(module, nn.Linear | nn.Conv2d | LoraLayer) and not direct:
            found[name] = module
    return found


def _fits(module: nn.Module, pair: Pair) -> bool:
    base: Any = getattr(module, "base_layer", module)
    assert pair.down is not None and pair.up is not None
    if min(pair.down.ndim, pair.up.ndim) < 2 or not pair.rank:
        return False
    kernel = 1
    if isinstance(base, nn.Conv2d):
        inputs, outputs = base.in_channels // base.groups, base.out_channels
        kernel = math.prod(base.kernel_size)
    else:  # not the weight's shape, which is that of packed bytes under GGUF
        inputs, outputs = base.in_features, base.out_features
    return (
        (pair.down.shape[1], pair.down.numel()) == (inputs, pair.rank * inputs * kernel)
        and tuple(pair.up.shape[:2]) == (outputs, pair.rank)
        and pair.up.numel() == outputs * pair.rank
    )


def _place(
    name: str, spec: ModelSpec, layers: dict[str, dict[str, Any]], flat: dict[str, dict[str, str]]
) -> tuple[str, str] | None:
    """(component, module name) of a layer name of any format."""
    if found := KOHYA.match(name):
        part, known = _kohya_part(found["part"], spec, layers), flat
        rest = found["rest"]
        tries = (rest, f"text_model_{rest}", rest.removeprefix("text_model_"))
        return next(((part, known[part][t]) for t in tries if part in known and t in known[part]), None)
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    part, _, rest = name.partition(".")
    if part not in layers:
        part, rest = spec.denoiser, name.removeprefix("unet.").removeprefix("transformer.")
    rest = rest.replace(".processor.", ".").replace(".to_out_lora", ".to_out.0_lora").removesuffix("_lora")
    for theirs, ours in OTHER_NAMES.items():
        rest = rest.replace(theirs, ours)
    names = (rest, f"{rest}.0", f"text_model.{rest}", rest.removeprefix("text_model."))
    return next(((part, t) for t in names if t in layers.get(part, {})), None)


def _kohya_part(label: str, spec: ModelSpec, layers: Mapping[str, Any]) -> str:
    if label in ("unet", "transformer"):
        return spec.denoiser
    digit = label[-1] if label[-1].isdigit() else "1"
    return "text_encoder" if digit == "1" else f"text_encoder_{digit}"


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, m) for name, m in module.named_modules() if isinstance(m, LoraLayer))


def _inject(module: nn.Module, pairs: dict[str, Pair], adapter: str) -> None:
    """Put the pairs on the module's layers as a PEFT adapter: in their dtype, alpha folded into `down`."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(pairs),
        rank_pattern={f"^{re.escape(name)}$": pair.rank for name, pair in pairs.items()},
        alpha_pattern={f"^{re.escape(name)}$": pair.rank for name, pair in pairs.items()},
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, module, adapter)
    for name, pair in pairs.items():
        layer: Any = module.get_submodule(name)
        base = layer.get_base_layer()
        scale = 1.0 if pair.alpha is None else pair.alpha / pair.rank
        assert pair.down is not None and pair.up is not None
        for matrix, value in ((layer.lora_A[adapter], pair.down * scale), (layer.lora_B[adapter], pair.up)):
            target = matrix.weight
            dtype = base.weight.dtype if base.weight.dtype.is_floating_point else target.dtype
            value = value.reshape(target.shape).to(base.weight.device, dtype)
            matrix.weight = nn.Parameter(value, requires_grad=False)
    module.eval()


def _unwrap(module: nn.Module) -> None:
    """Put the original layers back in the place of PEFT's."""
    for name, layer in list(_lora_layers(module)):
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent) if parent else module
        setattr(owner, child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config


def _sample(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
