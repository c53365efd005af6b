"""The product behind attention and the feed-forward layer beside it, in two, of which one need not wait.

In a block with both, one linear layer takes cat([attention's answer, feed-forward's activation]). Most of its
work is for the activation, which is there while attention's keys and values are still on their way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shared.models import Beside
from shared.parallel.surgery import Forward, Surgery


class Multiplying(nn.Linear):
    """A linear layer with a way of its own to multiply, also with some columns of its weight."""

    def multiply(self, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """What `forward` does, with a weight and a bias that are given."""
        raise NotImplementedError


class DividedProducts:
    """Divides products of blocks in two. Compiled code then computes one of them before it waits.

    A product that is not compiled stays whole, since it runs where it is called; so do those with weights
    that are only kept in fewer bits.
    """

    def __init__(self) -> None:
        self._attended: torch.Tensor | None = None
        self._activated: torch.Tensor | None = None

    def divide(self, block: nn.Module, beside: Beside, surgery: Surgery) -> bool:
        """Divide the product of a block; False where its layer cannot be divided."""
        found = block.get_submodule(beside.product)
        layer: Any = getattr(found, "base_layer", found)  # under a LoRA, which adds to its product
        plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        divisible = plain or isinstance(layer, Multiplying)
        if divisible:
            surgery.override(block.get_submodule(beside.activation), self._activation)
            surgery.override(layer, functools.partial(self._product, layer))
        return divisible

    def attended(self, answer: torch.Tensor) -> None:
        """Take note of attention's answer [batch, heads, tokens, channels] in such a block."""
        if torch.compiler.is_compiling():
            self._attended = answer.transpose(1, 2).flatten(2)

    def _activation(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        answer = original(*args, **kwargs)
        if torch.compiler.is_compiling():
            self._activated = answer
        return answer

    def _product(self, layer: nn.Linear, original: Forward, args: tuple, kwargs: dict) -> Any:
        attended, activated = self._attended, self._activated
        self._attended = self._activated = None
        if attended is None or activated is None:
            return original(*args, **kwargs)
        channels = attended.shape[-1]
        mine, others = layer.weight[:, :channels], layer.weight[:, channels:]
        if isinstance(layer, Multiplying):
            return layer.multiply(activated, others, layer.bias) + layer.multiply(attended, mine, None)
        ready = F.linear(activated, others, layer.bias).flatten(0, 1)
        return torch.addmm(ready, attended.flatten(0, 1), mine.t()).unflatten(0, attended.shape[:2])
