"""The link between the ranks and the speed of their arithmetic, measured at start in under a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

REPEATS = 4
SIZES = {"cuda": (1 << 16, 16 << 20), "cpu": (1 << 12, 2 << 20)}
"""Bytes that a rank sends, by kind of device."""
SIDES = {"cuda": 4096, "cpu": 512}
"""Of the matrices that are multiplied."""
SLOW = 10_000
"""Operations for each byte that a rank receives: models here have about 20 000 and must not wait for half of
it. NVLink has about 5 000, PCIe and host memory 30 000 and more."""

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Link:
    """What the slowest rank reaches."""

    latency: float
    """Seconds of an all-gather of little."""
    bandwidth: float
    """Bytes that a rank receives in a second, of an all-gather over all ranks."""
    pair: float
    """The same of two neighbours that exchange, as all pairs do at once; of 2 ranks it is `bandwidth`."""
    flops: float
    """Floating point operations of a matrix product in a second."""

    @property
    def slow(self) -> bool:
        """Whether more could be computed than a step computes while the bytes of its exchange arrive."""
        return self.flops / self.bandwidth > SLOW

    def told(self) -> dict[str, float]:
        """For /health: seconds, bytes and operations a second."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}

    def __str__(self) -> str:
        pair = "" if self.pair == self.bandwidth else f" ({self.pair / 1e9:.3g} between neighbours)"
        return (
            f"{self.bandwidth / 1e9:.3g} GB/s{pair}, {self.latency * 1e6:.0f} us an exchange; "
            f"{self.flops / 1e12:.3g} TFLOP/s a rank"
        )


def measured_link(device: torch.device, compute: dist.ProcessGroup, voting: dist.ProcessGroup) -> Link | None:
    """The link between all ranks; None for one rank. All must call it, and get the same numbers.

    Args:
        device: this rank's.
        compute: the group that is measured.
        voting: the same ranks over gloo.
    """
    rank, ranks = dist.get_rank(compute), dist.get_world_size(compute)
    if ranks == 1:
        return None
    small, large = SIZES[device.type]

    def gather(size: int) -> float:
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        every = torch.zeros(size * ranks, dtype=torch.uint8, device=device)
        return _seconds(lambda: _gather(every, own, group=compute), device)

    def swap(size: int) -> float:
        own, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        peer = rank ^ 1

        def exchange() -> None:
            ops = [dist.P2POp(dist.isend, own, peer, compute)]
            for work in dist.batch_isend_irecv([*ops, dist.P2POp(dist.irecv, other, peer, compute)]):
                work.wait()

        return _seconds(exchange, device)

    gathers = [gather(small), gather(large)]
    swaps = [swap(small), swap(large)] if ranks % 2 == 0 and ranks > 2 else []
    found = torch.tensor([*gathers, _product(device), *swaps], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=voting)
    shortest, longest, product, *swapped = found.tolist()
    bandwidth = (large - small) * (ranks - 1) / max(longest - shortest, 1e-9)
    pair = (large - small) / max(swapped[1] - swapped[0], 1e-9) if swapped else bandwidth
    return Link(shortest, bandwidth, pair, 2 * SIDES[device.type] ** 3 / product)


def told(link: Link | None) -> dict[str, Any]:
    """The part of a plan that tells of the link."""
    return {} if link is None else {"link": link.told()}


def _product(device: torch.device) -> float:
    """Seconds of a matrix product in the type that pictures are made in."""
    side, dtype = SIDES[device.type], torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    a = torch.randn(side, side, device=device, dtype=dtype)
    return _seconds(lambda: a @ a, device, 20 if device.type == "cuda" else 1)


def _seconds(act: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """The shortest of some runs; the first, in which libraries set themselves up, does not count."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / times

    once()
    return min(once() for _ in range(REPEATS))
