"""Layouts between the blocks of a compiled UNet: maps that are laid out by pixels stay so.

diffusers lays what comes out of transformer blocks out by channels, and torch's group norm does so on GPUs.
The next block then lays it out by pixels again, as its convolutions want it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from diffusers import Transformer2DModel
from torch import nn

Norm = Callable[[torch.Tensor], torch.Tensor]


def keep_layouts(denoiser: nn.Module) -> None:
    """Have transformers between convolutions answer in the layout of their input. The numbers stay."""
    for module in denoiser.modules():
        if isinstance(module, Transformer2DModel) and module.is_input_continuous:
            module._get_output_for_continuous_inputs = partial(_maps, module)


def in_its_layout(normalise: Norm) -> Norm:
    """The same, in the layout of its input: to be compiled, which makes it no copy."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        made = normalise(x)
        return made.contiguous(memory_format=torch.channels_last) if _by_pixels(x) else made

    return forward


def _by_pixels(x: torch.Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _maps(
    transformer: Transformer2DModel,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    """diffusers' method, whose arguments these are, without its copy."""
    if transformer.use_linear_projection:
        hidden_states = transformer.proj_out(hidden_states)
    maps = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
    if not _by_pixels(residual):
        maps = maps.contiguous()
    if not transformer.use_linear_projection:
        maps = transformer.proj_out(maps)
    return maps + residual
