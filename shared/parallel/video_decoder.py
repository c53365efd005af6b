"""The VAE decodes a video in rows, some on each rank, with the rows at their borders exchanged: exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15CausalConv3d,
)
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import LTX2VideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d
from torch import nn

from shared.parallel.distrifusion.decoder import KINDS, PatchDecoder
from shared.parallel.distrifusion.patch_exchange import PatchExchange
from shared.parallel.distrifusion.patched import cuts, gather
from shared.parallel.exchange import Ranks
from shared.parallel.method import Part
from shared.parallel.surgery import Forward, Surgery

VAES = (AutoencoderKLWan, AutoencoderKLQwenImage, AutoencoderKLHunyuanVideo15, AutoencoderKLLTX2Video)
WITH_CONV = (HunyuanVideo15CausalConv3d, LTX2VideoCausalConv3d)
"""Layers that pad what they give to a convolution inside them."""
CONVS = (WanCausalConv3d, QwenImageCausalConv3d, *WITH_CONV, nn.Conv2d, nn.Conv3d)
FRAME_ATTENTION = (WanAttentionBlock, QwenImageAttentionBlock)
FRAMES, ROWS = -3, -2
"""Dimensions of maps [batch, channels, frames, height, width]; rows are cut."""


class VideoDecoder(Part):
    """Makes all ranks share ``vae.decode`` of a video's VAE; each of them gets the whole video.

    Every rank must decode the same latents at the same time. Each computes some rows of all frames: a
    convolution gets the next rank's border row and its own padding, so that every value is made of what the
    whole decoder would make it of; what else there is takes one place at a time, or is attention, whose keys
    are gathered. Tiling, slicing and frames at a time still work, as each call of the decoder is shared.
    Latents with fewer rows than there are ranks are decoded whole by each.

    Args:
        vae: of Wan, Qwen-Image, HunyuanVideo 1.5 or LTX-2.
        group: the ranks; None for all.
        least: pixels of a call from which the ranks are to share it; whoever calls sets `active` by it.

    Raises:
        ValueError: another kind of VAE, or one whose decoder draws noise.
    """

    def __init__(self, vae: Any, group: dist.ProcessGroup | None = None, least: int = 0) -> None:
        super().__init__()
        self.least, self.active = least, True
        if not isinstance(vae, VAES):
            raise ValueError(
                f"decoding in rows supports {', '.join(c.__name__ for c in VAES)}; got {type(vae).__name__}"
            )
        if _draws_noise(vae):
            raise ValueError(f"decoding in rows does not support noise inside of {type(vae).__name__}")
        self.ranks = Ranks.of(group)
        self._exchange: PatchExchange | None = None
        self._sizes: list[int] = []
        surgery = self.held.enter_context(Surgery())
        inside: set[int] = set()
        for module in vae.decoder.modules():
            if id(module) in inside:
                continue
            if isinstance(module, FRAME_ATTENTION):
                surgery.override(module, self._whole)
            elif isinstance(module, HunyuanVideo15AttnBlock):
                surgery.override(module, self._causal_attention(module))
            elif isinstance(module, CONVS):
                inside |= {id(part) for part in module.modules()}
                conv: Any = module.conv if isinstance(module, WITH_CONV) else module
                if conv.kernel_size[ROWS] > 1:
                    surgery.override(module, self._convolution(conv.kernel_size[ROWS] // 2))
        surgery.override(vae.decoder, self._decode)

    def _decode(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        latents, (group, rank, ranks) = args[0], self.ranks
        rows = latents.shape[ROWS]
        if not self.active or ranks == 1 or rows < ranks:
            return original(*args, **kwargs)
        ends = cuts(rows, 1, ranks)
        self._sizes = [stop - start for start, stop in pairwise(ends)]
        self._exchange = PatchExchange(group, latents.device, sizes=self._sizes)
        self._exchange.start()
        try:
            own = latents.narrow(ROWS, ends[rank], self._sizes[rank])
            return self._gathered(original(own, *args[1:], **kwargs))
        finally:
            self._exchange = None

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks."""
        group, rank, _ = self.ranks
        ratio = own.shape[ROWS] // self._sizes[rank]
        return gather(own, own.ndim + ROWS, [size * ratio for size in self._sizes], group)

    def _convolution(self, border: int) -> Any:
        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            exchange = self._exchange
            if exchange is None:
                return original(*args, **kwargs)
            x, *rest = args
            # What Wan's convolutions keep of the frames before travels with these.
            before = rest[0] if rest and torch.is_tensor(rest[0]) else None
            parts = [x] if before is None else [before, x]
            rows = x.shape[ROWS]

            def borders(start: int) -> torch.Tensor:
                return torch.cat([part.narrow(ROWS, start, border) for part in parts], FRAMES)

            def joined(above: torch.Tensor | None, below: torch.Tensor | None) -> list[torch.Tensor]:
                lengths = [part.shape[FRAMES] for part in parts]
                stacks: list[Any] = [parts]
                if above is not None:
                    stacks.insert(0, above.split(lengths, FRAMES))
                if below is not None:
                    stacks.append(below.split(lengths, FRAMES))
                return [torch.cat(stack, ROWS) for stack in zip(*stacks, strict=True)]

            wide = exchange.rows(borders(0), borders(rows - border), joined)
            if before is not None:
                rest[0] = wide[0]
            # Its padding goes where no neighbour is, and is cut off with the neighbours' rows elsewhere.
            made = original(wide[-1], *rest, **kwargs)
            return made.narrow(ROWS, border if exchange.rank > 0 else 0, rows)

        return answer

    def _whole(self, original: Forward, args: tuple, kwargs: dict) -> Any:
        """Attention inside each frame, a few per mille of the work: every rank computes all of it."""
        if self._exchange is None:
            return original(*args, **kwargs)
        start = sum(self._sizes[: self.ranks.rank])
        whole = self._gathered(args[0])
        ratio = whole.shape[ROWS] // sum(self._sizes)
        return original(whole, *args[1:], **kwargs).narrow(ROWS, start * ratio, args[0].shape[ROWS])

    def _causal_attention(self, block: HunyuanVideo15AttnBlock) -> Any:
        """Each frame attends to itself and to those before: frame by frame, without a mask of all places."""

        def answer(original: Forward, args: tuple, kwargs: dict) -> Any:
            if self._exchange is None:
                return original(*args, **kwargs)
            x = args[0]
            normed = block.norm(x)
            keys, values = (self._gathered(layer(normed)) for layer in (block.to_k, block.to_v))
            query = block.to_q(normed)

            def places(maps: torch.Tensor) -> torch.Tensor:
                return maps.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()

            frames = [
                F.scaled_dot_product_attention(
                    places(query[:, :, f : f + 1]), places(keys[:, :, : f + 1]), places(values[:, :, : f + 1])
                )
                for f in range(x.shape[2])
            ]
            attended = torch.cat(frames, 2).squeeze(1).transpose(1, 2).reshape(x.shape)
            made: torch.Tensor = block.proj_out(attended) + x
            return made

        return answer


def _draws_noise(vae: Any) -> bool:
    noise = vae.config.get("decoder_inject_noise", False)
    return any(noise) if isinstance(noise, list | tuple) else bool(noise)


def can_share(vae: Any) -> bool:
    """Whether `shared_decoder` supports a VAE."""
    return isinstance(vae, KINDS) or (isinstance(vae, VAES) and not _draws_noise(vae))


def shared_decoder(vae: Any, group: dist.ProcessGroup | None, least: int = 0) -> PatchDecoder | VideoDecoder:
    """All ranks of a group share ``vae.decode``: of pictures in patches, of videos in rows.

    Raises:
        ValueError: a VAE of another kind.
    """
    cls = VideoDecoder if isinstance(vae, VAES) else PatchDecoder
    return cls(vae, group, least)
