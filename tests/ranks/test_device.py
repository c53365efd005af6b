"""shared.ranks.device: what a rank tells of its memory."""

from __future__ import annotations

import mmap

import torch

from shared.ranks.device import memory_report


def test_memory_in_use_is_what_the_process_holds() -> None:
    before = memory_report(torch.device("cpu"))
    with mmap.mmap(-1, 40_000_000) as kept:  # pages of its own: a tensor may get what the heap has left
        kept.write(b"1" * len(kept))
        after = memory_report(torch.device("cpu"))
    assert after["allocated"] - before["allocated"] > 30_000_000 and after["peak"] >= after["allocated"] * 0.9
