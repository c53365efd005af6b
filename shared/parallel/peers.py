"""Memory of the other ranks of this machine, which a rank's GPU copies from (CUDA IPC, symmetric memory).

A collective needs multiprocessors, which it takes from the products that run beside it. The GPU's copy
engines need none: by them a rank fetches weights, which do not change, when it likes, and what all ranks have
just made once all of them have made it.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed import _symmetric_memory as symmetric
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from shared.parallel.exchange import Ranks, all_gather
from shared.parallel.graphs import pool_of

log = logging.getLogger(__name__)
NO_PEERS = "NCCL_P2P_DISABLE"
NO_LIMIT = timedelta(0)
BUFFERS = 2
"""Gatherings that may be under way at once: of values, and of keys."""
ALIGNED = 16
"""Bytes."""
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
    if own.device.type != "cuda" or ranks.size == 1 or os.environ.get(NO_PEERS, "0") != "0":
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
    return seen if _all_of(good, ranks, own.device) else None


def _offer(own: torch.Tensor) -> tuple[str, tuple[Any, ...]] | None:
    """Which machine this is, and what torch needs to find this memory in another process."""
    try:
        return _machine(), reduce_tensor(own)[1]
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


class PeerGather:
    """Gathers what the ranks of a group have made, by copy engines, out of memory that they all see.

    Torch's own "low contention" gathering, but that the tensors may be overwritten as soon as it has started,
    as compiled code does. A shared buffer is used again once its copies have been waited for, so at most
    BUFFERS gatherings may be under way. All ranks must do everything alike; `between` makes it.

    Args:
        group: the ranks, on GPUs of one machine that read each other's memory.
        device: this rank's.
    """

    _of: ClassVar[dict[str, PeerGather]] = {}

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> PeerGather | None:
        """What gathers for this group; None: collectives do."""
        return cls._of.get(group.group_name)

    @classmethod
    def between(cls, group: dist.ProcessGroup, device: torch.device) -> PeerGather | None:
        """One for these ranks; None, on all of them alike, where it does not work between them."""
        ranks = Ranks.of(group)
        if not _near(ranks, device):
            return None
        made = cls(group, device)
        sample = torch.full((SAMPLE,), ranks.rank + 1, dtype=torch.uint8, device=device)
        expected = all_gather(sample[None], group).flatten()
        try:
            (every,) = made.start([sample])
            good = torch.equal(functional.wait_tensor(every), expected)
        except RuntimeError as error:  # such as a container that keeps processes from sharing memory
            log.info("keys and values are sent by NCCL: %s", str(error).splitlines()[0])
            good = False
        if _all_of(good, ranks, device):
            return made
        made.close()
        return None

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self._ranks = group, Ranks.of(group)
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._turn, self._room = 0, 0
        self._under_way: list[list[_Copied]] = [[] for _ in range(BUFFERS)]
        self._own: torch.Tensor | None = None
        self._shared: Any = None
        self._of[group.group_name] = self

    def begin(self) -> None:
        """Take the buffers from the first on: ranks that have failed may have left off at different ones."""
        self._turn = 0
        self._under_way = [[] for _ in range(BUFFERS)]

    def start(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[ranks x first dimension, ...] of each, filled once they are waited for by `wait_tensor`.

        Raises:
            RuntimeError: BUFFERS others have not been waited for.
        """
        if not all(copied.waited for copied in self._under_way[self._turn]):
            raise RuntimeError(f"more than {BUFFERS} gatherings under way: wait for one before the next")
        places, length = [], 0
        for x in tensors:
            places.append(length // x.element_size())
            length += -(-x.nbytes // ALIGNED) * ALIGNED
        shared, first = self._buffer(length), self._turn * self._room
        turn, self._turn = self._turn, (self._turn + 1) % BUFFERS
        rank, size = self._ranks.rank, self._ranks.size

        def part(of: int, x: torch.Tensor, place: int) -> torch.Tensor:
            return shared.get_buffer(of, x.shape, x.dtype, first // x.element_size() + place)

        found = list(zip(tensors, places, strict=True))
        for x, place in found:
            part(rank, x, place).copy_(x)
        every = [x.new_empty(size * x.shape[0], *x.shape[1:]) for x in tensors]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            shared.barrier()
            for step in range(size):  # each from another rank, the own part last
                other = (rank + step + 1) % size
                for whole, (x, place) in zip(every, found, strict=True):
                    whole.chunk(size)[other].copy_(part(other, x, place), non_blocking=True)
            shared.barrier()
            done = self._stream.record_event()
        self._under_way[turn] = [_Copied(done) for _ in every]
        for whole, copied in zip(every, self._under_way[turn], strict=True):
            torch._C._distributed_c10d._register_work(whole, copied)
        return every

    def _buffer(self, length: int) -> Any:
        if length > self._room:
            self.drop()
            # Not used here, and torch would set it up.
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
            make = symmetric._SymmetricMemory.empty_strided_p2p
            self._own = make((BUFFERS * length,), [1], torch.uint8, self._device)
            self._shared, self._room = symmetric.rendezvous(self._own, self.group), length
        return self._shared

    def drop(self) -> None:
        """Give the shared memory back, and with it the graphs that copy from it."""
        if self._own is not None:
            pool_of(self._device).drop()
            torch.cuda.synchronize(self._device)
        self._own = self._shared = None
        self._room = 0

    def close(self) -> None:
        """Collectives gather for this group again. May be called any number of times."""
        self._of.pop(self.group.group_name, None)
        self.drop()


class _Copied(dist.Work):
    """What `wait_tensor` makes the current stream wait for."""

    def __init__(self, done: torch.cuda.Event) -> None:
        super().__init__()
        self._done, self.waited = done, False

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        self._done.wait()
        self.waited = True
        return True


@torch.library.custom_op("multigpu::peer_gather", mutates_args=())
def peer_gather(tensors: list[torch.Tensor], group: str) -> list[torch.Tensor]:
    """PeerGather.start, which compiled code does not look into."""
    return PeerGather._of[group].start(tensors)


@peer_gather.register_fake
def _(tensors: list[torch.Tensor], group: str) -> list[torch.Tensor]:
    size = PeerGather._of[group]._ranks.size
    return [x.new_empty(size * x.shape[0], *x.shape[1:]) for x in tensors]


def _near(ranks: Ranks, device: torch.device) -> bool:
    """Whether all ranks are on GPUs of one machine that can read each other's memory."""
    if device.type != "cuda" or torch.version.hip:
        return False
    mine = os.environ.get(NO_PEERS, "0") == "0"
    told: list[Any] = [None] * ranks.size
    dist.all_gather_object(told, (_machine(), device.index) if mine else None, group=ranks.group)
    others = [one[1] for place, one in enumerate(told) if one is not None and place != ranks.rank]
    reached = (
        other < torch.cuda.device_count() and torch.cuda.can_device_access_peer(device, other)
        for other in others
        if other != device.index
    )
    alike = None not in told and len({machine for machine, _ in told}) == 1 and len(set(told)) == ranks.size
    return _all_of(alike and all(reached), ranks, device)


def _machine() -> str:
    """The same for all processes of a machine, until it starts again."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _all_of(good: bool, ranks: Ranks, device: torch.device) -> bool:
    verdict = torch.tensor(int(good), device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=ranks.group)
    return bool(verdict.item())
