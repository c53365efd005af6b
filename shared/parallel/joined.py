"""Queries, keys and values of self-attention in one product: one kernel instead of three smaller ones."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from shared.parallel.method import Part
from shared.parallel.surgery import Surgery

PROCESSOR = FusedAttnProcessor2_0()
"""One for all layers: compiled code of one block serves all blocks like it."""


class Joined:
    """What linear layers of one input make, one beside the other. Their weights become parts of its own.

    Args:
        layers: plain linear layers, all with a bias or none.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        # As they are: a parameter takes no tensor of the other kind.
        with torch.inference_mode(layers[0].weight.is_inference()):
            self.weight = torch.cat([layer.weight.data for layer in layers])
            self.bias = torch.cat([bias.data for bias in biases]) if biases else None
            parts = self.weight.split([layer.out_features for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.data = part

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class JoinedProjections(Part):
    """Makes the self-attention of a UNet project once, with diffusers' own processor for that.

    Layers with an adapter and quantized ones stay as they are, and so do those of other processors. For
    weights that stay where they are and what they are until ``close``.

    Args:
        denoiser: a UNet of diffusers.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        surgery = self.held.enter_context(Surgery())
        self.layers = 0
        """How many layers have become parts of others."""
        for attention in denoiser.modules():
            if not isinstance(attention, Attention) or attention.is_cross_attention:
                continue
            if type(attention.processor) is not AttnProcessor2_0:
                continue
            layers = [attention.to_q, attention.to_k, attention.to_v]
            if not all(map(_plain, layers)) or len({layer.bias is None for layer in layers}) > 1:
                continue
            surgery.add(attention, "to_qkv", Joined(layers))
            surgery.replace(attention, "processor", PROCESSOR)
            self.layers += len(layers)


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but its product with a weight that lies here."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight) is nn.Parameter
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.is_contiguous()
    )
