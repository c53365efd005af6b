"""A rank's place among the others, and its process groups.

Three groups over all ranks, each with one purpose. **control** and **voting** are gloo on every machine: idle
ranks wait for a message on the control group, on the CPU, without a spinning kernel and without limit; while
a message is executed they vote on the voting group, in bounded time. **compute** is NCCL on GPUs or gloo on
CPUs, in bounded time too, and only the parallel methods use it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shared.launch.errors import UsageError
from shared.ranks.link import Link
from shared.ranks.rendezvous import Rendezvous

log = logging.getLogger("host")

FOREVER = timedelta(days=365)
VOTE_GRACE = 5.0  # seconds


@dataclass(frozen=True)
class World:
    """This rank's place among the others.

    `init_world` builds it. `device` is the device that this rank computes on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup
    voting: dist.ProcessGroup
    compute: dist.ProcessGroup
    link: Link | None = None
    """Between all ranks, once it is measured."""

    @property
    def backend(self) -> str:
        """nccl or gloo, what the compute group runs on."""
        return dist.get_backend(self.compute)


def init_world(
    device: str,
    collective_timeout: float,
    watch: Callable[[Callable[[], str | None]], None] = lambda _: None,
    when_stopped: Callable[[Callable[[], None]], None] = lambda _: None,
) -> World:
    """Join the process group that torchrun's environment describes; without torchrun, a group of one.

    Args:
        device: auto, cuda or cpu. auto takes CUDA when every rank of every machine has a GPU of its own.
        collective_timeout: seconds that the compute group waits for a rank.
        watch: is given a function that returns why the ranks cannot go on, or None; it is polled.
        when_stopped: is given a function that stops other machines, to be called when this rank is stopped.

    Raises:
        UsageError: cuda was asked for and a rank has no GPU of its own.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not dist.is_initialized():
        if "MASTER_ADDR" in os.environ:
            meeting = Rendezvous(rank, size, collective_timeout)
            watch(meeting.fault)
            when_stopped(meeting.stop_others)
            within = timedelta(seconds=meeting.timeout)
            dist.init_process_group("gloo", store=meeting.join(), rank=rank, world_size=size, timeout=within)
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    have: list[Any] = [None] * size
    dist.all_gather_object(have, gpus >= local_size)
    if device == "cuda" and not all(have):
        lacking = [r for r, ok in enumerate(have) if not ok]
        raise UsageError(
            f"--device: cuda needs a GPU for every rank; rank {lacking[0]} sees {gpus} GPUs for "
            f"{local_size} ranks on its machine"
        )
    use_cuda = device != "cpu" and all(have)
    if use_cuda:
        torch.cuda.set_device(local_rank)
        where = torch.device("cuda", local_rank)
    else:
        where = torch.device("cpu")
    groups = make_groups(collective_timeout, "nccl" if use_cuda else "gloo")
    if device == "auto" and not use_cuda and rank == 0:
        log.info("computing on the CPU (gloo): not every rank has a GPU of its own")
    return World(rank, size, local_rank, where, *groups)


def make_groups(
    collective_timeout: float, backend: str
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup]:
    """The control, voting and compute groups over all ranks; `backend` is the compute group's."""
    control = dist.new_group(backend="gloo", timeout=FOREVER)
    # A vote outlasts a collective, so that a rank in a collective that fails still finds the others voting.
    voting = dist.new_group(backend="gloo", timeout=timedelta(seconds=collective_timeout + VOTE_GRACE))
    compute = dist.new_group(backend=backend, timeout=timedelta(seconds=collective_timeout))
    return control, voting, compute


@functools.cache
def weights_group(world: World, replicas: int, collective_timeout: float) -> dist.ProcessGroup:
    """The ranks of this rank's replica, for messages that run beside those of the compute group.

    Made once; all ranks must ask at the same time.
    """
    size, short = world.size // replicas, timedelta(seconds=collective_timeout)
    groups = [
        dist.new_group(list(range(r * size, (r + 1) * size)), backend=world.backend, timeout=short)
        for r in range(replicas)
    ]
    return groups[world.rank // size]


@functools.cache
def branch_groups(
    world: World, collective_timeout: float
) -> tuple[dist.ProcessGroup, dist.ProcessGroup, int]:
    """The ranks in two halves, one for each guidance branch.

    Returns:
        the group of this rank's half, the group of the two ranks in the same place of both halves (branch 0
        first), and this rank's branch. Made once; all ranks must ask at the same time.
    """
    half = world.size // 2
    short = timedelta(seconds=collective_timeout)

    def group(ranks: list[int]) -> dist.ProcessGroup:
        return dist.new_group(ranks, backend=world.backend, timeout=short)

    halves = [group(list(range(b * half, (b + 1) * half))) for b in (0, 1)]
    pairs = [group([place, place + half]) for place in range(half)]
    branch, place = divmod(world.rank, half)
    return halves[branch], pairs[place], branch
