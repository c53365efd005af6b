"""LoRA files: their tensors, checked, as what each file says of each layer.

Formats: LoRA (diffusers, PEFT, kohya), and of LyCORIS LoCon, LoHa, LoKr, whole differences, each with DoRA or
without, or with a difference of the bias.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from shared.pipeline.weights_file import scaled

Tensors = Mapping[str, torch.Tensor]
ROLES = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down",
    "lora_B": "up", "lora_up": "up", "lora.up": "up", "lora_mid": "mid",
    "_lora.down": "down", "_lora.up": "up", "lora_linear_layer.down": "down", "lora_linear_layer.up": "up",
    "lora_magnitude_vector": "magnitude",
}  # fmt: skip
KEYS = (
    re.compile(
        r"(?P<layer>.+?)(?P<sep>\.?)(?P<role>lora_linear_layer\.(?:down|up)|_lora\.(?:down|up)"
        r"|lora\.(?:down|up)|lora_(?:A|B|down|up|mid))(?:\.[^.]+)?\.weight$"
    ),
    re.compile(
        r"(?P<layer>.+?)(?P<sep>\.)(?P<role>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff(?:_b)?"
        r"|dora_scale|lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?$"
    ),
)
ALPHA = re.compile(r"(?P<layer>.+?)(?:\.lora)?\.alpha$")
SCALE = re.compile(r"(?P<layer>.+)\.(?:scale_weight|weight_scale|weight\.scale)$")
FOREIGN = re.compile(r"\.(?:oft_|boft_|ia3_|on_input$|[ab][12]\.weight$)")
RANKED_BY = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Tensors whose first dimension is the rank; the first that a layer has counts."""
ROWS_OF = {"diff": 0, "diff_b": 0, "up": 0, "hada_w1_a": 0, "hada_w2_a": 0, "dora_scale": 0, "magnitude": 0}
"""Tensors whose first dimension is the layer's outputs. LoKr's outputs are those of two tensors."""


class LoraError(ValueError):
    """A LoRA that cannot be used; the message says why."""


@dataclass
class Update:
    """What a file says of one layer: tensors by their role, as named in ROLES or in LyCORIS."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    alpha: float | None = None
    rows: torch.Tensor | None = None
    """Which outputs of the file's layer are the pipeline's layer's; None: all."""

    @property
    def plain(self) -> bool:
        """Whether it is a LoRA without more: weight += up @ down."""
        return set(self.tensors) == {"down", "up"}

    @property
    def is_dora(self) -> bool:
        """Whether it is relative to the length of the layer's own weights."""
        return not self.tensors.keys().isdisjoint(("dora_scale", "magnitude"))

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing: files that distil hold zeros for layers that they leave alone."""
        return bool(self.tensors) and not any(tensor.any() for tensor in self.tensors.values())

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without an alpha, and for a LoKr of two whole matrices, which has no rank."""
        ranked = next((self.tensors[key] for key in RANKED_BY if key in self.tensors), None)
        return 1.0 if self.alpha is None or ranked is None else self.alpha / ranked.shape[0]

    def part(self, rows: torch.Tensor) -> Update:
        """Only these outputs of the layer. Raises LoraError."""
        tensors = dict(self.tensors)
        if tensors.get("dora_scale", rows).shape[0] == 1 < len(rows):
            raise LoraError("DoRA with a scale for each input is not supported on layers that the file joins")
        whole = tensors.keys() & {"hada_t1", "hada_t2"}
        for key in tensors.keys() & ROWS_OF if not whole else ():
            tensors[key] = (tensors[key].flatten() if key == "magnitude" else tensors[key])[rows]
        if "lokr_w1" not in tensors and "lokr_w1_a" not in tensors and not whole:
            return Update(tensors, self.alpha)
        return Update(tensors, self.alpha, rows)


