"""Linear layers of one input in one product: one kernel that fills a GPU better than several smaller ones."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from shared.models import token_plan
from shared.parallel.divided import Multiplying
from shared.parallel.method import Part
from shared.parallel.surgery import Forward, Surgery

PROJECTIONS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
"""What attention calls its layers of one input, in the order in which it calls them."""
VALUES_FIRST = {"LTX2PerturbedAttnProcessor": ("to_v", "to_q", "to_k")}
"""That order of the first ones, by the class of a processor that has another."""


class Joined:
    """What linear layers of one input make, one beside the other. Their weights become parts of its own.

    Args:
        layers: plain linear layers or `Multiplying` ones of one class, all with a bias or none.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        first = layers[0]
        self._multiply: Forward = first.multiply if isinstance(first, Multiplying) else F.linear
        self._sizes = [layer.out_features for layer in layers]
        # As they are: a parameter takes no tensor of the other kind.
        with torch.inference_mode(first.weight.is_inference()):
            self.weight = _joined([layer.weight for layer in layers], self._sizes)
            self.bias = torch.cat([bias.data for bias in biases]) if biases else None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole: torch.Tensor = self._multiply(x, self.weight, self.bias)
        return whole.split(self._sizes, -1)


def _joined(weights: Sequence[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """Weights [outputs, inputs], one below the other; each becomes a view of the whole.

    Those of 8 bits consist of tensors that have a row for each output.
    """
    first: Any = weights[0]
    if type(first) is nn.Parameter:
        whole = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, whole.split(sizes), strict=True):
            weight.data = part
        return whole
    names, settings = first.__tensor_flatten__()
    inner = {name: torch.cat([getattr(weight, name) for weight in weights]) for name in names}
    for name, rows in inner.items():
        for weight, part in zip(weights, rows.split(sizes), strict=True):
            setattr(weight, name, part)
    shape = torch.Size((sum(sizes), first.shape[1]))
    made: torch.Tensor = type(first).__tensor_unflatten__(inner, settings, shape, (shape[1], 1))
    return made


class _Together:
    """Layers of which the first, when it is called, computes all; the others answer for the same input."""

    def __init__(self, layers: Sequence[nn.Linear], surgery: Surgery) -> None:
        self._joined = Joined(layers)
        self._input: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()
        self._last = len(layers) - 1
        surgery.override(layers[0], self._first)
        for place, layer in enumerate(layers[1:], 1):
            surgery.override(layer, functools.partial(self._later, place))

    def _first(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        self._input, self._parts = args[0], self._joined(args[0])
        return self._parts[0]

    def _later(self, place: int, original: Forward, args: tuple, kwargs: dict) -> Any:
        if self._input is not args[0]:
            return original(*args, **kwargs)
        answer = self._parts[place]
        if place == self._last:
            self._input, self._parts = None, ()
        return answer


class JoinedProjections(Part):
    """Makes self-attention project once: whatever its processor, with a LoRA on top of it, also in 8 bits.

    Layers that only keep their weights in fewer bits stay as they are. For weights that stay where they are
    and what they are until ``close``.

    Args:
        attentions: such layers of diffusers, as `of_unet` and `of_transformer` give them.
        apart: names of projections that stay as they are.
    """

    def __init__(self, attentions: Iterable[nn.Module], apart: Collection[str] = ()) -> None:
        super().__init__()
        surgery = self.held.enter_context(Surgery())
        self.layers = 0
        """How many layers have become parts of others."""
        for attention in attentions:
            own = VALUES_FIRST.get(type(getattr(attention, "processor", None)).__name__, PROJECTIONS[0])
            for names in (own, *PROJECTIONS[1:]):
                found = [getattr(attention, name, None) for name in names if name not in apart]
                layers = [_base(layer) for layer in found]
                if _joinable(layers):
                    _Together(layers, surgery)
                    self.layers += len(layers)


def of_unet(model: nn.Module) -> list[nn.Module]:
    """The self-attention of a UNet, its ControlNet, or a transformer made of diffusers' `Attention`."""
    return [m for m in model.modules() if isinstance(m, Attention) and not m.is_cross_attention]


def of_transformer(model: nn.Module) -> list[nn.Module]:
    """The self-attention of a model with a token plan."""
    plan = token_plan(type(model).__name__)
    blocks = [block for name in plan.blocks for block in model.get_submodule(name).children()]
    return [part for block in blocks for name, part in block.named_children() if name in plan.attention]


def _base(layer: Any) -> Any:
    """The layer itself, under a LoRA, which adds to what it makes."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def _joinable(layers: Sequence[Any]) -> bool:
    """Whether they are alike, and nothing but products with weights that lie here."""
    kinds = {(type(x), x.bias is None, x.in_features) for x in layers if _multiplies(x)}
    return len(layers) > 1 and all(map(_multiplies, layers)) and len(kinds) == 1


def _multiplies(layer: Any) -> bool:
    if not isinstance(layer, nn.Linear) or "forward" in vars(layer):
        return False
    if isinstance(layer, Multiplying):
        return True
    plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    return plain and type(layer.weight.data) is torch.Tensor and layer.weight.is_contiguous()
