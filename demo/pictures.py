"""The demo's training pictures, put together on the training device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from draw import COLOURS, SHAPES, SIZES, Scene, draw_mask, scenes
from torch import Tensor

CAPTION_DROP = 0.1  # of all captions, for classifier-free guidance


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


class Latents:
    """Training pictures in a trained autoencoder's latents, scaled as the denoiser sees them, with captions.

    With `rescale` the autoencoder's scaling_factor is set so that they have a standard deviation of 1.
    """

    @torch.no_grad()
    def __init__(
        self, vae: Any, pictures: Pictures, count: int, batch: int, *, rescale: bool = False
    ) -> None:
        parts = []
        for first in range(0, count, batch):
            images, index = pictures.draw(min(batch, count - first))
            with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
                latents = vae.encode(images).latent_dist
            parts.append((latents.mean.float(), latents.std.float(), index))
        means, stds, self.indices = (torch.cat(part) for part in zip(*parts, strict=True))
        if rescale:
            # The denoiser sees samples, so the spread of the posterior counts as well.
            spread = float((means.var() + stds.square().mean()).rsqrt())
            vae.register_to_config(scaling_factor=round(spread, 5))
        self.means, self.stds = means * vae.config.scaling_factor, stds * vae.config.scaling_factor
        sizeless = [Scene(s.shape, s.colour, s.background) for s in pictures.scenes]
        self.sizes = len(sizeless)
        self.captions = ["", *(s.caption for s in pictures.scenes), *(s.caption for s in sizeless)]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` random latents, float32 [count, 4, h, w], and the indices of their captions."""
        chosen = torch.randint(len(self.indices), (count,), device=self.indices.device)
        latents = torch.addcmul(self.means[chosen], self.stds[chosen], torch.randn_like(self.means[chosen]))
        # Half of the captions do not name the size.
        caption = 1 + self.indices[chosen] + torch.randint_like(chosen, 2) * self.sizes
        return latents, caption * (torch.rand(count, device=chosen.device) >= CAPTION_DROP)
