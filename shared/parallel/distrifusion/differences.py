"""What patches exchange as rounded differences to the step before, each with what rounding left out before.

Source: CompactFusion (arXiv 2507.17511): activations change little from step to step, so that their
differences need few bits; as sender and receivers add up the same rounded ones, no error adds up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.parallel.rounding import Bits, packed_groups, unpacked_groups


class Differences:
    """What all ranks know of the tensors of one exchange.

    Args:
        bits: the format of the differences.
    """

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        self.known: list[torch.Tensor] = []
        """By rank: what every rank takes for its tensor."""

    @property
    def held_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.known)

    def begin(self, whole: Sequence[torch.Tensor]) -> None:
        """The first step of a generation: the ranks' tensors as they are."""
        if not self.known:
            self.known = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in whole]
        for known, x in zip(self.known, whole, strict=True):
            known.copy_(x)

    def sent(self, own: torch.Tensor, rank: int) -> torch.Tensor:
        """What this rank sends in a later step."""
        rows = packed_groups(own - self.known[rank], self.bits)
        self._add(rank, rows)
        return rows

    def arrived(self, inbox: Sequence[torch.Tensor | None]) -> None:
        """What the others have sent, by rank; each arrival counts once, so that it is zero afterwards."""
        for rank, rows in enumerate(inbox):
            if rows is not None:
                self._add(rank, rows)
                rows.zero_()

    def _add(self, rank: int, rows: torch.Tensor) -> None:
        known = self.known[rank]
        known += unpacked_groups(rows, known.shape[-1], self.bits, known.dtype)
