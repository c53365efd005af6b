"""What a LoRA adds to a layer: the formulas, as PEFT layers, in place or fused into the weights.

Sources: Hu et al., "LoRA", arXiv 2106.09685, section 4.1; Yeh et al., "LyCORIS", arXiv 2309.14859, section 3
and appendix B (LoCon, LoHa, LoKr); Liu et al., "DoRA", arXiv 2402.09353, equation 5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shared.pipeline.lora_file import Update

Factors = Mapping[str, torch.Tensor]


def delta(factors: Factors) -> torch.Tensor:
    """What is added to the weight, without the scale: [outputs, inputs, ...], or its last dimensions flat."""
    if "diff" in factors:
        return factors["diff"]
    if "up" in factors:
        down = factors["down"]
        if "mid" in factors:
            down = torch.einsum("oikl,in->onkl", factors["mid"], down.flatten(1))
        return (factors["up"].flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])
    if "hada_w1_a" in factors:
        return _product(factors, "hada_w1", "hada_t1") * _product(factors, "hada_w2", "hada_t2")
    first, second = _product(factors, "lokr_w1"), _product(factors, "lokr_w2", "lokr_t2")
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _product(factors: Factors, name: str, core: str = "") -> torch.Tensor:
    """A matrix given whole, as two factors, or with a convolution's kernel as a core between them."""
    if name in factors:
        return factors[name]
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if core in factors:
        return torch.einsum("ijkl,ip,jr->prkl", factors[core], a, b)
    return a @ b


def fits(layer: nn.Module, update: Update) -> bool:
    """Whether an update is whole and has the layer's shape."""
    outputs, inputs, kernel = _shape(layer)
    shift = update.tensors.get("diff_b")
    if shift is not None and (_bias(layer) is None or update.is_dora or shift.shape != (outputs,)):
        return False
    meta = {key: tensor.to("meta") for key, tensor in update.tensors.items()}
    if not all(tensor.numel() for tensor in meta.values()):
        return False
    try:
        shape = delta(meta).shape
    except (KeyError, RuntimeError, IndexError):
        return False
    if update.rows is not None:
        shape = torch.Size((len(update.rows), *shape[1:]))
    whole = (outputs, inputs, *kernel)
    flat = len(shape) == 2 or math.prod(shape[2:]) == 1  # 1 x 1 convolutions and linear layers are alike
    flat = flat and shape[0] == outputs and shape[1:].numel() == math.prod(whole[1:])
    if tuple(shape) != whole and (not flat or ("down" in meta and meta["down"].shape[1] != inputs)):
        return False
    axis = _dora_axis(update)
    return axis is None or _dora(update).numel() == (outputs, inputs)[axis]


def shape_of(update: Update) -> tuple[int, int] | None:
    """Outputs and inputs of the file's layer; None where its tensors are no update of a layer."""
    try:
        change = delta({key: tensor.to("meta") for key, tensor in update.tensors.items()})
        return change.shape[0], change.shape[1]
    except (KeyError, RuntimeError, IndexError):
        return None


def outputs_of(layer: nn.Module) -> int:
    """How many outputs a layer has."""
    return _shape(layer)[0]


