"""Layers of a decoder on large maps, in bands of rows: what lies between two maps is never whole. Exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional as F

from shared.parallel.distrifusion.layers import (
    GroupNormMode,
    exchange_now,
    exchanging_nothing,
    padded_inside,
    unpadded,
)
from shared.parallel.distrifusion.moments import apply_moments, group_moments, whole_moments
from shared.parallel.surgery import Forward, Surgery

BAND = 256 << 20
"""Bytes of a band of the wider map: a GPU works on it for a millisecond, so that launches do not show."""
LARGE = 512 << 20
"""Bytes of a map above which there are bands: of smaller ones all that is saved is less than most weights."""

Edges = tuple[torch.Tensor | None, torch.Tensor | None]
"""The other ranks' rows above and below a map; None outside of the picture."""


def in_bands(decoder: nn.Module, surgery: Surgery) -> None:
    """Make a decoder compute its large maps in bands, on any number of ranks.

    A resnet of plain diffusers holds up to five maps: its input, that normalised and activated, the shortcut
    and the sum. Here it holds its input and its output, and of what is between them one band, with the row on
    either side that a convolution needs. Moments of group norm are of the whole. Smaller maps are computed as
    ever, and all where autograd is on.

    It must be done before weights are sharded and before patches: both call what is overridden here. What is
    in bands already stays so.

    Args:
        decoder: of AutoencoderKL or FLUX.2's; or Stable Video Diffusion's, of which what joins frames is not
            in bands. Of another kind it stays as it is.
        surgery: takes the overrides, and gives them back.
    """
    if hasattr(decoder, "in_bands"):
        return
    surgery.add(decoder, "in_bands", True)
    for module in decoder.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain_resnet(module):
            surgery.override(module, partial(_resnet, module))
        elif isinstance(module, Upsample2D) and _is_plain_upsampler(module):
            surgery.override(module, partial(_upsampler, module))
    if type(decoder) is Decoder and isinstance(decoder.conv_norm_out, nn.GroupNorm):
        surgery.override(decoder, partial(_decoder, decoder))


def _decoder(decoder: Any, original: Forward, args: tuple, kwargs: dict) -> Any:
    """Without the blocks' own loops, which hold on to what a block was given until it ends."""
    given = dict(zip(("sample", "latent_embeds"), args, strict=False)) | kwargs
    if torch.is_grad_enabled() or given.get("latent_embeds") is not None:
        return original(*args, **kwargs)
    x = decoder.mid_block(decoder.conv_in(given["sample"]), None)
    for block in decoder.up_blocks:
        for part in _parts(block):
            x = part(x, None)
    norm, activation, conv = decoder.conv_norm_out, decoder.conv_act, decoder.conv_out
    if count := _count(x, x.shape[1]):
        return _normed(x, norm, activation, conv, count)
    return conv(activation(norm(x)))


def _resnet(block: Any, original: Forward, args: tuple, kwargs: dict) -> Any:
    x: torch.Tensor = args[0]
    count = _count(x, max(block.in_channels, block.out_channels))
    if not count:
        return original(*args, **kwargs)
    made = _normed(x, block.norm1, block.nonlinearity, block.conv1, count)
    made = _normed(made, block.norm2, block.nonlinearity, block.conv2, count, in_place=True)
    if block.conv_shortcut is None:
        return made.add_(x)
    for start, length in _bands(x.shape[2], count):
        made.narrow(2, start, length).add_(block.conv_shortcut(x.narrow(2, start, length)))
    return made


def _upsampler(block: Any, original: Forward, args: tuple, kwargs: dict) -> Any:
    x: torch.Tensor = args[0]
    count = _count(x, 4 * max(block.channels, block.out_channels))
    if not count or any(value is not None for value in (*args[1:], *kwargs.values())):
        return original(*args, **kwargs)
    edges: Edges = (None, None)
    if (exchange := exchange_now()) is not None:
        edges = exchange.rows(_row(x, 0), _row(x, x.shape[2] - 1), lambda *rows: rows)

    def twice(band: torch.Tensor) -> torch.Tensor:
        wide = F.interpolate(band, scale_factor=2.0, mode="nearest")
        return wide.narrow(2, 1, wide.shape[2] - 2)

    return _convolved(x, edges, twice, block.conv, count)


