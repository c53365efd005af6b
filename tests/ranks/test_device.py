"""shared.ranks.device: what a rank tells of its memory, and its frozen heap."""

from __future__ import annotations

import gc
import mmap
import weakref

import torch

from shared.ranks.device import freeze_heap, memory_report


def test_memory_in_use_is_what_the_process_holds() -> None:
    before = memory_report(torch.device("cpu"))
    with mmap.mmap(-1, 40_000_000) as kept:  # pages of its own: a tensor may get what the heap has left
        kept.write(b"1" * len(kept))
        after = memory_report(torch.device("cpu"))
    assert after["allocated"] - before["allocated"] > 30_000_000 and after["peak"] >= after["allocated"] * 0.9


def test_a_frozen_heap_still_gives_back_what_dies() -> None:
    class Node:
        other: Node

    try:
        one, two = Node(), Node()
        one.other, two.other = two, one
        alive = weakref.ref(one)
        freeze_heap()
        del one, two
        gc.collect()
        assert alive() is not None, "what is frozen is out of a collection's sight"
        freeze_heap()
        assert alive() is None
    finally:
        gc.unfreeze()