def read_lora(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file, or of the one in a folder. Raises LoraError.

    Alphas that the file's metadata or PEFT's adapter_config.json beside it hold are among them.
    """
    file = Path(path)
    try:
        if file.is_dir():
            inside = sorted(file.glob("*.safetensors"))
            if len(inside) != 1:
                raise LoraError(f"LoRA folder {path!r} must hold one .safetensors file, got {len(inside)}")
            file = inside[0]
        if file.suffix != ".safetensors":
            raise LoraError(f"LoRA {path!r} must be a .safetensors file (no pickles)")
        tensors = load_file(file)
        return tensors | _alphas(tensors, _settings(file))
    except (OSError, SafetensorError, KeyError, AttributeError, ValueError, TypeError, re.error) as error:
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"LoRA {path!r} cannot be read: {error}") from None


def _settings(file: Path) -> dict[str, dict[str, Any]]:
    """How a LoRA was trained, PEFT's LoraConfig, by the component that it is of; "": of all."""
    beside = file.with_name("adapter_config.json")
    if file.name == "adapter_model.safetensors" and beside.is_file():
        return {"": json.loads(beside.read_text())}
    with safe_open(file, "pt") as opened:
        told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))  # diffusers'
    found: dict[str, dict[str, Any]] = {}
    for key, value in told.items():
        part, _, name = key.partition(".")
        found.setdefault(part, {})[name] = value
    return found


def _alphas(tensors: Tensors, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The alphas that the settings of a LoRA give its layers, where it has none of its own."""
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items() if settings else ():
        of = _read(key)
        if of is None or ROLES.get(of["role"], of["role"]) not in RANKED_BY or not value.ndim:
            continue
        layer = of["layer"]
        config = settings.get("") or settings.get(layer.partition(".")[0]) or {}
        own = (config.get("alpha_pattern") or {}).items()
        named = [alpha for name, alpha in own if re.match(rf"(.*\.)?({name})$", layer)]
        alpha = (named or [config.get("lora_alpha", config.get("alpha"))])[0]
        if alpha is not None and f"{layer}.alpha" not in tensors:
            root = math.sqrt(value.shape[0]) if config.get("use_rslora") else 1.0
            found[f"{layer}.alpha"] = torch.tensor(float(alpha) * root)
    return found


def check_lora(path: str) -> None:
    """Check what can be checked of a LoRA without the model. Raises LoraError."""
    tensors = read_lora(path)
    try:
        updates(numbers(tensors))
    except LoraError as error:
        raise LoraError(f"LoRA {path!r}: {error}") from None


def numbers(tensors: Tensors) -> dict[str, torch.Tensor]:
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
        if _read(key) and not value.is_floating_point():
            raise LoraError(f"{key!r} must hold floats, got {str(value.dtype).removeprefix('torch.')}")
    for key, scale in scales.items():
        if key not in found:
            raise LoraError(f"the scale of {key!r} has no weight to scale")
        try:
            found[key] = scaled(key, found[key], scale)
        except ValueError as error:
            raise LoraError(str(error)) from None
    return found


def _read(key: str) -> re.Match[str] | None:
    return next(filter(None, (pattern.match(key) for pattern in KEYS)), None)


def updates(tensors: Tensors, alphas: Mapping[str, float] | None = None) -> dict[str, Update]:
    """What the tensors say of each layer, by the layer's name in the file.

    A name of what is not understood stands for itself, with an empty Update. Raises LoraError.
    """
    if foreign := next((key for key in tensors if FOREIGN.search(key)), None):
        raise LoraError(
            f"key {foreign!r} is of a format that is not supported; LoRA, LoCon, LoHa, LoKr and DoRA are"
        )
    found: dict[str, Update] = {}
    for key, value in tensors.items():
        if of := _read(key):
            layer = of["layer"].removesuffix(".processor") if of["sep"] else of["layer"]
            found.setdefault(layer, Update()).tensors[ROLES.get(of["role"], of["role"])] = value
        elif of := ALPHA.match(key):
            if value.numel() != 1:
                raise LoraError(f"{key!r} must be one number, got shape {list(value.shape)}")
            found.setdefault(of["layer"], Update()).alpha = float(value)
        else:
            found.setdefault(key, Update())
    for key, alpha in (alphas or {}).items():
        layer = key.removesuffix(".alpha").removesuffix(".lora")
        layer = KEYS[0].sub(r"\g<layer>", f"{layer}.weight")
        if layer in found:
            found[layer].alpha = float(alpha)
    return found