def _count(x: torch.Tensor, channels: int) -> int:
    """Into how many bands a layer is divided whose wider map has so many channels; 0: it is not."""
    rows, exchange = x.shape[2], exchange_now()
    if exchange is not None:
        # Those of the largest patch, as the ranks must agree on what they exchange.
        assert exchange.sizes is not None
        rows = rows * max(exchange.sizes) // exchange.sizes[exchange.rank]
    nbytes = len(x) * channels * rows * x.shape[3] * x.element_size()
    return 0 if torch.is_grad_enabled() or nbytes <= LARGE else -(-nbytes // BAND)


def _normed(
    x: torch.Tensor,
    norm: nn.GroupNorm,
    activation: nn.Module,
    conv: nn.Module,
    count: int,
    in_place: bool = False,
) -> torch.Tensor:
    """The convolution of the map as it is normalised and activated."""
    own = group_moments(x, norm.num_groups)
    mean, variance = own
    edges: Edges = (None, None)
    if (exchange := exchange_now()) is not None:
        first, last = _row(x, 0), _row(x, x.shape[2] - 1)
        known, *rows = exchange.moments_and_rows(own, x.numel() // mean.numel(), first, last)
        edges = rows[0], rows[1]
        mean, variance = whole_moments(own, known, moving=False)

    def apply(band: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        return apply_moments(band, mean, variance, weight, bias, norm.eps)

    def prepare(band: torch.Tensor) -> torch.Tensor:
        with GroupNormMode(apply):  # weights that come for each call are there while the norm's forward runs
            band = norm(band)
        made: torch.Tensor = activation(band)
        return made

    return _convolved(x, edges, prepare, conv, count, in_place)


def _convolved(
    x: torch.Tensor,
    edges: Edges,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    conv: nn.Module,
    count: int,
    in_place: bool = False,
) -> torch.Tensor:
    """A convolution of 3 x 3 of what `prepare` makes of bands that have one more row at each end."""
    above, below = edges
    rows, zeros = x.shape[2], torch.zeros_like(_row(x, 0))

    def convolved(before: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        after = _row(x, stop) if stop < rows else zeros if below is None else below
        with exchanging_nothing(), unpadded(padded_inside(conv), 0):
            band = prepare(torch.cat([before, x.narrow(2, start, stop - start), after], 2))
            if start == 0 and above is None:
                _row(band, 0).zero_()
            if stop == rows and below is None:
                _row(band, band.shape[2] - 1).zero_()
            made: torch.Tensor = conv(band)
        return made

    before = zeros if above is None else above
    out = x if in_place else None
    for start, length in _bands(rows, count):
        last = _row(x, start + length - 1).clone()  # the next band's, before this one is written over it
        made = convolved(before, start, start + length)
        scale = made.shape[2] // length
        if out is None:
            out = _taller(made, rows * scale)
        out.narrow(2, start * scale, length * scale).copy_(made)
        before = last
        del made
    assert out is not None
    return out


def _parts(block: Any) -> Iterator[nn.Module]:
    """What a block calls one after the other, each with the map and None, or the block itself."""
    if type(block) is UpDecoderBlock2D and "forward" not in vars(block):
        yield from (*block.resnets, *(block.upsamplers or ()))
    else:
        yield block


def _bands(rows: int, count: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each."""
    length = -(-rows // count)
    for start in range(0, rows, length):
        yield start, min(length, rows - start)


def _row(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.narrow(2, number, 1)


def _taller(band: torch.Tensor, rows: int) -> torch.Tensor:
    """Memory for so many rows of what a band has one of, laid out alike."""
    by_pixel = band.stride(1) == 1 and band.shape[1] > 1
    layout = torch.channels_last if by_pixel else torch.contiguous_format
    shape = (*band.shape[:2], rows, band.shape[3])
    return torch.empty(shape, dtype=band.dtype, device=band.device, memory_format=layout)


def _is_plain_resnet(block: Any) -> bool:
    """Whether a resnet does no more than norm, activation and convolution, twice, and a sum."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is None
        and block.time_embedding_norm != "scale_shift"
        and block.output_scale_factor == 1
        and block.conv2.out_channels == block.out_channels
        and (block.dropout.p == 0 or not block.training)
        and all(map(_is_usual, (block.conv1, block.conv2)))
    )


def _is_plain_upsampler(block: Any) -> bool:
    """Whether an upsampler repeats every pixel four times and convolves that."""
    return (
        block.norm is None
        and block.interpolate
        and block.use_conv
        and not block.use_conv_transpose
        and block.name == "conv"
        and _is_usual(block.conv)
    )


def _is_usual(conv: Any) -> bool:
    return all(
        (m.kernel_size, m.stride, m.padding, m.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        for m in padded_inside(conv)
    )
