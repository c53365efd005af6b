"""Tensors in few bits on their way to other ranks."""

from __future__ import annotations

import pytest
import torch

from shared.parallel.rounding import BITS, SCALE_BYTES, Bits, packed, unpacked, width_of

ERROR: dict[Bits, float] = {"int8": 0.007, "float8": 0.03, "int4": 0.12}
"""Of a row, in the mean."""


@pytest.mark.parametrize("bits", BITS)
def test_rows_come_back_with_the_stated_error(bits: Bits) -> None:
    x = torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    x = x * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    rows = packed(x, bits)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, width_of(64, bits))
    back = unpacked(rows, bits, torch.float32)
    errors = (back - x).norm(dim=-1) / x.norm(dim=-1)
    assert 0 < errors.mean() < ERROR[bits] and errors.max() < 1.5 * ERROR[bits]
    # The last bytes are the scale as fp32 has it, so that any rank reads it.
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    assert torch.equal(unpacked(rows, bits, torch.float32).abs().amax(-1) > 0, scale[..., 0] > 1e-30)


def test_a_row_of_zeros_stays_zeros() -> None:
    for bits in BITS:
        assert not unpacked(packed(torch.zeros(2, 64), bits), bits, torch.bfloat16).any()
