"""shared.pipeline.layouts: maps that are laid out by pixels stay so between the blocks of a UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel

from shared.pipeline.layouts import in_its_layout, keep_layouts
from tests import tiny


@pytest.mark.parametrize("name", ["sd1", "sdxl"])  # convolutions around the blocks; linear layers
def test_transformers_answer_in_the_layout_of_their_input(name: str) -> None:
    unet = tiny.load(name).unet
    seen: list[tuple[bool, torch.Tensor]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        made = output[0]
        seen.append((made.is_contiguous(memory_format=torch.channels_last), made))

    transformers = [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
    for transformer in transformers:
        transformer.register_forward_hook(note)
    x, width = torch.randn(1, 4, 16, 16), unet.config.cross_attention_dim
    given = None
    if name == "sdxl":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        given = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}

    def made(weights: torch.memory_format) -> list[tuple[bool, torch.Tensor]]:
        seen.clear()
        unet.to(memory_format=weights)
        with torch.no_grad():
            unet(x, torch.tensor(5), torch.ones(1, 4, width), added_cond_kwargs=given)
        return list(seen)

    plain = made(torch.contiguous_format)
    left = made(torch.channels_last)
    keep_layouts(unet)
    kept, as_before = made(torch.channels_last), made(torch.contiguous_format)
    assert len(plain) == len(transformers)
    if transformers[0].use_linear_projection:  # else a convolution behind the copy lays it out again
        assert not any(by_pixels for by_pixels, _ in left)
    assert all(by_pixels for by_pixels, _ in kept)
    assert not any(by_pixels for by_pixels, _ in as_before)
    for (_, one), (_, other), (_, third) in zip(plain, kept, as_before, strict=True):
        torch.testing.assert_close(other, one)
        assert torch.equal(third, one)


def test_a_norm_answers_in_the_layout_of_its_input() -> None:
    forward = in_its_layout(lambda x: x.contiguous() + 1)  # as torch's own on GPUs
    x = torch.randn(2, 8, 6, 6)
    by_pixels = forward(x.to(memory_format=torch.channels_last))
    assert by_pixels.is_contiguous(memory_format=torch.channels_last) and torch.equal(by_pixels, x + 1)
    assert forward(x).is_contiguous() and forward(torch.zeros(1, 8, 2, 3, 3)).is_contiguous()
