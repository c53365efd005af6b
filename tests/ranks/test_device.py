"""shared.ranks.device: what a rank tells of its memory, and its frozen heap."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch

from shared.ranks.device import (
    begin_request,
    freeze_heap,
    memory_report,
    out_of_memory,
    put_off_full_collections,
    request_peak,
)


def test_memory_in_use_is_what_the_process_holds() -> None:
    before = memory_report(torch.device("cpu"))
    with mmap.mmap(-1, 40_000_000) as kept:  # pages of its own: a tensor may get what the heap has left
        kept.write(b"1" * len(kept))
        after = memory_report(torch.device("cpu"))
    assert after["allocated"] - before["allocated"] > 30_000_000 and after["peak"] >= after["allocated"] * 0.9


def test_a_requests_peak_is_its_own() -> None:
    cpu = torch.device("cpu")
    begin_request(cpu)
    before = request_peak(cpu)
    with mmap.mmap(-1, 80_000_000) as kept:
        kept.write(b"1" * len(kept))
    assert request_peak(cpu) - before > 60_000_000, "also after it is given back"
    begin_request(cpu)
    assert request_peak(cpu) - before < 40_000_000


def test_what_out_of_memory_looks_like() -> None:
    wrapped = ValueError("the pipeline failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    after = RuntimeError("operation failed due to a previous error during capture")
    after.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    host = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
    assert all(map(out_of_memory, (wrapped, after, host, MemoryError())))
    assert not any(map(out_of_memory, (None, ValueError("no memory"), RuntimeError("mat1 and mat2"))))
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(full.value)


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


def test_while_loading_only_young_garbage_is_collected() -> None:
    """Until the heap is frozen; full collections come as usual afterwards."""
    usual = gc.get_threshold()
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        generations.append(info["generation"])

    gc.callbacks.append(note)
    try:
        put_off_full_collections()
        kept = [[number] for number in range(usual[0] * usual[1] * (usual[2] + 5) * 2)]
        assert set(generations) == {0, 1} and kept
        freeze_heap()
        assert gc.get_threshold() == usual and generations[-1] == 2
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*usual)
        gc.unfreeze()
