"""Latents between two passes of a picture, enlarged and cropped; one picture's latents from a pipeline's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from shared.api.jobs import SecondPass
from shared.api.media import encode_image
from shared.api.replies import Reply
from shared.api.retouch import cut_from


def enlarged(draft: Reply, second: SecondPass) -> bytes:
    """What the second pass starts from: the first one's latents in safetensors or picture as PNG, enlarged.

    A picture with another aspect ratio than the first one's is the centre crop of one that covers it.
    """
    if second.layout == "pixels":
        size = (second.request.width or 0, second.request.height or 0)
        resample = Image.Resampling[second.mode]
        return encode_image(cut_from(draft.pictures[0].resize(second.covers, resample), size), "png")
    latent = safetensors.torch.load(draft.output[0])["latent"]
    kind = latent.dtype
    if second.layout == "packed":
        factor = math.isqrt(draft.width * draft.height // (4 * latent.shape[1]))
        grid = (draft.height // factor, draft.width // factor)
        frames = picture_latents(latent, second.layout, grid)[None]
    else:
        factor = draft.height // latent.shape[-2]
        # Of a video [1, channels, frames, height, width]: each frame by itself.
        frames = latent.movedim(1, 2).flatten(0, 1) if second.layout == "ncfhw" else latent
    covers = [side // factor for side in second.covers]
    sides = [(second.request.width or 0) // factor, (second.request.height or 0) // factor]
    to = (covers[1], covers[0])
    frames = F.interpolate(frames.float(), to, mode=second.mode, antialias=second.antialias)
    left, top = ((cover - side) // 2 for cover, side in zip(covers, sides, strict=True))
    frames = frames[..., top : top + sides[1], left : left + sides[0]].to(kind)
    if second.layout == "packed":
        frames = packed(frames)
    elif second.layout == "ncfhw":
        frames = frames[None].movedim(2, 1)
    return safetensors.torch.save({"latent": frames.contiguous()})


@contextlib.contextmanager
def upcast(vae: Any) -> Iterator[None]:
    """Inside, a VAE that overflows in half precision computes in fp32, as its pipelines let it decode."""
    dtype = vae.dtype
    if dtype != torch.float16 or not vae.config.get("force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(dtype)


def picture_latents(latents: torch.Tensor, layout: str, grid: tuple[int, int]) -> torch.Tensor:
    """One picture's latents [channels, height, width] out of a pipeline's; of a video the middle frame.

    Args:
        latents: [1, ...], in the layout of ModelSpec.latent_layout.
        grid: (height, width) in latents, which packed latents and tokens do not show.
    """
    first = latents[0]
    if layout == "ncfhw":
        return first[:, first.shape[1] // 2]
    if layout == "nfchw":
        return first[first.shape[0] // 2]
    if layout == "tokens":
        every = first.view(-1, *grid, first.shape[-1])
        return every[len(every) // 2].movedim(-1, 0)
    if layout == "packed":
        height, width = grid
        tiles = first.view(height // 2, width // 2, -1, 2, 2)
        return tiles.permute(2, 0, 3, 1, 4).reshape(-1, height, width)
    return first


def squares(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens [1, tokens, 4 x channels] -> [1, 4 x channels, height / 2, width / 2]; sizes in latents."""
    return latents.transpose(1, 2).reshape(1, -1, height // 2, width // 2)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """[1, channels, height, width] -> squares of 2 x 2, as FLUX's transformer reads them."""
    _, channels, height, width = latents.shape
    tiles = latents.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(1, (height // 2) * (width // 2), channels * 4)
