"""The demo's training pictures, put together on the training device."""

from __future__ import annotations

import random

import numpy as np
import torch
from draw import COLOURS, SHAPES, SIZES, draw_mask, scenes
from torch import Tensor


class Pictures:
    """Draws training pictures on the device: masks by Pillow, once; colours put in on request.

    Small shapes come `small_times` as often as large ones.
    """

    def __init__(
        self, device: torch.device, seed: int, pixels: int, masks_each: int, small_times: int = 1
    ) -> None:
        rng = random.Random(seed)
        self.scenes = [scene for scene in scenes(held_out=False) if scene.size]
        self.device, self.masks_each = device, masks_each
        masks = [
            np.asarray(draw_mask(shape, size, rng, pixels))
            for shape in SHAPES
            for size in SIZES
            for _ in range(masks_each)
        ]
        self.masks = torch.from_numpy(np.stack(masks)).to(device)  # uint8 [shapes * sizes * masks_each, H, W]
        self.palette = torch.tensor(list(COLOURS.values()), device=device).float() / 127.5 - 1  # [colours, 3]
        names = list(COLOURS)
        rows = [
            (
                SHAPES.index(s.shape) * len(SIZES) + SIZES.index(s.size or ""),
                names.index(s.colour),
                names.index(s.background),
            )
            for s in self.scenes
        ]
        self.rows = torch.tensor(rows, device=device)  # int64 [scenes, 3]: kind of mask, colour, background
        often = [k for k, s in enumerate(self.scenes) for _ in range(small_times if s.size == "small" else 1)]
        self.lots = torch.tensor(often, device=device)  # int64: one lot per chance of a scene

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` random pictures, float32 [count, 3, H, W] from -1 to 1, and the indices of their scenes."""
        index = self.lots[torch.randint(len(self.lots), (count,), device=self.device)]
        kind, colour, background = self.rows[index].unbind(1)
        masks = self.masks[kind * self.masks_each + torch.randint_like(kind, self.masks_each)]
        weight = masks.float().div_(255)[:, None]
        front, back = self.palette[colour][..., None, None], self.palette[background][..., None, None]
        return torch.lerp(back.expand(-1, -1, *weight.shape[2:]), front, weight), index
