"""Memory of the other ranks of this machine, which a rank copies from without asking them (CUDA IPC).

A collective needs multiprocessors, which it takes from the products that run beside it, and all ranks at the
same time. Weights do not change, so a rank may fetch them when it likes, by the GPU's copy engines.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from shared.parallel.exchange import Ranks, all_gather

log = logging.getLogger(__name__)
SAMPLE = 1 << 16
"""Bytes at the begin and at the end of each rank's memory that are compared with what a collective brings."""


def seen_by_all(own: torch.Tensor, ranks: Ranks) -> list[torch.Tensor] | None:
    """The tensors of all ranks, in rank order, each as if it were on this rank's device.

    They must have one length, be filled, and not change any more. All ranks must call this.

    Args:
        own: of bytes, on this rank's device.

    Returns:
        None, on all ranks alike, where one cannot read another's: on a CPU, on other machines, between GPUs
        without peer copy, and where NCCL_P2P_DISABLE says not to.
    """
    if own.device.type != "cuda" or ranks.size == 1 or os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return None
    told: list[Any] = [None] * ranks.size
    dist.all_gather_object(told, _offer(own), group=ranks.group)
    seen = (
        _opened(told, own, ranks.rank) if all(told) and len({machine for machine, _ in told}) == 1 else None
    )
    ends = torch.cat([own[:SAMPLE], own[-SAMPLE:]])
    sent = all_gather(ends[None], ranks.group)  # also: every rank's memory is filled before another reads it
    good = seen is not None and all(
        torch.equal(torch.cat([theirs[:SAMPLE], theirs[-SAMPLE:]]), sample)
        for theirs, sample in zip(seen, sent, strict=True)
    )
    verdict = torch.tensor(int(good), device=own.device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=ranks.group)
    return seen if verdict.item() else None


def _offer(own: torch.Tensor) -> tuple[str, tuple[Any, ...]] | None:
    """Which machine this is, and what torch needs to find this memory in another process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), reduce_tensor(own)[1]
    except (OSError, RuntimeError) as error:  # such as an allocator whose memory cannot be shared
        log.info("this GPU's memory is not shared with other ranks: %s", error)
        return None


def _opened(told: Sequence[Any], own: torch.Tensor, rank: int) -> list[torch.Tensor] | None:
    seen = []
    for number, (_, arguments) in enumerate(told):
        if number == rank:
            seen.append(own)
            continue
        call = inspect.signature(rebuild_cuda_tensor).bind(*arguments)
        # Opened for this device, which then reads it without a context of its own on the other.
        call.arguments["storage_device"] = own.device.index
        try:
            seen.append(rebuild_cuda_tensor(*call.args, **call.kwargs))
        except RuntimeError as error:
            log.info("the memory of rank %d cannot be read: %s", number, str(error).splitlines()[0])
            return None
    return seen


class Fetched:
    """Copies on streams of their own that were started; `wait` makes the current stream wait for them.

    Args:
        whole: filled with `parts`, one behind the other.
        own: which part is this rank's; the next one's turn is first, so that not all ranks read from one.
        cut: which bytes of the own part are needed, by begin and end.
        streams: for the own part, which the memory of this GPU brings, and for those that a link brings: two
            limits that need not be waited for one after the other.
    """

    def __init__(
        self,
        whole: torch.Tensor,
        parts: Sequence[torch.Tensor],
        own: int,
        cut: Sequence[tuple[int, int]],
        streams: Sequence[torch.cuda.Stream],
    ) -> None:
        length, others = parts[0].numel(), (*range(own + 1, len(parts)), *range(own))
        places = whole.split(length)
        near = [(places[own][slice(*bytes_)], parts[own][slice(*bytes_)]) for bytes_ in cut]
        far = [(places[number], parts[number]) for number in others]
        current = torch.cuda.current_stream()
        self._done = []
        for stream, copies in zip(streams, (near, far), strict=True):
            if not copies:
                continue
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for place, part in copies:
                    place.copy_(part, non_blocking=True)
            self._done.append(stream.record_event())

    def wait(self) -> None:
        current = torch.cuda.current_stream()
        for event in self._done:
            current.wait_event(event)
