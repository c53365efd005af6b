"""A prompt's keys and values, made once a prompt: cross-attention uses the same ones in every step.

They replace the prompt's embeddings among the denoiser's arguments, one beside the other in one tensor, so
captured steps, divided branches and stages take them as they take any other input.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

from shared.parallel.asyncdiff.trace import parameter_names
from shared.parallel.method import Part
from shared.parallel.shapes import Latest
from shared.parallel.surgery import Forward, Surgery

PROMPT = "encoder_hidden_states"
BRANCHES = 2
"""Prompts that one generation alternates between: a rank may compute either guidance branch of a step."""


class KeptPrompt(Part):
    """Makes keys and values of cross-attention once a generation and prompt.

    Layers are called, LoRA and quantization included, by themselves and before the denoiser: not for weights
    that are elsewhere until their block is called. A denoiser that also uses the prompt in another way is
    left as it is. To be put on after what divides or captures the denoiser, and before what divides guidance.

    Args:
        denoiser: a UNet or ControlNet of diffusers.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self._names = parameter_names(denoiser)
        self._kept: Latest[tuple[torch.Tensor, torch.Tensor]] = Latest(BRANCHES)
        """By where a prompt's embeddings lie: these, so that nothing else comes to lie there, and what is
        made of them."""
        self._layers: list[Forward] = []
        surgery = self.held.enter_context(Surgery())
        blocks = attending(denoiser)
        self.layers = 2 * len(blocks)
        """How many layers are not called in each step."""
        start = 0
        for block in blocks:
            attention = block.attn2
            self._layers.append(surgery.replace(attention.to_k, "forward", _keys))
            self._layers.append(surgery.replace(attention.to_v, "forward", _values))
            width = 2 * attention.inner_kv_dim
            surgery.override(block, _taking(start, width))
            start += width
        if blocks:
            surgery.override(denoiser, self._forward)
        self.held.callback(self.reset)

    def begin(self, steps: int, pictures: int = 1) -> None:
        super().begin(steps, pictures)
        self.reset()  # adapters may have other scales

    def reset(self) -> None:
        self._kept.clear()

    def _forward(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        prompt = kwargs[PROMPT]
        place = _place(prompt)
        kept = self._kept.get(place)
        if kept is None:
            made = torch.cat([layer(prompt) for layer in self._layers], -1)
            kept = self._kept.put(place, (prompt, made))
        return original(**(kwargs | {PROMPT: kept[1]}))


def attending(denoiser: nn.Module) -> list[BasicTransformerBlock]:
    """The blocks that attend to the prompt; none where the denoiser uses it in another way too."""
    blocks = [
        module
        for module in denoiser.modules()
        if isinstance(module, BasicTransformerBlock)
        and module.attn2 is not None
        and module.attn2.is_cross_attention
        and not module.attn2.norm_cross
    ]
    theirs = {block.attn2 for block in blocks}
    attentions = [module for module in denoiser.modules() if isinstance(module, Attention)]
    config: Any = denoiser.config
    otherwise = (
        any(one.is_cross_attention and one not in theirs for one in attentions)
        or config.get("encoder_hid_dim_type") not in (None, "ip_image_proj")
        or config.get("addition_embed_type") not in (None, "text_time")
    )
    return [] if otherwise else blocks


# Functions without state: compiled code of one block serves all blocks like it.
def _keys(made: torch.Tensor) -> torch.Tensor:
    return made[..., : made.shape[-1] // 2]


def _values(made: torch.Tensor) -> torch.Tensor:
    return made[..., made.shape[-1] // 2 :]


def _taking(start: int, width: int) -> Any:
    """Gives a block its part of what is made of the prompt, which an IP-Adapter puts before its pictures."""

    def forward(original: Forward, args: tuple, kwargs: dict) -> Any:
        made = kwargs[PROMPT]
        if isinstance(made, tuple):
            mine: Any = (made[0].narrow(-1, start, width), *made[1:])
        else:
            mine = made.narrow(-1, start, width)
        return original(*args, **(kwargs | {PROMPT: mine}))

    return forward


def _place(prompt: torch.Tensor) -> Hashable:
    """Where a tensor's values lie, and which: what writes into it later makes it another one."""
    version = None if prompt.is_inference() else prompt._version
    return prompt.data_ptr(), prompt.shape, prompt.stride(), prompt.dtype, version
