"""Tensors in 8 or 4 bits on their way to other ranks: whole numbers or float8, with a scale for each row."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Bits = Literal["int8", "float8", "int4"]
BITS: tuple[Bits, ...] = get_args(Bits)
LARGEST: dict[Bits, float] = {"int8": 127.0, "float8": 448.0, "int4": 7.0}
"""The largest number of each format."""
FORMATS: dict[Bits, torch.dtype] = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "int4": torch.uint8}
DIFFERENCES: Bits = "int4"
"""The format that is too coarse for anything but differences."""
SCALE_BYTES = 4  # fp32
GROUP = 64
"""Channels that share a scale where attention heads are not known."""
LEAST_SCALE = 1e-30  # a row of zeros


def bits_named(name: str | None) -> Bits | None:
    """A format by its name; None for every other name."""
    return next((bits for bits in BITS if bits == name), None)


def packed(x: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Each row of x [..., channels] in so many bits, then its scale: bytes [..., width_of(channels)].

    A row's error is about 0.6 % of it as int8, and 2.5 % as float8, which keeps small numbers beside large
    ones; 11 % as int4. Channels must be a multiple of SCALE_BYTES, in 4 bits of twice as many.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST[bits]).clamp_min(LEAST_SCALE)
    values = x / scale
    if bits == "int4":
        low, high = (values.round() + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        rounded = low + 16 * high
    else:
        rounded = (values.round() if bits == "int8" else values).to(FORMATS[bits])
    return torch.cat([rounded.view(torch.uint8), _bytes(scale)], -1)


def unpacked(rows: torch.Tensor, bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `packed`."""
    values, scale = rows.split([rows.shape[-1] - SCALE_BYTES, SCALE_BYTES], -1)
    values = values.view(FORMATS[bits])
    if bits == "int4":
        # A row of zero bytes is a row of zeros, whatever they stand for: its scale is zero.
        values = torch.stack([values % 16, values // 16], -1).flatten(-2).to(torch.int8) - 8
    return (values.float() * _numbers(scale)).to(dtype)


def _bytes(scale: torch.Tensor) -> torch.Tensor:
    """fp32 [..., 1] as bytes [..., SCALE_BYTES], the lowest first.

    By arithmetic: inductor makes a view of a tensor as one of smaller numbers only where its rows are dense.
    """
    whole = scale.view(torch.int32)
    return torch.cat([whole >> (8 * place) & 255 for place in range(SCALE_BYTES)], -1).to(torch.uint8)


def _numbers(rows: torch.Tensor) -> torch.Tensor:
    """The inverse of `_bytes`."""
    parts = [row.to(torch.int32) << (8 * place) for place, row in enumerate(rows.split(1, -1))]
    return (parts[0] | parts[1] | parts[2] | parts[3]).view(torch.float32)


def width_of(channels: int, bits: Bits) -> int:
    """Bytes of a row of so many channels."""
    return (channels // 2 if bits == "int4" else channels) + SCALE_BYTES


def packed_groups(x: torch.Tensor, bits: Bits) -> torch.Tensor:
    """`packed`, with a scale for each GROUP channels of x [..., channels], or for all of them."""
    return packed(x.unflatten(-1, (-1, _group(x.shape[-1]))), bits).flatten(-2)


def unpacked_groups(rows: torch.Tensor, channels: int, bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `packed_groups`, for so many channels."""
    return unpacked(rows.unflatten(-1, (-1, width_of(_group(channels), bits))), bits, dtype).flatten(-2)


def _group(channels: int) -> int:
    return channels if channels % GROUP else GROUP
