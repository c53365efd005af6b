"""What the ranks of a group send each other: all at once, or in pairs and joined at the end of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# torch 2.13 gave it this name and warns, on every rank, at the one that older releases know.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pretended(dist.ProcessGroup):
    """So many ranks that are not there, and the last of them, which gets the most where shares are unequal:
    to count what it would need of memory. Nothing travels; what would arrive is of any content."""

    def __init__(self, size: int) -> None:
        super().__init__(size - 1, size)  # type: ignore[call-arg]


class Ranks(NamedTuple):
    """Ranks that share something: their group, this rank's place in it, their number."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a group; None for all, and for only this rank without torch.distributed."""
        if isinstance(group, Pretended):
            return cls(group, group.rank(), group.size())
        if not dist.is_initialized():
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def to_global(self, rank: int) -> int:
        """What torch.distributed calls a rank of the group."""
        if self.group is None or isinstance(self.group, Pretended):
            return rank
        return dist.get_global_rank(self.group, rank)


def all_gather(own: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The tensors of all ranks, of one shape, joined along the first dimension in rank order."""
    own = own.contiguous()
    every = own.new_empty(Ranks.of(group).size * own.shape[0], *own.shape[1:])
    if not isinstance(group, Pretended):
        _all_gather(every, own, group=group)
    return every


def start_all_gather(every: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> Any:
    """Start to fill `every` with the ranks' `own`, of one length, in rank order.

    Returns:
        what must be waited for; on CUDA, `wait` makes the current stream wait.
    """
    return _all_gather(every, own, group=group, async_op=True)


def broadcast(buffer: torch.Tensor, source: int, ranks: Ranks) -> None:
    """Fill `buffer`, whose memory has no gaps, with that of the rank `source`."""
    flat = buffer.as_strided((buffer.numel(),), (1,))  # NCCL takes no other order
    dist.broadcast(flat, ranks.to_global(source), group=ranks.group)


class Exchange:
    """The transfers of one step, between pairs of ranks, each tensor on its own.

    Early, each transfer starts as soon as it is asked for. Otherwise all are launched together at the end of
    the step, as one group: on NCCL a receive that waits for its sender would hold multiprocessors that the
    stage needs, and what is launched as a group cannot deadlock in any order.

    Args:
        group: the ranks; None for all. Peers are ranks within it.
        early: whether to start transfers at once; right for gloo, whose transfers run in the background.
    """

    def __init__(self, group: dist.ProcessGroup | None, early: bool) -> None:
        self.ranks, self.early = Ranks.of(group), early
        self._later: list[tuple[int, int, Any, torch.Tensor]] = []
        self._pending: list[tuple[Any, torch.Tensor | None]] = []

    def send(self, tensor: torch.Tensor, peer: int, tag: int, stride: Sequence[int]) -> None:
        """Send ``tensor`` in the memory layout ``stride``, which has no gaps and which the receiver uses too.

        It must not change until ``finish``. A pair of ranks uses each tag once a step and direction.
        """
        if tuple(tensor.stride()) != tuple(stride):
            dense = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
            tensor = dense.copy_(tensor)
        self._add(dist.isend, tensor, peer, tag)

    def receive(self, buffer: torch.Tensor, peer: int, tag: int) -> None:
        """Receive into ``buffer``, whose memory has no gaps; it is filled after ``finish``."""
        self._add(dist.irecv, buffer, peer, tag)

    def receive_now(self, buffer: torch.Tensor, peer: int, tag: int) -> None:
        """Receive into ``buffer`` and wait for it (on CUDA: make the current stream wait)."""
        flat = buffer.as_strided((buffer.numel(),), (1,))
        work = dist.irecv(flat, self.ranks.to_global(peer), group=self.ranks.group, tag=tag)
        assert work is not None  # only for ranks outside of the group
        work.wait()

    def finish(self) -> None:
        """Wait until all transfers are done (on CUDA: make the current stream wait)."""
        if self._later:
            # Sorted by tag, so that both sides of a pair name their transfers in the same order.
            ops = [
                dist.P2POp(op, flat, self.ranks.to_global(peer), group=self.ranks.group, tag=tag)
                for tag, peer, op, flat in sorted(self._later, key=lambda entry: entry[:2])
            ]
            self._pending += [(work, None) for work in dist.batch_isend_irecv(ops)]
        for work, _ in self._pending:
            work.wait()
        self._later, self._pending = [], []

    def _add(self, op: Any, tensor: torch.Tensor, peer: int, tag: int) -> None:
        flat = tensor.as_strided((tensor.numel(),), (1,))
        if self.early:
            # The tensor is kept with its transfer: gloo does not hold on to it.
            self._pending.append(
                (op(flat, self.ranks.to_global(peer), group=self.ranks.group, tag=tag), flat)
            )
        else:
            self._later.append((tag, peer, op, flat))