def _shape(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Outputs, inputs and kernel; not by the weight's shape, which is that of packed bytes under GGUF."""
    base: Any = getattr(layer, "base_layer", layer)
    if isinstance(base, nn.Conv2d):
        return base.out_channels, base.in_channels // base.groups, tuple(base.kernel_size)
    return base.out_features, base.in_features, ()


def _bias(layer: Any) -> torch.Tensor | None:
    bias: torch.Tensor | None = getattr(layer, "base_layer", layer).bias
    return bias


def _dora(update: Update) -> torch.Tensor:
    return update.tensors["dora_scale" if "dora_scale" in update.tensors else "magnitude"]


def _dora_axis(update: Update) -> int | None:
    """0: a magnitude for each output, PEFT's; 1: for each input, LyCORIS' by default; None: no DoRA."""
    if "dora_scale" in update.tensors:
        scale = update.tensors["dora_scale"]
        return 1 if scale.ndim > 1 and scale.shape[0] == 1 else 0
    return 0 if "magnitude" in update.tensors else None


class Change(nn.Module):
    """What PEFT has no LoRA layer for. In place of `lora_A` of one adapter on one layer.

    Args:
        update: fits the layer.
        base: the layer, with the checkpoint's weights.
        dtype: of the factors.
    """

    rows: torch.Tensor | None
    bias: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, update: Update, base: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = (base,)  # in a tuple: no submodule, and no argument, which offload would move
        self.axis = _dora_axis(update)
        self.names = [key for key in update.tensors if key not in ("dora_scale", "magnitude", "diff_b")]
        device = base.weight.device
        shift = update.tensors.get("diff_b")
        if shift is not None:
            shift = nn.Parameter(shift.to(device, dtype), requires_grad=False)
        self.register_parameter("shift", shift)  # of the bias
        self.register_buffer("rows", None if update.rows is None else update.rows.to(device))
        factors = {key: update.tensors[key].to(device, torch.float32) for key in self.names}
        factors[self.names[0]] = factors[self.names[0]] * update.scale
        for key, tensor in factors.items():
            self.register_parameter(key, nn.Parameter(tensor.to(dtype), requires_grad=False))
        if self.axis is None:
            return
        weight = _weight(base)
        norm = (
            (weight + self._delta(factors).reshape(weight.shape))
            .transpose(0, self.axis)
            .flatten(1)
            .norm(dim=1)
        )
        magnitude = _dora(update).to(device, torch.float32).flatten()
        gain = magnitude / norm.clamp_min(torch.finfo(torch.float32).eps) - 1
        self.gain = nn.Parameter(gain.to(dtype), requires_grad=False)
        # A copy, because offload takes the layer's own away between its calls.
        bias = None if base.bias is None else nn.Parameter(base.bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """For PEFT, which asks for its dtype."""
        return self.get_parameter(self.names[0])

    def _delta(self, factors: Factors | None = None) -> torch.Tensor:
        """What is added to the weight before DoRA's magnitudes."""
        found = delta(factors or {key: self.get_parameter(key) for key in self.names})
        return found if self.rows is None else found[self.rows]

    def forward(self, x: torch.Tensor, result: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer's output for `x` changes by; axis 0 needs that output, `result`."""
        (base,) = self.layer
        if self.axis is None:
            added = self._added(base, x)
            return added if self.shift is None else added + _along(self.shift, base)
        if self.axis == 0:
            assert result is not None
            gain = _along(self.gain, base)
            return gain * self._without_bias(result, base) + (1 + gain) * self._added(base, x)
        gain = _along(self.gain, base)
        return self._without_bias(base(x * gain), base) + self._added(base, x * (1 + gain))

    def _without_bias(self, result: torch.Tensor, base: nn.Module) -> torch.Tensor:
        return result if self.bias is None else result - _along(self.bias, base)

    def _added(self, base: Any, x: torch.Tensor) -> torch.Tensor:
        conv = isinstance(base, nn.Conv2d)
        if "up" in self.names and "mid" not in self.names and not (conv and base.groups > 1):
            down, up = self.get_parameter("down"), self.get_parameter("up").flatten(1)
            if not conv:
                return F.linear(F.linear(x, down.flatten(1)), up)
            kernel = down.reshape(down.shape[0], -1, *base.kernel_size)
            return F.conv2d(_convolved(base, x, kernel), up[:, :, None, None])
        change = self._delta()
        if not conv:
            return F.linear(x, change.flatten(1))
        return _convolved(base, x, change.reshape(change.shape[0], -1, *base.kernel_size))

    def weight_change(self, weight: torch.Tensor) -> torch.Tensor:
        """What is added to a layer's weight, given in fp32."""
        change = self._delta().float().reshape(weight.shape)
        if self.axis is None:
            return change
        sizes = [1] * weight.ndim
        sizes[self.axis] = -1
        gain = self.gain.float().reshape(sizes)
        return gain * weight + (1 + gain) * change


class _Changes:
    """A variant of LoRA, as PEFT's layers take them. Each DoRA is of the checkpoint's weight alone."""

    @staticmethod
    def forward(
        module: Any, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **unused: Any
    ) -> torch.Tensor:
        change = module.lora_A[active_adapter]
        if change.axis != 0:
            return result + change(x) * module.scaling[active_adapter]
        # These come first (`ordered`): when the first is asked, the result is still the layer's own.
        together = [name for name in module.active_adapters if _needs_result(module, name)]
        if active_adapter != together[0]:
            return result
        own = result
        for name in together:
            result = result + module.lora_A[name](x, own) * module.scaling[name]
        return result


def _needs_result(layer: Any, adapter: str) -> bool:
    return any(name == adapter and isinstance(m, Change) and m.axis == 0 for name, m in layer.lora_A.items())


def ordered(layer: Any, adapters: list[str]) -> list[str]:
    """The adapters of a layer in the order in which it must add them."""
    return sorted((a for a in adapters if a in layer.lora_A), key=lambda name: not _needs_result(layer, name))


def _convolved(base: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, weight, None, base.stride, base.padding, base.dilation, base.groups)


def _along(values: torch.Tensor, base: nn.Module) -> torch.Tensor:
    return values if isinstance(base, nn.Linear) else values[:, None, None]


def _weight(base: Any) -> torch.Tensor:
    """The layer's weight in fp32."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    weight = base.weight
    return (dequantize_gguf_tensor(weight) if isinstance(weight, GGUFParameter) else weight).float()


def lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in a model, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, m) for name, m in module.named_modules() if isinstance(m, LoraLayer))


def inject(module: nn.Module, found: dict[str, Update], adapter: str) -> None:
    """Put updates on the module's layers as a PEFT adapter, in the layers' dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {name: u.tensors["down"].shape[0] if u.plain else 1 for name, u in found.items()}
    pattern = {f"^{re.escape(name)}$": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=list(found),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, module, adapter)
    for name, update in found.items():
        layer: Any = module.get_submodule(name)
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        dtype = dtype if dtype.is_floating_point else layer.lora_A[adapter].weight.dtype
        if update.plain:
            values = update.tensors["down"] * update.scale, update.tensors["up"]
            for matrix, value in zip((layer.lora_A[adapter], layer.lora_B[adapter]), values, strict=True):
                value = value.reshape(matrix.weight.shape).to(base.weight.device, dtype)
                matrix.weight = nn.Parameter(value, requires_grad=False)
            continue
        layer.lora_A[adapter] = Change(update, base, dtype)
        layer.lora_B[adapter] = nn.Identity()
        layer.lora_variant[adapter] = _Changes()
    module.eval()


def fuse(module: nn.Module) -> None:
    """Add what the active adapters add to the weights themselves, and put the original layers back."""
    for _, layer in lora_layers(module):
        base = layer.get_base_layer()
        weight = base.weight.data.float()
        total = weight.clone()
        for name in layer.active_adapters:
            change = layer.lora_A[name]
            if isinstance(change, Change):
                total += change.weight_change(weight) * layer.scaling[name]
                if change.shift is not None:
                    base.bias.data = base.bias.data + (change.shift * layer.scaling[name]).to(base.bias.dtype)
            else:
                total += layer.get_delta_weight(name).float()
        base.weight.data = total.to(base.weight.dtype)
    unwrap(module)


def unwrap(module: nn.Module) -> None:
    """Put the original layers back in the place of PEFT's."""
    for name, layer in list(lora_layers(module)):
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent) if parent else module
        setattr(owner, child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
